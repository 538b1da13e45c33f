"""Attention over dense keys: the plain one against float64, and where flash_attn comes from."""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from support.kernels import PagedContext, within_twice

from llava_engine.errors import KernelsNotBuilt
from llava_engine.kernels.varlen_attention import (
    flash_attn_varlen_attention,
    flash_takes,
    plain_varlen_attention,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 10), (5, 1, 16)], ids=str)
@pytest.mark.parametrize(
    "lengths", [[(9, 9)], [(3, 17), (8, 8), (1, 12), (5, 6)], [(2, 2), (0, 3), (1, 1)]], ids=str
)
def test_plain_is_attention_written_out(
    lengths: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    context = PagedContext(lengths, heads, dtype, torch.Generator().manual_seed(3))
    new, contexts = zip(*lengths, strict=True)
    out = plain_varlen_attention(
        context.q,
        torch.cat(context.keys),
        torch.cat(context.values),
        torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(contexts)], dtype=torch.int32),
        max(new),
        max(contexts),
        context.scale,
    )
    within_twice(out, context.expected(dtype), context.expected(torch.float64), floor=1e-6)


def test_flash_takes_sixteen_bits_and_heads_of_eights() -> None:
    """As flash_attn 2's own checks have it (csrc/flash_attn/flash_api.cpp)."""
    for dtype, dim in ((torch.float16, 64), (torch.bfloat16, 128), (torch.float16, 256)):
        assert flash_takes(dtype, dim)
    for dtype, dim in ((torch.float32, 64), (torch.float16, 20), (torch.float16, 264)):
        assert not flash_takes(dtype, dim)


def test_without_flash_attn_one_error_says_what_to_install() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed here")
    with pytest.raises(KernelsNotBuilt, match=r"not installed.*llava-engine\[flash\]"):
        flash_attn_varlen_attention()


def test_a_flash_attn_for_another_torch_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ImportError("undefined symbol: _ZN3c105ErrorC2ENS")

    def broken(name: str) -> None:
        raise cause

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(KernelsNotBuilt, match="cannot be loaded into torch") as raised:
        flash_attn_varlen_attention()
    assert raised.value.__cause__ is cause


def test_flash_attn_is_called_as_its_signature_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of flash_attn 2.8's signature, which computes by the definition."""

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        assert causal and dropout_p == 0.0 and softmax_scale is not None
        return plain_varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        )

    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    attention = flash_attn_varlen_attention()
    context = PagedContext([(3, 7)], (4, 2, 8), torch.float32, torch.Generator().manual_seed(3))
    out = attention(
        context.q,
        context.keys[0],
        context.values[0],
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0, 7], dtype=torch.int32),
        3,
        7,
        context.scale,
    )
    torch.testing.assert_close(out, context.expected(torch.float32))
