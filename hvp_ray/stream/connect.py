"""Connect this process to Ray: join the cluster that RAY_ADDRESS names, or start a Ray on this machine.

Every program connects through this module, which reports failures in one sentence without Ray's traceback. Call
`launch.environment.prepare_ray_environment` before you import it.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import grpc  # type: ignore[import-untyped]
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._private.services import canonicalize_bootstrap_address

from hvp_ray.errors import ConfigError, first_line
from hvp_ray.stream.tls import check_tls_files, explain_silence

_VITAL_PROCESSES = {"gcs_server", "raylet"}
_HEAD_SECONDS = 30.0
"""A starting head answers within this time. Ray itself would wait 15 minutes for a dead one."""


@dataclass(slots=True)
class _Connection:
    """State of this process's connection to Ray."""

    is_ours: bool = False
    """This module opened the connection, so `end_ray` closes it."""
    is_abandoned: bool = False


_connection = _Connection()


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRay:
    """Size of a Ray that is started on this machine."""

    num_cpus: int
    """CPUs that Ray schedules, which may be more than the machine has."""
    object_store_bytes: int


def joins_cluster() -> bool:
    """Return whether the environment names a cluster to join. `local` is Ray's name for this machine."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def connect_ray(size_of_local: Callable[[], LocalRay]) -> bool:
    """Use the Ray of this process, or join the cluster of RAY_ADDRESS, or start a local one.

    Args:
        size_of_local: called only to start a local Ray; raises ConfigError if the machine is too small.

    Returns:
        Whether a cluster existed already.

    Raises:
        ConfigError: the cluster does not answer, its certificates are missing, or the local Ray does not start.
    """
    if ray.is_initialized():
        return True
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if joins_cluster():
        address = os.environ["RAY_ADDRESS"]
        check_tls_files()
        try:
            _wait_for_head(address)
            ray.init(**quiet)
        except Exception as error:  # Ray raises bare ones too, if a node does not start in time
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({first_line(error)}); start its head, correct the "
                f"address, or unset RAY_ADDRESS to start a Ray on this machine"
            ) from error
        _connection.is_ours = True
        return True
    local = size_of_local()
    try:
        ray.init(
            address="local",
            num_cpus=local.num_cpus,
            object_store_memory=local.object_store_bytes,
            include_dashboard=False,
            **quiet,
        )
    except Exception as error:
        raise ConfigError(
            f"Ray could not be started on this machine: {first_line(error)}; see its logs in "
            f"{get_default_ray_temp_dir()}/session_latest/logs"
        ) from error
    _connection.is_ours = True
    return False


def dead_processes() -> list[str]:
    """Return Ray's names of the ended processes of a Ray that was started here."""
    node = ray._private.worker._global_node
    return [] if not _connection.is_ours or node is None else [kind for kind, _ in node.dead_processes()]


def is_ray_lost() -> bool:
    """Return whether a Ray that was started here cannot work any more."""
    return not _VITAL_PROCESSES.isdisjoint(dead_processes())


def end_ray(*, threads_have_ended: bool = True) -> None:
    """Disconnect, and end a Ray that was started here. A connection that other code opened stays.

    `ray.shutdown()` waits minutes for a vital process that died, and crashes this process if a thread still calls Ray. In
    these cases Ray's processes are killed, and the program must end without clean-up, see `is_abandoned`.
    """
    if not _connection.is_ours:
        return
    is_safe = threads_have_ended and not is_ray_lost()
    _connection.is_ours = False
    if is_safe:
        ray.shutdown()
        return
    _connection.is_abandoned = True
    node = ray._private.worker._global_node
    if node is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def is_abandoned() -> bool:
    """Return whether Ray could not be shut down, so that its clean-up at exit must be skipped (`os._exit`)."""
    return _connection.is_abandoned


def _wait_for_head(address: str) -> None:
    """Wait until the head's GCS answers gRPC. An open port alone may belong to a head that hangs.

    Raises:
        ConnectionError: the head does not answer, or no cluster runs here.
        ValueError: `address` is no address.
    """
    if address.startswith("ray://"):
        return  # Ray's client has a timeout of its own
    head = canonicalize_bootstrap_address(address)
    if head is None:
        raise ConnectionError("no cluster was started on this machine")
    with init_grpc_channel(head, options=GLOBAL_GRPC_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_HEAD_SECONDS)
        except grpc.FutureTimeoutError as error:
            reason = explain_silence(head) or f"no answer from {head} within {_HEAD_SECONDS:.0f} s"
            raise ConnectionError(reason) from error
