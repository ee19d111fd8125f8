"""Checkpoints: files first, then a manifest with digests, which is the commit.

`<run>/checkpoints/step-00000500/` holds `state-attempt-0001.pt` (tensors and plain values only) and `manifest.json`. In
sharded training each rank writes a file of its own, `state-00000-of-00002-attempt-0001.pt` and so on. The attempt is the one
that wrote it, so a process that lost the run cannot damage what its successor wrote. A folder without a manifest is ignored.
Buckets cannot rename, so nothing relies on renaming.
"""

import dataclasses
import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hvp_ray.distributed.world import World, gather_over_ranks
from hvp_ray.errors import CheckpointError, first_line
from hvp_ray.files import Folder, delete_folder, is_uri, place_in
from hvp_ray.stored_archive import check_stored_archive
from hvp_ray.training.trainee import Checkpoint, join_checkpoints

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_ALONE = World()
_FAILED = -2
"""Stands for the size of a part that could not be written."""
STEP_FOLDER = r"step-(\d{8,12})"
"""Pattern of a checkpoint's folder name."""
_STATE = r"state(?:-(\d{5})-of-(\d{5}))?(?:-attempt-\d{4,})?\.pt"
_OF_STATE = re.compile(rf"{STEP_FOLDER}/{_STATE}(?:\.part)?")
_OF_ATTEMPT = re.compile(r"-attempt-(\d+)")
_COMMITTED = re.compile(f"{STEP_FOLDER}/{_MANIFEST}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file of a checkpoint, as the manifest describes it."""

    num_bytes: int
    sha256: str


class CheckpointStore:
    """The checkpoints of one run. Rank 0 commits, and writes unless they are sharded; all ranks read."""

    def __init__(
        self,
        location: str,
        *,
        run_identity: str | None,
        keep: int,
        attempt: int | None = None,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """Read nothing yet.

        Args:
            location: folder, path or URI.
            run_identity: of the run. None: of any run, only to read.
            keep: see `write`.
            attempt: that writes, for the names of its files.
            check_owner: raises if this process must not commit or delete; called before each.
        """
        self._location = location
        # Retries on a bucket only: a full disk stays full.
        self._files = Folder(location, pauses=None if is_uri(location) else ())
        self._run_identity = run_identity
        self._keep = keep
        self._attempt = attempt
        self.check_owner = check_owner

    def write(self, checkpoint: Checkpoint) -> None:
        """Write and commit the checkpoint. Then delete all but the newest `keep`, and damaged checkpoints of later steps.

        Raises:
            CheckpointError: the storage refused (disk full, no permission); earlier checkpoints stay usable.
            LostRunError: another process has taken the run over; nothing is committed.
        """
        self.commit(checkpoint.step, [self.write_part(checkpoint, _ALONE)])

    def write_part(self, checkpoint: Checkpoint, world: World) -> WrittenFile:
        """Write the file of one rank, without committing it. Files of earlier attempts at the same one are deleted first.

        Raises:
            CheckpointError: the storage refused.
            LostRunError: another process has taken the run over.
        """
        buffer = io.BytesIO()
        torch.save({field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}, buffer)
        content = buffer.getvalue()
        self._drop_attempts_before(checkpoint.step, world)
        self._write(checkpoint.step, self._state_name(world.rank, world.num_ranks), content)
        return WrittenFile(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def commit(self, step: int, written: Sequence[WrittenFile]) -> None:
        """Write the manifest over the files of all ranks, in order. Then delete what `write` says.

        Raises:
            CheckpointError: the storage refused.
            LostRunError: another process has taken the run over; nothing is committed.
        """
        manifest = {
            "format": 1,
            "step": step,
            "run_identity": self._run_identity,
            "written_at": time.time(),
            "files": {
                self._state_name(rank, len(written)): {"bytes": file.num_bytes, "sha256": file.sha256}
                for rank, file in enumerate(written)
            },
        }
        self.check_owner()
        self._write(step, _MANIFEST, json.dumps(manifest, indent=1).encode())
        self._drop_others(step)

    def _drop_attempts_before(self, step: int, world: World) -> None:
        """Make room, if this process may write. What earlier attempts left and cannot be deleted stays."""
        self.check_owner()
        if self._attempt is None:
            return
        own = _OF_ATTEMPT.sub("", self._state_name(world.rank, world.num_ranks))
        try:
            for name in self._files.names(_folder(step), unfinished=True):
                file = name.rpartition("/")[2]
                attempt = _OF_ATTEMPT.search(file)
                is_earlier = attempt is None or int(attempt[1]) < self._attempt
                if is_earlier and _OF_ATTEMPT.sub("", file.removesuffix(".part")) == own:
                    self._files.delete(name)
        except OSError as error:
            logger.warning("files of earlier attempts at step %d could not be deleted: %s", step, error)

    def _state_name(self, rank: int, num_ranks: int) -> str:
        of_rank = "" if num_ranks == 1 else f"-{rank:05d}-of-{num_ranks:05d}"
        return f"state{of_rank}" + ("" if self._attempt is None else f"-attempt-{self._attempt:04d}") + ".pt"

    def _write(self, step: int, name: str, content: bytes) -> None:
        try:
            self._files.write(f"{_folder(step)}/{name}", content)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._location}: {error}; the one before "
                f"it is untouched. Make room or repair the storage, then start the run again with its name to resume it"
            ) from error

    def committed_steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        return _steps_of(self._files.names(), _COMMITTED)

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
        """Read one checkpoint, check its digests, and join its parts.

        Raises:
            CheckpointError: it is missing, damaged, of another run, or holds something else than tensors and plain values,
                none of which is executed.
        """
        folder = self.folder_of(step)
        digests, identity = _read_manifest(self._read(step, _MANIFEST), folder)
        parts = []
        for name in sorted(digests):
            content = self._read(step, name)
            if hashlib.sha256(content).hexdigest() != digests[name]:
                raise _DamagedError(
                    f"the checkpoint {folder} is damaged: {name} does not have the digest of its manifest"
                )
            if self._run_identity not in (None, identity):
                raise CheckpointError(f"the checkpoint {folder} belongs to a run of another identity")
            try:
                parts.append(_unpack(content, step, map_location))
            except Exception as error:
                asked = re.search(r"GLOBAL ([\w.]+)", str(error))
                reason = f"it asks for {asked[1]}" if asked else first_line(error)
                raise CheckpointError(
                    f"the checkpoint {folder} is refused: {name} has the digest of its manifest, but holds something else "
                    f"than tensors and plain values ({reason}). Nothing in it was executed. Find out who wrote it; without "
                    f"this folder the run resumes from the checkpoint before it"
                ) from error
        try:
            return join_checkpoints(parts)
        except (ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint {folder} is refused: its parts do not fit together ({first_line(error)})"
            ) from error

    def folder_of(self, step: int) -> str:
        """Return the folder of a checkpoint, a path or a URI."""
        return place_in(self._location, _folder(step))

    def digest(self, step: int) -> str:
        """Return a digest of a checkpoint, from its manifest.

        Raises:
            CheckpointError: it is missing or damaged, or cannot be read.
        """
        digests, _ = _read_manifest(self._read(step, _MANIFEST), self.folder_of(step))
        digests = {_OF_ATTEMPT.sub("", name): digest for name, digest in digests.items()}  # any attempt writes the same
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    def _read(self, step: int, name: str) -> bytes:
        folder = self.folder_of(step)
        try:
            content = self._files.read(f"{_folder(step)}/{name}")
        except OSError as error:
            # It is unreachable, not damaged; resuming from an older one would discard steps.
            raise CheckpointError(f"the checkpoint {folder} cannot be read now: {error}") from error
        if content is None:
            raise _DamagedError(f"the checkpoint {folder} is damaged: {name} is missing")
        return content

    def _drop_others(self, newest: int) -> None:
        try:
            names = self._files.names(unfinished=True)
            self.check_owner()
        except (OSError, CheckpointError) as error:
            logger.warning("the checkpoints before step %d could not be listed, so none was deleted: %s", newest, error)
            return
        steps, with_state = _steps_of(names, _COMMITTED), _steps_of(names, _OF_STATE)
        for step in [s for s in steps if s <= newest][: -self._keep] + [s for s in steps if s > newest]:
            try:
                self._files.delete(f"{_folder(step)}/{_MANIFEST}")  # uncommitted first, then removed
            except OSError as error:
                logger.warning("the checkpoint of step %d could not be deleted: %s", step, error)
                continue
            delete_folder(self.folder_of(step))
        for step in [s for s in with_state if s < newest and s not in steps]:  # of attempts that ended while they wrote
            delete_folder(self.folder_of(step))


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

    def close(self, *, has_failed: bool = False) -> None:
        """Wait, and end the thread.

        Args:
            has_failed: the run ends by an error.

        Raises:
            CheckpointError: see `CheckpointStore.write`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, checkpoint: Checkpoint) -> None:
        self._store.write(checkpoint)
        self._note_commit()

    def _note_commit(self) -> None:
        self.num_written += 1
        self.written_at = time.time()


class PartWriter(CheckpointWriter):
    """Writes this rank's part of sharded checkpoints; rank 0 commits one when all ranks have written.

    Every rank calls the same methods at the same steps. The failure of one rank is raised on all.
    """

    def __init__(self, store: CheckpointStore, world: World, device: torch.device) -> None:
        """Start the thread.

        Args:
            store: the checkpoints.
            world: the ranks.
            device: device of the tensors that ranks exchange.
        """
        super().__init__(store)
        self._world, self._device = world, device
        self._step = 0
        self._part: Future[WrittenFile] | None = None
        self._is_committing = False

    def write(self, checkpoint: Checkpoint) -> None:
        """As `CheckpointWriter.write`, for a part."""
        self.wait()
        self._step, self._is_committing = checkpoint.step, False
        self._part = self._thread.submit(self._store.write_part, checkpoint, self._world)

    def check(self) -> None:
        """As `CheckpointWriter.check`; exchanges a few numbers while a checkpoint is not committed."""
        self._advance(wait=False)

    def wait(self) -> None:
        """As `CheckpointWriter.wait`."""
        self._advance(wait=True)

    def close(self, *, has_failed: bool = False) -> None:
        """As `CheckpointWriter.close`; after an error other ranks may be gone, so parts are not committed."""
        if has_failed:
            self._thread.shutdown()
        else:
            super().close()

    def _advance(self, *, wait: bool) -> None:
        if self._part is not None and not self._is_committing:
            self._commit_if_written(wait=wait)
        if self._part is not None and self._is_committing:
            self._end_if_committed(wait=wait)

    def _commit_if_written(self, *, wait: bool) -> None:
        assert self._part is not None
        failure, own = None, WrittenFile(num_bytes=-1, sha256="00" * 32)
        if wait or self._part.done():
            failure = self._part.exception()
            own = self._part.result() if failure is None else dataclasses.replace(own, num_bytes=_FAILED)
        numbers = torch.tensor([own.num_bytes, *bytes.fromhex(own.sha256)], device=self._device)
        of_ranks = gather_over_ranks(numbers).tolist()
        self._raise_on_all(failure, [rank for rank, (size, *_) in enumerate(of_ranks) if size == _FAILED])
        self._is_committing = all(size >= 0 for size, *_ in of_ranks)
        if self._is_committing and self._world.rank == 0:
            written = [WrittenFile(num_bytes=size, sha256=bytes(digest).hex()) for size, *digest in of_ranks]
            self._pending = self._thread.submit(self._store.commit, self._step, written)

    def _end_if_committed(self, *, wait: bool) -> None:
        failure, outcome = None, 0
        if self._pending is not None and (wait or self._pending.done()):
            failure = self._pending.exception()
            outcome = 1 if failure is None else _FAILED
        of_rank_0 = int(gather_over_ranks(torch.tensor(outcome, device=self._device))[0])
        self._raise_on_all(failure, [0] if of_rank_0 == _FAILED else [])
        if of_rank_0:
            self._part = self._pending = None
            self._note_commit()

    def _raise_on_all(self, failure: BaseException | None, failed: list[int]) -> None:
        if not failed:
            return
        self._part = self._pending = None
        if failure is not None:
            raise failure
        named = ", ".join(map(str, failed))
        raise CheckpointError(
            f"trainer {named} could not write the checkpoint of step {self._step}; its log has the reason"
        )


def _read_manifest(content: bytes, folder: str) -> tuple[dict[str, str], str]:
    """Return the SHA-256 of each file of state by name, and the identity of the run.

    Raises:
        _DamagedError: it is no manifest.
    """
    try:
        manifest = json.loads(content)
        digests = {name: str(described["sha256"]) for name, described in manifest["files"].items()}
        identity = str(manifest["run_identity"])
        found = [re.fullmatch(_STATE, name) for name in digests]
        ranks = sorted((int(match[1] or 0), int(match[2] or 1)) for match in found if match is not None)
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _DamagedError(f"the checkpoint {folder} is damaged: {_MANIFEST} is no manifest") from error
    if not digests or ranks != [(rank, len(digests)) for rank in range(len(digests))]:
        raise _DamagedError(
            f"the checkpoint {folder} is damaged: {_MANIFEST} names other files than those of all ranks"
        )
    return digests, identity


def _unpack(content: bytes, step: int, map_location: torch.device | str) -> Checkpoint:
    """Return the checkpoint in the bytes that `CheckpointStore.write` made.

    Raises:
        Exception: of any kind, if they are something else.
    """
    check_stored_archive(io.BytesIO(content), num_bytes=len(content))
    state = torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    method, optimizer, predictor = state["method"], state["optimizer"], state["predictor"]
    named = [*method.items(), *predictor.items()]
    are_parts = state.get("are_parts")  # checkpoints before it was written are whole
    are_tensors = all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named)
    if not are_tensors or set(optimizer) != {"state", "param_groups"} or type(state["step"]) is not int:
        raise ValueError("no step, method, optimizer and predictor")
    if state["step"] != step:
        raise ValueError(f"it is of step {state['step']}")
    _check_tensors(state)
    return Checkpoint(step=step, method=method, optimizer=optimizer, predictor=predictor, are_parts=are_parts)


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


def _steps_of(names: Iterable[str], of_step: re.Pattern[str]) -> list[int]:
    """Return the steps in the names of files that match, ascending, each once."""
    found = (of_step.fullmatch(name) for name in names)
    return sorted({int(match[1]) for match in found if match is not None})


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
