"""A feed sends the whole log before it ends, whatever is written while it sends."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hvp_ray.tracking.feed import Ending, Feed, Record
from hvp_ray.tracking.run_log import METRICS, RunLog


@dataclass(frozen=True)
class _Place:
    place: ClassVar[tuple[str, ...]] = ()
    title: str = "a tracker"


class _Held(Feed):
    """Receives records, and holds the first call until it is told to continue."""

    state_file = "held.json"

    def __init__(self, run_dir: Path) -> None:
        self.steps: list[int] = []
        self.steps_at_end: list[int] | None = None
        self.receives, self.may_continue = threading.Event(), threading.Event()
        super().__init__(_Place(), run_dir)

    def connect(self) -> dict[str, int]:
        return {}

    def send(self, kind: str, records: list[Record]) -> None:
        self.receives.set()
        self.may_continue.wait()
        self.steps += [record["step"] for record in records]

    def end(self, ending: Ending) -> None:
        self.steps_at_end = list(self.steps)


def test_records_written_while_earlier_ones_are_sent_arrive_before_the_end(tmp_path: Path) -> None:
    log = RunLog(tmp_path)

    def write(*steps: int) -> None:
        for step in steps:
            log.write(METRICS, {"step": step, "time": 1e9, "metrics": {"train/loss": 1.0}})

    write(1, 2, 3)
    feed = _Held(tmp_path)
    feed.receives.wait()
    write(4, 5)
    feed.begin_end(status="FINISHED", artifacts=[], values={}, timeout_seconds=600.0)
    feed.may_continue.set()
    assert feed.wait_for_end()
    assert feed.steps_at_end == [1, 2, 3, 4, 5]
