"""A clock for the parts of a training step: what `Trainee.stage` enters, and the networks' share of a part.

On a CPU it is the process's CPU time, on a GPU the device's own events, read when everything is done.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from hvp_ray.methods.method import Method
from hvp_ray.training.stages import Stage

NETWORKS_OF = {"score": "score_networks", "forward": "forward_networks"}
"""Parts whose time is split into that of modules (encoder, heads) and the rest (scores, loss)."""


class StepClock:
    """Collects the seconds of each part of each step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: dict[str, list[tuple[Any, Any]]] = {}
        self._steps: list[dict[str, float]] = []
        self._stage: Stage | None = None
        self._depth = 0
        self._entered: Any = None

    @contextlib.contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        """Measure a part; see `Trainee.stage`."""
        begin = self._now()
        self._stage = stage
        try:
            yield
        finally:
            self._stage = None
            self._marks.setdefault(stage, []).append((begin, self._now()))

    @contextlib.contextmanager
    def watching_networks(self) -> Iterator[None]:
        """Tell the time in outermost modules apart; eager networks only."""
        handles = [
            torch_modules.register_module_forward_pre_hook(self._enter),
            torch_modules.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_step(self) -> None:
        """Add up what was measured since the last call."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._steps.append({name: sum(self._between(*pair) for pair in pairs) for name, pairs in self._marks.items()})
        self._marks = {}

    def medians(self, steps: slice = slice(None)) -> dict[str, float]:
        """Return the median seconds of each part over the steps; parts of parts are taken out of these."""
        chosen = self._steps[steps]
        names = sorted({name for step in chosen for name in step})
        seconds = {name: statistics.median(step.get(name, 0.0) for step in chosen) for name in names}
        for stage, networks in NETWORKS_OF.items():
            if networks in seconds:
                seconds[stage] = max(0.0, seconds[stage] - seconds[networks])
        return seconds

    def _enter(self, module: nn.Module, _inputs: object) -> None:
        if isinstance(module, Method) or self._stage not in NETWORKS_OF:
            return
        if self._depth == 0:
            self._entered = self._now()
        self._depth += 1

    def _leave(self, module: nn.Module, _inputs: object, _output: object) -> None:
        if isinstance(module, Method) or self._stage not in NETWORKS_OF:
            return
        self._depth -= 1
        if self._depth == 0:
            self._marks.setdefault(NETWORKS_OF[self._stage], []).append((self._entered, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._on_gpu else float(end - begin)
