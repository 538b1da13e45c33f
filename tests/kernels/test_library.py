"""Whether compiled kernels are there is asked once, and never answered by a silent fallback."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llava_engine.kernels.norm  # noqa: F401  (declares its ops)
from llava_engine.errors import KernelsNotBuilt
from llava_engine.kernels import library
from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.library import references, require_kernels


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


def test_a_missing_library_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(KernelsNotBuilt, match="nvcc.*reference") as raised:
        require_kernels(torch.device("cuda"))
    assert str(tmp_path) not in str(raised.value)


def test_a_library_that_does_not_load_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "broken.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(KernelsNotBuilt, match="build it again") as raised:
        require_kernels(torch.device("cuda"))
    assert isinstance(raised.value.__cause__, OSError)
    assert str(tmp_path) not in str(raised.value)


def test_references_hold_in_their_block_and_thread_alone() -> None:
    """With a stand-in for the compiled kernel that writes sevens."""
    gate_up = torch.ones(1, 4)

    def run(into: list[float]) -> None:
        out = torch.zeros(1, 2)
        silu_mul(out, gate_up)
        into.append(float(out[0, 0]))

    def sevens(out: torch.Tensor, gate_up: torch.Tensor) -> None:
        out.fill_(7)

    with torch.library._scoped_library("llava_engine", "IMPL") as stand_in:
        stand_in.impl("silu_mul", sevens, "CPU")
        inside: list[float] = []
        elsewhere: list[float] = []
        after: list[float] = []
        with references():
            run(inside)
            thread = threading.Thread(target=run, args=(elsewhere,))
            thread.start()
            thread.join()
        run(after)
    assert inside == [pytest.approx(1 / (1 + 2.718281828**-1))]
    assert elsewhere == after == [7]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (209, "no code for cuda:1: it is built for 90a"),
        (35, "driver of cuda:1 is too old"),
        (999, "gone"),
    ],
    ids=["no-code", "old-driver", "other"],
)
def test_a_device_that_cannot_run_the_code_is_one_clear_error(
    error: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library's own answer; its numbers are cudaError_t's."""
    answers = SimpleNamespace(
        llava_engine_architectures=lambda: b"90a",
        llava_engine_error_text=lambda error: b"gone",
        llava_engine_probe=lambda device: error if device == 1 else 0,
    )
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: answers)
    monkeypatch.setattr(library, "_loaded", True)
    with pytest.raises(KernelsNotBuilt, match=said):
        require_kernels(torch.device("cuda:1"))
