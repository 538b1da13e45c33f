"""Attention of every token to every token of its picture, by torch's kernels; nothing is masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q @ k.T / sqrt(dim)) @ v of each picture and head.

    q, k, v: [n, heads, tokens, dim], which may be parts of one matrix [n, tokens, 3, heads, dim];
    the result has their shape, and q's order of dimensions in memory. By cuDNN where it takes them:
    on an H100 it needs half of flash's time. It is called by its operator, since choosing a backend
    (torch.nn.attention.sdpa_kernel) sets flags of the whole process, under other threads' feet. It
    plans for some 50 ms at the first call of a thread with new sizes.
    """
    if q.is_cuda:
        asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        if torch.backends.cuda.can_use_cudnn_attention(asked):
            attended: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, False
            )[0]
            return attended
    return F.scaled_dot_product_attention(q, k, v)
