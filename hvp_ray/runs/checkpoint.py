"""Checkpoints: files first, then a manifest with digests, which is the commit.

`<run>/checkpoints/step-00000500/` holds `state.pt` (tensors and plain values only) and `manifest.json`. A folder without a
manifest is ignored. Buckets cannot rename, so nothing relies on renaming.
"""

import hashlib
import io
import json
import logging
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hvp_ray.errors import CheckpointError, first_line
from hvp_ray.files import Folder, delete_folder, is_uri, place_in
from hvp_ray.stored_archive import check_stored_archive
from hvp_ray.training.trainee import Checkpoint

logger = logging.getLogger(__name__)

_STATE, _MANIFEST = "state.pt", "manifest.json"
_COMMITTED = re.compile(rf"step-(\d{{8,12}})/{_MANIFEST}")


class CheckpointStore:
    """The checkpoints of one run. One process writes, all read."""

    def __init__(self, location: str, *, run_identity: str, keep: int) -> None:
        self._location = location
        # Retries on a bucket only: a full disk stays full.
        self._files = Folder(location, pauses=None if is_uri(location) else ())
        self._run_identity = run_identity
        self._keep = keep

    def write(self, checkpoint: Checkpoint) -> None:
        """Write and commit the checkpoint. Then delete all but the newest `keep`, and damaged checkpoints of later steps.

        Raises:
            CheckpointError: the storage refused (disk full, no permission); earlier checkpoints stay usable.
        """
        folder = _folder(checkpoint.step)
        buffer = io.BytesIO()
        state = {
            "step": checkpoint.step,
            "method": checkpoint.method,
            "optimizer": checkpoint.optimizer,
            "predictor": checkpoint.predictor,
        }
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
            self._files.write(f"{folder}/{_STATE}", content)
            self._files.write(f"{folder}/{_MANIFEST}", json.dumps(manifest, indent=1).encode())
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} could not be written to {self._location}: {error}; the one before "
                f"it is untouched. Make room or repair the storage, then start the run again with its name to resume it"
            ) from error
        self._drop_others(checkpoint.step)

    def committed_steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        manifests = (_COMMITTED.fullmatch(name) for name in self._files.names())
        return sorted(int(manifest[1]) for manifest in manifests if manifest is not None)

    def load_newest(self, map_location: torch.device | str = "cpu") -> Checkpoint | None:
        """Return the newest intact checkpoint; None: there is none. A damaged one is skipped with a warning.

        Raises:
            CheckpointError: it belongs to a run of another identity, holds something else than tensors, or cannot be
                reached. Or all of them are damaged: restarting at step 0 would discard the run.
        """
        steps = self.committed_steps()
        for step in reversed(steps):
            try:
                return self.load(step, map_location)
            except _DamagedError as error:
                logger.warning("%s; the checkpoint before it is used", error)
        if steps:
            raise CheckpointError(
                f"all checkpoints in {self._location} are damaged (steps {steps}). Restore one of them from a copy; or "
                f"delete the folders to restart this run at step 0"
            )
        return None

    def load(self, step: int, map_location: torch.device | str = "cpu") -> Checkpoint:
        """Read one checkpoint and check its digest.

        Raises:
            CheckpointError: it is missing, damaged, of another run, or holds something else than tensors and plain values,
                none of which is executed.
        """
        folder = place_in(self._location, _folder(step))
        try:
            described, content = (self._files.read(f"{_folder(step)}/{name}") for name in (_MANIFEST, _STATE))
        except OSError as error:
            # It is unreachable, not damaged; resuming from an older one would discard steps.
            raise CheckpointError(f"the checkpoint {folder} cannot be read now: {error}") from error
        if described is None or content is None:
            raise _DamagedError(f"the checkpoint {folder} is damaged: a file is missing")
        try:
            manifest = json.loads(described)
            digest, identity = manifest["files"][_STATE]["sha256"], manifest["run_identity"]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
            raise _DamagedError(f"the checkpoint {folder} is damaged: {_MANIFEST} is no manifest") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise _DamagedError(
                f"the checkpoint {folder} is damaged: {_STATE} does not have the digest of its manifest"
            )
        if identity != self._run_identity:
            raise CheckpointError(f"the checkpoint {folder} belongs to a run of another identity")
        try:
            return _unpack(content, step, map_location)
        except Exception as error:
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it asks for {asked[1]}" if asked else first_line(error)
            raise CheckpointError(
                f"the checkpoint {folder} is refused: {_STATE} has the digest of its manifest, but holds something else than "
                f"tensors and plain values ({reason}). Nothing in it was executed. Find out who wrote it; without this "
                f"folder the run resumes from the checkpoint before it"
            ) from error

    def _drop_others(self, newest: int) -> None:
        try:
            steps = self.committed_steps()
        except OSError as error:
            logger.warning("the checkpoints before step %d could not be listed, so none was deleted: %s", newest, error)
            return
        for step in [s for s in steps if s <= newest][: -self._keep] + [s for s in steps if s > newest]:
            try:
                self._files.delete(f"{_folder(step)}/{_MANIFEST}")  # uncommitted first, then removed
            except OSError as error:
                logger.warning("the checkpoint of step %d could not be deleted: %s", step, error)
                continue
            delete_folder(place_in(self._location, _folder(step)))


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time, while training continues.

    A failure is raised by the next call, or by the next step through `check`.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.num_written = 0
        self.written_at = 0.0
        """Unix time of the last commit. 0: none yet."""

    def write(self, checkpoint: Checkpoint) -> None:
        """Wait for the previous write, then start this one. The caller must not modify the tensors afterwards.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, checkpoint)

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written, without waiting.

        Raises:
            CheckpointError: see `CheckpointStore.write`.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when every checkpoint is committed.

        Raises:
            CheckpointError: see `CheckpointStore.write`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            CheckpointError: see `CheckpointStore.write`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, checkpoint: Checkpoint) -> None:
        self._store.write(checkpoint)
        self.num_written += 1
        self.written_at = time.time()


def _unpack(content: bytes, step: int, map_location: torch.device | str) -> Checkpoint:
    """Return the checkpoint in the bytes that `CheckpointStore.write` made.

    Raises:
        Exception: of any kind, if they are something else.
    """
    check_stored_archive(io.BytesIO(content), num_bytes=len(content))
    state = torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    method, optimizer, predictor = state["method"], state["optimizer"], state["predictor"]
    named = [*method.items(), *predictor.items()]
    are_tensors = all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named)
    if not are_tensors or set(optimizer) != {"state", "param_groups"} or type(state["step"]) is not int:
        raise ValueError("no step, method, optimizer and predictor")
    if state["step"] != step:
        raise ValueError(f"it is of step {state['step']}")
    _check_tensors(state)
    return Checkpoint(step=step, method=method, optimizer=optimizer, predictor=predictor)


def _check_tensors(state: object) -> None:
    """Check that no tensor has more elements than its storage, because copying it would allocate more than the file has."""
    pending, seen = [state], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(value.shape)} without its elements")
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple | set):
            pending.extend(value)


class _DamagedError(CheckpointError):
    """A checkpoint is unusable; an older one may be intact."""


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
