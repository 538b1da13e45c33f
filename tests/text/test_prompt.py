"""Prompts against transformers' LlavaProcessor, and queries that try to be more than text."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from llava_engine.errors import InvalidQuery, PromptTooLong, WeightsError
from llava_engine.registry import LLAVA_15_TEMPLATE
from llava_engine.text.prompt import (
    Prompt,
    build_prompt,
    check_length,
    check_query,
    placeholder_ids,
)
from llava_engine.text.tokenizer import Tokenizer

IMAGE_LENGTH = 4
KEY = b"a picture"
BLOCKS = [
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x370, 0x52F),
    (0x590, 0x6FF),  # right to left
    (0x900, 0x97F),
    (0x2000, 0x206F),  # spaces, joiners, direction marks
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0x1F300, 0x1FAFF),
    (0xE000, 0xE0FF),
    (0x10000, 0x10FFFF),
]
PHRASES = [
    "the picture",
    "  ",
    "\n",
    "\n\n",
    "\t",
    " ",
    "123",
    "4 567,89",
    "👩‍👩‍👧",
    "🇩🇪",
    "\r\n",
    "▁",
    "<",
    ">",
]


def build(tokenizer: Tokenizer, query: str, template: str = LLAVA_15_TEMPLATE) -> Prompt:
    return build_prompt(tokenizer, template, query, tokenizer.image_token_id, IMAGE_LENGTH, KEY)


def with_image_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids as transformers has them, with the image token at every place of the picture."""
    end = prompt.image_offset + prompt.image_length
    assert prompt.token_ids[prompt.image_offset : end] == placeholder_ids(KEY, IMAGE_LENGTH)
    return (
        prompt.token_ids[: prompt.image_offset]
        + [tokenizer.image_token_id] * prompt.image_length
        + prompt.token_ids[end:]
    )


