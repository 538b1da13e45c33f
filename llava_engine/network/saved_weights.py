"""Matrices that transformers saved as bitsandbytes quantised them: NF4 or 8 bits.

What stands beside X.weight: in 4 bits X.weight.absmax, .quant_map, .nested_absmax,
.nested_quant_map and .quant_state.bitsandbytes__nf4, which is JSON; in 8 bits X.SCB and
X.weight_format. All of it is checked before any memory is taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from llava_engine.errors import UnsupportedModel, WeightsError
from llava_engine.kernels.dequantize import BLOCK, CODEBOOK, GROUP
from llava_engine.network.safetensors_file import StoredTensor
from llava_engine.network.tensor_reader import Place
from llava_engine.quant import Format, QuantisedWeight, fits
from llava_engine.quant.int8 import Int8Weight
from llava_engine.quant.nf4 import Nf4Weight, dequantize_flat

_STATE = ".quant_state.bitsandbytes__"
_SCB = "SCB"
_FORMATS = ("weight_format", "weight_state")  # of SCB's values; rows as they are is the only one
_MOST_STATE_BYTES = 1 << 14
_ALIGNED = 16

Stored = dict[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class SavedWeight:
    """A quantised matrix of a file.

    shape: outputs, inputs. tensors: what is read of it, by the last part of the names.
    offset: of NF4's scales.
    """

    format: Format
    shape: tuple[int, int]
    tensors: Stored
    offset: float = 0.0

    @property
    def stacks(self) -> bool:
        """Whether its rows can be those of a quantised product."""
        return fits(self.format, self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that reading takes, each tensor's rounded up."""
        return sum(-(-stored.nbytes // _ALIGNED) * _ALIGNED for stored in self.tensors.values())

    def views(self, room: torch.Tensor) -> dict[str, torch.Tensor]:
        """Dense tensors, by the names of `tensors`, within uint8 [nbytes]."""
        found, start = {}, 0
        for name, stored in self.tensors.items():
            dtype = _DTYPES[name, self.format]
            found[name] = room[start : start + stored.nbytes].view(dtype)
            start += -(-stored.nbytes // _ALIGNED) * _ALIGNED
        return found

    def places(self, room: torch.Tensor) -> list[Place]:
        """What to read to fill `views`."""
        views = self.views(room)
        return [(stored, views[name]) for name, stored in self.tensors.items()]

    def weight(self, room: torch.Tensor) -> QuantisedWeight:
        """The matrix out of filled `views`, which it shares memory with; if it `stacks`."""
        views = self.views(room)
        if self.format == "int8":
            return Int8Weight(views["weight"].view(self.shape), views[_SCB])
        return Nf4Weight.from_flat(
            views["weight"],
            views["absmax"],
            views["nested_quant_map"],
            views["nested_absmax"],
            self.offset,
            inputs=self.shape[1],
        )

    def dequantize(self, room: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in `dtype`, out of filled `views`."""
        if self.stacks:
            return self.weight(room).dequantize(dtype)
        views = self.views(room)
        return dequantize_flat(
            views["weight"],
            views["absmax"],
            views["nested_quant_map"],
            views["nested_absmax"],
            self.offset,
            shape=self.shape,
            dtype=dtype,
        )


_DTYPES = {
    ("weight", "nf4"): torch.uint8,
    ("absmax", "nf4"): torch.uint8,
    ("nested_absmax", "nf4"): torch.float32,
    ("nested_quant_map", "nf4"): torch.float32,
    ("weight", "int8"): torch.int8,
    (_SCB, "int8"): torch.float32,
}


def take_saved_weights(stored: Stored, format: Format) -> dict[str, SavedWeight]:
    """The matrices in `format`, nf4 or int8, by the names of their weights; all that belongs to
    them is taken out of `stored`.

    Raises WeightsError where something is missing or has not the size that goes with the rest, and
    UnsupportedModel for other ways to quantise than blocks of 64 with double quantisation.
    """
    if format == "int8":
        names = [name.removesuffix(_SCB) for name in stored if name.endswith(f".{_SCB}")]
        return {f"{name}weight": _take_int8(stored, name) for name in names}
    states = [name for name in stored if _STATE in name]
    return {name.partition(_STATE)[0]: _take_nf4(stored, name) for name in states}


def _take_int8(stored: Stored, prefix: str) -> SavedWeight:
    weight = _take(stored, f"{prefix}weight", "I8")
    if len(weight.shape) != 2:
        raise WeightsError(f"tensor {weight.name} is no matrix")
    for name in _FORMATS:
        layout = stored.pop(prefix + name, None)
        if layout is not None and any(_bytes(layout)):
            raise UnsupportedModel(f"tensor {layout.name}: only rows as they are can be read")
    outputs, inputs = weight.shape
    scb = _take(stored, prefix + _SCB, "F32", (outputs,))
    return SavedWeight("int8", (outputs, inputs), {"weight": weight, _SCB: scb})


def _take_nf4(stored: Stored, state_name: str) -> SavedWeight:
    name, _, kind = state_name.partition(_STATE)
    state_tensor = stored.pop(state_name)
    where = f"tensor {state_tensor.name}"
    if kind != "nf4":
        raise UnsupportedModel(f"{where}: of bitsandbytes' 4-bit types only nf4 is implemented")
    state = _state(state_tensor)
    shape = state.get("shape")
    if not _is_matrix(shape):
        raise WeightsError(f"{where} tells no shape of a matrix")
    outputs, inputs = shape
    if state.get("blocksize") != BLOCK:
        raise UnsupportedModel(
            f"{where}: blocks of {state.get('blocksize')!r} weights, not {BLOCK}"
        )
    offset = state.get("nested_offset")
    if offset is None:
        raise UnsupportedModel(
            f"{where}: NF4 without double quantisation (bnb_4bit_use_double_quant) is not read"
        )
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise WeightsError(f"{where} has no valid nested_offset")
    if state.get("nested_blocksize") != GROUP or state.get("nested_dtype") != "float32":
        raise UnsupportedModel(f"{where}: scales in groups other than of {GROUP} in float32")
    codebook = _take(stored, f"{name}.quant_map", "F32", (len(CODEBOOK),))
    if _bytes(codebook) != torch.tensor(CODEBOOK).numpy().tobytes():
        raise UnsupportedModel(f"tensor {codebook.name} has other levels than NF4's")
    blocks = -(-outputs * inputs // BLOCK)
    sizes = {
        "weight": (name, "U8", (-(-outputs * inputs // 2), 1)),
        "absmax": (f"{name}.absmax", "U8", (blocks,)),
        "nested_absmax": (f"{name}.nested_absmax", "F32", (-(-blocks // GROUP),)),
        "nested_quant_map": (f"{name}.nested_quant_map", "F32", (256,)),
    }
    tensors = {key: _take(stored, *wanted) for key, wanted in sizes.items()}
    return SavedWeight("nf4", (outputs, inputs), tensors, offset)


def _take(
    stored: Stored, name: str, dtype: str, shape: tuple[int, ...] | None = None
) -> StoredTensor:
    tensor = stored.pop(name, None)
    if tensor is None:
        raise WeightsError(f"the checkpoint lacks tensor {name}")
    if tensor.dtype != dtype:
        raise WeightsError(f"tensor {tensor.name} is of type {tensor.dtype}, not {dtype}")
    if shape is not None and tensor.shape != shape:
        raise WeightsError(
            f"tensor {tensor.name} has shape {list(tensor.shape)}; "
            f"what stands beside it asks for {list(shape)}"
        )
    return tensor


def _state(stored: StoredTensor) -> dict[str, Any]:
    try:
        state = json.loads(_bytes(stored))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"tensor {stored.name} is no valid JSON") from error
    if not isinstance(state, dict):
        raise WeightsError(f"tensor {stored.name} must hold a JSON object")
    return state


def _bytes(stored: StoredTensor) -> bytes:
    if stored.nbytes > _MOST_STATE_BYTES:
        raise WeightsError(f"tensor {stored.name} is too long")
    buffer = bytearray(stored.nbytes)
    stored.file.read(memoryview(buffer), stored.offset)
    return bytes(buffer)


def _is_matrix(shape: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    )
