"""What all parts of the GPU check share: where its data are, and how large it is."""

from dataclasses import dataclass
from pathlib import Path

from hvp_ray.config import RendererName


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Settings of one check."""

    data: Path | None
    """Parquet file with photographs. None: made-up ones."""
    folder: Path
    """For files that a part makes."""
    rehearse: bool
    """On a CPU, tiny: shows that the program runs, and measures nothing."""
    picture: Path
    """Where the timeline is drawn."""

    @property
    def renderer(self) -> RendererName:
        """The renderer that is checked."""
        return "dali-cpu" if self.rehearse else "dali-gpu"

    @property
    def device(self) -> str:
        """Where torch works."""
        return "cpu" if self.rehearse else "cuda"

    def amount(self, real: int, rehearsal: int) -> int:
        """Return how many of something are done."""
        return rehearsal if self.rehearse else real
