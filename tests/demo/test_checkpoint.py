"""The shipped checkpoint as transformers sees it: small, loadable, right about unseen scenes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bench.demo_model.data import shrink
from bench.demo_model.evaluate import SEED
from bench.demo_model.picture import PICTURE
from bench.demo_model.questions import names_everything, one_of_each, same_answer
from bench.demo_model.scenes import make_scene, render
from bench.demo_model.tokenizer import PROMPT, build_tokenizer
from llava_engine import demo

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(demo.model_dir(), dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(demo.model_dir(), backend="pil")


def answers(llava: tuple[Any, Any], cases: list[tuple[Image.Image, str]], limit: int) -> list[str]:
    model, processor = llava
    inputs = processor(
        images=[picture for picture, _ in cases],
        text=[PROMPT.format(query=query) for _, query in cases],
        padding=True,
        return_tensors="pt",
    )
    made = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    texts: list[str] = processor.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def test_the_directory_is_whole_and_at_most_8_mb() -> None:
    here = Path(demo.__file__).parent
    assert {path.name for path in demo.model_dir().iterdir()} == FILES
    assert sum(path.stat().st_size for path in here.rglob("*") if path.is_file()) <= 8_000_000


def test_closed_questions_about_unseen_scenes(llava: tuple[Any, Any]) -> None:
    asked = [
        (render(scene), question)
        for scene in (make_scene(SEED, index) for index in range(40, 48))
        for question in one_of_each(scene)
        if question.kind != "describe"
    ]
    given = answers(llava, [(picture, question.text) for picture, question in asked], 12)
    right = [same_answer(g, q.answer) for g, (_, q) in zip(given, asked, strict=True)]
    assert len(right) >= 40
    assert sum(right) >= 0.9 * len(right), [
        (q.text, q.answer, g) for g, (_, q) in zip(given, asked, strict=True)
    ]


def test_the_bundled_picture_is_described(llava: tuple[Any, Any]) -> None:
    picture = Image.open(demo.picture_path())
    assert picture.size == (PICTURE.width, PICTURE.height)
    queries = ["Describe the image.", "What is in this picture?", "What do you see?"]
    for text in answers(llava, [(picture, query) for query in queries], 96):
        assert names_everything(PICTURE, text), text
        assert "The word HELLO is written at the bottom." in text


def test_the_tokenizer_is_the_one_its_script_builds() -> None:
    shipped = Tokenizer.from_file(str(demo.model_dir() / "tokenizer.json"))
    built = build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    prompts = ("Größe 猫 🐱?", "two  spaces", "What colour is the heart?", "\t\n", "")
    for query in prompts:
        prompt = PROMPT.format(query=query)
        assert shipped.encode(prompt).ids == built(prompt).input_ids
        assert shipped.token_to_id("<unk>") not in shipped.encode(prompt).ids


def test_pictures_are_shrunk_as_the_shipped_processor_does(llava: tuple[Any, Any]) -> None:
    processor = llava[1].image_processor
    for index in range(10):
        picture = render(make_scene(SEED, index))
        made = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.asarray(made["pixel_values"][0]).transpose(1, 2, 0)
        assert np.array_equal(pixels, np.asarray(shrink(picture)))
