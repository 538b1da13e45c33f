"""What tests of the runtime on the CPU share: a sink, and a tiny model beside its oracle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from support.checkpoints import make_checkpoint
from support.pictures import picture, random_pictures, values
from transformers import LlavaForConditionalGeneration

from llava_engine import EngineConfig, FinishReason, SamplingParams
from llava_engine.errors import LlavaError
from llava_engine.kernels.preprocess import DecodedPicture
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model
from llava_engine.runtime.decode_loop import TokenEvent
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Picture, Sequence
from llava_engine.text.prompt import placeholder_ids

CPU = torch.device("cpu")


class Sink:
    """A reader that waits for the end and may lose interest after some tokens.

    room: tokens that it still takes. flushed: tokens that the reader was told of.
    """

    def __init__(self, cancel_after: int | None = None, room: int = 1 << 30) -> None:
        self.cancel_after = cancel_after
        self.cancelled = False
        self.room = room
        self.cached = 0
        self.tokens: list[int] = []
        self.flushed = 0
        self.ended = threading.Event()
        self.reason: FinishReason | None = None
        self.error: LlavaError | None = None

    def start(self, cached_tokens: int) -> None:
        self.cached = cached_tokens

    def put(self, token_id: int) -> None:
        assert not self.ended.is_set() and self.room > 0
        self.room -= 1
        self.tokens.append(token_id)
        if self.cancel_after is not None and len(self.tokens) >= self.cancel_after:
            self.cancelled = True

    def flush(self) -> None:
        self.flushed = len(self.tokens)

    def finish(self, reason: FinishReason) -> None:
        assert not self.ended.is_set()
        self.reason = reason
        self.ended.set()

    def fail(self, error: LlavaError) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    def wait(self) -> list[int]:
        assert self.ended.wait(60), "the stream hangs"
        if self.error is not None:
            raise self.error
        return self.tokens


@dataclass
class World:
    """A random tiny LLaVA twice: ours, and transformers' as the oracle."""

    ours: LlavaModel
    theirs: LlavaForConditionalGeneration
    pictures: list[DecodedPicture]

    def sequence(
        self, picture: int | None, question: list[int], count: int, sink: Sink, **options: object
    ) -> Sequence:
        """`<s>`, the picture if any, then the question."""
        length = self.ours.config.image_tokens
        ids, pictures = [1], ()
        if picture is not None:
            key = picture.to_bytes(16, "big")
            ids += placeholder_ids(key, length)
            pictures = (Picture(key, 1, length, self.pictures[picture]),)
        sampling = options.pop("sampling", SamplingParams(ignore_eos=True))
        seed, eos = options.pop("seed", 0), options.pop("eos", frozenset({2}))
        return Sequence(ids + question, pictures, sampling, count, eos, sink, seed=seed, **options)

    def expected(
        self, picture: int | None, question: list[int], count: int, penalty: float = 1.0
    ) -> list[int]:
        """Greedy tokens of transformers' generate."""
        ids = [1]
        inputs = {}
        if picture is not None:
            ids += [self.ours.config.image_token_id] * self.ours.config.image_tokens
            inputs["pixel_values"] = torch.from_numpy(values(self.pictures[picture]))[None]
        input_ids = torch.tensor([ids + question])
        with torch.inference_mode():
            out = self.theirs.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                repetition_penalty=penalty,
                **inputs,
            )
        return out[0, input_ids.shape[1] :].tolist()


def make_world(directory: Path) -> World:
    """Six pictures, two of them one pixel apart."""
    make_checkpoint(directory, seed=3)
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    # Without an end-of-sequence id, min_new_tokens forbids no token.
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    ours = load_model(directory, device=CPU, dtype=torch.float32)
    pictures = random_pictures(0, 6, ours.config.vision.image_size)
    pixels = pictures[0].pixels.copy()
    pixels[0, 0, 0] ^= 128
    pictures[1] = picture(pixels)
    return World(ours, theirs, pictures)


def running(
    world: World,
    blocks: int,
    on_tokens: Callable[[list[TokenEvent]], None] | None = None,
    **options: object,
) -> Iterator[DeviceRuntime]:
    """A runtime with one worker's share of so many blocks; its thread has ended afterwards."""
    config = EngineConfig(device="cpu", **{"block_size": 8, "prefill_chunk": 24, **options})
    made = DeviceRuntime(world.ours, device=CPU, config=config, on_tokens=on_tokens)
    made.add_worker("one", blocks * made.kv_block_bytes)
    yield made
    thread = made._thread
    made.close()
    assert not thread.is_alive()


def until(condition: Callable[[], object]) -> None:
    """Poll until the condition holds; fail if it does not within half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never comes true"
        time.sleep(0.002)


def settled(runtime: DeviceRuntime) -> None:
    """Until the loop has seen every end, then: nothing may be left."""
    deadline = time.monotonic() + 30
    while runtime.load() and time.monotonic() < deadline:
        runtime.wake()
        time.sleep(0.005)
    assert runtime.load() == 0
    assert runtime.num_free_blocks == runtime.num_blocks
