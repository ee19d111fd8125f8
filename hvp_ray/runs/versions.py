"""Other versions of libraries than a run was started with: whether it may be resumed, and from which step they were used.

A run keeps the identity that it was started with. Its config.json holds which other versions may resume it
(`accepted_versions`). Each attempt records the versions that it runs with, so the log says from which step they were used.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvp_ray.errors import CheckpointError, first_line
from hvp_ray.files import place_in, read_file, write_file
from hvp_ray.identity import ACCEPTED_VERSIONS, VERSIONS, Identity
from hvp_ray.runs.render_sample import RenderedSample

PIXEL_LIBRARIES = frozenset({"pillow", "pillow-heif", "simplejpeg", "opencv-python-headless"})
"""Libraries that change nothing but the pixels of views, if they change anything."""

_ORIGINAL: dict[str, Any] = {"versions": {}, "pixels_equal": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherVersions:
    """Versions of libraries that differ from those of a run's identity."""

    versions: Mapping[str, str | None]
    """Library -> installed version. Empty: none differs."""
    pixels_equal: bool | None
    """Whether the sample of views has the recorded pixels. None: not compared."""
    finding: str
    """What the comparison of pixels found, as a sentence. Empty: these versions were accepted before."""
    is_allowed: bool
    """Whether the run may be resumed with them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for config.json and for the record of an attempt."""
        return {"versions": dict(self.versions), "pixels_equal": self.pixels_equal}


def check_versions(
    record: Mapping[str, Any], identity: Identity, *, accepts: bool, render: Callable[[], RenderedSample]
) -> OtherVersions:
    """Decide whether a run may be resumed with the installed versions. It may if one of these is true.

    - They are the recorded ones, or were accepted before.
    - They differ from such versions only in `PIXEL_LIBRARIES`, and the sample of views has the recorded pixels.
    - The user accepts them.

    Args:
        record: the run's config.json, which differs from `identity` in nothing but versions.
        identity: of the run as it is installed here.
        accepts: the setting `run.accept_versions`.
        render: renders the sample.
    """
    before, now = record["identity"], identity.weights
    versions = {n: now.get(n) for n in VERSIONS if (n in before, before.get(n)) != (n in now, now.get(n))}
    known = [_ORIGINAL, *record.get(ACCEPTED_VERSIONS, [])]
    for entry in known:
        if entry["versions"] == versions:
            return OtherVersions(versions=versions, pixels_equal=entry["pixels_equal"], finding="", is_allowed=True)
    pixels_equal, finding = _compare(record.get("rendering"), render)
    changes = [{name for name, _ in versions.items() ^ entry["versions"].items()} for entry in known]
    is_harmless = pixels_equal is True and any(names <= PIXEL_LIBRARIES for names in changes)
    return OtherVersions(
        versions=versions, pixels_equal=pixels_equal, finding=finding, is_allowed=accepts or is_harmless
    )


def _compare(recorded: Mapping[str, Any] | None, render: Callable[[], RenderedSample]) -> tuple[bool | None, str]:
    if recorded is None:
        return None, "Pixels were not compared: the run was started by a version of hvp_ray that recorded no sample."
    if recorded.get("sha256") is None:
        return None, f"Pixels were not compared: the run has no sample of them ({recorded.get('reason')})."
    sample = render()
    if sample.sha256 is None:
        return None, f"Pixels were not compared: the sample cannot be rendered ({sample.reason})."
    what = f"The views of {sample.num_images} training images were rendered again:"
    if sample.sha256 == recorded["sha256"]:
        return True, f"{what} no pixel changed."
    return False, f"{what} pixels changed."


def record_versions(run: str, others: OtherVersions | None) -> None:
    """Add versions that a run is resumed with to its config.json, once this process owns the run.

    Args:
        run: the run's folder, path or URI.
        others: the versions.

    Raises:
        CheckpointError: config.json cannot be read or written.
    """
    if others is None or not others.finding:
        return
    path = place_in(run, "config.json")
    try:
        record = json.loads(read_file(path) or b"")
        record[ACCEPTED_VERSIONS] = [*record.get(ACCEPTED_VERSIONS, []), others.to_dict()]
        write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read and written: {first_line(error)}. Repair the storage, then start the run again with "
            f"its name"
        ) from error


def with_recorded_versions(identity: Identity, record: Mapping[str, Any]) -> Identity:
    """Return the identity that the recorded run was started with; it differs from `identity` in nothing but versions."""
    others = {name: value for name, value in identity.weights.items() if name not in VERSIONS}
    recorded = {name: value for name, value in record["identity"].items() if name in VERSIONS}
    return Identity(weights=others | recorded, evaluation=identity.evaluation)


def versions_by_step(attempts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the changes of versions in a run's weights, in step order; None: it had one set of versions.

    Args:
        attempts: the records of all attempts, in order.

    Returns:
        Step from which on they were used, and `OtherVersions.to_dict`. Empty versions: those of the identity again. Steps
        that a later attempt trained again do not count.
    """
    changes: list[dict[str, Any]] = []
    for attempt in attempts:
        changes = [change for change in changes if change["step"] < attempt["step"]]
        used = attempt.get("other_versions") or _ORIGINAL
        if used["versions"] != (changes[-1]["versions"] if changes else {}):
            changes.append({"step": attempt["step"]} | used)
    return changes or None


def describe_versions(changes: Sequence[Mapping[str, Any]] | None) -> str | None:
    """Return what `versions_by_step` found, in a sentence or two; None: the run had one set of versions."""
    if not changes:
        return None

    def names(versions: Mapping[str, str | None]) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items()) or "those of its start again"

    used = "; ".join(f"from step {change['step']}: {names(change['versions'])}" for change in changes)
    text = f"Other versions of libraries than at the start were used {used}."
    for change in changes:
        if change["versions"] and not (change["pixels_equal"] is True and change["versions"].keys() <= PIXEL_LIBRARIES):
            return f"{text} Equal bits are no longer promised from step {change['step']}."
    return f"{text} No pixel of a sample of views changed; equal bits are promised as far as this sample shows."
