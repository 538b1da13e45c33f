"""Random quantised matrices, made without quantising anything, where a generator is."""

from __future__ import annotations

import torch

from llava_engine.kernels.dequantize import BLOCK, GROUP
from llava_engine.kernels.fp8 import FP8
from llava_engine.quant import Format, QuantisedWeight
from llava_engine.quant.fp8 import Fp8Weight
from llava_engine.quant.int8 import Int8Weight
from llava_engine.quant.nf4 import Nf4Weight

FORMATS: tuple[Format, ...] = ("int8", "fp8", "nf4")


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
