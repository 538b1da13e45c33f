"""The demo checkpoint in float16 on the GPU says what it says on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from difflib import SequenceMatcher

from PIL import Image, ImageDraw
from support.gpu import NEEDS_GPU

import llava_engine
from llava_engine import EngineConfig, PoolConfig, WorkerPool

pytestmark = NEEDS_GPU


def pictures(count: int) -> list[Image.Image]:
    """Plain shapes on plain grounds, much as the model was trained on."""
    chance = random.Random(3)
    made = []
    for _ in range(count):
        image = Image.new("RGB", (112, 112), chance.choice(["white", "lightgray", "beige"]))
        draw = ImageDraw.Draw(image)
        for _ in range(chance.randint(1, 3)):
            x, y, size = chance.randrange(70), chance.randrange(70), chance.randrange(20, 40)
            shape = chance.choice([draw.ellipse, draw.rectangle])
            shape((x, y, x + size, y + size), fill=chance.choice(["red", "green", "blue"]))
        made.append(image)
    return made


def test_texts_are_those_of_the_cpu(record_property: Callable[[str, object], None]) -> None:
    asked = pictures(24)
    texts = {}
    for device in ("cpu", "cuda"):
        config = EngineConfig(device=device, kv_cache_mb=64)
        with WorkerPool(PoolConfig()) as pool:
            model = llava_engine.get("llava-tiny", config, pool=pool)
            streams = [
                model.describe_image(image, "Describe the picture.", max_new_tokens=48)
                for image in asked
            ]
            texts[device] = [stream.text() for stream in streams]
    different = [pair for pair in zip(*texts.values(), strict=True) if pair[0] != pair[1]]
    record_property("different_texts", f"{len(different)} of {len(asked)}")
    # float16 against float32: single words may tip over, whole descriptions may not.
    assert len(different) <= 4
    assert all(SequenceMatcher(None, *pair).ratio() > 0.5 for pair in different)
