"""The records that cross the package's edge: sampling parameters, chunks, usage, timings.

Standard library only. Nothing here knows of torch, of tokenizers or of the pool.
"""

from __future__ import annotations

import enum
import math
import numbers
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

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


_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # in which it is precise


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    max_new_tokens: at least 1; None means the model's default.
    temperature: 0 is greedy.
    top_p: in (0, 1]; 1 keeps every token.
    top_k: 0 keeps every token.
    repetition_penalty: > 0; 1 is none. Divides positive and multiplies negative logits of tokens
        that stand in the prompt or the answer (Keskar et al. 2019, as in transformers).
    stop: strings that end the answer and are not part of it; one string, several or None are taken
        and kept as a tuple.
    seed: makes sampling reproducible; None draws one.
    ignore_eos: go on past the end-of-sequence token (benchmarks).

    Numbers of other types, such as numpy's, are taken and kept as int and float; the devices hold
    the floats in 32 bits, so that those that do not fit are refused.
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
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None or name == "top_k":
                object.__setattr__(self, name, plain_int(name, value))
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = plain_float(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, not {value}")
            if value and not _FLOAT32_MIN <= abs(value) <= _FLOAT32_MAX:
                raise ValueError(f"{name} must fit into 32 bits, which {value} does not")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be a bool, not {type(self.ignore_eos).__name__}")
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


def plain_int(name: str, value: Any) -> int:
    """An argument as an int; whatever Python takes for an index, but a bool. Raises TypeError."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def plain_float(name: str, value: Any) -> float:
    """An argument as a float; whatever is a real number, but a bool. Raises TypeError.

    What is too large for a float is infinite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # typeshed's Real


def _stop_strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop must be a string or several, not {type(stop).__name__}")
    strings = tuple(stop)
    for text in strings:
        if not isinstance(text, str):
            raise TypeError(f"stop must hold strings, not {type(text).__name__}")
        if not text:
            raise ValueError("stop must not hold an empty string")
    return strings
