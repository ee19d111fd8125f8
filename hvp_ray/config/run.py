"""Name, place and seed of a run."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hvp_ray.config.checks import Checked, PathOrUri, Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(Checked):
    """Name, place and seed of a run."""

    path: ClassVar[str] = "run"

    name: str | None = None
    """Name of the run's folder under `run.output`; the name of an existing run resumes it. None: a new unique name."""

    output: PathOrUri | None = None
    """Folder of all runs and of the MLflow store, visible to all trainers: a path, or a URI (s3://bucket/prefix, gs://,
    abfs://, hdfs://, file:///; other S3 servers: s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http). Every node
    reads credentials from its environment, never from the URI. None: `runs/` in the working folder, or `hvp_runs/` in the
    home folder if `ray job submit --working-dir` made the working folder."""

    seed: Annotated[int, Range(least=0, most=2**64 - 1)] = 0
    """Seed of all random numbers: order, views, initial weights."""

    resume: bool = True
    """Continue an existing run of this name. False: an existing run of this name is an error."""

    accept_versions: bool = False
    """Resume the run although versions of libraries differ from its own. The summary says from which step they do; equal bits
    are no longer promised from there. Give it once: later resumes with these versions are allowed."""

    def check_together(self, prefix: str) -> None:
        """Check that the name can be a folder's."""
        if self.name is not None:
            allowed = "letters, digits, '.', '_' and '-', not beginning with '.' or '-', at most 120 characters"
            characters_fit = all(c.isascii() and (c.isalnum() or c in "._-") for c in self.name)
            starts_well = self.name[:1] not in ("", ".", "-")
            require(characters_fit and starts_well and len(self.name) <= 120, f"{prefix}name", self.name, allowed)
