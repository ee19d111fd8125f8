"""WebDataset: tar files in which `KEY.jpg` and, next to it, `KEY.cls`, `KEY.json` or `KEY.txt` are one sample.

Nothing is unpacked. The headers of a tar file are read once on a node (`tar_index.py`, kept in the node's cache), and then an
image is a range of bytes.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.block_cache import BlockCache, EncodedBlock
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.image_suffixes import image_suffixes
from hvp_ray.data.label_values import labels_of
from hvp_ray.data.listing import Leftovers
from hvp_ray.data.source import Place, Source
from hvp_ray.data.tar_index import TarIndex, index_from_bytes, index_tar, index_to_bytes
from hvp_ray.errors import DataError, LabelError
from hvp_ray.files import retried

TAR_SUFFIXES = (".tar",)

_NAMES_AT_ONCE = 16_384
_NUMBER = r"^(-1|[0-9]{1,9})$"
_REQUESTS_AT_ONCE = 32
_MAX_CLASSES_OF_FEW = 1_000
"""With more classes than this, and more than half as many as labels, labels are texts about single images."""


def open_web_dataset(place: Place) -> Source | None:
    """Return the tar files that lie there. Beside single images they are archives of them, and left out.

    Raises:
        DataError: they cannot be used.
    """
    if not place.files.names(*TAR_SUFFIXES) or place.has_images:
        return None
    return WebDatasetSource(place.files, place.config, cache_bytes=place.cache_bytes)


class WebDatasetSource(Source):
    """Images in tar files; ids count the samples of the sorted files."""

    kind = "WebDataset"

    def __init__(self, files: FileSet, config: DataConfig, *, cache_bytes: int) -> None:
        """Read the indices of the tar files, and make those that the node does not have.

        Args:
            files: the tar files, and maybe others.
            config: columns and limits.
            cache_bytes: disk of this node for the indices. 0: every process makes them.

        Raises:
            DataError: a file is damaged, is no tar file, or has samples with several images.
            StorageError: a file cannot be read.
        """
        self._files = files
        self._names = files.names(*TAR_SUFFIXES)
        self._max_image_bytes = config.max_image_mib * 2**20
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "tar files") if files.is_remote else None
        sizes = "".join(f"{name} {files.sizes[name]}\n" for name in self._names)
        key = f"{files.state} {sizes} {config.image_column} {config.label_column} {config.channels} tar"
        self._cache = BlockCache(key, max_bytes=cache_bytes)
        numbers, index = range(len(self._names)), lambda number: self._index(number, config)
        indices = list(map(index, numbers) if self._pool is None else self._pool.map(index, numbers))
        table = pa.concat_tables([index.samples for index in indices])
        self._members = table["name"].combine_chunks()
        self._offsets, self._sizes = table["offset"].to_numpy(), table["size"].to_numpy()
        self._label_texts = table["label"].chunks
        self._label_problem = next((index.label_problem for index in indices if index.label_problem), "")
        self._starts = np.cumsum([0, *(len(index.samples) for index in indices)])
        self.num_samples, self.num_bytes = len(table), int(self._sizes.sum())
        if not self.num_samples:
            raise DataError(
                f"{files.location}: no sample of the tar files has an image"
                + (f" {config.image_column!r}" if config.image_column else "")
                + "; expected KEY.jpg, KEY.png, ... (WebDataset). Name another ending by --data.image_column"
            )
        self.has_labels = any(chunk.null_count < len(chunk) for chunk in self._label_texts)
        self.left_out = (*files.left_out_beside(self._names), *_left_out_of(indices).entries())
        self._digest = self._compute_digest()

    @property
    def num_bytes_read(self) -> int:
        """Bytes that the storage has returned to this process."""
        return self._files.num_bytes_read

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the labels: whole numbers, if all labels are, or places among their texts, sorted."""
        if not self.has_labels:
            raise LabelError(
                self._label_problem
                or f"{self._files.location} has no labels: no sample has KEY.cls, KEY.txt or a label in KEY.json. Name "
                f"another ending by --data.label_column, or a value of the JSON files: --data.label_column json.NAME"
            )
        labels, names = labels_of(
            _as_numbers(self._label_texts), (), f"{self._files.location}: labels of the tar files"
        )
        if max(_MAX_CLASSES_OF_FEW, (labels >= 0).sum() // 2) < len(names):
            raise LabelError(
                f"{self._files.location} has {len(names):,} different labels of {len(labels):,} images, such as "
                f"{names[0][:80]!r}; expected classes. Name another ending by --data.label_column"
            )
        return labels, names

    def fingerprint(self) -> str:
        """Return a digest of the names and sizes of all images."""
        return self._digest

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes. No bytes: an image is larger than allowed.

        Raises:
            StorageError: the storage failed, or a file has become shorter.
        """
        read = map if self._pool is None else self._pool.map
        return list(read(self._read_one, sample_ids))

    def places(self) -> set[str]:
        """Return the tar files."""
        return self._files.places(self._names)

    def describe(self, sample_id: int) -> str:
        """Return tar file and member."""
        return f"{self._files.shown(self._names[self._file_of(sample_id)])} member {self._members[sample_id].as_py()}"

    def _read_one(self, sample_id: int) -> bytes:
        size = int(self._sizes[sample_id])
        if size > self._max_image_bytes:
            return b""
        file = self._files.open(self._names[self._file_of(sample_id)])
        return file.read_at(int(self._offsets[sample_id]), size)

    def _file_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._starts, sample_id, side="right")) - 1

    def _index(self, number: int, config: DataConfig) -> TarIndex:
        """Return the index of a tar file from the cache, which makes it once on a node."""
        name, is_remote = self._names[number], self._files.is_remote

        def index() -> TarIndex:
            file = self._files.open(name)
            return index_tar(
                file,
                is_remote=is_remote,
                image=config.image_column,
                label=config.label_column,
                suffixes=image_suffixes(config.channels),
            )

        def make() -> EncodedBlock:
            made = retried(index, f"reading {self._files.shown(name)}", pauses=None if is_remote else ())
            content = index_to_bytes(made)
            return EncodedBlock(entries=np.array([[0, len(content)]], np.int64), data=[memoryview(content)])

        return index_from_bytes(self._cache.read(number, [0], make)[0])

    def _compute_digest(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, self.num_samples, _NAMES_AT_ONCE):
            names = self._members[start : start + _NAMES_AT_ONCE].to_pylist()
            sizes = self._sizes[start : start + _NAMES_AT_ONCE].tolist()
            digest.update("".join(f"{name}\0{size}\n" for name, size in zip(names, sizes, strict=True)).encode())
        return digest.hexdigest()


def _left_out_of(indices: list[TarIndex]) -> Leftovers:
    """Return the members of all files that are not read."""
    leftovers = Leftovers()
    for index in indices:
        for entry in index.left_out:
            leftovers.add_entry(entry)
    return leftovers


def _as_numbers(texts: list[pa.Array]) -> list[pa.Array]:
    """Return whole numbers if all texts are some, else the texts."""
    are_numbers = [pc.all(pc.match_substring_regex(part, _NUMBER)).as_py() is not False for part in texts]
    return [part.cast(pa.int64()) for part in texts] if all(are_numbers) else texts
