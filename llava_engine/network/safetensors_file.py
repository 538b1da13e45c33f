"""A safetensors file: its header, believed only as far as the file bears it out, and its bytes.

Files are read by position, never mapped: one that is cut short while it is read then gives an error
instead of SIGBUS. The format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_engine.errors import WeightsError

HEADER_LIMIT = 16 << 20
"""Bytes of the longest header that is read; that of a LLaVA of 13B has 0.1 MB."""

_MOST_DIMENSIONS = 64
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: its type as the format names it, and where in the file its bytes are."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open file; `tensors` are those that its header lists, by name."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError where the file cannot be read or its header does not fit it."""
        self.name = path.name
        with self._reading():
            self._descriptor = os.open(path, os.O_RDONLY)
            try:
                self.tensors = self._read_header()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; nobody may be reading."""
        os.close(self._descriptor)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into`, bytes, with what stands from `offset` on; any number of threads may.

        Raises WeightsError where the file ends before that or cannot be read.
        """
        done = 0
        with self._reading():
            while done < len(into):
                count = os.preadv(self._descriptor, [into[done:]], offset + done)
                if count == 0:
                    raise ValueError("the file ends before its tensors do")
                done += count

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # its text has the path
            raise WeightsError(f"{self.name} is corrupt, truncated or unreadable") from error
        except (ValueError, RecursionError) as error:
            raise WeightsError(
                f"{self.name} is corrupt, truncated or unreadable: {error}"
            ) from error

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > min(HEADER_LIMIT, size - 8):
            raise ValueError(f"a header of {length} bytes, in a file of {size}")
        text = self._bytes(8, length).decode()
        if not text.startswith("{"):
            raise ValueError("the header is no JSON object")
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is not a table of texts")
        tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
        # Tensors stand one behind another up to the file's end: none overlaps, nothing is between.
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                raise ValueError(f"tensor {tensor.name} overlaps another or leaves a gap")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"the tensors end at byte {end}, the file at {size}")
        return tensors

    def _bytes(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read(memoryview(buffer), offset)
        return bytes(buffer)

    def _tensor(self, name: str, entry: Any, start: int) -> StoredTensor:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name} is not told as dtype, shape and data_offsets")
        name.encode()  # raises for halves of surrogate pairs, which JSON can hold
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"tensor {name} is of an unknown type")
        if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has no valid shape")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {name} has no valid data_offsets")
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(
                f"tensor {name} has {end - begin} bytes, which is not what its {dtype} {shape} take"
            )
        return StoredTensor(self, name, dtype, tuple(shape), start + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose names is there twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    return table


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of whole numbers from 0 up (True is none)."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def narrowed_bytes(directory: Path) -> int:
    """How many bytes less a directory's files would have with 16 bits instead of wider floats, into
    which they are read on a GPU. A file that is broken counts as it is: loading it tells why."""
    total = 0
    for path in directory.glob("*.safetensors"):
        try:
            with SafetensorsFile(path) as file:
                total += sum(
                    tensor.nbytes - 2 * math.prod(tensor.shape)
                    for tensor in file.tensors.values()
                    if tensor.dtype in ("F32", "F64")
                )
        except WeightsError:
            continue
    return total
