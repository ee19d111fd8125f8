"""TensorBoard as a tracker of a run: event files in the run's folder, with metrics, final values and figures.

Every attempt writes the folder anew from the log, so it holds each step once, whatever a killed process left. One event has
all values of a record. TensorBoard keeps values as float32.
"""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hvp_ray.extras import require_extra
from hvp_ray.tracking.feed import Ending, Feed, Record

FOLDER = "tensorboard"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorboardRun:
    """The description of a run for TensorBoard, which needs none."""

    place: ClassVar[tuple[str, ...]] = ()

    @property
    def title(self) -> str:
        """Name of the tracker, for messages."""
        return "TensorBoard's folder"


def check_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        ConfigError: it is not; the message has the command that installs it.
    """
    _require("tensorboard")


def _require(module: str) -> Any:
    return require_extra(module, extra="tensorboard", purpose="tracking.loggers=tensorboard")


class TensorboardFeed(Feed):
    """Writes the event files of one run."""

    state_file = "tensorboard.json"

    def connect(self) -> dict[str, int]:
        """Begin an event file in an empty folder."""
        folder = self._run_dir / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._events = _require("tensorboard.compat.proto.event_pb2")
        self._summaries = _require("tensorboard.compat.proto.summary_pb2")
        records = _require("tensorboard.summary.writer.record_writer")
        # A new name in every attempt: a TensorBoard that reads the folder takes the file for a new one.
        self._writer = records.RecordWriter((folder / f"events.out.tfevents.{time.time_ns()}").open("wb"))
        self._write(self._events.Event(wall_time=time.time(), file_version="brain.Event:2"))
        return {}

    def send(self, kind: str, records: list[Record]) -> None:
        """Append records to the event file."""
        for record in records:
            self._write_values(record["metrics"], step=record["step"], wall_time=record["time"])
        self._writer.flush()

    def end(self, ending: Ending) -> None:
        """Write final values and figures at step 0, and close the file."""
        self._write_values(ending.values, step=0, wall_time=ending.time)
        figures = [path for path in ending.artifacts if path.suffix == ".png"]
        self._write_summary(map(self._image, figures), step=0, wall_time=ending.time)
        self._writer.close()

    def _write_values(self, values: dict[str, float], *, step: int, wall_time: float) -> None:
        scalars = (self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items())
        self._write_summary(scalars, step=step, wall_time=wall_time)

    def _write_summary(self, values: Iterable[Any], *, step: int, wall_time: float) -> None:
        summary = self._summaries.Summary(value=values)
        if summary.value:
            self._write(self._events.Event(wall_time=wall_time, step=step, summary=summary))

    def _image(self, path: Path) -> Any:
        image = self._summaries.Summary.Image(encoded_image_string=path.read_bytes())
        return self._summaries.Summary.Value(tag=f"figures/{path.stem}", image=image)

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
