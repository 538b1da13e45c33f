"""LLaVA-1.5-7B's shape in float16 against transformers, with the same random weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.gpu import GPU, NEEDS_GPU, Sink, World
from support.pictures import random_pictures
from support.seven_b import configuration, random_oracle
from transformers import LlavaConfig as TheirConfig

from llava_engine import EngineConfig
from llava_engine.network.config import LlavaConfig
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import published_name
from llava_engine.runtime.runtime import DeviceRuntime

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(configuration(), GPU, tmp_path_factory.mktemp("config"))


def make_world(config: TheirConfig, device: torch.device, directory: Path) -> World:
    theirs = random_oracle(config, device)
    config.save_pretrained(directory)
    ours = LlavaModel(LlavaConfig.from_directory(directory), device=device, dtype=torch.float16)
    weights = {published_name(name): value for name, value in theirs.named_parameters()}
    with torch.no_grad():
        for name, view in ours.slots():
            view.copy_(weights[name])
    return World(ours, theirs, random_pictures(1, 8, 336))


def test_greedy_tokens_of_16_prompts(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(2)
    asked = [
        (index % 8, [chance.randrange(3, 31_000) for _ in range(chance.randint(5, 40))])
        for index in range(16)
    ]
    world.measure(asked[:4])
    assert world.error < 0.5
    runtime = DeviceRuntime(world.ours, device=GPU, config=EngineConfig(device="cuda"))
    try:
        runtime.add_worker("one", 8 << 30)
        sinks = [Sink() for _ in asked]
        for request, sink in zip(asked, sinks, strict=True):
            runtime.submit(world.sequence(*request, sink))
        answers = [sink.wait() for sink in sinks]
    finally:
        runtime.close()
    assert len({tuple(answer) for answer in answers}) == len(answers)
    same = [world.agrees(*request, tokens) for request, tokens in zip(asked, answers, strict=True)]
    record_property("identical", f"{sum(same)} of {len(same)}")
    record_property("logit_error", world.error)
