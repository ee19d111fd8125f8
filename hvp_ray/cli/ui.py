"""Open MLflow's page on the curves of all runs.

hvp-ray ui [--store FILE] [--port N]
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hvp_ray.cli.command_line import exit_status, parse_options, say
from hvp_ray.config.checks import Checked, Range
from hvp_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of the page."""

    store: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("runs/mlflow.db")
    """MLflow's SQLite file: `mlflow.db` in the folder of the runs."""

    port: Annotated[int, Range(least=1, most=65_535)] = 5000
    """Port on 127.0.0.1."""


def serve(options: Options) -> None:
    """Replace this process by MLflow's server.

    Raises:
        ConfigError: there is no such store.
    """
    from hvp_ray.tracking.mlflow_store import store_uri

    store = options.store.expanduser().absolute()
    if not store.is_file():
        raise ConfigError(
            f"no runs in {options.store} yet: start with hvp-ray pretrain, or name another store: --store path/to/mlflow.db"
        )
    page = "experiments/1/runs?compareRunsMode=CHART&workflowType=machine_learning"
    say(f"open http://127.0.0.1:{options.port}/#/{page}")
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    words = ["--port", str(options.port), "--backend-store-uri", store_uri(store)]
    os.execve(sys.executable, [*server, *words], {**os.environ, **settings})


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C; return the exit status."""
    return exit_status(
        lambda: serve(parse_options(Options, arguments, program="hvp-ray ui", description=__doc__ or ""))
    )
