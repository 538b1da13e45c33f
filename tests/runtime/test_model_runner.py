"""A step's calls out of Python: at each its lock is given up, and others may keep it for long."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.runtime import CPU, Sink, World
from torch.overrides import TorchFunctionMode

from llava_engine import EngineConfig, SamplingParams
from llava_engine.kernels.library import hold
from llava_engine.network import llava
from llava_engine.runtime.feature_cache import FeatureCache
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.model_runner import ModelRunner
from llava_engine.runtime.scheduler import Scheduled
from llava_engine.runtime.sequence import Sequence
from llava_engine.runtime.streams import DeviceStreams


class Calls(TorchFunctionMode):
    """Names of what is called of torch's; what it does in turn counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ != "__get__":  # an attribute, for which the lock is kept
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def as_one(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            with torch._C.DisableTorchFunction():
                return call(*args, **kwargs)

        return counted


def make_runner(world: World, *, penalty: float = 1.0) -> tuple[ModelRunner, list[Scheduled]]:
    """And a step: two whole prompts, of which one has a picture, and a part of a third."""
    text, size = world.ours.config.text, EngineConfig().block_size
    cache = KVCache(
        num_layers=text.num_layers,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        block_size=size,
        dtype=world.ours.dtype,
        device=CPU,
    )
    cache.resize(40, {})
    runner = ModelRunner(world.ours, cache, FeatureCache(0), DeviceStreams(CPU))
    sequences: list[Sequence] = []
    free = list(range(40))
    for picture, question in ((0, [9, 8]), (None, [5, 6, 7]), (1, [4] * 20)):
        sampling = SamplingParams(ignore_eos=True, repetition_penalty=penalty)
        sequence = world.sequence(picture, question, 4, Sink(), sampling=sampling)
        sequence.block_table = [free.pop() for _ in range(-(-len(sequence) // size))]
        sequences.append(sequence)
    runner.encode_pictures([(each, picture) for each in sequences for picture in each.pictures])
    *whole, part = sequences
    return runner, [
        *(Scheduled(each, len(each)) for each in whole),
        Scheduled(part, len(part) - 3),
    ]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@torch.inference_mode()
def test_a_step_is_few_calls(world: World, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, step = make_runner(world, penalty=penalty)
    streams = runner._streams
    calls = Calls()
    monkeypatch.setattr(streams, "upload", calls.as_one("upload", streams.upload))
    monkeypatch.setattr(llava, "prefill_step", calls.as_one("prefill_step", llava.prefill_step))
    launched: list[list[str]] = []
    with calls:
        tokens = runner.run(step, lambda: launched.append(list(calls.names)))
    # On a GPU the upload is two: the device's memory, and the copy to it.
    assert launched == [["upload", "empty", "prefill_step"]]
    assert calls.names == [*launched[0], "tolist"]
    assert tokens == [
        *world.expected(0, [9, 8], 1, penalty),
        *world.expected(None, [5, 6, 7], 1, penalty),
        None,
    ]


@torch.inference_mode()
def test_torch_refers_to_what_every_step_hands_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it takes Python's lock for each tensor that a step's op drops: some 260."""
    runner, step = make_runner(world)
    given: list[torch.Tensor] = []

    def prefill_step(tokens: torch.Tensor, *rest: Any) -> None:
        _, _, embedding, _, _, keys, values, decoder, head, _ = rest
        tensors = [*decoder.weights, decoder.final_norm, decoder.cos_sin, decoder.workspace]
        given.extend([*tensors, embedding, head, *keys, *values])
        tokens.zero_()

    monkeypatch.setattr(llava, "prefill_step", prefill_step)
    runner.run(step, lambda: None)
    runner._cache.resize(30, {})
    runner.run(step, lambda: None)
    again = given[len(given) // 2 :]
    assert len(again) > 20
    assert all(map(referred_to, again)) and not referred_to(torch.zeros(1))


def referred_to(tensor: torch.Tensor) -> bool:
    """Whether anything in C++ does: its first reference from there is one to Python's, too."""
    before = sys.getrefcount(tensor)
    another = hold([tensor])
    after = sys.getrefcount(tensor)
    del another
    return after == before
