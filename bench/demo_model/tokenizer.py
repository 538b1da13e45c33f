"""Builds llava-tiny's tokenizer: a Llama-style BPE with byte fallback over the questions' words.

The vocabulary is learnt from the generator's own sentences, one word at a time, so no merge crosses
a space. What is written in a picture is kept out of it and is spelt letter by letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from bench.demo_model.questions import describe, one_of_each
from bench.demo_model.scenes import make_scene

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
VOCAB_SIZE = 768
PROMPT = "USER: <image>\n{query} ASSISTANT:"
# Everyday words that the generator does not use, so that a stranger's question stays short.
EXTRA = """
the a an of and or to in on at is are was be it this that there here which what who where when
why how can could would do does did you your me my we they he she one two three four five six
seven eight nine ten word number text letter letters read say says show shows picture photo
image scene background describe detail detailed short sentence briefly please tell name list
all every each any many much more object objects thing things shape shapes color colour colors
colours size big small large tiny left right above below under over top bottom middle center
centre corner side next between near hello thanks yes no not with for from by as about
"""


def corpus(seed: int, scenes: int) -> Iterator[str]:
    """The words and marks of the generator's sentences, each by itself; ▁ is a word's space."""
    for word in EXTRA.split():
        for form in (word, word.capitalize()):
            yield from ["▁" + form] * 20
    for index in range(scenes):
        scene = make_scene(seed, index)
        texts = [describe(scene)]
        for question in one_of_each(scene):
            texts.append(question.text)
            if question.kind not in ("describe", "read"):
                texts.append(question.answer)
        written = scene.writing.text if scene.writing else None
        for text in ["USER: ASSISTANT:", *texts]:
            for word in text.split(" "):
                if word.strip(".,?:") != written:
                    head, *marks = re.findall(r"[\w']+|[^\w\s]", word)
                    yield "▁" + head
                    yield from marks


def build_tokenizer(seed: int = 0, scenes: int = 3000) -> LlamaTokenizer:
    """The tokenizer, ready for save_pretrained; the same for the same arguments."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=tokens,
        initial_alphabet=alphabet,
        min_frequency=5,
        show_progress=False,
    )
    learner.train_from_iterator(corpus(seed, scenes), trainer)
    learnt = json.loads(learner.to_str())["model"]
    return LlamaTokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        add_bos_token=True,
        model_max_length=1024,
        padding_side="left",
    )
