"""Weights in e4m3: how far products with them can be off, where they can be had, what they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import make_checkpoint

from llava_engine.errors import UnsupportedModel
from llava_engine.network.weights import load_model
from llava_engine.quant.fp8 import Fp8Weight, fp8_linear, require_fp8

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

HALF_STEP = 2.0**-4  # of an e4m3 number, relative
HALF_LEAST = 2.0**-10  # half of the least e4m3 number


def most_off(x: torch.Tensor) -> torch.Tensor:
    """What quantising each row of x can change its elements by, float64."""
    wide = x.double().abs()
    scales = wide.amax(dim=1, keepdim=True) / 448
    # Scaling is in float32, whose rounding is nothing beside e4m3's.
    return torch.maximum(wide * HALF_STEP, scales * HALF_LEAST) * (1 + 1e-5)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def outliers(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, a few of them fifty times as large."""
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.02] *= 50
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_what_it_was_to_half_a_step(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = outliers(generator, 20, 96, dtype=dtype)
    kept = Fp8Weight.of(weight)
    back = kept.values.double() * kept.scales.double().unsqueeze(1)
    assert ((back - weight.double()).abs() <= most_off(weight)).all()
    assert kept.values.dtype == torch.float8_e4m3fn and kept.scales.shape == (20,)
    assert kept.nbytes == 20 * 96 + 20 * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantising_rounds_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    kept = Fp8Weight.of(outliers(generator, 20, 96, dtype=torch.float32))
    exact = kept.values.double() * kept.scales.double().unsqueeze(1)
    assert torch.equal(kept.dequantize(dtype), exact.float().to(dtype))


def test_a_stack_is_its_parts(generator: torch.Generator) -> None:
    plain = [outliers(generator, rows, 40, dtype=torch.float16) for rows in (3, 1, 9)]
    stacked = Fp8Weight.stack([Fp8Weight.of(part) for part in plain])
    whole = Fp8Weight.of(torch.cat(plain))
    assert torch.equal(stacked.dequantize(torch.float32), whole.dequantize(torch.float32))
    assert (stacked.outputs, stacked.inputs) == (13, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (17, 512, 40)], ids=str)
def test_products_err_by_no_more_than_their_factors_allow(
    shape: tuple[int, int, int], biased: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rows, inputs, outputs = shape
    x = outliers(generator, rows, inputs, dtype=dtype)
    weight = outliers(generator, outputs, inputs, dtype=dtype)
    bias = outliers(generator, outputs, dtype=dtype) if biased else None
    ours = fp8_linear(x, Fp8Weight.of(weight), bias)
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size, wide = x.double().abs(), weight.double().abs()
    bound = most_off(x) @ (wide + most_off(weight)).T + size @ most_off(weight).T
    # The sums' own rounding, and the result's.
    bound += inputs * 2.0**-23 * (size @ wide.T + truth.abs())
    bound += torch.finfo(dtype).eps * (truth.abs() + bound)
    assert ours.dtype == dtype and ours.shape == truth.shape
    assert ((ours.double() - truth).abs() <= bound).all()


def test_products_of_what_e4m3_has_are_exact(generator: torch.Generator) -> None:
    """Whole numbers up to 8 beside 448, which makes every scale 1."""
    x = torch.randint(-8, 9, (5, 24), generator=generator).float()
    weight = torch.randint(-8, 9, (7, 24), generator=generator).float()
    x[:, 0] = weight[:, 1] = 448
    assert torch.equal(fp8_linear(x, Fp8Weight.of(weight)), x @ weight.T)


def test_only_a_16_bit_model_on_hopper_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    require_fp8(GPU, torch.float16, references=False)
    require_fp8(GPU, torch.bfloat16, references=False)
    with pytest.raises(UnsupportedModel, match="16 bits.*float32"):
        require_fp8(GPU, torch.float32, references=False)
    with pytest.raises(UnsupportedModel, match="needs a GPU.*cpu.*reference"):
        require_fp8(CPU, torch.float16, references=False)
    for capability in ((8, 9), (10, 0)):
        with pytest.raises(UnsupportedModel, match=rf"cuda:1 has {capability[0]}\.{capability[1]}"):
            require_fp8(GPU, torch.float16, references=False)


def test_the_references_take_anything() -> None:
    require_fp8(CPU, torch.float32, references=True)


def test_a_model_keeps_copies_of_its_decoders_products_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    before = model.nbytes
    model.quantize_for_prefill()
    products = {
        name: view
        for name, view in model.slots()
        if name.startswith("language_model.model.layers.") and view.dim() == 2
    }
    assert len(products) == 2 * 7
    copies = sum(view.numel() + 4 * len(view) for view in products.values())
    assert model.nbytes == before + copies
    layer = model._decoder._layers[1]
    for product, parts in ((layer._qkv, "qkv"), (layer._down, ("down",))):
        names = [f"{part}_proj" for part in parts]
        whole = torch.cat(
            [
                view
                for name, view in products.items()
                if ".1." in name and name.split(".")[-2] in names
            ]
        )
        assert torch.equal(whole, product.weight) and product.fp8 is not None
        back = product.fp8.values.double() * product.fp8.scales.double().unsqueeze(1)
        assert ((back - whole.double()).abs() <= most_off(whole)).all()
    kept = layer._qkv.fp8
    model.quantize_for_prefill()
    assert layer._qkv.fp8 is kept, "captured graphs have its address"
