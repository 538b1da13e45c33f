"""Turns scenes into training rows: one picture, then a branch of tokens for each question.

The branches share the picture's prefix, so a picture is encoded once however much is asked.
Rows are made in worker processes, in an order that depends on the seed alone.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from bench.demo_model.questions import KINDS, Question, ask, ask_all
from bench.demo_model.scenes import COLOURS, SHAPES, Scene, letter_centres, make_scene, render
from bench.demo_model.tokenizer import PROMPT

EDGE, PATCH = 112, 8
GRID = EDGE // PATCH
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BRANCHES = 13  # a description and twelve closed questions
LONG, SHORT = 72, 24  # tokens of a description's branch and of a closed question's
BRANCH_TOKENS = LONG + (BRANCHES - 1) * SHORT
IGNORE = -100
CHUNK = 128


@dataclass(frozen=True)
class Rows:
    """n pictures and what is asked about them, as arrays whose first axis is n."""

    pixels: NDArray[np.uint8]  # [n, EDGE, EDGE, 3]
    tokens: NDArray[np.int16]  # [n, BRANCH_TOKENS]
    targets: NDArray[np.int16]  # [n, BRANCH_TOKENS]; the next token where it is part of an answer
    kinds: NDArray[np.uint8]  # [n, BRANCHES]; index into KINDS
    patches: NDArray[np.uint8]  # [n, 3, GRID * GRID]; colour, shape and letter there; 0 is none


def shrink(image: Image.Image, edge: int = EDGE) -> Image.Image:
    """What the CLIP processor makes of an RGB picture before it rescales: bicubic, centre crop."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(edge * long / short)
    size = (edge, scaled) if width <= height else (scaled, edge)
    small = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    return small.crop((left, top, left + edge, top + edge))


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Everything up to and including the picture's placeholders."""
    image_id = tokenizer.token_to_id("<image>")
    ids: list[int] = tokenizer.encode(PROMPT.format(query="")).ids
    return ids[: ids.index(image_id)] + [image_id] * (GRID * GRID)


def branch_ids(tokenizer: Tokenizer, question: Question) -> tuple[list[int], int]:
    """The tokens after the picture, and how many of them come before the answer."""
    image_id = tokenizer.token_to_id("<image>")
    prompt = PROMPT.format(query=question.text)
    asked = tokenizer.encode(prompt).ids
    whole = tokenizer.encode(f"{prompt} {question.answer}</s>").ids
    assert whole[: len(asked)] == asked, question
    start = asked.index(image_id) + 1
    return whole[start:], len(asked) - start


def patch_labels(scene: Scene) -> NDArray[np.uint8]:
    """Colour, shape and letter (from 1; 0 is none) of what lies at each patch, [3, GRID * GRID]."""
    labels = np.zeros((3, GRID, GRID), dtype=np.uint8)
    centres = (np.arange(GRID) + 0.5) / GRID
    for shape in scene.shapes:
        squared = (centres[None, :] - shape.cx) ** 2 + (centres[:, None] - shape.cy) ** 2
        here = squared <= (0.8 * shape.radius) ** 2
        here.flat[squared.argmin()] = True
        labels[0][here] = 1 + list(COLOURS).index(shape.colour)
        labels[1][here] = 1 + SHAPES.index(shape.shape)
    if scene.writing is not None:
        rows = np.abs(centres - scene.writing.cy) <= scene.writing.cap / 2
        for letter, x, half in letter_centres(scene.writing):
            columns = np.abs(centres - x) <= half
            columns[np.abs(centres - x).argmin()] = True
            labels[2][np.ix_(rows, columns)] = 1 + LETTERS.index(letter)
    return labels.reshape(3, -1)


def make_rows(tokenizer: Tokenizer, seed: int, start: int, count: int) -> Rows:
    """Rows `start` to `start + count` of that seed."""
    rows = Rows(
        pixels=np.zeros((count, EDGE, EDGE, 3), dtype=np.uint8),
        tokens=np.full((count, BRANCH_TOKENS), tokenizer.token_to_id("<pad>"), dtype=np.int16),
        targets=np.full((count, BRANCH_TOKENS), IGNORE, dtype=np.int16),
        kinds=np.zeros((count, BRANCHES), dtype=np.uint8),
        patches=np.zeros((count, 3, GRID * GRID), dtype=np.uint8),
    )
    for n in range(count):
        scene = make_scene(seed, start + n)
        rows.pixels[n] = np.asarray(shrink(render(scene)))
        rows.patches[n] = patch_labels(scene)
        for branch, question in enumerate(_branches(scene)):
            ids, asked = branch_ids(tokenizer, question)
            begin = 0 if branch == 0 else LONG + (branch - 1) * SHORT
            assert len(ids) <= (SHORT if branch else LONG), question
            rows.tokens[n, begin : begin + len(ids)] = ids
            rows.targets[n, begin + asked - 1 : begin + len(ids) - 1] = ids[asked:]
            rows.kinds[n, branch] = KINDS.index(question.kind)
    return rows


def _branches(scene: Scene) -> list[Question]:
    rng = random.Random(f"llava-tiny/describe/{scene.seed}/{scene.index}")
    first = ask(scene, "describe", rng)
    assert first is not None
    closed = ask_all(scene, BRANCHES - 1)
    # A bare scene may not have eight different closed questions: ask some of them again.
    closed += [closed[i % len(closed)] for i in range(BRANCHES - 1 - len(closed))]
    return [first, *closed]


_worker: tuple[Tokenizer, int] | None = None


def _start_worker(tokenizer: str, seed: int) -> None:
    global _worker
    _worker = Tokenizer.from_str(tokenizer), seed


def _make_chunk(number: int) -> Rows:
    assert _worker is not None
    return make_rows(*_worker, number * CHUNK, CHUNK)


def stream_rows(tokenizer: Tokenizer, seed: int, count: int, workers: int) -> Iterator[Rows]:
    """The first `count` rows of that seed, CHUNK at a time and in order, by `workers` processes."""
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_worker, (tokenizer.to_str(), seed)) as pool:
        yield from pool.imap(_make_chunk, range(count // CHUNK))
