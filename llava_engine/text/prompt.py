"""A question about a picture to token ids.

The template is ours and its special tokens count; the query is a stranger's and is always text.
Nothing here knows what a picture is, only how many places it takes and what it is keyed by.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from llava_engine.errors import InvalidQuery, PromptTooLong, WeightsError
from llava_engine.text.tokenizer import Tokenizer

_CHARACTERS_PER_TOKEN = 128
"""No tokenizer in use has a longer entry (the longest are runs of spaces in Llama 3's)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, in which a picture's places hold negative ids of its own.

    image_offset, image_length: where the picture stands in `token_ids`.
    """

    token_ids: list[int]
    image_offset: int
    image_length: int


def check_query(query: object) -> None:
    """Raise TypeError unless `query` is a string; every other check belongs to the stream."""
    if not isinstance(query, str):
        raise TypeError(f"query must be a str, not {type(query).__name__}")


def check_length(query: str, max_model_len: int) -> None:
    """Raise PromptTooLong for a query that cannot fit, however its text is encoded.

    A bound that takes no tokenizer and no time, so that a megabyte is refused before anything is
    fetched or encoded; a query that passes may still prove too long once encoded.
    """
    if len(query) > max_model_len * _CHARACTERS_PER_TOKEN:
        raise PromptTooLong(
            f"The query of {len(query)} characters cannot fit a context of {max_model_len} tokens."
        )


def check_prompt(
    tokenizer: Tokenizer, template: str, query: str, image_length: int, max_model_len: int
) -> None:
    """Raise PromptTooLong or InvalidQuery for a query that would end so once its picture is here.

    Before a fetch, so that nobody is asked for a picture that cannot be asked about.
    """
    check_length(query, max_model_len)
    _check_text(query)
    if len(query.encode()) + len(template) + image_length < max_model_len:
        return  # a token has a byte at least
    length = len(_encode(tokenizer, template, query)) - 1 + image_length
    if length >= max_model_len:
        raise PromptTooLong(
            f"The prompt has {length} tokens; the model's context of {max_model_len} leaves no "
            "room for an answer."
        )


def build_prompt(
    tokenizer: Tokenizer,
    template: str,
    query: str,
    image_token_id: int,
    image_length: int,
    image_key: bytes,
) -> Prompt:
    """The token ids of `template` with the picture and the query in it.

    template: holds `<image>` once and then `{query}` once.
    image_token_id: the checkpoint's image token, which must be the tokenizer's.
    image_length: places that the picture takes, in tokens.
    image_key: what the placeholders are derived from; equal keys give equal ids.

    Equal to transformers' LlavaProcessor where the query spells no special token, save for the
    placeholders. Raises InvalidQuery for text that cannot be encoded and WeightsError where
    tokenizer and model disagree on the image token.
    """
    _check_text(query)
    if tokenizer.image_token_id != image_token_id:
        raise WeightsError(
            f"The model's image token is {image_token_id}, "
            f"but the tokenizer's {tokenizer.image_token!r} is {tokenizer.image_token_id}."
        )
    ids = _encode(tokenizer, template, query)
    offset = ids.index(image_token_id)
    ids[offset : offset + 1] = placeholder_ids(image_key, image_length)
    return Prompt(ids, offset, image_length)


def _check_text(query: str) -> None:
    if "\0" in query:
        raise InvalidQuery("The query holds a NUL character.")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise InvalidQuery("The query holds a lone surrogate, which is no text.") from error


def _encode(tokenizer: Tokenizer, template: str, query: str) -> list[int]:
    """The prompt's ids with one for the picture."""
    before, _, after = template.partition("{query}")
    before = before.replace("<image>", tokenizer.image_token)
    return tokenizer.encode_around(before, query, after)


def placeholder_ids(key: bytes, length: int) -> list[int]:
    """`length` negative ids, each a hash of the key and the position: -1 minus 63 bits.

    A longer list of the same key begins with the shorter one. Source: SHAKE-128, FIPS 202.
    """
    words = np.frombuffer(hashlib.shake_128(key).digest(8 * length), "<u8")
    ids: list[int] = (-1 - (words >> 1).astype(np.int64)).tolist()
    return ids
