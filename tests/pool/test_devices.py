"""Several devices: where workers are placed, and what goes on when one of them is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.pool_fakes import (
    GB,
    Clock,
    FakeModel,
    FakeProbe,
    ask,
    error_of,
    make_pool,
    model_of,
    wait_for,
)

import llava_engine
from llava_engine import EngineConfig, WorkerPool
from llava_engine.errors import DeviceLost, KernelsNotBuilt, ModelError, UnsupportedModel
from llava_engine.kernels import library
from llava_engine.pool import backend as backends
from llava_engine.pool.backend import candidate_devices
from llava_engine.pool.model import ModelSpec
from llava_engine.pool.sizing import DeviceMemory, SystemProbe
from llava_engine.pool.worker import WorkerState

HOST = DeviceMemory("cpu", 64 * GB, 64 * GB)


def gpus(*free_gb: int) -> list[DeviceMemory]:
    return [DeviceMemory(f"cuda:{i}", 80 * GB, free * GB) for i, free in enumerate(free_gb)]


def places(pool: WorkerPool, key: str = "fake") -> list[str]:
    return [worker["device"] for worker in pool.health()["models"][key]["workers"]]


def spec(model: FakeModel, device: str = "cuda", **sizes: int) -> ModelSpec:
    config = EngineConfig(device=device, kernels="reference")
    made = model.spec(**sizes)
    return dataclasses.replace(
        made, devices=lambda found, host: candidate_devices(config, found, host)
    )


def cause_of(pool: WorkerPool, device: str) -> DeviceLost:
    error = DeviceLost(f"{device} has failed")
    error.__cause__ = torch.AcceleratorError("an illegal memory access was encountered")
    return error


def site(pool: WorkerPool, device: str, key: str = "fake") -> object:
    return model_of(pool, key).sites[device].backend


@pytest.mark.parametrize(
    ("free_gb", "device", "expected"),
    [
        ((80, 80, 80), "cuda", ["cuda:0", "cuda:1"]),
        ((20, 70, 60), "cuda", ["cuda:1", "cuda:2"]),
        ((20, 70, 40), "cuda", ["cuda:1", "cuda:1"]),
        ((80, 80), "auto", ["cuda:0", "cuda:1"]),
        ((10, 80), "cuda", ["cuda:1", "cuda:1"]),
        ((80, 80), "cuda:1", ["cuda:1", "cuda:1"]),
        ((80, 12), "cuda:1", []),
    ],
    ids=str,
)
def test_workers_go_where_most_room_is(
    free_gb: tuple[int, ...], device: str, expected: list[str]
) -> None:
    """20 GB for the first worker on a device, 4 GB for one more. A pool spawns two at first."""
    with make_pool(FakeProbe(*gpus(*free_gb))) as pool:
        model = FakeModel(weights=16 * GB, share=4 * GB)
        pool.add_model(spec(model, device, first=20 * GB, following=4 * GB))
        error = error_of(ask(pool))
        if not expected:
            assert isinstance(error, llava_engine.MemoryExhausted)
            return
        assert error is None
        wait_for(pool, lambda: len(model_of(pool).live_workers) == 2)
        assert places(pool) == expected
        assert sorted(model.loads) == sorted(set(expected))  # two on one device share a load


def test_a_lost_device_ends_its_streams_and_the_other_goes_on() -> None:
    model, clock = FakeModel(share=GB), Clock()
    with make_pool(FakeProbe(*gpus(80, 80)), clock) as pool:
        pool.add_model(spec(model, first=10 * GB))
        assert ask(pool).text() == "7"
        wait_for(pool, lambda: len(model_of(pool).live_workers) == 2 and not model_of(pool).live)
        for made in model.backends:
            made.hold = True
        streams = [ask(pool) for _ in range(8)]
        for made in model.backends:
            made.await_held(4)
        victims = [w for w in model_of(pool).workers if w.device == "cuda:0"]
        cause = cause_of(pool, "cuda:0")
        lost = site(pool, "cuda:0")
        lost.die(cause)
        wait_for(pool, lambda: len(model_of(pool).workers) == 1)
        assert [worker.state for worker in victims] == [WorkerState.FAILED]
        assert lost.closed and places(pool) == ["cuda:1"]
        site(pool, "cuda:1").release()
        errors = [error_of(stream) for stream in streams]
        dead = [error for error in errors if error is not None]
        assert len(dead) == 4 and len({id(error) for error in dead}) == 4
        for error in dead:
            assert type(error) is DeviceLost and error.retryable
            assert error.__cause__ is cause.__cause__
        # What is missing is made up for, on the device that is left.
        clock.now += 60
        pool.maintain()
        wait_for(pool, lambda: len(model_of(pool).live_workers) == 2)
        assert places(pool) == ["cuda:1", "cuda:1"]
        devices = pool.health()["devices"]
        assert [devices[name]["lost"] for name in ("cuda:0", "cuda:1")] == [True, False]


def test_after_the_last_device_requests_are_told_and_nothing_is_tried_again() -> None:
    model, clock = FakeModel(), Clock()
    with make_pool(FakeProbe(*gpus(80)), clock) as pool:
        pool.add_model(spec(model, "auto"))
        on_host = FakeModel()
        pool.add_model(spec_on_host(on_host))
        assert ask(pool).text() == "7"
        site(pool, "cuda:0").die(cause_of(pool, "cuda:0"))
        wait_for(pool, lambda: not model_of(pool).workers)
        loads = list(model.loads)
        for _ in range(3):
            error = error_of(ask(pool))
            assert type(error) is DeviceLost and not error.retryable
            assert "cuda:0 failed" in str(error) and "new process" in str(error)
        wait_for(pool, lambda: not model_of(pool).spawning)
        for _ in range(3):
            clock.now += 60
            pool.maintain()
            assert not model_of(pool).spawning
        assert model.loads == loads  # nor did "auto" take to the CPU by itself
        assert ask(pool, "host").text() == "7"  # others go on


def spec_on_host(model: FakeModel) -> ModelSpec:
    made = model.spec("host")
    return dataclasses.replace(made, devices=lambda found, host: [host])


def test_every_model_of_a_lost_device_goes_with_it() -> None:
    one, two = FakeModel(), FakeModel(hold=True)
    with make_pool(FakeProbe(*gpus(80))) as pool:
        pool.add_model(spec(one))
        pool.add_model(dataclasses.replace(spec(two), registry_key="other"))
        assert ask(pool).text() == "7"
        stream = ask(pool, "other")
        wait_for(pool, lambda: model_of(pool, "other").live_workers)
        two.backend.await_held(1)
        site(pool, "cuda:0").die(cause_of(pool, "cuda:0"))
        assert type(error_of(stream)) is DeviceLost
        wait_for(pool, lambda: not model_of(pool, "other").workers and not model_of(pool).workers)
        assert one.backend.closed and two.backend.closed and pool.total_memory_mb() == 0


def test_a_device_that_is_lost_while_loading() -> None:
    lost = DeviceLost("cuda:0 has failed")
    model = FakeModel(lost)
    with make_pool(FakeProbe(*gpus(80)), max_workers=1) as pool:
        pool.add_model(spec(model))
        assert type(error_of(ask(pool))) is DeviceLost
        wait_for(pool, lambda: not model_of(pool).workers and not model_of(pool).spawning)
        error = error_of(ask(pool))
        assert type(error) is DeviceLost and not error.retryable
        assert len(model.loads) == 1


def test_torchs_own_error_while_loading_is_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = torch.AcceleratorError("an illegal memory access was encountered")

    def load_model(*arguments: object, **options: object) -> None:
        raise cause

    monkeypatch.setattr(backends, "load_model", load_model)
    with make_pool(SystemProbe()) as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
        error = error_of(model.describe_image(PICTURE, "What?"))
    assert type(error) is DeviceLost and error.__cause__ is cause


PICTURE = torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()


def test_a_gpu_that_the_kernels_do_not_run_on_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(device: torch.device) -> None:
        if device.index == 0:
            raise KernelsNotBuilt("no code for cuda:0")

    monkeypatch.setattr(backends, "require_kernels", require)
    found = gpus(80, 40)
    for device in ("auto", "cuda"):
        assert candidate_devices(EngineConfig(device=device), found, HOST) == found[1:]
    assert candidate_devices(EngineConfig(device="auto"), found[:1], HOST) == [HOST]
    # Whoever asks for a GPU is told by the load what is wrong with it.
    for device in ("cuda", "cuda:0"):
        assert candidate_devices(EngineConfig(device=device), found[:1], HOST) == found[:1]
    with pytest.raises(ModelError, match="cuda:7"):
        candidate_devices(EngineConfig(device="cuda:7"), found, HOST)


def fails(error: int) -> Callable[[str], object]:
    """A library that says `error` of every device, a cudaError_t."""

    class Answers:
        llava_engine_architectures = staticmethod(lambda: b"90a")
        llava_engine_error_text = staticmethod(lambda error: b"said by CUDA")
        llava_engine_probe = staticmethod(lambda device: error)

    return lambda path: Answers


@pytest.mark.parametrize(
    ("error", "said"),
    [(209, "no code for cuda:0.*90a"), (35, "driver of cuda:0 is too old"), (None, "nvcc")],
    ids=["no-code", "old-driver", "no-library"],
)
def test_what_a_gpu_lacks_reaches_the_stream(
    error: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU of the probe's own, and a stand-in for the library's answer."""
    if error is None:
        monkeypatch.setattr(library, "_loaded", False)
        monkeypatch.setattr(library, "LIBRARY", library.LIBRARY.with_name("none.so"))
    else:
        monkeypatch.setattr(library, "_loaded", True)
        monkeypatch.setattr(library.ctypes, "CDLL", fails(error))
    with make_pool(FakeProbe(*gpus(80))) as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cuda"), pool=pool)
        with pytest.raises(KernelsNotBuilt, match=said):
            model.describe_image(PICTURE, "What?").text()
        assert pool.total_memory_mb() == 0


def test_an_attention_that_cannot_be_had_reaches_the_stream() -> None:
    with make_pool(SystemProbe()) as pool:
        config = EngineConfig(device="cpu", attention="flash_attn")
        model = llava_engine.get("llava-tiny", config, pool=pool)
        with pytest.raises(UnsupportedModel, match="CUDA alone"):
            model.describe_image(PICTURE, "What?").text()


def test_dense_attention_answers_as_the_paged_one() -> None:
    with make_pool(SystemProbe()) as pool:
        answers = [
            llava_engine.get("llava-tiny", EngineConfig(device="cpu", attention=name), pool=pool)
            .describe_image(PICTURE, "Describe the picture.")
            .text()
            for name in ("paged", "torch")
        ]
    assert answers[0] == answers[1] != ""
