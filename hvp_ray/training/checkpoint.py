"""Checkpoints: files first, a manifest with digests last; what has no manifest does not exist.

`<run>/checkpoints/step-00000500/` holds `state.pt` (tensors and plain values only) and `manifest.json`. Local folders
and URIs go through pyarrow.fs alike; nothing relies on renaming, which buckets do not have.
"""

import hashlib
import io
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from torch import Tensor

from hvp_ray.errors import CheckpointError

logger = logging.getLogger(__name__)

_STATE, _MANIFEST = "state.pt", "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What is needed to go on bit for bit: position and tensors; no random state, because there is none."""

    step: int
    """Number of optimizer steps done."""
    method: dict[str, Tensor]
    optimizer: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run. One process writes, all read."""

    def __init__(self, location: str, *, run_identity: str, keep: int) -> None:
        self._filesystem, self._root = _resolve(location)
        self._run_identity = run_identity
        self._keep = keep

    def write(self, checkpoint: Checkpoint) -> None:
        """Write and commit; then drop the oldest beyond `keep`.

        Raises:
            CheckpointError: the storage refused (disk full, no permission); earlier checkpoints stay usable.
        """
        folder = self._folder(checkpoint.step)
        buffer = io.BytesIO()
        state = {"step": checkpoint.step, "method": checkpoint.method, "optimizer": checkpoint.optimizer}
        torch.save(state, buffer)
        content = buffer.getvalue()
        manifest = {
            "format": 1,
            "step": checkpoint.step,
            "run_identity": self._run_identity,
            "written_at": time.time(),
            "files": {_STATE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
        }
        try:
            self._filesystem.create_dir(folder, recursive=True)
            self._write_file(f"{folder}/{_STATE}", content)
            self._write_file(f"{folder}/{_MANIFEST}", json.dumps(manifest, indent=1).encode())
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} could not be written to {folder}: {error}; the one before it is "
                f"untouched. Make room or mend the storage, then start the run again with its name to go on"
            ) from error
        self._drop_old()

    def committed_steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        selector = pafs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        manifests = [Path(f.path) for f in found if f.is_file and Path(f.path).name == _MANIFEST]
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)

    def load_newest(self, map_location: torch.device | str = "cpu") -> Checkpoint | None:
        """Return the newest intact checkpoint; None: there is none. A damaged one is passed over with a warning.

        Raises:
            CheckpointError: it belongs to a run of another identity.
        """
        for step in reversed(self.committed_steps()):
            try:
                return self.load(step, map_location)
            except _DamagedError as error:
                logger.warning("%s; the checkpoint before it is used", error)
        return None

    def load(self, step: int, map_location: torch.device | str = "cpu") -> Checkpoint:
        """Read one checkpoint and check its digest.

        Raises:
            CheckpointError: missing, damaged, or of another run.
        """
        folder = self._folder(step)
        try:
            manifest = json.loads(self._read_file(f"{folder}/{_MANIFEST}"))
            content = self._read_file(f"{folder}/{_STATE}")
        except (OSError, ValueError) as error:
            raise _DamagedError(f"the checkpoint {folder} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != manifest["files"][_STATE]["sha256"]:
            raise _DamagedError(
                f"the checkpoint {folder} is damaged: {_STATE} does not have the digest of its manifest"
            )
        if manifest["run_identity"] != self._run_identity:
            raise CheckpointError(f"the checkpoint {folder} belongs to a run of another identity")
        state = torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
        return Checkpoint(step=state["step"], method=state["method"], optimizer=state["optimizer"])

    def _drop_old(self) -> None:
        for step in self.committed_steps()[: -self._keep]:
            folder = self._folder(step)
            self._filesystem.delete_file(f"{folder}/{_MANIFEST}")  # uncommitted first, then removed
            self._filesystem.delete_dir(folder)

    def _folder(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}"

    def _write_file(self, path: str, content: bytes) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _read_file(self, path: str) -> bytes:
        with self._filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content


class _DamagedError(CheckpointError):
    """An unusable checkpoint; an older one may serve."""


def _resolve(location: str) -> tuple[pafs.FileSystem, str]:
    if "://" in location:
        filesystem, path = pafs.FileSystem.from_uri(location)
        return filesystem, path
    return pafs.LocalFileSystem(), str(Path(location).absolute())


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
