"""Read and write safetensors files a few rows at a time, with plain file reads and writes.

    u64 little-endian: length of the header | header, JSON: name -> dtype, shape, data_offsets | data

The library can read rows of a tensor, but it writes whole dictionaries of tensors, which makes a process as
large as a shard. Here a new file gets its header first, since all sizes are known beforehand, and then its
tensors in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of one number of each dtype that has whole bytes.
NBYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
          "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
          "F8_E5M2FNUZ": 1}  # fmt: skip
CHUNK = 8 * 2**20  # bytes copied at once


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: safetensors' name of its dtype, shape, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def row_nbytes(self) -> int:
        """Of one row, a part along the first axis."""
        return self.nbytes // self.shape[0]


class Reader:
    """The tensors of a file; the library checks the header, plain reads at an offset take rows and chunks.

    The library's own slices of a file that is not mapped read the whole tensor for each.

    Attributes:
        entries: by name, in the order of the data.
        metadata: the header's `__metadata__`.

    Raises:
        ValueError: if the file is no safetensors file, is not as long as its header says, or a tensor's dtype and shape
            do not fit its place.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        try:
            with safe_open(self.path, "pt", backend="pread") as file:
                self.metadata: dict[str, str] | None = file.metadata()
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    if dtype not in NBYTES:
                        raise ValueError(f"{self.path} holds {name!r} as {dtype}, of which single rows cannot be read")
                    self.entries[name] = Entry(dtype, shape, NBYTES[dtype] * math.prod(shape))
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is no complete safetensors file: truncated, damaged or another format ({error}); get it "
                "again"
            ) from error
        with open(self.path, "rb") as raw:
            position = 8 + int.from_bytes(raw.read(8), "little")
        self._starts: dict[str, int] = {}
        for name, entry in self.entries.items():  # the library has refused gaps and overlaps
            self._starts[name] = position
            position += entry.nbytes

    def rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """These rows (of the first axis) of a tensor, in its own dtype and fresh memory."""
        entry = self.entries[name]
        start, stop, _ = rows.indices(entry.shape[0])
        tensor = torch.empty(stop - start, *entry.shape[1:], dtype=DTYPES[entry.dtype])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._starts[name] + start * entry.row_nbytes)
            _read_into(file, _bytes(tensor), self.path)
        return tensor

    def copy(self, name: str, write: Callable[[memoryview], None], rows: slice | None = None) -> None:
        """Pass a tensor's bytes to `write`, chunk by chunk: all of them, or those of these rows."""
        entry = self.entries[name]
        first, left = 0, entry.nbytes
        if rows is not None:
            start, stop, _ = rows.indices(entry.shape[0])
            first, left = start * entry.row_nbytes, (stop - start) * entry.row_nbytes
        buffer = memoryview(bytearray(min(CHUNK, left)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._starts[name] + first)
            while left:
                part = buffer[: min(left, len(buffer))]
                _read_into(file, part, self.path)
                write(part)
                left -= len(part)


class Writer:
    """A new file, under the name `<path>.partial` until it is complete and on the disk.

    A context manager: leaving it without an error checks that everything was written, waits for the
    disk and gives the file its name; an error leaves the partial file, which no reader takes for a checkpoint.

    Args:
        entries: by name, in the order of the data.
        progress: called with a number of bytes after each write.
    """

    def __init__(
        self,
        path: str | Path,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str] | None = None,
        progress: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        self.path, self.entries, self._progress = Path(path), dict(entries), progress
        text = header(entries, metadata)
        self._starts, position = {}, len(text)
        for name, entry in self.entries.items():
            self._starts[name] = position
            position += entry.nbytes
        self._missing = position - len(text)
        self._file = open(partial(self.path), "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            self._write(memoryview(text))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is not None:
                return
            if self._missing:
                raise RuntimeError(f"{self.path}: {self._missing:,} bytes of its tensors were not written")
            os.fsync(self._file.fileno())
        rename(self.path)

    def copy(self, reader: Reader, name: str, rows: slice | None = None) -> None:
        """A tensor of another file, byte by byte, or these rows of it to the same place."""
        first = 0 if rows is None else rows.indices(self.entries[name].shape[0])[0] * self.entries[name].row_nbytes
        self._file.seek(self._starts[name] + first)
        reader.copy(name, self._add, rows)

    def rows(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Rows of a tensor, from this one on; each row is written once."""
        entry = self.entries[name]
        if tensor.dtype != DTYPES[entry.dtype]:
            raise TypeError(f"{name!r} is {entry.dtype}, got {tensor.dtype}")
        self._file.seek(self._starts[name] + first * entry.row_nbytes)
        self._add(_bytes(tensor.contiguous()))

    def _add(self, data: memoryview) -> None:
        self._write(data)
        self._missing -= len(data)
        self._progress(len(data))

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]


def header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Length and header of a file with these tensors."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, entry in entries.items():
        offsets = [position, position + entry.nbytes]
        content[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    return len(text).to_bytes(8, "little") + text


def partial(path: Path) -> Path:
    """What a file is called until it is complete."""
    return path.with_name(f"{path.name}.partial")


def rename(path: Path) -> None:
    """Give a partial file its name, on the disk too."""
    os.replace(partial(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def _read_into(file: Any, buffer: memoryview, path: Path) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError(f"{path} ended early: it was changed while it was read")
        buffer = buffer[count:]