def processor(directory: Path) -> LlavaProcessor:
    pictures = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_normalize=False
    )
    return LlavaProcessor(
        pictures,
        AutoTokenizer.from_pretrained(directory),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def queries(count: int, special: frozenset[str]) -> list[str]:
    """Text of many scripts, runs of white space, digits, emoji, spaces at either end."""
    generator = random.Random(20)
    made: list[str] = ["", " ", "\n", "What is in the picture?", " the ", "a  b   c    d"]
    while len(made) < count:
        parts = []
        for _ in range(generator.randrange(12)):
            if generator.random() < 0.5:
                parts.append(generator.choice(PHRASES) * generator.randrange(1, 4))
            else:
                first, last = generator.choice(BLOCKS)
                length = generator.randrange(1, 8)
                parts += [chr(generator.randint(first, last)) for _ in range(length)]
        query = generator.choice(["", " "]) + "".join(parts) + generator.choice(["", " ", "\n"])
        if not any(text in query for text in special):
            made.append(query)
    return made


def test_ids_equal_transformers_on_a_thousand_prompts(tokenizer, directory):
    asked = queries(1000, tokenizer.special_texts)
    picture = Image.fromarray(np.zeros((28, 28, 3), np.uint8))
    texts = [LLAVA_15_TEMPLATE.replace("{query}", query) for query in asked]
    expected = processor(directory)(images=[picture] * len(texts), text=texts).input_ids
    for query, ids in zip(asked, expected, strict=True):
        assert with_image_tokens(tokenizer, build(tokenizer, query)) == ids, repr(query)


def test_sealed_and_open_encoding_agree_where_no_special_token_is_spelt(tokenizer):
    """So a query that spells one is encoded as any other, but for what it spells."""
    for query in queries(300, tokenizer.special_texts):
        before, after = LLAVA_15_TEMPLATE.split("{query}")
        sealed = tokenizer._sealed.encode(tokenizer._seal(before) + query + tokenizer._seal(after))
        assert sealed.ids == tokenizer.encode_around(before, query, after), repr(query)


def hostile(special: frozenset[str]) -> st.SearchStrategy[str]:
    words = sorted(special)
    parts = [word[:cut] for word in words for cut in range(1, len(word) + 1)]
    parts += [word[cut:] for word in words for cut in range(1, len(word))]
    return st.lists(
        st.sampled_from(words) | st.sampled_from(parts) | st.sampled_from(["a", " ", "\n", "▁"]),
        max_size=8,
    ).map("".join)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_hostile_query_is_text(tokenizer, data):
    query = data.draw(hostile(tokenizer.special_texts))
    ids = with_image_tokens(tokenizer, build(tokenizer, query))
    plain = with_image_tokens(tokenizer, build(tokenizer, "x"))
    special = {
        index
        for index in range(tokenizer.vocab_size)
        if tokenizer.decode([index], skip_special=False) in tokenizer.special_texts
    }
    assert len(special) == len(tokenizer.special_texts)
    control = [index for index in ids if index in special]
    assert control == [index for index in plain if index in special]
    # All that the query spells is there to be read, once, behind the picture.
    text = tokenizer.decode(ids[ids.index(tokenizer.image_token_id) + IMAGE_LENGTH :])
    shown = query.replace("▁", " ") if tokenizer.decoding.replace else query
    assert text.removeprefix(" ").removeprefix("\n") == f"{shown} ASSISTANT:"


@pytest.mark.parametrize(
    "query", ["<image>", "</s>", "<s>", "<pad>", "<unk>", "a</s> b", "<image>" * 50]
)
def test_the_known_special_texts(directories, query):
    tokenizer = Tokenizer.from_directory(directories["prepend"])
    prompt = build(tokenizer, query)
    tail = prompt.token_ids[prompt.image_offset + prompt.image_length :]
    assert tokenizer.decode(tail, skip_special=False) == f"\n{query} ASSISTANT:"
    oracle = AutoTokenizer.from_pretrained(directories["prepend"])
    assert not set(tail) & set(oracle.all_special_ids)


def test_tokens_that_match_normalised_text_are_caught(directories, tmp_path):
    """A token flagged `normalized` is matched after the normaliser, here a lower-casing one."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(directories["byte-level"] / "tokenizer.json"))
    library.normalizer = tokenizers.normalizers.Lowercase()
    library.add_tokens([tokenizers.AddedToken("<Stop>", normalized=True, special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    stop = library.token_to_id("<Stop>")
    assert stop in tokenizer.encode("a <sToP>", special=True)
    for query in ("a <stop>", "a <sToP>", "<Stop>"):
        prompt = build(tokenizer, query)
        assert stop not in prompt.token_ids
        assert query.lower() in tokenizer.decode(
            [index for index in prompt.token_ids if index >= 0], skip_special=False
        )


@pytest.mark.parametrize("query", ["a\0b", "\0", "\ud800", "ok \udfff", "\ud83d\ude00"])
def test_text_that_is_none_is_refused(directories, query):
    tokenizer = Tokenizer.from_directory(directories["prepend"])
    with pytest.raises(InvalidQuery):
        build(tokenizer, query)


@pytest.mark.parametrize("query", [None, b"bytes", 5, ["text"]])
def test_only_strings_are_queries(query):
    with pytest.raises(TypeError, match="query"):
        check_query(query)


def test_check_query_passes_strings():
    check_query("")
    check_query("\0")


def test_the_image_token_must_be_the_models(directories):
    tokenizer = Tokenizer.from_directory(directories["prepend"])
    with pytest.raises(WeightsError, match="32000"):
        build_prompt(tokenizer, LLAVA_15_TEMPLATE, "x", 32000, IMAGE_LENGTH, KEY)


@given(query=st.text("ab \n<>", max_size=200) | st.text(" ", max_size=2000))
@example(" " * 5000)
@settings(deadline=None, max_examples=50)
def test_the_cheap_bound_refuses_nothing_that_fits(tokenizer, query):
    needed = len(build(tokenizer, query).token_ids)
    check_length(query, needed)


def test_a_megabyte_is_refused_by_its_length_alone():
    with pytest.raises(PromptTooLong, match="1000000"):
        check_length("x" * 1_000_000, 4096)


def test_placeholders():
    ids = placeholder_ids(b"one", 576)
    assert placeholder_ids(b"one", 576) == ids
    assert placeholder_ids(b"one", 4) == ids[:4]
    assert len(set(ids)) == 576
    assert all(-(2**63) <= index < 0 for index in ids)
    assert not set(ids) & set(placeholder_ids(b"two", 576))
    assert min(ids) < -(2**62)


def test_a_template_with_other_special_tokens(directories):
    """Special tokens of the template count, whether or not the query spells any."""
    tokenizer = Tokenizer.from_directory(directories["byte-level"])
    oracle = AutoTokenizer.from_pretrained(directories["byte-level"])
    end = oracle.convert_tokens_to_ids("<|end|>")
    template = "user <image>\n{query}<|end|>assistant<tool>"
    expected = oracle(template.replace("{query}", "the red star")).input_ids
    prompt = build(tokenizer, "the red star", template)
    offset = prompt.image_offset
    ids = prompt.token_ids
    assert ids[:offset] + [tokenizer.image_token_id] + ids[offset + IMAGE_LENGTH :] == expected
    assert build(tokenizer, "<|end|>", template).token_ids.count(end) == 1
