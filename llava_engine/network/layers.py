"""Parts that the vision tower, the projector and the decoder share.

A layer holds plain tensors, uninitialised until network.weights fills them. `slots` names the views
of them that a checkpoint's tensors go to, which is how several tensors become one fused matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F

from llava_engine.kernels import linear, quant_linear
from llava_engine.kernels.library import using_references
from llava_engine.kernels.norm import add_layer_norm, layer_norm
from llava_engine.kernels.quant_linear import QuantMatrix, dequantize_rows
from llava_engine.quant import Format, QuantisedWeight
from llava_engine.quant.fp8 import Fp8Weight

Slot: TypeAlias = tuple[str, torch.Tensor]
"""A tensor's name in a checkpoint as published, and the view that it is copied to."""


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
"""The activations that are implemented, under transformers' names."""


FormatOf: TypeAlias = Callable[[Iterable[str], int], Format | None]
"""The format of a decoder's product, by the names of its matrices and its inputs."""


def unquantised(names: Iterable[str], inputs: int) -> None:
    """The FormatOf that leaves every product in the model's own type."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in which type a model's tensors are made.

    format: of the products that may be quantised, which are the decoder's.
    """

    device: torch.device
    dtype: torch.dtype
    format: FormatOf = unquantised

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)


class Slab:
    """One piece of memory for the like tensors of all layers: the allocator rounds each piece up to
    whole megabytes, which is 4 % of a model in NF4.

    count: of the tensors, of which the first says what all are like.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[torch.Tensor] | None = None

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, here."""
        if self._free is None:
            self._free = list(tensor.new_empty(self._count, *tensor.shape).unbind())
        return self._free.pop().copy_(tensor)


class Linear:
    """y = x @ weight.T + bias, of `inputs` to `outputs` numbers. bias: [outputs] or None.

    The weight is there once: as `weight` [outputs, inputs], or where there is a format as
    `quantised`, or as `matrix`, in `slab`, where the compiled kernels take that. apart: as
    QuantMatrix has it.
    fp8: what quantize_for_prefill made, `weight` once more in 8 bits, or the `matrix` itself.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        place: Placement,
        format: Format | None = None,
        apart: int = 1,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.format = format
        self.bias = place.empty(outputs) if bias else None
        self.quantised: QuantisedWeight | None = None
        self.matrix: QuantMatrix | None = None
        self.fp8: Fp8Weight | None = None
        self.slab = Slab(1)
        self._place, self._apart = place, apart
        self._weight = None if format else place.empty(outputs, inputs)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of a product without a format."""
        assert self._weight is not None, "the weight is quantised"
        return self._weight

    @property
    def fused_rows(self) -> int:
        """The most rows that the fused ops of a decoding step take; maybe 0."""
        if self.format is None:
            return linear.most_rows(self.weight)
        if not self._compiled():
            return 0
        packed = self.format == "nf4"
        return quant_linear.most_rows(self.outputs, self.inputs, self._place.device, packed=packed)

    def load(self, weight: QuantisedWeight) -> None:
        """Take the weight of a product with a format."""
        if self.fused_rows:
            matrix = weight.matrix(self._apart)
            self.matrix = replace(matrix, weight=self.slab.keep(matrix.weight))
        else:
            self.quantised = weight

    def _compiled(self) -> bool:
        """Whether kernels multiply; their references would have to unpack the weight each time."""
        place = self._place
        return place.device.type == "cuda" and place.dtype.itemsize == 2 and not using_references()

    @property
    def quantised_nbytes(self) -> int:
        """Bytes of the weight of a product with a format."""
        if self.matrix is not None:
            return self.matrix.weight.nbytes + self.matrix.scales.nbytes
        return 0 if self.quantised is None else self.quantised.nbytes

    @property
    def in_fp8(self) -> bool:
        """Whether the weight is quantised to fp8, as kernels take it."""
        return self.format == "fp8" and self.matrix is not None

    def quantize_for_prefill(self) -> None:
        """Make `fp8` of a weight that is whole or a matrix in fp8, unless it is there: captured
        graphs have its address."""
        if self.fp8 is None:
            matrix = self.matrix
            if matrix is None:
                self.fp8 = Fp8Weight.of(self.weight)
            else:
                self.fp8 = Fp8Weight(matrix.weight, matrix.scales)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.whole(x.dtype), self.bias)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [outputs, inputs], dequantised to `dtype` where there is a format."""
        if self.format is None:
            return self.weight
        if self.matrix is not None:
            out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self._place.device)
            dequantize_rows(out, self.matrix)
            return out
        assert self.quantised is not None, "the weight is not loaded"
        return self.quantised.dequantize(dtype)

    def slots(self, parts: dict[str, int]) -> Iterator[Slot]:
        """The checkpoint's tensors stacked here, but for a quantised weight; `parts` has the
        matrices' names and output sizes."""
        start = 0
        for name, outputs in parts.items():
            if self.format is None:
                yield f"{name}.weight", self.weight[start : start + outputs]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[start : start + outputs]
            start += outputs


class LayerNorm:
    """Layer normalisation over the last dimension of `size`."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        self.weight = place.empty(size)
        self.bias = place.empty(size)
        self.eps = eps

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor, pending: torch.Tensor | None = None
    ) -> None:
        """x += pending where there is such, then out = norm(x). All [T, size]; out may not be x
        with pending."""
        if pending is None:
            layer_norm(out, x, self.weight, self.bias, self.eps)
        else:
            add_layer_norm(out, x, pending, self.weight, self.bias, self.eps)

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.weight", self.weight
        yield f"{name}.bias", self.bias
