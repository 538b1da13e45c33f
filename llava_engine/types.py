"""The records that cross the package's edge: sampling parameters, chunks, usage, timings.

Standard library only. Nothing here knows of torch, of tokenizers or of the pool.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, Union

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

ImageInput: TypeAlias = Union[  # noqa: UP007  (evaluated only by type checkers)
    str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryIO, "Image.Image", "np.ndarray"
]
"""A path, encoded bytes, a binary file, a PIL image, or a uint8 height x width x 3 array."""


class FinishReason(enum.StrEnum):
    """Why a stream ended."""

    STOP = "stop"  # the end-of-sequence token, or a stop string
    LENGTH = "length"  # max_new_tokens, or the model's context is full
    CANCELLED = "cancelled"  # the caller cancelled or left the stream
    ERROR = "error"  # the stream raised


class Chunk(str):
    """A piece of the answer's text; a `str` that also knows the token ids it came from.

    The ids may be those of an earlier token too, when a character or a possible stop string was
    held back until this chunk.
    """

    __slots__ = ("token_ids",)
    token_ids: tuple[int, ...]

    def __new__(cls, text: str, token_ids: Iterable[int] = ()) -> Chunk:
        self = super().__new__(cls, text)
        self.token_ids = tuple(token_ids)
        return self


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `prompt_tokens` includes `image_tokens`."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the call to the end of each stage; None for a stage that was not reached.

    queued: the request left the queue; image: the picture was fetched, decoded and preprocessed;
    first_token: the first token was sampled; total: the last one was.
    """

    queued: float | None = None
    image: float | None = None
    first_token: float | None = None
    total: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    max_new_tokens: at least 1; None means the model's default.
    temperature: 0 is greedy.
    top_p: in (0, 1]; 1 keeps every token.
    top_k: 0 keeps every token.
    repetition_penalty: > 0; 1 is none. Divides positive and multiplies negative logits of tokens
        that stand in the prompt or the answer (Keskar et al. 2019, as in transformers).
    stop: strings that end the answer and are not part of it.
    seed: makes sampling reproducible; None draws one.
    ignore_eos: go on past the end-of-sequence token (benchmarks).

    Raises TypeError or ValueError naming the field.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif self.stop is None:
            object.__setattr__(self, "stop", ())
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            optional = name != "top_k"
            if not (_is_int(value) or (optional and value is None)):
                raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not (_is_int(value) or isinstance(value, float)):
                raise TypeError(f"{name} must be a number, not {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, not {value}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be a bool, not {type(self.ignore_eos).__name__}")
        for text in self.stop:
            if not isinstance(text, str):
                raise TypeError(f"stop must hold strings, not {type(text).__name__}")
            if not text:
                raise ValueError("stop must not hold an empty string")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be in [0, 2**31), not {self.top_k}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {self.seed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
