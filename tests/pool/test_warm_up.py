"""The CUDA context that is made beside the imports: which GPU's, and that it is let go."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llava_engine.pool import warm_up
from llava_engine.pool.stages import Stages
from llava_engine.pool.warm_up import warmed_up

INVALID_DEVICE = 101


class Driver:
    """The functions of libcuda that are used, for a machine with so many GPUs."""

    def __init__(self, gpus: int, *, fails: bool = False) -> None:
        self.gpus, self.fails = gpus, fails
        self.held: Counter[int] = Counter()
        self.retained: list[int] = []

    def cuInit(self, flags: int) -> int:
        return 100 if self.fails else 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, gpu: Any, index: int) -> int:
        gpu._obj.value = index
        return 0 if index < self.gpus else INVALID_DEVICE

    def cuDevicePrimaryCtxRetain(self, context: Any, gpu: Any) -> int:
        self.held[gpu.value] += 1
        self.retained.append(gpu.value)
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, gpu: Any) -> int:
        self.held[gpu.value] -= 1
        return 0


@pytest.mark.parametrize(
    ("gpus", "device", "woken"),
    [
        (1, "auto", [0]),
        (1, "cuda", [0]),
        (1, "cpu", []),
        (4, "auto", []),
        (4, "cuda:2", [2]),
        (2, "cuda:2", []),
        (0, "auto", []),
    ],
)
def test_the_gpu_that_the_model_will_have_is_woken(
    gpus: int, device: str, woken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(gpus)
    monkeypatch.setattr(warm_up.ctypes, "CDLL", lambda name: driver)
    with warmed_up(device, Stages()):
        assert driver.retained == woken
        assert +driver.held == Counter(woken)
    assert not +driver.held and not -driver.held


def test_it_is_let_go_when_the_load_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(1)
    monkeypatch.setattr(warm_up.ctypes, "CDLL", lambda name: driver)
    with pytest.raises(ZeroDivisionError), warmed_up("auto", Stages()):
        _ = 1 / 0
    assert driver.retained == [0] and not +driver.held


def test_machines_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    for library in (missing, lambda name: object(), lambda name: Driver(1, fails=True)):
        monkeypatch.setattr(warm_up.ctypes, "CDLL", library)
        stages = Stages()
        with stages.cold_start(), warmed_up("auto", stages):
            pass
        assert "imports" in stages.seconds()
