"""Backfills records that trackers missed while unreachable, when an ended run is started again by its name."""

from pathlib import Path
from typing import Any

from hvp_ray.config import RunConfig
from hvp_ray.files import is_uri, place_in
from hvp_ray.runs.location import output_location
from hvp_ray.runs.storage import RunStorage
from hvp_ray.tracking.trackers import catch_up, lacks_records


def send_missing_records(config: RunConfig) -> dict[str, Any] | None:
    """Send what trackers lack of the ended run that `config` names.

    Returns:
        The summary with the trackers' ids if something was missing and has arrived. None: nothing was missing, or a tracker
        is still unreachable, which is logged as a warning.
    """
    assert config.run.name is not None
    place = place_in(output_location(config), config.run.name)
    with RunStorage(Path(place), place if is_uri(place) else None, rank=0) as storage:
        if not lacks_records(storage.folder):
            return None
        summary = catch_up(storage.folder)
        storage.push()
    return summary
