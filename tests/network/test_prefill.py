"""A whole step of a model, also where its decoder or attention is not what the one call is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.prefill import BLOCK_SIZE, LENGTHS, PENALISED, Step, composed, make_caches, make_step

from llava_engine.kernels.varlen_attention import plain_varlen_attention
from llava_engine.network.attention import DensePrefill, PrefillAttention
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model

CPU = torch.device("cpu")


def prefilled(model: LlavaModel, step: Step, dense: DensePrefill | None = None) -> list[int]:
    model.prefill(
        step.tokens,
        step.uploaded,
        step.sizes,
        step.features,
        step.feature_rows,
        *make_caches(model, step),
        step.max_query_len,
        dense,
    )
    return step.tokens.tolist()


@pytest.mark.parametrize("text", [{"attention_bias": True}, {"hidden_act": "gelu"}, {}], ids=str)
@torch.inference_mode()
def test_any_decoder(text: dict[str, Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=4, text_config=text)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    assert (model._decoder.in_one_call(None) is None) == bool(text)
    step = make_step(model, settings=PENALISED)
    expected = composed(model, step, make_caches(model, step)).tolist()
    assert prefilled(model, step) == expected


@torch.inference_mode()
def test_dense_attention(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=4)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    text = model.config.text
    step = make_step(model, settings=PENALISED)
    prefill = PrefillAttention(
        plain_varlen_attention,
        min_rows=2,
        num_kv_heads=text.num_kv_heads,
        key_bytes=2 * text.num_kv_heads * text.head_dim * 4,
    )
    new, contexts = zip(*LENGTHS, strict=True)
    dense = prefill.plan(new, contexts, step.arrays.block_table, BLOCK_SIZE, CPU)
    assert dense is not None and dense.num_paged == 1
    assert model._decoder.in_one_call(dense) is None
    expected = composed(model, step, make_caches(model, step)).tolist()
    assert prefilled(model, step, dense) == expected
