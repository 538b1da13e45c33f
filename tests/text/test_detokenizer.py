"""Pieces joined against the library's decode of all ids."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_engine.text.detokenizer import Detokenizer
from llava_engine.text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(index) for index in ids), detokenizer.flush()]


@given(data=st.data())
@settings(deadline=None, max_examples=400)
def test_any_ids_join_to_their_decode(tokenizer, data):
    """Special, byte, unknown and ordinary ids in any order, broken characters among them."""
    everything = st.integers(0, tokenizer.vocab_size + 3)
    few = st.integers(0, 40) | st.integers(200, 262)
    ids = data.draw(st.lists(everything | few, max_size=30))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(deadline=None)
def test_text_comes_back_without_half_characters(tokenizer, text):
    text = "x" + text.replace("\ufffd", "")
    ids = tokenizer.encode(text, special=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_a_character_appears_as_soon_as_it_is_certain(directories):
    """Byte fallback: at the first token after its run. Byte level: at its last byte."""
    for layout, at in (("prepend", 4), ("byte-level", 3)):
        tokenizer = Tokenizer.from_directory(directories[layout])
        ids = tokenizer.encode("🦜", special=False)[-4:] + tokenizer.encode("!", special=False)[-1:]
        assert [part for part in pieces(tokenizer, ids)[:at] if part] == []
        assert pieces(tokenizer, ids)[at].startswith("🦜")


@pytest.mark.parametrize("layout", ["prepend", "metaspace"])
def test_only_the_first_space_is_stripped(directories, layout):
    tokenizer = Tokenizer.from_directory(directories[layout])
    space = tokenizer.encode(" ", special=False)[-1]
    end = min(tokenizer.eos_token_ids)
    for ids in ([space], [space, space], [end, space, end, space], [0x20 + 3, space, space]):
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_ends_as_in_the_whole_decode(tokenizer):
    ids = tokenizer.encode("x🦜", special=False)[:-1]
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert "\ufffd" in parts[-1]


def test_cost_does_not_grow_with_the_answer(directories):
    """Calls of the vocabulary per token stay one, however long a run of bytes gets."""
    tokenizer = Tokenizer.from_directory(directories["prepend"])
    calls = 0
    look_up = tokenizer.piece

    def counted(index: int) -> str | None:
        nonlocal calls
        calls += 1
        return look_up(index)

    tokenizer.piece = counted
    generator = random.Random(1)
    ids = [generator.randrange(3, 259) for _ in range(20_000)]
    parts = pieces(tokenizer, ids)
    assert calls == len(ids)
    assert "".join(parts) == tokenizer.decode(ids)
