"""Say at the end of a session why a process of pytest-xdist died: its traceback, and the last lines of its Ray driver's log.

pytest captures what a process prints, so the reason of a crash would be lost with it.
"""

import faulthandler
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

_LINES = 40
_folder: list[Path] = []
"""Of the controlling process, from the first process of pytest-xdist on."""
_crashed: list[str] = []


@pytest.hookimpl(trylast=True)  # after pytest's own use of faulthandler
def pytest_configure(config: pytest.Config) -> None:
    """In a process of pytest-xdist: write the traceback of a crash into a file."""
    process = getattr(config, "workerinput", {})
    if "crash_folder" in process:
        file = (Path(process["crash_folder"]) / process["workerid"]).open("w")
        print(os.getpid(), file=file, flush=True)
        faulthandler.enable(file=file)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process where its traceback goes."""
    if not _folder:
        _folder.append(Path(tempfile.mkdtemp(prefix="hvp_ray-tests-")))
    node.workerinput["crash_folder"] = str(_folder[0])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Remember the processes that did not end by themselves."""
    if error and error != "keyboard-interrupt":
        _crashed.append(node.gateway.id)


def pytest_unconfigure() -> None:
    """Remove the files."""
    while _folder:
        shutil.rmtree(_folder.pop(), ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the dead have left."""
    for name in _crashed:
        left = _folder[0] / name
        pid, *traceback = left.read_text(errors="replace").splitlines() if left.exists() else ["unknown"]
        terminalreporter.section(f"{name} crashed (process {pid})")
        terminalreporter.write_line("\n".join(traceback[:_LINES]) or "It left no traceback.")
        for log in Path(tempfile.gettempdir()).glob(f"ray/session_2*/logs/python-core-driver-*_{pid}.log"):
            terminalreporter.section(str(log))
            terminalreporter.write_line("\n".join(log.read_text(errors="replace").splitlines()[-_LINES:]))
