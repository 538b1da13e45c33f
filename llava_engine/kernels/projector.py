"""The two-layer projector from picture features to the decoder's embedding rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_engine.kernels.library import define


def project(
    out: torch.Tensor,
    features: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> None:
    """out = gelu(features @ w1.T + b1) @ w2.T + b2, with the exact (erf) GELU.

    features: [n, patches, in], of n pictures; each one's rows are dense, and the pictures may lie
    any number of whole rows apart, so that class tokens are left out by addressing. out:
    [n, patches, hidden], dense. w1: [hidden, in]; w2: [hidden, hidden]; b1, b2: [hidden] or None.
    All of one dtype (Liu et al. 2023, LLaVA-1.5).
    """
    _project(out, features, w1, b1, w2, b2)


def _project_reference(
    out: torch.Tensor,
    features: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> None:
    out.copy_(F.linear(F.gelu(F.linear(features, w1, b1)), w2, b2))


_project = define(
    "project(Tensor(a!) out, Tensor features, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2) -> ()",
    _project_reference,
)
