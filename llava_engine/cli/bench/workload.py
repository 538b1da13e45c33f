"""What is asked: pictures that no two requests share, and a question of a given length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llava_engine
from llava_engine.cli.bench.loops import Ask
from llava_engine.cli.describe import BadInput

QUESTION = "Describe the picture."
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_WORD = " a"  # one token in the vocabularies of Llama and of llava-tiny

Pictures = Callable[[int], llava_engine.ImageInput]


def noise(size: tuple[int, int], seed: int) -> Pictures:
    """Pictures of random pixels, height x width; another for every number."""
    import numpy as np

    def picture(number: int) -> llava_engine.ImageInput:
        random = np.random.default_rng((seed, number))
        return random.integers(0, 256, (*size, 3), dtype=np.uint8)

    return picture


def files(directory: Path) -> tuple[Pictures, int]:
    """The pictures of a folder in the order of their names, from the start again after the last;
    and how many there are. Raises BadInput."""
    try:
        found = sorted(
            str(path) for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES
        )
    except OSError as error:
        raise BadInput(f"{directory}: {error.strerror}") from error
    if not found:
        raise BadInput(f"{directory} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return lambda number: found[number % len(found)], len(found)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by number: the same number is the same request, to whomever it is put.

    text_tokens: of the prompt around the picture, template included.
    """

    model: llava_engine.VisionModel
    pictures: Pictures
    query: str
    new_tokens: int

    def ask(self, first: int, count: int, new_tokens: int | None = None) -> Ask:
        """How to ask the `count` requests from `first` on, their pictures made beforehand."""
        pictures = [self.pictures(first + number) for number in range(count)]
        tokens = self.new_tokens if new_tokens is None else new_tokens
        return lambda number: ask(self.model, pictures[number], self.query, tokens)

    def prompt(self) -> str:
        """The whole prompt as other engines take it, `<image>` in the picture's place."""
        return self.model.info.prompt_template.replace("{query}", self.query)


def ask(
    model: llava_engine.VisionModel, picture: llava_engine.ImageInput, query: str, new_tokens: int
) -> llava_engine.ChunkStream:
    """One greedy request of exactly `new_tokens` tokens. Raises BadInput."""
    try:
        return model.describe_image(
            picture, query, max_new_tokens=new_tokens, temperature=0, ignore_eos=True
        )
    except ValueError as error:
        raise BadInput(str(error)) from error


def question_of(model: llava_engine.VisionModel, picture: Any, text_tokens: int) -> str:
    """A query that makes the prompt's text, template included, `text_tokens` long.

    Found by asking: only the engine knows how text is counted. Raises BadInput.
    """

    def count(words: int) -> int:
        with ask(model, picture, _WORD.strip() + _WORD * (words - 1), 1) as stream:
            stream.text()
        return stream.usage.prompt_tokens - stream.usage.image_tokens

    least = count(1)
    words = 1 + text_tokens - least
    if words < 1:
        raise BadInput(f"--prompt-tokens: the template and one word take {least} already")
    if count(words) != text_tokens:
        raise BadInput("--prompt-tokens: this model's tokenizer has no word that is one token")
    return _WORD.strip() + _WORD * (words - 1)
