"""What the GPU tests share: the mark, a sink, and a model beside its oracle with the near-tie rule.

Tokens must be the same, or part first at a near tie: where the oracle's two best logits lie closer
together than the two implementations' measured errors on both can move them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from support.paged import Prompt, greedy
from support.pictures import values
from transformers import LlavaForConditionalGeneration

from llava_engine import FinishReason, SamplingParams
from llava_engine.errors import LlavaError
from llava_engine.kernels.preprocess import DecodedPicture
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.sequence import Picture, Sequence
from llava_engine.text.prompt import placeholder_ids

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEEDS_HOPPER = [
    *NEEDS_GPU,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernels are Hopper's",
    ),
]
GPU = torch.device("cuda")
NEW_TOKENS = 24


class Sink:
    """A reader that waits for the end, may lose interest after some tokens, and takes at most
    `room` more."""

    def __init__(self, cancel_after: int | None = None, room: int = 1 << 30) -> None:
        self.cancel_after = cancel_after
        self.cancelled = cancel_after == 0
        self.room = room
        self.cached = 0
        self.tokens: list[int] = []
        self.ended = threading.Event()
        self.error: LlavaError | None = None

    def start(self, cached_tokens: int) -> None:
        self.cached = cached_tokens

    def put(self, token_id: int) -> None:
        assert self.room > 0
        self.room -= 1
        self.tokens.append(token_id)
        if self.cancel_after is not None and len(self.tokens) >= self.cancel_after:
            self.cancelled = True

    def flush(self) -> None: ...

    def finish(self, reason: FinishReason) -> None:
        self.ended.set()

    def fail(self, error: LlavaError) -> None:
        self.error = error
        self.ended.set()

    def wait(self) -> list[int]:
        assert self.ended.wait(120), "the stream hangs"
        if self.error is not None:
            raise self.error
        return self.tokens


@dataclass
class World:
    """A random LLaVA twice on the GPU: ours, and transformers' as the oracle."""

    ours: LlavaModel
    theirs: LlavaForConditionalGeneration
    pictures: list[DecodedPicture]
    error: float = 0.0
    """The largest difference of any logit between the two, on the same tokens."""

    def sequence(self, picture: int | None, question: list[int], sink: Sink) -> Sequence:
        length = self.ours.config.image_tokens
        ids, pictures = [1], ()
        if picture is not None:
            key = picture.to_bytes(16, "big")
            ids += placeholder_ids(key, length)
            pictures = (Picture(key, 1, length, self.pictures[picture]),)
        sampling = SamplingParams(ignore_eos=True)
        return Sequence(
            ids + question, pictures, sampling, NEW_TOKENS, frozenset({2}), sink, seed=0
        )

    def prompt(self, picture: int | None, question: list[int]) -> Prompt:
        if picture is None:
            return Prompt([1, *question])
        config = self.ours.config
        image = [config.image_token_id] * config.image_tokens
        pixels = torch.from_numpy(values(self.pictures[picture]))[None]
        return Prompt([1, *image, *question], pixels)

    @torch.inference_mode()
    def oracle(self, prompt: Prompt, continuation: list[int]) -> torch.Tensor:
        """The oracle's logits [len(continuation), vocab] for each next token."""
        ids = torch.tensor([prompt.token_ids], device=GPU)
        following = torch.tensor([continuation], dtype=torch.int64, device=GPU)
        embed = self.theirs.get_input_embeddings()
        embeds = embed(torch.cat((ids, following), dim=1))
        if prompt.pixels is not None:
            pixels = prompt.pixels.to(GPU, self.theirs.dtype)
            features = torch.cat(list(self.theirs.get_image_features(pixels).pooler_output))
            place = ids[0] == self.theirs.config.image_token_index
            embeds[0, : ids.shape[1]][place] = features.to(embeds.dtype)
        logits = self.theirs(inputs_embeds=embeds).logits[0, ids.shape[1] - 1 : -1]
        return logits.float()

    def measure(self, asked: list[tuple[int | None, list[int]]]) -> None:
        """Set `error`, teacher-forced on our own tokens."""
        for picture, question in asked:
            prompt = self.prompt(picture, question)
            (mine,) = greedy(self.ours, [prompt], NEW_TOKENS, block_size=16)
            theirs = self.oracle(prompt, mine.token_ids)
            difference = (torch.stack(mine.logits) - theirs).abs().max()
            self.error = max(self.error, float(difference))

    def agrees(self, picture: int | None, question: list[int], tokens: list[int]) -> bool:
        """Whether `tokens` are the oracle's greedy ones; False after a near tie, and an
        AssertionError where they part at anything else."""
        logits = self.oracle(self.prompt(picture, question), tokens)
        best = logits.argmax(dim=-1).tolist()
        for place, (ours, theirs) in enumerate(zip(tokens, best, strict=True)):
            if ours != theirs:
                gap = float(logits[place, theirs] - logits[place, ours])
                assert gap <= 2 * self.error, f"token {place}: {gap} apart, error {self.error}"
                return False
        return True
