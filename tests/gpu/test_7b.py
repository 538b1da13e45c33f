"""LLaVA-1.5-7B's shape in float16 against transformers, with the same random weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.gpu import GPU, NEEDS_GPU, Sink, World
from support.pictures import random_pictures
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as TheirConfig

from llava_engine import EngineConfig
from llava_engine.network.config import LlavaConfig
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import published_name
from llava_engine.runtime.runtime import DeviceRuntime

pytestmark = NEEDS_GPU


def configuration(**depth: int) -> TheirConfig:
    """7B's configuration; `depth` may make it shallow."""
    layers = {"vision": 24, "text": 32, **depth}
    return TheirConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=layers["vision"],
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            num_hidden_layers=layers["text"],
            vocab_size=32064,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_token_index=32000,
    )


def random_oracle(config: TheirConfig, device: torch.device) -> LlavaForConditionalGeneration:
    """transformers' model with random float16 weights, made on the device."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).half().eval()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "layrnorm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    # Buffers are computed, in float32: take those of a shallow model, made in the ordinary way.
    shallow = LlavaForConditionalGeneration(configuration(vision=1, text=1))
    for name, buffer in shallow.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)
    assert model.get_buffer("model.language_model.rotary_emb.inv_freq").dtype == torch.float32
    return model


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
