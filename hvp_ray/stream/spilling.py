"""Bytes that Ray's object stores have spilled to disk."""

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

from hvp_ray.errors import StageError, first_line

_TIMEOUT_SECONDS = 60.0


def spilled_bytes() -> int:
    """Return the bytes that all object stores of the cluster have spilled since they started.

    Raises:
        StageError: no node answers.
    """
    reasons = []
    for node in ray.nodes():
        if node["Alive"]:  # any raylet answers for the whole cluster
            try:
                return _ask_raylet(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            except grpc.RpcError as error:
                reasons.append(first_line(error))
    why = "; ".join(reasons) or "no node is alive"
    raise StageError(f"no node of the Ray cluster reports its spilled bytes ({why}); check the nodes with `ray status`")


def _ask_raylet(address: str) -> int:
    # Ray's own options: by default gRPC uses `http_proxy`, which cannot reach the nodes.
    with init_grpc_channel(address, options=GLOBAL_GRPC_OPTIONS) as channel:
        reply = node_manager_pb2_grpc.NodeManagerServiceStub(channel).FormatGlobalMemoryInfo(
            node_manager_pb2.FormatGlobalMemoryInfoRequest(include_memory_info=False), timeout=_TIMEOUT_SECONDS
        )
    return int(reply.store_stats.spilled_bytes_total)
