"""A step in one call on the GPU is, bit for bit, what the ops give that it is made of."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU
from support.prefill import (
    DRAWN,
    GREEDY,
    LENGTHS,
    PENALISED,
    PLACES,
    REFUSED,
    WANTED,
    composed,
    in_one_call,
    make_caches,
    make_step,
)

from llava_engine.kernels.library import programmatic_launch
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model
from llava_engine.runtime.failures import MemoryErrors

pytestmark = NEEDS_GPU

TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1104,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaModel:
    made: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(made, seed=5, text_config=TEXT)
    return load_model(made, device=GPU, dtype=request.param)


@pytest.mark.parametrize("long", [[], [(700, 900)]], ids=["short", "long"])
@pytest.mark.parametrize("wanted", [WANTED, WANTED[:1], []], ids=str)
@pytest.mark.parametrize("places", [PLACES, []], ids=["features", "text"])
@pytest.mark.parametrize("settings", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalty"])
@torch.inference_mode()
def test_it_is_its_parts(
    model: LlavaModel,
    settings: list[tuple[float, int, float, float]],
    places: list[tuple[int, int, int]],
    wanted: list[int],
    long: list[tuple[int, int]],
) -> None:
    step = make_step(model, lengths=LENGTHS + long, settings=settings, places=places, wanted=wanted)
    expected_caches = make_caches(model, step)
    expected = composed(model, step, expected_caches)
    for overlap in (False, True):
        step.tokens.fill_(-7)
        caches = make_caches(model, step)
        with programmatic_launch(overlap):
            in_one_call(model, step, caches)
        assert torch.equal(step.tokens, expected)
        for ours, theirs in zip(caches, expected_caches, strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert ((expected >= 0) & (expected < model.config.text.vocab_size)).all()


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
@torch.inference_mode()
def test_sizes_that_do_not_belong_together_are_refused(model: LlavaModel, change) -> None:
    step = make_step(model)
    with pytest.raises(RuntimeError):
        in_one_call(model, change(step), make_caches(model, step))


@torch.inference_mode()
def test_memory_that_is_lacking_within_the_call_is_counted(model: LlavaModel) -> None:
    """torch's own error does not come through; the call works again when there is room."""
    step = make_step(model, lengths=[(1500, 1500), *LENGTHS])
    caches = make_caches(model, step)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)  # no more than there is
    taken = []
    try:
        for nbytes in (16 << 20, 2 << 20, 64 << 10, 512):
            with suppress(torch.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(nbytes, dtype=torch.uint8, device=GPU))
        errors = MemoryErrors(GPU)
        with pytest.raises(RuntimeError):
            in_one_call(model, step, caches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    taken.clear()
    assert errors.happened() and not errors.happened()
    in_one_call(model, step, caches)
    assert (step.tokens >= 0).all()
    assert not errors.happened()
