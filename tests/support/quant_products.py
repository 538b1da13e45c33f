"""Random quantised matrices and layers, made without quantising, where a generator is."""

from __future__ import annotations

import torch
from support.kernels import within_twice

from llava_engine.kernels.attention import attention_workspace
from llava_engine.kernels.decoder import DecoderTensors, decoder_layers
from llava_engine.kernels.dequantize import BLOCK, GROUP
from llava_engine.kernels.fp8 import FP8
from llava_engine.quant import Format, QuantisedWeight
from llava_engine.quant.fp8 import Fp8Weight
from llava_engine.quant.int8 import Int8Weight
from llava_engine.quant.nf4 import Nf4Weight

FORMATS: tuple[Format, ...] = ("int8", "fp8", "nf4")
FLOOR = 1e-6
WORST = 0.02  # where an element of the plain result has hardly an error


class Errors:
    """Results of all numbers of rows, whose errors are judged together: those of a few elements are
    chance, since the weights are rounded in one of the two only."""

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, ...]] = []

    def add(self, ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
        """None may be much worse, either: a row that is wrong does not hide behind others."""
        ours, plain, truth = (x.double().flatten() for x in (ours, plain, truth))
        if len(truth):
            assert (ours - truth).abs().max() <= 8 * (plain - truth).abs().max() + WORST
        self._seen.append((ours, plain, truth))

    def check(self) -> None:
        within_twice(*(torch.cat(x) for x in zip(*self._seen, strict=True)), FLOOR)


def random_weight(
    kind: Format, outputs: int, inputs: int, generator: torch.Generator
) -> QuantisedWeight:
    """[outputs, inputs], elements of about inputs ** -0.5, every row and block with a scale."""
    device = generator.device

    def some_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)

    def factors(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) * inputs**-0.5 + 1e-3

    if kind == "int8":
        return Int8Weight(some_bytes(outputs, inputs).view(torch.int8), 2 * factors(outputs))
    if kind == "fp8":
        values = torch.randn(outputs, inputs, generator=generator, device=device)
        return Fp8Weight((values * 100).clamp(-448, 448).to(FP8), factors(outputs) / 100)
    blocks = inputs // BLOCK
    phases = torch.arange(outputs, device=device) * blocks % GROUP  # as rows of one tensor have it
    code2 = torch.linspace(-1, 1, 256, device=device) ** 3
    scales2 = torch.stack(
        (
            factors(outputs),
            factors(outputs),
            torch.full((outputs,), 2 * inputs**-0.5, device=device),
            phases.float(),
        ),
        dim=1,
    )
    codes, absmax = some_bytes(outputs, inputs // 2), some_bytes(outputs, blocks)
    return Nf4Weight(codes, absmax, code2, scales2)


HIDDEN, WIDE, Q_HEADS, KV_HEADS = 256, 448, 4, 2
BLOCK_SIZE = 16


class Layers:
    """Two layers in a format, and the same in 16 bits, for kernels.decoder.decoder_layers.

    dim: of a head. whole: of the eight products that many come first which are not quantised.
    """

    def __init__(
        self,
        kind: Format,
        dtype: torch.dtype,
        generator: torch.Generator,
        *,
        dim: int = 64,
        whole: int = 0,
    ) -> None:
        self._generator, self._dtype, self._dim = generator, dtype, dim
        products = (
            ((Q_HEADS + 2 * KV_HEADS) * dim, HIDDEN, dim // 2),
            (HIDDEN, Q_HEADS * dim, 1),
            (2 * WIDE, HIDDEN, WIDE),
            (HIDDEN, WIDE, 1),
        )
        self._quantised: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        self._plain: list[torch.Tensor] = []
        for _ in range(2):
            for index, (outputs, inputs, apart) in enumerate(products):
                if index % 2 == 0:  # the norms stand before qkv and before gate and up
                    norm = self.random(HIDDEN)
                    self._quantised.append(norm)
                    self._plain.append(norm)
                weight = random_weight(kind, outputs, inputs, generator)
                plain = weight.dequantize(dtype)
                self._plain.append(plain)
                if len(self._scales) < whole:
                    self._quantised.append(plain)
                    self._scales.append(plain)
                    continue
                matrix = weight.matrix(apart)
                self._quantised.append(matrix.weight)
                self._scales.append(matrix.scales)
        self.final_norm = self.random(HIDDEN)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device).to(
            self._dtype
        )

    def run(
        self, rows: torch.Tensor, *, quantised: bool, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A prompt [T, HIDDEN] through the layers, in the weights' type or in another."""
        to = dtype or self._dtype
        weights = [
            x if x.dtype.itemsize == 1 else x.to(to)
            for x in (self._quantised if quantised else self._plain)
        ]
        device, count, dim = rows.device, len(rows), self._dim
        blocks = -(-count // BLOCK_SIZE)
        caches = torch.full(
            (2, 2, blocks, KV_HEADS, BLOCK_SIZE, dim), torch.nan, dtype=to, device=device
        )
        places = torch.arange(count, device=device)
        angles = places.unsqueeze(1) * 0.01 ** torch.linspace(0, 1, dim // 2, device=device)
        out = torch.full((count, HIDDEN), torch.nan, dtype=to, device=device)
        decoder = DecoderTensors(
            weights,
            self._scales if quantised else [],
            [],
            self.final_norm.to(to),
            torch.cat((angles.cos(), angles.sin()), dim=1),
            attention_workspace(Q_HEADS, KV_HEADS, dim, device),
            dim**-0.5,
            1e-5,
        )
        decoder_layers(
            out,
            rows.to(to, copy=True),
            list(caches[0]),
            list(caches[1]),
            decoder,
            places,
            places,
            torch.arange(blocks, device=device).int().unsqueeze(0),
            torch.tensor([0, count], device=device).int(),
            torch.tensor([count], device=device).int(),
            None,
            count,
        )
        return out
