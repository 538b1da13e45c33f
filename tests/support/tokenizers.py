"""Small Llama-like tokenizers in the Hugging Face layout, made from scratch for tests.

Two layouts exist in the wild: the one published with llava-hf/llava-1.5-7b-hf, in which a
normaliser puts "▁" before every stretch of text, and the newer Metaspace one. Both have byte
fallback.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

_WORDS = (
    "USER ASSISTANT the The picture image what is in of a red green blue circle square star "
    "describe Describe color there are left right above below how many yes no and with on"
)
_CHARACTERS = (
    "▁\n\t"
    + "".join(chr(code) for code in range(33, 127))
    + "éüßñçøÉ«»“”’—…°ابتшж中文图的日本語한😀"
)


def make_tokenizer(directory: Path, *, metaspace: bool = False) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `directory`.

    `<unk>` is 0, `<s>` 1, `</s>` 2, then 256 byte tokens, merges and characters, and at the end the
    added `<image>` and `<pad>`. `metaspace` chooses the newer layout.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("\n", "\n")]
    for word in _WORDS.split():
        left = "▁"
        for right in word:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    pieces += dict.fromkeys(left + right for left, right in merges)
    pieces += [character for character in dict.fromkeys(_CHARACTERS) if character not in pieces]
    vocab = {piece: index for index, piece in enumerate(pieces)}

    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first", split=False
        )
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.save(str(directory / "tokenizer.json"))

    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for text in special
        },
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": not metaspace,
        "model_max_length": 10**30,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    _write(directory / "tokenizer_config.json", config)
    _write(directory / "special_tokens_map.json", {**names, "image_token": "<image>"})


def make_byte_level_tokenizer(directory: Path) -> None:
    """Write a tokenizer like Llama 3's: byte-level BPE with words taken whole (`ignore_merges`).

    `<|begin|>`, `<|end|>` and `<image>` are special and lie beyond the model's vocabulary;
    `<tool>` is added but not special.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in _WORDS.split():
        left = "Ġ"
        for right in word:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    pieces += dict.fromkeys(left + right for left, right in merges)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<image>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A",
        pair=None,
        special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(directory / "tokenizer_config.json", config)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
