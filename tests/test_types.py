"""Argument checks of the public records."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

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
        ("ignore_eos", 1, TypeError),
    ],
)
def test_a_bad_value_names_its_field(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        SamplingParams(**{field: value})


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 1.0


def test_a_chunk_is_text_that_knows_its_tokens() -> None:
    chunk = Chunk("a cat", [5, 6])
    assert chunk == "a cat" and "".join([chunk, "!"]) == "a cat!"
    assert chunk.token_ids == (5, 6)
    assert pickle.loads(pickle.dumps("".join([chunk]))) == "a cat"
