"""What a benchmark leaves behind: one JSON object a line, each written as soon as it is measured."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

Result = dict[str, Any]
"""One measured number: name, value, unit, and context."""
Results = Iterator[Result]


class Keep(Protocol):
    """Writes results."""

    def __call__(self, results: Iterable[Result], /) -> None: ...


@contextmanager
def open_results(path: Path | None, context: Result) -> Iterator[Keep]:
    """Open a file for results, to each of which `context` is added. None: they are kept nowhere."""
    if path is None:
        yield lambda _: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def keep(results: Iterable[Result]) -> None:
            file.write("".join(json.dumps(result | context) + "\n" for result in results))
            file.flush()

        yield keep


def describe_machine(*packages: str) -> Result:
    """Return date, CPU, load of the last minute (other work distorts even CPU time), Python and versions of packages."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return {"date": time.strftime("%Y-%m-%d")} | machine | {"python": platform.python_version()} | found


def cpu_model() -> str:
    """Return the name of the CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
