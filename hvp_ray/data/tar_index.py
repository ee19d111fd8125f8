"""Index a tar file of WebDataset samples: the place of every image, and its label.

Neighbouring members of one key (their path up to the first dot of the name) are one sample. Python's `tarfile` reads the
headers. It stops silently at a damaged header, so this module checks where it stopped.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from hvp_ray.data.columns import choose_label
from hvp_ray.data.image_suffixes import IMAGE_SUFFIXES
from hvp_ray.data.listing import HIDDEN, LeftOut, Leftovers, hidden_part
from hvp_ray.errors import DataError, LabelError, first_line
from hvp_ray.files import OpenFile

_LABEL_ENDINGS = ("cls", "json", "txt")
"""Endings of members that may hold a label; the first of them that gives one counts."""
_JSON = "json"
_LINKS = "links and devices"
_MAX_LABEL_BYTES = 65_536
_MAX_HEADER_BYTES = 2**20
_LOCAL_READ_BYTES = 16_384
_REMOTE_READ_BYTES = 2**20
"""Bytes of one request for headers. Few images are larger, so a file at a URI is mostly read as a whole, in few requests."""
_ROWS_AT_ONCE = 16_384
"""Samples that are Python objects at a time."""
_SCHEMA = pa.schema([("name", pa.large_string()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.string())])
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TarIndex:
    """The samples of one tar file."""

    samples: pa.Table
    """Columns: name of the image's member, offset and size of its bytes, and text of its label, which may be null."""
    left_out: tuple[LeftOut, ...]
    """Members that are not read."""
    label_problem: str
    """Why a sample has no label although it may have one, as a sentence. Empty: there was no such sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int
    content: bytes
    """Of a small member that may hold a label."""

    @property
    def key(self) -> str:
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def ending(self) -> str:
        return _ending_of(self.name)


def index_tar(
    file: OpenFile,
    *,
    is_remote: bool,
    image: str | None,
    label: str | None,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
) -> TarIndex:
    """Read all headers of a tar file, and its labels.

    Args:
        file: opened.
        is_remote: whether a request takes long.
        image: ending of the images' members, such as `jpg` or `left.png`. None: the only one that is read as an image.
        label: ending of the labels' members; `json.NAME` is a value in JSON files. None: found.
        suffixes: endings that are read as images.

    Raises:
        DataError: the file is damaged, ends early, or a sample has several images.
        StorageError: it cannot be read.
    """
    leftovers, problem = Leftovers(), ""
    rows: list[tuple[str, int, int, str | None]] = []
    parts: list[pa.RecordBatch] = []
    for _, group in groupby(_members(file, leftovers, is_remote=is_remote, label=label), key=lambda member: member.key):
        members = list(group)
        found = [member for member in members if _is_image(member, image, suffixes)]
        if len(found) > 1:
            raise DataError(_several_images(file.shown, found))
        used, text = "", None
        try:
            used, text = _label_of(members, label) if found else ("", None)
        except LabelError as error:
            problem = problem or f"{file.shown}: {error}"
        for member in members:
            if member not in found and member.name != used:
                leftovers.add_file(_place_of(file, member.name))
        rows += [(member.name, member.offset, member.size, text) for member in found]
        if len(rows) >= _ROWS_AT_ONCE:
            parts.append(_as_columns(rows))
            rows = []
    samples = pa.Table.from_batches([*parts, _as_columns(rows)])
    return TarIndex(samples=samples, left_out=leftovers.entries(), label_problem=problem)


def index_to_bytes(index: TarIndex) -> bytes:
    """Return an index as an Arrow stream."""
    left_out = json.dumps([dataclasses.asdict(entry) for entry in index.left_out])
    sink = pa.BufferOutputStream()
    table = index.samples.replace_schema_metadata({"left_out": left_out, "label_problem": index.label_problem})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def index_from_bytes(content: bytes) -> TarIndex:
    """Return the index of `index_to_bytes`."""
    table = pa.ipc.open_stream(content).read_all()
    metadata = table.schema.metadata
    return TarIndex(
        samples=table.replace_schema_metadata(None),
        left_out=tuple(LeftOut(**entry) for entry in json.loads(metadata[b"left_out"])),
        label_problem=metadata[b"label_problem"].decode(),
    )


def _members(file: OpenFile, leftovers: Leftovers, *, is_remote: bool, label: str | None) -> Iterator[_Member]:
    """Yield the files of a tar file, with the content of those that may hold labels."""
    endings = _endings_of(label)
    reader = _HeaderReader(_Bytes(file), _REMOTE_READ_BYTES if is_remote else _LOCAL_READ_BYTES)
    try:
        tar = tarfile.open(fileobj=reader, mode="r:")  # noqa: SIM115 (the reader belongs to the file set)
        begin = -1
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.offset <= begin or member.size < 0:
                raise tarfile.ReadError("a member begins before the last one")
            begin = member.offset
            name = member.name.removeprefix("./")
            if member.offset_data + member.size > file.size:
                raise tarfile.ReadError(f"it ends in its member {name}")
            if hidden_part(name):
                leftovers.add(HIDDEN, _place_of(file, name))
            elif not member.isreg() or member.issparse():
                if not member.isdir():
                    leftovers.add(_LINKS, _place_of(file, name))
            else:
                content = b""
                if _ending_of(name) in endings and member.size <= _MAX_LABEL_BYTES:
                    reader.seek(member.offset_data)
                    content = reader.read(member.size)
                yield _Member(name=name, offset=member.offset_data, size=member.size, content=content)
        reader.seek(tar.offset)
        if any(reader.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"there is no header at byte {tar.offset}")
    except _TAR_ERRORS as error:
        if file.read_at(0, min(6, file.size)).startswith(_COMPRESSED):
            raise DataError(f"{file.shown} is compressed, so single images cannot be read; decompress it") from error
        raise DataError(
            f"{file.shown} is damaged or not complete: {first_line(error)}; copy it or write it again"
        ) from error


def _as_columns(rows: list[tuple[str, int, int, str | None]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ((),) * len(_SCHEMA)
    arrays = [pa.array(values, column.type) for values, column in zip(columns, _SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _place_of(file: OpenFile, name: str) -> str:
    return f"{file.shown.rpartition('/')[2]}/{name}"


def _ending_of(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _is_image(member: _Member, wanted: str | None, suffixes: tuple[str, ...]) -> bool:
    if wanted is not None:
        return member.ending == wanted.lower().removeprefix(".")
    return f".{member.ending}".endswith(suffixes)


def _several_images(shown: str, found: list[_Member]) -> str:
    """Return the sentence about a sample with several images."""
    endings = sorted({member.ending for member in found})
    if len(endings) > 1:
        remedy = f"choose one of their endings by --data.image_column: {endings[:8]}"
    else:
        remedy = "give each sample a key of its own"
    return f"{shown} has a sample of {len(found)} images, {found[0].name} and {found[1].name}; {remedy}"


def _endings_of(label: str | None) -> tuple[str, ...]:
    """Return the endings of members that may hold the label."""
    if label is None:
        return _LABEL_ENDINGS
    return (_JSON if label.startswith(f"{_JSON}.") else label.lower().removeprefix("."),)


def _label_of(members: Sequence[_Member], wanted: str | None) -> tuple[str, str | None]:
    """Return the member that holds the label, and the label as a text. None: there is none.

    Raises:
        LabelError: several values of a JSON file may be the label.
    """
    value = wanted.partition(".")[2] if wanted and wanted.startswith(f"{_JSON}.") else None
    of_ending = {member.ending: member for member in members}
    for ending in _endings_of(wanted):
        member = of_ending.get(ending)
        if member is None:
            continue
        text = _text_in_json(member, value) if ending == _JSON else member.content.decode("utf-8", "replace").strip()
        if text:
            return member.name, text
    return "", None


def _text_in_json(member: _Member, wanted: str | None) -> str | None:
    """Return the label in a JSON file: the value of a name, or the only value."""
    try:
        found = json.loads(member.content)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        path = wanted or choose_label([name for name, value in found.items() if _is_label(value)], "json.")
        for part in path.split(".") if path else ():
            found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, bool) or (isinstance(found, float) and found.is_integer()):
        found = int(found)
    return str(found).strip() if _is_label(found) else None


def _is_label(value: object) -> bool:
    return isinstance(value, int | float | str)


class _Bytes(io.RawIOBase):
    """A file as `io` has it."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position; see `io`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Fill a buffer as far as the file goes."""
        num_bytes = max(0, min(len(buffer), self._file.size - self._position))
        buffer[:num_bytes] = self._file.read_at(self._position, num_bytes) if num_bytes else b""
        self._position += num_bytes
        return num_bytes


class _HeaderReader(io.BufferedReader):
    """Reads headers and labels; a header that claims megabytes is damaged."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return super().read(size)
