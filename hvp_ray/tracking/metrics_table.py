"""The table of metrics: every recorded, summarised or published metric with its meaning, from `metrics.toml`."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric, or a value of the summary."""

    meaning: str
    kind: Kind
    unit: str = ""
    """Empty: it has none."""

    healthy: str = ""
    """Values to expect; empty: any."""

    otherwise: str = ""
    """What to check or change if a value is not healthy."""


def _metric(name: str, *, meaning: str, kind: Kind | None = None, **texts: str) -> Metric:
    return Metric(meaning=meaning, kind=kind or ("counter" if name.endswith("_total") else "gauge"), **texts)


_TABLE = {
    section: {name: _metric(name, **texts) for name, texts in metrics.items()}
    for section, metrics in tomllib.loads(Path(__file__).with_name("metrics.toml").read_text()).items()
}

RECORDED = _TABLE["recorded"]
SUMMARY = _TABLE["summary"]
TRAINER_METRICS = _TABLE["trainers"]
WORKER_METRICS = _TABLE["view_workers"]
