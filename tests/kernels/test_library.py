"""Whether compiled kernels are there is asked once, and never answered by a silent fallback."""

from __future__ import annotations

import pytest
import torch

import llava_engine.kernels.activation  # noqa: F401  (declares its op)
import llava_engine.kernels.norm  # noqa: F401
from llava_engine.errors import KernelsNotBuilt
from llava_engine.kernels.library import require_kernels


def test_the_cpu_needs_nothing_built() -> None:
    require_kernels(torch.device("cpu"))


def test_a_device_needs_a_kernel_for_every_op() -> None:
    """With stand-ins registered for another device, op by op."""
    device = torch.device("xpu")
    declared = {
        name.removeprefix("llava_engine::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("llava_engine::")
    }
    assert {"rms_norm", "silu_mul"} <= declared
    with torch.library._scoped_library("llava_engine", "IMPL") as library:
        for name in sorted(declared):
            with pytest.raises(KernelsNotBuilt, match=name):
                require_kernels(device)
            library.impl(name, lambda *arguments: None, "XPU")
        require_kernels(device)
    with pytest.raises(KernelsNotBuilt, match="reference"):
        require_kernels(device)
