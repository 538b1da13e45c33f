"""The tokenizer against transformers' own, and its refusals."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llava_engine.errors import ModelError, UnsupportedModel, WeightsError
from llava_engine.text.tokenizer import Tokenizer

ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def copy(directories: dict[str, Path], tmp_path: Path) -> Path:
    """A tokenizer directory that the test may change."""
    return Path(shutil.copytree(directories["prepend"], tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def oracle(directory: Path):
    return AutoTokenizer.from_pretrained(directory)


@given(text=ENCODABLE)
@settings(deadline=None)
def test_encodes_and_decodes_as_transformers(tokenizer, oracle, text):
    assert tokenizer.encode(text, special=True) == oracle(text).input_ids
    ids = oracle(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == oracle.decode(ids)


@given(text=ENCODABLE)
@settings(deadline=None)
def test_text_without_special_tokens_is_encoded_alike_with_them_off(tokenizer, oracle, text):
    assume(not any(special in text for special in tokenizer.special_texts))
    ids = oracle(text, add_special_tokens=False).input_ids
    assert tokenizer.encode(text, special=False) == ids


@given(data=st.data())
@settings(deadline=None)
def test_special_tokens_are_text_when_they_are_off(tokenizer, data):
    pieces = st.one_of(
        st.sampled_from(sorted(tokenizer.special_texts)), st.text("ab <>/s|", max_size=4)
    )
    text = "x" + "".join(data.draw(st.lists(pieces, max_size=6)))
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert all(tokenizer.piece(index) not in tokenizer.special_texts for index in ids)
    assert all(tokenizer.piece(index) is not None for index in ids)


def test_attributes(directories):
    tokenizer = Tokenizer.from_directory(directories["prepend"])
    assert tokenizer.special_texts == {"<unk>", "<s>", "</s>", "<image>", "<pad>"}
    assert tokenizer.image_token == "<image>"
    assert tokenizer.eos_token_ids == {2}
    oracle = AutoTokenizer.from_pretrained(directories["prepend"])
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.image_token_id == oracle.image_token_id


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, {7}),
        ({"eos_token_id": [7, 9]}, {}, {7, 9}),
        ({}, {"text_config": {"eos_token_id": 5}, "eos_token_id": 6}, {5}),
        ({}, {"eos_token_id": 6}, {6}),
        ({}, {"eos_token_id": None}, {2}),
        (None, {}, {2}),
    ],
)
def test_end_of_answer_ids(copy, generation, config, expected):
    (copy / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer.from_directory(copy).eos_token_ids == expected


def test_tokens_that_only_the_configuration_describes_are_added(copy):
    """An older checkpoint may have <image> and <pad> only in tokenizer_config.json."""
    data = json.loads((copy / "tokenizer.json").read_text())
    edit(copy / "tokenizer.json", added_tokens=data["added_tokens"][:3])
    check_like_transformers(copy)


def test_tokens_that_only_the_older_files_describe_are_added(copy):
    data = json.loads((copy / "tokenizer.json").read_text())
    image = data["added_tokens"][3]["id"]
    edit(copy / "tokenizer.json", added_tokens=data["added_tokens"][:3])
    edit(copy / "tokenizer_config.json", added_tokens_decoder=None)
    (copy / "added_tokens.json").write_text(json.dumps({"<pad>": image + 1, "<image>": image}))
    check_like_transformers(copy)


def test_properties_in_the_configuration_win(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    tokens = config["added_tokens_decoder"]
    for token in tokens.values():
        token["rstrip"] = token["lstrip"] = token["content"] == "<image>"
    edit(copy / "tokenizer_config.json", added_tokens_decoder=tokens)
    check_like_transformers(copy)
    tokenizer = Tokenizer.from_directory(copy)
    assert tokenizer.encode("a  <image>  b", special=True) == tokenizer.encode(
        "a<image>b", special=True
    )


def test_truncation_and_padding_of_the_file_are_off(copy):
    edit(
        copy / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        },
    )
    check_like_transformers(copy)


def check_like_transformers(directory: Path) -> None:
    tokenizer, oracle = (
        Tokenizer.from_directory(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    text = "USER: <image>\nthe picture <pad></s> <image> x ASSISTANT:"
    ids = oracle(text).input_ids
    assert tokenizer.encode(text, special=True) == ids
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.special_texts == set(oracle.get_added_vocab())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": {}}', '{"model": {"type": "BPE", "vocab": [], "merges": []}}']
    + ["[" * 100_000, '{"added_tokens": [{"id": 5}], "model": {"type": "BPE"}}', '"text"', "\xff"],
)
def test_a_broken_file_is_named(copy, content):
    (copy / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(copy)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"]
)
def test_other_broken_files_are_named(copy, name):
    (copy / name).write_text('{"a": ')
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.from_directory(copy)
    assert caught.value.__cause__ is not None
    assert str(copy) not in str(caught.value)


def test_damage_inside_the_file_never_shows_the_library(copy):
    """Every part of the file in turn is replaced by something of the wrong kind."""
    whole = json.loads((copy / "tokenizer.json").read_text())
    for key in whole:
        for wrong in ({"type": "Nonsense"}, [1], "text", 5, {"decoders": [5]}, [{"content": 3}]):
            (copy / "tokenizer.json").write_text(json.dumps({**whole, key: wrong}))
            try:
                Tokenizer.from_directory(copy)
            except ModelError as error:
                assert "tokenizer" in str(error)


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def test_queries_are_not_kept(copy):
    """All are different, as those of a service are; kept, they would take four megabytes."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    tokenizer = Tokenizer.from_directory(copy)

    def held_after(begin: int, end: int) -> int:
        for number in range(begin, end):
            tokenizer.encode(
                f"What is number {number} of the things that I see here?", special=True
            )
        gc.collect()
        return mallinfo().uordblks

    before = held_after(0, 100)
    assert held_after(100, 4100) - before < 400_000


def test_a_missing_file(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(copy)


def test_a_tokenizer_without_an_image_token(copy):
    edit(copy / "tokenizer_config.json", image_token="<picture>", added_tokens_decoder={})
    edit(copy / "tokenizer_config.json", image_token=None, extra_special_tokens=None)
    data = json.loads((copy / "tokenizer.json").read_text())
    edit(copy / "tokenizer.json", added_tokens=data["added_tokens"][:3])
    with pytest.raises(WeightsError, match="<image>"):
        Tokenizer.from_directory(copy)


def test_an_image_token_of_another_name(copy):
    (copy / "processor_config.json").write_text(json.dumps({"image_token": "<pad>"}))
    edit(copy / "tokenizer_config.json", image_token=None, extra_special_tokens=None)
    assert Tokenizer.from_directory(copy).image_token == "<pad>"


def test_a_decoder_that_cannot_be_followed_is_refused(copy):
    edit(copy / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer.from_directory(copy)
