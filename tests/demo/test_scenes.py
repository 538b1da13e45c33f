"""The scene generator: the same from a seed, and what it says of a picture is in the picture."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bench.demo_model import questions
from bench.demo_model.scenes import COLOURS, Scene, Shape, make_scene, render

SEED = 424_242


def colour_at(scene: Scene, shape: Shape) -> tuple[int, ...]:
    """The picture's colour inside the shape: at its centre, or on the band of a ring."""
    out = 0.76 * shape.radius if shape.shape == "ring" else 0.0
    left, top = scene.origin
    x, y = left + (shape.cx + out) * scene.side, top + shape.cy * scene.side
    pixel = render(scene).getpixel((int(x), int(y)))
    assert isinstance(pixel, tuple)
    return pixel


def nearest_colour(rgb: tuple[int, ...]) -> str:
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], rgb))


def test_a_scene_and_its_questions_depend_on_seed_and_index_alone() -> None:
    for index in range(10):
        scene, again = make_scene(SEED, index), make_scene(SEED, index)
        assert scene == again
        assert np.array_equal(np.asarray(render(scene)), np.asarray(render(again)))
        assert questions.ask_all(scene, 8) == questions.ask_all(again, 8)
        assert questions.one_of_each(scene) == questions.one_of_each(again)
    assert make_scene(SEED, 0) != make_scene(SEED, 1)
    assert make_scene(SEED, 0) != make_scene(SEED + 1, 0)


def test_every_shape_has_its_colour_where_the_scene_says() -> None:
    for index in range(100):
        scene = replace(make_scene(SEED, index), noise=0.0, quality=0)
        for shape in scene.shapes:
            assert nearest_colour(colour_at(scene, shape)) == shape.colour, (index, shape)


def test_shapes_lie_inside_apart_and_in_reading_order() -> None:
    for index in range(300):
        scene = make_scene(SEED, index)
        assert 1 <= len(scene.shapes) <= 4
        cells = [(s.row, s.col) for s in scene.shapes]
        assert cells == sorted(set(cells))
        for shape in scene.shapes:
            assert shape.radius < min(shape.cx, shape.cy, 1 - shape.cx, 1 - shape.cy)
            assert scene.writing is None or shape.row != scene.writing.row
            for other in scene.shapes:
                apart = math.dist((shape.cx, shape.cy), (other.cx, other.cy))
                assert shape is other or apart > shape.radius + other.radius


def test_a_description_names_everything_once_and_passes_its_own_check() -> None:
    for index in range(200):
        scene = make_scene(SEED, index)
        text = questions.describe(scene)
        assert questions.named(text) == Counter((s.colour, s.shape) for s in scene.shapes)
        assert questions.names_everything(scene, text)
        assert not questions.names_everything(scene, text.replace(scene.shapes[0].shape, "thing"))
        assert not questions.names_everything(scene, text + " A red circle is in the middle.")
        assert scene.writing is None or f" {scene.writing.text} " in text


@pytest.mark.parametrize("plural", ["shapes", "objects"])
def test_counts_are_the_number_of_shapes(plural: str) -> None:
    asked = 0
    for index in range(400):
        scene = make_scene(SEED, index)
        for question in questions.ask_all(scene, 12):
            if question.text.lower().startswith(f"how many {plural} "):
                asked += 1
                assert question.answer == questions.NUMBERS[len(scene.shapes)]
    assert asked > 20


def test_a_shape_beside_another_is_the_only_one_there() -> None:
    asked = 0
    for index in range(300):
        scene = make_scene(SEED, index)
        for question in questions.ask_all(scene, 12):
            words = question.text.lower().removesuffix("?").split(" of the ")
            if question.kind != "relation" or len(words) != 2 or question.answer == "None":
                continue
            described = [s for s in scene.shapes if words[1] in f"{s.colour} {s.shape}"]
            if len(described) != 1:
                continue
            asked += 1
            sign = -1 if words[0].endswith("left") else 1
            beside = [
                f"The {s.colour} {s.shape}"
                for s in scene.shapes
                if sign * (s.cx - described[0].cx) >= questions.APART
            ]
            assert beside == [question.answer]
    assert asked > 20


def test_answers_compare_by_case_and_last_period_only() -> None:
    assert questions.same_answer(" red. ", "Red")
    assert not questions.same_answer("Red circle", "Red")
    assert not questions.same_answer("Re.d", "Red")
