"""The GPU of a process, and the time until a trainer notices a stop. Tests that need a GPU are in tests/gpu."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hvp_ray.config import config_to_dict
from hvp_ray.distributed.world import World
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs import recorder
from hvp_ray.runs.opened_rank import RankServices
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.progress import Progress
from hvp_ray.runs.rank import train_rank
from hvp_ray.stream.batches import BatchStream, InlineBatches, RequestOf
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.render_batch import open_render_context
from tests.helpers import tiny_config


class _ReachedError(Exception):
    """The process group would be created now."""


def test_process_of_torchrun_takes_its_gpu_before_it_joins_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself is replaced, because this machine has no GPU."""
    taken: list[torch.device] = []

    def join(*_: object, **__: object) -> None:
        raise _ReachedError

    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", join)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    config = tiny_config(str(tmp_path), cluster={"num_trainers": 2, "device": "cuda"})
    with pytest.raises(_ReachedError):
        pretrain_in_process(config)
    assert taken == [torch.device("cuda", 1)]


def steps_until_the_stop_of_the_third_report(output: Path, device: torch.device) -> list[int]:
    """Train with a record at step 1 only; request a stop in the answer to the third report."""
    config = tiny_config(
        str(output), run={"name": "run"}, training={"num_steps": 40}, tracking={"log_every_steps": 1000}
    )
    context = open_render_context(config_to_dict(config), "cpu")
    reported: list[int] = []

    def report(progress: Progress) -> bool:
        reported.append(progress.steps_done)
        assert progress.loss < 1.0
        return len(reported) >= 3

    def open_stream(request_of: RequestOf, first_step: int, _end_step: int) -> BatchStream:
        return InlineBatches(context, request_of, first_step=first_step, copy_to_device=CopyToDevice(device))

    services = RankServices(
        open_stream=open_stream, report_progress=report, submit_knn=lambda _: Future(), cluster_facts=dict
    )
    resolved = ResolvedRun(renderer="cpu", device="cuda" if device.type == "cuda" else "cpu")
    summary = train_rank(prepare_run(config, resolved), World(), device, services)
    assert summary is None
    return [int(path.name.removeprefix("step-")) for path in sorted((output / "run" / "checkpoints").iterdir())]


def test_stop_is_noticed_between_two_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_PROGRESS_SECONDS", 0.0)
    steps = steps_until_the_stop_of_the_third_report(tmp_path, torch.device("cpu"))
    assert steps[-1] == 4  # requested after step 3: step 4 sends it to all ranks and ends with a checkpoint
