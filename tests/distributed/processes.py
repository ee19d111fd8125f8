"""Start ranks as processes that meet on loopback, with gloo or nccl."""

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """Call function(rank, num_ranks, *arguments) on every rank; return the results in the order of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_rank_main, args=(rank, num_ranks, port, backend, function, arguments, queue))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(timeout=60)
    for rank, result in results.items():
        if isinstance(result, str) and result.startswith("Traceback"):
            raise AssertionError(f"rank {rank} failed:\n{result}")
    return [results[rank] for rank in range(num_ranks)]


def _rank_main(
    rank: int, num_ranks: int, port: int, backend: str, function: Callable[..., Any], arguments: Any, queue: Any
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    try:
        queue.put((rank, function(rank, num_ranks, *arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
