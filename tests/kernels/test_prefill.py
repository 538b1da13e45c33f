"""A step in one call, on the CPU: the ops that it is made of, in their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.prefill import (
    DRAWN,
    GREEDY,
    PENALISED,
    PLACES,
    REFUSED,
    WANTED,
    composed,
    in_one_call,
    make_caches,
    make_step,
)

from llava_engine.kernels.prefill import unpack
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlavaModel:
    made: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(made, seed=5)
    return load_model(made, device=torch.device("cpu"), dtype=torch.float32)


def test_what_is_packed_is_unpacked(model: LlavaModel) -> None:
    step = make_step(model, settings=PENALISED)
    there = unpack(step.uploaded, step.sizes)
    for name, array, tensor in zip(step.arrays._fields, step.arrays, there, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array, err_msg=name, strict=True)


@pytest.mark.parametrize("wanted", [WANTED, WANTED[:1], []], ids=str)
@pytest.mark.parametrize("places", [PLACES, []], ids=["features", "text"])
@pytest.mark.parametrize("settings", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalty"])
@torch.inference_mode()
def test_it_is_its_parts(
    model: LlavaModel,
    settings: list[tuple[float, int, float, float]],
    places: list[tuple[int, int, int]],
    wanted: list[int],
) -> None:
    step = make_step(model, settings=settings, places=places, wanted=wanted)
    caches, their_caches = make_caches(model, step), make_caches(model, step)
    in_one_call(model, step, caches)
    expected = composed(model, step, their_caches)
    assert torch.equal(step.tokens, expected)
    assert ((step.tokens >= 0) & (step.tokens < model.config.text.vocab_size)).all()
    for ours, theirs in zip(caches, their_caches, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
@torch.inference_mode()
def test_sizes_that_do_not_belong_together_are_refused(model: LlavaModel, change) -> None:
    step = make_step(model)
    with pytest.raises((ValueError, RuntimeError)):
        in_one_call(model, change(step), make_caches(model, step))


def test_schema_and_fake(model: LlavaModel) -> None:
    step = make_step(model, settings=PENALISED)
    decoder = model._decoder.in_one_call(None)
    assert decoder is not None
    torch.library.opcheck(
        torch.ops.llava_engine.prefill_step.default,
        (
            step.tokens,
            step.uploaded,
            step.sizes,
            step.embedding,
            step.features,
            step.feature_rows,
            *make_caches(model, step),
            decoder.weights,
            decoder.scales,
            decoder.fp8,
            decoder.final_norm,
            decoder.cos_sin,
            step.head,
            decoder.workspace,
            step.max_query_len,
            decoder.scale,
            decoder.eps,
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
