"""Argument checks of the public records."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest

from llava_engine import Chunk, SamplingParams


def test_defaults_are_greedy() -> None:
    params = SamplingParams()
    assert params.temperature == 0 and params.stop == () and params.max_new_tokens is None


def test_stop_takes_one_string_or_several() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("max_new_tokens", 0, ValueError),
        ("max_new_tokens", 1.5, TypeError),
        ("max_new_tokens", True, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "hot", TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("top_k", -1, ValueError),
        ("top_k", 2**31, ValueError),
        ("top_k", None, TypeError),
        ("repetition_penalty", 0.0, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("stop", [""], ValueError),
        ("stop", [1], TypeError),
        ("stop", 3, TypeError),
        ("stop", b"END", TypeError),
        ("temperature", 1e39, ValueError),
        ("temperature", 1e-60, ValueError),
        ("temperature", 10**400, ValueError),
        ("temperature", np.True_, TypeError),
        ("temperature", 1j, TypeError),
        ("top_p", 1e-60, ValueError),
        ("repetition_penalty", 1e39, ValueError),
        ("repetition_penalty", 1e-60, ValueError),
        ("repetition_penalty", -(10**400), ValueError),
        ("top_k", np.True_, TypeError),
        ("top_k", np.float64(3), TypeError),
        ("seed", np.int64(-1), ValueError),
        ("ignore_eos", 1, TypeError),
    ],
)
def test_a_bad_value_names_its_field(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array])
@pytest.mark.parametrize("field", ["max_new_tokens", "top_k", "seed"])
def test_whole_numbers_of_other_types_are_kept_as_int(field: str, kind: type) -> None:
    value = getattr(SamplingParams(**{field: kind(5)}), field)
    assert type(value) is int and value == 5


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Fraction, float])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
def test_real_numbers_of_other_types_are_kept_as_float(field: str, kind: type) -> None:
    value = getattr(SamplingParams(**{field: kind(0.5)}), field)
    assert type(value) is float and value == 0.5
    assert type(getattr(SamplingParams(**{field: np.int64(1)}), field)) is float


@pytest.mark.parametrize("extreme", [np.finfo(np.float32).max, np.finfo(np.float32).tiny])
def test_what_32_bits_hold_is_taken(extreme: np.float32) -> None:
    params = SamplingParams(temperature=extreme, repetition_penalty=extreme)
    assert params.temperature == params.repetition_penalty == float(extreme)


def test_an_error_in_a_caller_s_iterator_is_the_caller_s() -> None:
    with pytest.raises(KeyError):
        SamplingParams(stop=({}[name] for name in ("a",)))


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 1.0


def test_a_chunk_is_text_that_knows_its_tokens() -> None:
    chunk = Chunk("a cat", [5, 6])
    assert chunk == "a cat" and "".join([chunk, "!"]) == "a cat!"
    assert chunk.token_ids == (5, 6)
    assert pickle.loads(pickle.dumps("".join([chunk]))) == "a cat"
