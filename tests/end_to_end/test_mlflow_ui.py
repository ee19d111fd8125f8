"""View MLflow in headless Chromium as a user does: the link of a comparison, and two runs selected and compared.

HVP_RAY_SCREENSHOTS=folder keeps the pictures. HVP_RAY_MLFLOW_STORE=file.db shows your own runs instead of tiny ones.
"""

import asyncio
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.tracking.mlflow import quiet_mlflow
from hvp_ray.tracking.mlflow_report import PublishedReport, publish
from tests.end_to_end.browser import CHROMIUM, Browser
from tests.helpers import tiny_config
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

CLOSE_ASSISTANT = (
    "document.querySelectorAll('[data-component-id=\"mlflow.assistant.chat_panel.close\"]').forEach(b => b.click())"
)
SELECT_TWO_RUNS = (
    "[...document.querySelectorAll('input[aria-label*=\"toggle row selection\"]')].slice(0, 2).forEach(b => b.click())"
)
COMPARE_BUTTON = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() === 'Compare')"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a store with two arms and a published report; return its path."""
    if "HVP_RAY_MLFLOW_STORE" in os.environ:
        return str(Path(os.environ["HVP_RAY_MLFLOW_STORE"]).absolute())
    output = tmp_path_factory.mktemp("runs")
    for arm, rule in (("vanilla", "first"), ("hardest", "hardest")):
        tracking = {"uri": "auto", "comparison": "demo", "arm": arm, "knn_every_epochs": 1}
        pretrain_in_process(
            tiny_config(str(output), run={"name": f"demo-{arm}-s0"}, selection={"rule": rule}, tracking=tracking)
        )
    uri = f"sqlite:///{output}/mlflow.db"
    report = PublishedReport(
        uri=uri,
        experiment="hvp_ray",
        artifact_root=None,
        run_name="demo-report",
        comparison="demo",
        text="what was found",
        metrics={"comparison/hardest_minus_vanilla_points": 1.5},
        artifacts=(),
        figures=(),
    )
    assert publish(report) is not None
    return f"{output}/mlflow.db"


@pytest.fixture(scope="module")
def server(store: str) -> Iterator[str]:
    """Run `make ui` on this store; return its address."""
    quiet_mlflow()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "make",
        "--old-file=setup",
        "ui",
        f"UI_STORE={store}",
        f"UI_PORT={port}",
        f"BIN={Path(sys.executable).parent}",
    ]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
        except OSError:
            return False
        return True

    wait_until(is_up, "the MLflow server", pause=0.5)
    yield address
    os.killpg(process.pid, 15)
    process.wait(timeout=30)


def _keep(name: str) -> Path | None:
    folder = os.environ.get("HVP_RAY_SCREENSHOTS")
    return None if folder is None else Path(folder) / name


def _comparison(store: str) -> str:
    import mlflow

    experiment = mlflow.MlflowClient(f"sqlite:///{store}").get_experiment_by_name("hvp_ray")
    assert experiment is not None
    prefix = "mlflow.sharedViewState."
    return next(tag.removeprefix(prefix) for tag in experiment.tags if tag.startswith(prefix))


def test_link_of_a_comparison_shows_one_mean_curve_for_each_arm(server: str, store: str) -> None:
    async def look() -> None:
        link = f"runs?viewStateShareKey={_comparison(store)}&compareRunsMode=CHART&workflowType=machine_learning"
        async with Browser(height=1500) as page:
            await page.open(f"{server}/#/experiments/1/{link}")
            await page.wait_until("document.body.innerText.includes('Group by: trained_views')")
            await page.wait_until("document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length >= 4")
            await page.evaluate(CLOSE_ASSISTANT)
            for wanted in ("Group: hardest", "Group: vanilla", "hardest (eval/knn_top1)"):
                await page.wait_until(f"document.body.innerText.includes('{wanted}')")
            assert "Group: report" not in await page.text()
            if (kept := _keep("mlflow_compare.png")) is not None:
                await page.picture(kept)

    asyncio.run(look())


def test_two_runs_can_be_selected_and_compared(server: str) -> None:
    async def look() -> None:
        async with Browser() as page:
            await page.open(f"{server}/#/experiments/1/runs?compareRunsMode=TABLE&workflowType=machine_learning")
            await page.wait_until(
                "document.querySelectorAll('input[aria-label*=\"toggle row selection\"]').length >= 2"
            )
            await page.evaluate(CLOSE_ASSISTANT)
            await page.evaluate(SELECT_TWO_RUNS)
            await page.wait_until(COMPARE_BUTTON)
            await page.evaluate(f"{COMPARE_BUTTON}.click()")
            await page.wait_until("location.hash.includes('compare-runs')")
            await page.wait_until("document.body.innerText.includes('Comparing 2 Runs')")
            text = await page.text()
            for wanted in ("selection.rule", "Show diff only"):
                assert wanted in text
            if (kept := _keep("mlflow_two_runs.png")) is not None:
                await page.picture(kept)

    asyncio.run(look())
