"""Share fixtures among all tests, check shapes and types of `hvp_ray` at run time, and distribute tests over processes."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # one private Ray on loopback for the whole session
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pkgutil

from jaxtyping import install_import_hook

import hvp_ray

# DALI and torch.compile read the source of functions, which the checker would replace.
_UNCHECKED = ("render_dali", "color_batch")
_CHECKED = [m.name for m in pkgutil.walk_packages(hvp_ray.__path__, "hvp_ray.") if not m.name.endswith(_UNCHECKED)]
_hook = install_import_hook(
    [name for name in _CHECKED if name.count(".") > 1 or "views" not in name], "beartype.beartype"
)

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

pytest_plugins = ("tests.crash_report",)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process of pytest-xdist, and all tests that may use Ray to a single one.

    So a session has one Ray, and module-scoped runs are made once.
    """
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(("tests/ray/", "tests/end_to_end/")) else super()._split_scope(nodeid)

    return OneRay(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the session's Ray."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the session's Ray before a test that starts none; those come last in a process."""
    ray = sys.modules.get("ray")
    if item.nodeid.startswith("tests/unit/") and ray is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> None:
    """Seed torch by the test's name, and use one thread, so that bits can be compared."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return a NumPy generator seeded by the test's name."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Start the one local Ray of this session; a test that needs a Ray of its own says why."""
    import ray

    ray.init(address="local", num_cpus=8, object_store_memory=400 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Return the folder with cifar10-train.parquet and cifar10-test.parquet."""
    if not (SHARED_DATA / "cifar10-train.parquet").exists():
        pytest.skip("no CIFAR-10 beside the checkout (../shared/data/cifar10-train.parquet)")
    return SHARED_DATA
