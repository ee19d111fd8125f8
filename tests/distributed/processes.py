"""Call functions on ranks: processes that form a process group on loopback, with gloo or nccl.

The processes are reused, because each imports PyTorch first. Each call has its own process group.
"""

import atexit
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class _RankProcess:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.connection, its_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(its_end,))
        self._process.start()
        its_end.close()  # else this process would not notice that the other has ended

    def end(self) -> None:
        self.connection.close()
        self._process.join(timeout=60)


_processes: list[_RankProcess] = []


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """Call function(rank, num_ranks, *arguments) on every rank; return the results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    while len(_processes) < num_ranks:
        _processes.append(_RankProcess())
    ranks = _processes[:num_ranks]
    try:
        for rank, process in enumerate(ranks):
            process.connection.send((rank, num_ranks, port, backend, function, arguments))
        outcomes = [process.connection.recv() for process in ranks]
    except EOFError as error:
        _end_all()
        raise AssertionError("a rank has died") from error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            _end_all()  # the failed call may have left state behind
            raise AssertionError(f"rank {rank} failed:\n{failure}")
    return [result for result, _ in outcomes]


@atexit.register
def _end_all() -> None:
    while _processes:
        _processes.pop().end()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, num_ranks, port, backend, function, arguments = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
        try:
            outcome: tuple[Any, str | None] = (function(rank, num_ranks, *arguments), None)
        except BaseException:
            outcome = (None, traceback.format_exc())
        finally:
            dist.destroy_process_group()
        connection.send(outcome)
