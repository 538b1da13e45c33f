"""Marks for what needs a CUDA device and the compiled kernels (bench/gpu.sh runs it)."""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
