"""From a picture to text through the public API, against transformers with the same weights."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import make_checkpoint
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_engine
from bench.demo_model.questions import ask_all
from bench.demo_model.scenes import make_scene, render
from llava_engine import (
    EngineConfig,
    FinishReason,
    ModelError,
    PoolConfig,
    PromptTooLong,
    UnknownModel,
    VisionModel,
    WorkerPool,
)
from llava_engine.demo import model_dir

CPU = EngineConfig(device="cpu")
SEED = 987_654  # of scenes that neither training nor its evaluation draws


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(PoolConfig())
    yield made
    made.shutdown(0)


@pytest.fixture(scope="module")
def tiny(pool: WorkerPool) -> VisionModel:
    return llava_engine.get("llava-tiny", CPU, pool=pool)


class Oracle:
    """transformers' own way from a picture and a question to text."""

    def __init__(self, directory: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(directory, use_fast=False)
        self.model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self.model.eval()

    def __call__(self, picture: Image.Image, question: str, count: int) -> tuple[str, int, int]:
        """The answer, the prompt's tokens and the answer's."""
        inputs = self.processor(
            text=f"USER: <image>\n{question} ASSISTANT:", images=picture, return_tensors="pt"
        )
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=count, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        ids = out[0, prompt:]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text, prompt, len(ids)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(model_dir())


def questions(count: int) -> list[tuple[Image.Image, str]]:
    cases = []
    for index in range(count):
        scene = make_scene(SEED, index)
        question = random.Random(index).choice(ask_all(scene, 6))
        cases.append((render(scene), question.text))
    return cases


def test_llava_tiny_says_what_transformers_says(tiny: VisionModel, oracle: Oracle) -> None:
    cases = [*questions(24), (render(make_scene(SEED, 100)), "Describe the picture.")]
    streams = [tiny.describe_image(picture, text, max_new_tokens=64) for picture, text in cases]
    for (picture, text), stream in zip(cases, streams, strict=True):
        answer, prompt_tokens, completion_tokens = oracle(picture, text, 64)
        assert stream.text() == answer
        assert stream.usage.prompt_tokens == prompt_tokens
        assert stream.usage.completion_tokens == completion_tokens
        assert stream.finish_reason is FinishReason.STOP
        assert answer.strip()


@pytest.mark.parametrize("naming", ["published", "new"])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_directory_says_what_transformers_says(
    naming: str, layout: str, pool: WorkerPool, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, layout=layout, naming=naming, seed=11)
    model = llava_engine.get(tmp_path, CPU, pool=pool)
    oracle = Oracle(tmp_path)
    generator = np.random.default_rng(3)
    for size in ((40, 60), (333, 200)):
        picture = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        stream = model.describe_image(picture, "What is this?", max_new_tokens=24)
        answer, prompt_tokens, completion_tokens = oracle(picture, "What is this?", 24)
        assert stream.text() == answer
        assert stream.usage.prompt_tokens == prompt_tokens
        assert stream.usage.completion_tokens == completion_tokens


def test_every_kind_of_image_input_gives_the_same_answer(tiny: VisionModel, tmp_path: Path) -> None:
    picture = render(make_scene(SEED, 200))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    path = tmp_path / "scene.png"
    path.write_bytes(encoded.getvalue())
    encoded.seek(0)
    inputs = [path, str(path), encoded.getvalue(), encoded, picture, np.asarray(picture)]
    answers = {tiny.describe_image(i, "Describe the picture.").text() for i in inputs}
    assert len(answers) == 1


def test_chunks_stream_and_join_to_the_text(tiny: VisionModel) -> None:
    picture = render(make_scene(SEED, 201))
    whole = tiny.describe_image(picture, "Describe the picture.").text()
    with tiny.describe_image(picture, "Describe the picture.") as stream:
        chunks = list(stream)
    assert len(chunks) > 3 and "".join(chunks) == whole
    assert sum(len(chunk.token_ids) for chunk in chunks) <= stream.usage.completion_tokens
    assert stream.timings.first_token < stream.timings.total

    async def main() -> str:
        async with tiny.describe_image(picture, "Describe the picture.") as stream:
            return "".join([chunk async for chunk in stream])

    assert asyncio.run(main()) == whole


def test_the_same_picture_again_is_found_in_the_cache(tiny: VisionModel) -> None:
    picture = render(make_scene(SEED, 202))
    first = tiny.describe_image(picture, "What colour is the background?")
    first.text()
    second = tiny.describe_image(picture, "Describe the picture.")
    second.text()
    assert first.usage.cached_tokens == 0
    assert 0 < second.usage.cached_tokens < second.usage.prompt_tokens


def test_sampling_options_reach_the_model(tiny: VisionModel) -> None:
    picture = render(make_scene(SEED, 203))

    def ask(**options: object) -> str:
        return tiny.describe_image(picture, "Describe the picture.", **options).text()

    greedy = ask()
    assert ask(temperature=1e-4, seed=1) == greedy
    hot = [ask(temperature=30.0, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert ask(temperature=30.0, top_k=1, seed=5) == greedy
    word = greedy.split()[3]
    assert ask(stop=word) == greedy[: greedy.index(word)]
    stream = tiny.describe_image(picture, "Describe.", max_new_tokens=3)
    stream.text()
    assert stream.finish_reason is FinishReason.LENGTH and stream.usage.completion_tokens == 3
    stream = tiny.describe_image(picture, "Describe.", max_new_tokens=150, ignore_eos=True)
    stream.text()
    assert stream.usage.completion_tokens == 150


def test_readers_that_cancel_close_or_vanish_leave_nothing(
    tiny: VisionModel, pool: WorkerPool
) -> None:
    chance = random.Random(7)
    pictures = [render(make_scene(SEED, 300 + index)) for index in range(6)]
    want = [tiny.describe_image(p, "Describe the picture.").text() for p in pictures]
    survivors = []
    for index in range(400):
        stream = tiny.describe_image(pictures[index % 6], "Describe the picture.")
        if index % 40 == 0:
            survivors.append((stream, want[index % 6]))
            continue
        for _ in range(chance.choice([0, 0, 0, 1, 3])):
            next(stream)
        leave = chance.choice(["cancel", "close", "with", "vanish"])
        if leave == "with":
            with stream:
                pass
        elif leave != "vanish":
            getattr(stream, leave)()
        del stream
    for stream, text in survivors:
        assert stream.text() == text
    backend = pool._state.models[tiny.registry_key].sites["cpu"].backend
    runtime = backend._runtime
    until = time.monotonic() + 30
    while runtime.load() and time.monotonic() < until:
        time.sleep(0.01)
    assert runtime.load() == 0
    assert runtime.num_free_blocks == runtime.num_blocks
    record = pool.health()["models"][tiny.registry_key]
    assert record["queue_depth"] == record["running"] == 0
    # A request that ends early has let go of its picture; it must not look like one with a URL.
    assert not [t for t in threading.enumerate() if t.name.startswith("llava-fetch")]


@pytest.mark.parametrize(
    "query",
    ["<image>", "</s>", "<s><unk><pad> and <image> again", "", " ", "\n", "مرحبا 👋🏽", "x" * 300],
)
def test_hostile_queries_are_answered_as_text(tiny: VisionModel, query: str) -> None:
    stream = tiny.describe_image(render(make_scene(SEED, 204)), query, max_new_tokens=8)
    stream.text()
    assert stream.usage.image_tokens == 196
    assert stream.usage.prompt_tokens > 196


@pytest.mark.parametrize(
    ("query", "error"),
    [("x\0y", llava_engine.InvalidQuery), ("\ud800", llava_engine.InvalidQuery)],
)
def test_text_that_is_none_is_refused(
    tiny: VisionModel, query: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny.describe_image(render(make_scene(SEED, 204)), query).text()


def test_a_megabyte_of_query_is_too_long(tiny: VisionModel) -> None:
    with pytest.raises(PromptTooLong):
        tiny.describe_image(render(make_scene(SEED, 204)), "word " * 200_000).text()
    assert tiny.describe_image(render(make_scene(SEED, 204)), "Describe.").text()


@pytest.mark.parametrize(
    ("picture", "query", "options", "error"),
    [
        (3.5, "q", {}, TypeError),
        (np.zeros((4, 4, 3), dtype=np.float32), "q", {}, (TypeError, ValueError)),
        (b"x", 7, {}, TypeError),
        (b"x", "q", {"temperature": -1}, ValueError),
        (b"x", "q", {"max_new_tokens": 0}, ValueError),
        (b"x", "q", {"timeout": 0}, ValueError),
    ],
)
def test_wrong_arguments_are_raised_at_the_call(
    tiny: VisionModel,
    picture: object,
    query: object,
    options: dict[str, object],
    error: type[Exception] | tuple[type[Exception], ...],
) -> None:
    with pytest.raises(error):
        tiny.describe_image(picture, query, **options)


def test_a_bad_picture_is_an_error_of_its_stream_alone(tiny: VisionModel) -> None:
    bad = tiny.describe_image(b"<html>no picture</html>", "Describe.")
    good = tiny.describe_image(render(make_scene(SEED, 205)), "Describe the picture.")
    with pytest.raises(llava_engine.ImageDecodeError):
        bad.text()
    assert good.text()


def _truncate(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _corrupt_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\xff" * 4096)


def _misshape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (directory / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "truncated": _truncate,
    "corrupt": _corrupt_header,
    "misshapen": _misshape,
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "no tokenizer": lambda d: (d / "tokenizer.json").unlink(),
    "bad tokenizer": lambda d: (d / "tokenizer.json").write_text("{"),
    "bad config": lambda d: (d / "config.json").write_text("[]"),
    "bad preprocessor": lambda d: (d / "preprocessor_config.json").write_text("not json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_model_error(
    damage: str, pool: WorkerPool, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, seed=12)
    DAMAGES[damage](tmp_path)
    with pytest.raises(ModelError):
        llava_engine.get(tmp_path, CPU, pool=pool).describe_image(
            Image.new("RGB", (8, 8)), "What?"
        ).text()


def test_a_missing_shard_is_named(pool: WorkerPool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, layout="sharded", seed=12)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(llava_engine.WeightsError, match=shard.name):
        llava_engine.get(tmp_path, CPU, pool=pool).describe_image(
            Image.new("RGB", (8, 8)), "What?"
        ).text()


def test_an_unknown_name_is_told_the_known_ones(pool: WorkerPool) -> None:
    with pytest.raises(UnknownModel, match="llava-tiny"):
        llava_engine.get("llava-tinny", CPU, pool=pool)
