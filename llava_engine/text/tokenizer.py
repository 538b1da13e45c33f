"""A checkpoint's tokenizer: text to token ids and back, as transformers does it.

Built on the `tokenizers` library alone. Knows nothing of prompts, pictures or models; what must
never happen here is that text from a stranger becomes a control token.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llava_engine.errors import UnsupportedModel, WeightsError

_NAMED = frozenset(f"{kind}_token" for kind in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"])
"""The special tokens that every tokenizer may have; any other `..._token` is the model's own."""

_BLANK = " ▁\t\n\r"
"""Added tokens of nothing but these are runs of white space: ordinary text, no control tokens."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How pieces become text: the two decoders that LLaVA's language models have.

    byte_level: every character of a piece stands for a byte (GPT-2); else "<0xHH>" pieces do.
    replace: (old, new) within each piece, in this order.
    strip: the character of which up to `strip_count` are dropped from the text's beginning.
    """

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    strip: str = " "
    strip_count: int = 0


class Tokenizer:
    """One checkpoint's tokenizer. Safe to use from several threads.

    image_token, image_token_id: the text and id of the picture's placeholder.
    special_texts: texts of all added tokens that are more than white space.
    eos_token_ids: ids that end an answer.
    vocab_size: number of tokens, added ones included.
    decoding: how pieces become text.
    """

    def __init__(
        self,
        data: dict[str, Any],
        added: Sequence[tokenizers.AddedToken] = (),
        *,
        image_token: str = "<image>",
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`data` is the content of a tokenizer.json; `added` changes or extends its added tokens.

        Raises ValueError for what the library refuses, UnsupportedModel for a decoder that cannot
        be followed token by token, and WeightsError where `image_token` is no added token.
        """
        self._tokenizer = _build(data, added)
        self.decoding = _decoding(data.get("decoder"))
        tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_texts = frozenset(
            token.content for token in tokens.values() if token.content.strip(_BLANK)
        )
        self._hidden_ids = frozenset(index for index, token in tokens.items() if token.special)

        # In the sealed twin every special token has a name that nobody can guess, so text that is
        # not ours can spell none of them, and all else is encoded as ever. The library's own
        # switch (encode_special_tokens) leaves added tokens that are not flagged special.
        nonce = secrets.token_hex(8)
        names = sorted(self.special_texts)
        self._names = {text: f"{nonce}{index:05d}" for index, text in enumerate(names)}
        self._sealed = _build(
            _renamed(data, self._names),
            [_with_content(token, self._names.get(token.content)) for token in added],
        )
        spellings = set(self.special_texts)
        self._normalizer = self._tokenizer.normalizer
        if self._normalizer is not None:
            spellings.update(
                self._normalizer.normalize_str(token.content)
                for token in tokens.values()
                if token.normalized and token.content in self.special_texts
            )
        self._special_pattern = _any_of(spellings)
        self._name_pattern = _any_of(self.special_texts)

        image_token_id = self._tokenizer.token_to_id(image_token)
        if image_token_id is None or image_token not in self.special_texts:
            raise WeightsError(f"The tokenizer has no token {image_token!r} for the picture.")
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.eos_token_ids = eos_token_ids
        self.vocab_size = self._tokenizer.get_vocab_size()

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read a checkpoint's tokenizer.json and the files that amend it.

        As transformers 5 does for LLaVA checkpoints: tokenizer.json decides, the beginning-of-text
        token included (`add_bos_token` and `legacy` of tokenizer_config.json are ignored), and
        added tokens that tokenizer_config.json, or else special_tokens_map.json and
        added_tokens.json, describe otherwise are changed.

        Raises WeightsError naming the file that is missing or broken, or UnsupportedModel.
        """
        data = _read(path, "tokenizer.json")
        if data is None:
            raise WeightsError("The checkpoint has no tokenizer.json.")
        config = _read(path, "tokenizer_config.json") or {}
        special_map = _read(path, "special_tokens_map.json") or {}
        if "added_tokens_decoder" not in config:
            config = {**config, **special_map}
        try:
            added = _amended(data, config, _read(path, "added_tokens.json") or {})
            image_token = _image_token(config, _read(path, "processor_config.json") or {})
            tokenizer = cls(data, added, image_token=image_token)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError("tokenizer.json, or a file beside it, is no tokenizer.") from error
        tokenizer.eos_token_ids = _eos_token_ids(path) or tokenizer._ids_of(config, "eos_token")
        return tokenizer

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`.

        special: special tokens in the text are recognised and those that frame a text (such as
            the beginning-of-text token) are added; else all of it is text and nothing is added.
        """
        tokenizer = self._tokenizer if special else self._sealed
        return tokenizer.encode(text, add_special_tokens=special).ids

    def encode_around(self, before: str, query: str, after: str) -> list[int]:
        """`encode(before + query + after, special=True)`, where `query` is always text.

        A special token that `query` spells is encoded as its characters.
        """
        if not self._spells_special(query):
            return self.encode(before + query + after, special=True)
        return self._sealed.encode(self._seal(before) + query + self._seal(after)).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids beyond the vocabulary have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's entry, before decoding; None for special tokens and unknown ids."""
        if token_id in self._hidden_ids:
            return None
        return self._tokenizer.id_to_token(token_id)

    def _spells_special(self, text: str) -> bool:
        if self._special_pattern.search(text):
            return True
        if self._normalizer is None:
            return False
        return bool(self._special_pattern.search(self._normalizer.normalize_str(text)))

    def _seal(self, text: str) -> str:
        return self._name_pattern.sub(lambda match: self._names[match[0]], text)

    def _ids_of(self, config: dict[str, Any], key: str) -> frozenset[int]:
        text = _content(config.get(key))
        index = self._tokenizer.token_to_id(text) if text else None
        return frozenset() if index is None else frozenset((index,))


def _build(data: dict[str, Any], added: Sequence[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from error
    # It would keep the last 10,000 different queries, a kilobyte each, and help only those that
    # come again word for word.
    tokenizer.model._resize_cache(0)
    tokenizer.add_tokens(list(added))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which tokens carry other names; ids and all else stay."""
    model = dict(data["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: (piece, score)
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        # A merge that makes a special token out of text would make it out of a stranger's.
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if not (left in names or right in names or left + right in names)
        ]
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in data.get("added_tokens") or []
    ]
    return {**data, "model": model, "added_tokens": added}


def _amended(
    data: dict[str, Any], config: dict[str, Any], added_json: dict[str, Any]
) -> list[tokenizers.AddedToken]:
    """The added tokens that the other files describe otherwise than tokenizer.json does."""
    known = {token["content"]: _added_token(token) for token in data.get("added_tokens") or []}
    standard = [_content(token) for key, token in config.items() if key in _NAMED]
    own = [_content(token) for key, token in config.items() if key.endswith("_token")]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key) or []
        if isinstance(extra, dict):
            own += [_content(token) for token in extra.values()]
        else:
            standard += [_content(token) for token in extra]

    amended: dict[str, tokenizers.AddedToken] = {}
    if "added_tokens_decoder" in config:
        entries = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        described = [_added_token(token) for _, token in entries]
    else:
        described = [
            _added_token(
                {
                    "content": text,
                    "special": text in standard or text in own,
                    "normalized": text not in standard,
                }
            )
            for text, _ in sorted(added_json.items(), key=lambda item: int(item[1]))
            if text not in known
        ]
    for token in described:
        if token.content not in known or repr(token) != repr(known[token.content]):
            amended[token.content] = token
    for text in (*standard, *own):
        if text and text not in known and text not in amended:
            amended[text] = _added_token({"content": text, "special": True})
    return list(amended.values())


def _added_token(token: dict[str, Any]) -> tokenizers.AddedToken:
    special = bool(token.get("special", False))
    return tokenizers.AddedToken(
        token["content"],
        single_word=bool(token.get("single_word", False)),
        lstrip=bool(token.get("lstrip", False)),
        rstrip=bool(token.get("rstrip", False)),
        normalized=bool(token.get("normalized", not special)),
        special=special,
    )


def _with_content(token: tokenizers.AddedToken, content: str | None) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        content or token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _decoding(decoder: dict[str, Any] | None) -> Decoding:
    steps = (decoder or {}).get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding(byte_level=True)
    replace = [step for step in steps if step["type"] == "Replace"]
    strip = [step for step in steps if step["type"] == "Strip"]
    expected = ["Replace"] * len(replace) + ["ByteFallback", "Fuse"] + ["Strip"] * len(strip)
    simple = (
        kinds == expected
        and len(strip) <= 1
        and all("String" in step["pattern"] for step in replace)
        and all(step["stop"] == 0 for step in strip)
    )
    if not simple:
        raise UnsupportedModel(f"The tokenizer's decoder is not supported: {kinds or None}.")
    return Decoding(
        replace=tuple((step["pattern"]["String"], step["content"]) for step in replace),
        strip=strip[0]["content"] if strip else " ",
        strip_count=strip[0]["start"] if strip else 0,
    )


def _image_token(config: dict[str, Any], processor: dict[str, Any]) -> str:
    extra = config.get("extra_special_tokens")
    places = (config, extra if isinstance(extra, dict) else {}, processor)
    found = (_content(place.get("image_token")) for place in places)
    return next((text for text in found if text), "<image>")


def _eos_token_ids(path: Path) -> frozenset[int]:
    """The ids that the checkpoint's configuration names; empty if it names none."""
    config = _read(path, "config.json") or {}
    generation = _read(path, "generation_config.json") or {}
    text_config = config.get("text_config")
    for place in (generation, text_config if isinstance(text_config, dict) else {}, config):
        value = place.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if value is not None and all(isinstance(index, int) for index in ids):
            return frozenset(ids)
    return frozenset()


def _read(path: Path, name: str) -> dict[str, Any] | None:
    """A JSON object among the checkpoint's files, or None where there is no such file."""
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{name} cannot be read: it is no JSON file.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{name} cannot be read: it holds no JSON object.")
    return content


def _content(token: object) -> str | None:
    """A token's text, given as such or as a record."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first, as the library does; nothing if there is none."""
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
