"""Asks about a scene in varied words; every question has exactly one right answer.

Referents are unique, and what is left of, right of, above or below something is asked only where
every other shape is either clearly there or clearly not. Knows nothing of pixels or tokens.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.demo_model.scenes import COLOURS, SHAPES, Scene, Shape

KINDS = ("describe", "count", "colour", "shape", "where", "relation", "yes_no", "read")
CLOSED = KINDS[1:]
NUMBERS = ("Zero", "One", "Two", "Three", "Four")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
ROWS = ("at the top", "in the middle", "at the bottom")
# Offsets between two centres, as fractions of the picture: clearly apart, and hardly apart.
APART, LEVEL = 0.19, 0.08
# A side: how far `other` lies on that side of `shape`, and the words for it.
SIDES: dict[str, tuple[Callable[[Shape, Shape], float], tuple[str, ...]]] = {
    "left": (lambda shape, other: shape.cx - other.cx, ("to the left of", "left of")),
    "right": (lambda shape, other: other.cx - shape.cx, ("to the right of", "right of")),
    "above": (lambda shape, other: shape.cy - other.cy, ("above",)),
    "below": (lambda shape, other: other.cy - shape.cy, ("below", "under")),
}
DESCRIBE = (
    "Describe the picture.",
    "Describe this picture.",
    "Describe the image.",
    "Describe this image.",
    "Describe the image in detail.",
    "Describe the scene.",
    "Please describe the image.",
    "What is in this picture?",
    "What is in this image?",
    "What is in the picture?",
    "What is in the image?",
    "What's in the image?",
    "What do you see?",
    "What do you see in this image?",
    "What is shown here?",
    "What does the picture show?",
    "What does this image show?",
    "Tell me what you see.",
    "What can you see?",
    "What can you see in this picture?",
    "Can you describe this image?",
    "Describe what you see.",
    "Describe the picture in one sentence.",
    "Name all the shapes in the picture.",
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def describe(scene: Scene) -> str:
    """The sentence or two that name everything in the scene, in reading order."""
    parts = [f"{_long_name(s)} is {PLACES[s.row][s.col]}" for s in scene.shapes]
    *most, last = parts
    text = f"{', '.join(most)} and {last}." if most else f"{last}."
    text = text[0].upper() + text[1:]
    if scene.writing is not None:
        what = scene.writing
        text += f" The {what.noun} {what.text} is written {ROWS[what.row]}."
    return text


def named(answer: str) -> Counter[tuple[str, str]]:
    """The (colour, shape) pairs that a description names."""
    pairs = re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", answer.lower())
    return Counter(pairs)


def names_everything(scene: Scene, answer: str) -> bool:
    """Whether the answer names every object with its colour, and nothing that is not there."""
    return named(answer) == Counter((s.colour, s.shape) for s in scene.shapes)


def same_answer(given: str, expected: str) -> bool:
    """Exact match but for case and a period at the end."""
    return _bare(given) == _bare(expected)


def _bare(answer: str) -> str:
    return answer.strip().removesuffix(".").lower()


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """One question of that kind about the scene, or None where the scene allows none."""
    made = _ASKERS[kind](scene, rng)
    if made is None:
        return None
    text, answer = made
    if rng.random() < 0.5:
        text = text.replace("colour", "color")
    if rng.random() < 0.3:
        text = text.replace("picture", "image")
    if rng.random() < 0.1:
        text = (text[0].lower() + text[1:]).rstrip("?.")
    return Question(kind, text, answer)


def ask_all(scene: Scene, count: int, salt: str = "") -> list[Question]:
    """`count` closed questions, the kinds in turn, none asked twice where that can be helped."""
    rng = random.Random(f"llava-tiny/questions/{salt}/{scene.seed}/{scene.index}")
    kinds = list(CLOSED) + ["relation", "yes_no"]
    rng.shuffle(kinds)
    asked: dict[str, Question] = {}
    for turn in range(6 * count):
        question = ask(scene, kinds[turn % len(kinds)], rng)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


def one_of_each(scene: Scene) -> list[Question]:
    """A question of every kind that the scene allows: what the evaluation asks."""
    rng = random.Random(f"llava-tiny/evaluation/{scene.seed}/{scene.index}")
    return [q for kind in KINDS if (q := ask(scene, kind, rng)) is not None]


Made = tuple[str, str] | None


def _long_name(shape: Shape) -> str:
    size = "" if shape.size == "medium" else shape.size + " "
    name = f"{size}{shape.colour} {shape.shape}"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def _nouns(scene: Scene) -> tuple[str, ...]:
    """What shapes may be called: a word is a thing too, so with one about only "shape" is clear."""
    return ("shape",) if scene.writing else ("shape", "object", "thing")


def _references(scene: Scene, shape: Shape) -> dict[str, list[str]]:
    """The unique ways to point at a shape, by what they give away (both is colour and shape)."""
    colours = Counter(s.colour for s in scene.shapes)
    kinds = Counter(s.shape for s in scene.shapes)
    pairs = Counter((s.colour, s.shape) for s in scene.shapes)
    ways: dict[str, list[str]] = {"both": [], "colour": [], "shape": [], "place": []}
    if pairs[shape.colour, shape.shape] == 1:
        ways["both"].append(f"the {shape.colour} {shape.shape}")
    if colours[shape.colour] == 1:
        ways["colour"] += [f"the {shape.colour} {noun}" for noun in _nouns(scene)]
    if kinds[shape.shape] == 1:
        ways["shape"].append(f"the {shape.shape}")
    ways["place"].append(f"the shape {PLACES[shape.row][shape.col]}")
    return ways


def _point(scene: Scene, rng: random.Random, *hints: str) -> tuple[Shape, str] | None:
    """A random shape with a unique reference that gives away only what one of `hints` does."""
    options = [
        (shape, rng.choice(ways[hint]))
        for shape in scene.shapes
        for ways in (_references(scene, shape),)
        for hint in hints
        if ways[hint]
    ]
    return rng.choice(options) if options else None


def _ask_describe(scene: Scene, rng: random.Random) -> Made:
    return rng.choice(DESCRIBE), describe(scene)


def _ask_count(scene: Scene, rng: random.Random) -> Made:
    about = rng.choice(("all", "all", "all", "colour", "colour", "shape", "shape", "both"))
    some = rng.choice(scene.shapes)
    if about == "all":
        noun, number = rng.choice(_nouns(scene)) + "s", len(scene.shapes)
    elif about == "colour":
        colour = some.colour if rng.random() < 0.75 else rng.choice(tuple(COLOURS))
        noun = f"{colour} {rng.choice(_nouns(scene))}s"
        number = sum(s.colour == colour for s in scene.shapes)
    elif about == "shape":
        kind = some.shape if rng.random() < 0.75 else rng.choice(SHAPES)
        noun, number = _plural(kind), sum(s.shape == kind for s in scene.shapes)
    else:
        noun = f"{some.colour} {_plural(some.shape)}"
        number = sum((s.colour, s.shape) == (some.colour, some.shape) for s in scene.shapes)
    frames = (
        "How many {} are there?",
        "How many {} are in the picture?",
        "How many {} do you see?",
    )
    frame = rng.choice((*frames, "Count the {}."))
    return frame.format(noun), NUMBERS[number]


def _ask_colour(scene: Scene, rng: random.Random) -> Made:
    found = _point(scene, rng, "shape", "place")
    if found is None:
        return None
    shape, name = found
    frames = ("What colour is {}?", "Which colour is {}?", "What is the colour of {}?")
    return rng.choice(frames).format(name), shape.colour.capitalize()


def _ask_shape(scene: Scene, rng: random.Random) -> Made:
    found = _point(scene, rng, "colour", "place")
    if found is None:
        return None
    shape, name = found
    frames = ("What shape is {}?", "Which shape is {}?", "What is the shape of {}?")
    frame = rng.choice(frames)
    return frame.format(name.replace("shape", "object")), shape.shape.capitalize()


def _ask_where(scene: Scene, rng: random.Random) -> Made:
    if scene.writing is not None and rng.random() < 0.3:
        frame = rng.choice(("Where is the {}?", "Where is the {} written?"))
        return frame.format(scene.writing.noun), ROWS[scene.writing.row].capitalize()
    found = _point(scene, rng, "both", "colour", "shape")
    if found is None:
        return None
    shape, name = found
    frames = ("Where is {}?", "Where in the picture is {}?", "Where do you see {}?")
    return rng.choice(frames).format(name), PLACES[shape.row][shape.col].capitalize()


def on_side(scene: Scene, shape: Shape, side: str) -> list[Shape] | None:
    """The shapes clearly on that side of `shape`, or None where one is neither there nor not."""
    offset, _ = SIDES[side]
    offsets = [(offset(shape, other), other) for other in scene.shapes if other is not shape]
    if any(LEVEL < distance < APART for distance, _ in offsets):
        return None
    return [other for distance, other in offsets if distance >= APART]


def _ask_relation(scene: Scene, rng: random.Random) -> Made:
    options = []
    for side in SIDES:
        for shape in scene.shapes:
            there = on_side(scene, shape, side)
            ways = [
                w for hint in ("both", "colour", "shape") for w in _references(scene, shape)[hint]
            ]
            if there is not None and len(there) <= 1 and ways:
                options.append((side, there, rng.choice(ways)))
    found = [option for option in options if option[1]]
    empty = [option for option in options if not option[1]]
    pool = found if rng.random() < 0.85 else empty
    if not pool:
        return None
    side, there, name = rng.choice(pool)
    # "What is above" would have two answers with a word up there: then ask for shapes alone.
    openings = (
        ("Which shape is", "What shape is") if scene.writing else ("What is", "Which shape is")
    )
    text = f"{rng.choice(openings)} {rng.choice(SIDES[side][1])} {name}?"
    return text, f"The {there[0].colour} {there[0].shape}" if there else "None"


def _ask_yes_no(scene: Scene, rng: random.Random) -> Made:
    want = rng.random() < 0.5
    about = rng.choice(("exists", "exists", "attribute", "side", "side", "count", "written"))
    if about == "attribute":
        return _is_it(scene, want, rng)
    if about == "side":
        return _is_it_there(scene, want, rng)
    if about == "count":
        number = len(scene.shapes)
        if not want:
            number = rng.choice([n for n in (1, 2, 3, 4) if n != number])
        noun = "shape" if number == 1 else "shapes"
        verb = "Is" if number == 1 else "Are"
        return f"{verb} there {NUMBERS[number].lower()} {noun}?", _yes(number == len(scene.shapes))
    if about == "written":
        noun = rng.choice(("word", "number"))
        frame = rng.choice(("Is there a {} in the picture?", "Is a {} written in the picture?"))
        has = scene.writing is not None and scene.writing.noun == noun
        return frame.format(noun), _yes(has)
    pairs = {(s.colour, s.shape) for s in scene.shapes}
    if want:
        colour, kind = rng.choice(sorted(pairs))
    else:
        some = rng.choice(scene.shapes)
        near = rng.random()
        colour = some.colour if near < 0.4 else rng.choice(tuple(COLOURS))
        kind = some.shape if near >= 0.6 else rng.choice(SHAPES)
    article = "an" if colour[0] in "aeiou" else "a"
    frame = rng.choice(("Is there {} {} {}?", "Do you see {} {} {}?", "Is there {} {} {} here?"))
    return frame.format(article, colour, kind), _yes((colour, kind) in pairs)


def _is_it(scene: Scene, want: bool, rng: random.Random) -> Made:
    found = _point(scene, rng, "shape", "place")
    if found is None:
        return None
    shape, name = found
    colour = shape.colour
    if not want:
        colour = rng.choice([c for c in COLOURS if c != colour])
    return f"Is {name} {colour}?", _yes(want)


def _is_it_there(scene: Scene, want: bool, rng: random.Random) -> Made:
    options = []
    for shape in scene.shapes:
        for other in scene.shapes:
            if other is shape:
                continue
            names = [_references(scene, s)["both"] for s in (other, shape)]
            if not all(names):
                continue
            for side, (offset, words) in SIDES.items():
                there = offset(shape, other)
                if (there >= APART) if want else (there <= LEVEL):
                    options.append((names[0][0], rng.choice(words), names[1][0], side))
    if not options:
        return None
    one, words, two, _ = rng.choice(options)
    return f"Is {one} {words} {two}?", _yes(want)


def _ask_read(scene: Scene, rng: random.Random) -> Made:
    if scene.writing is None:
        return None
    noun = scene.writing.noun
    frames = (
        "What is written in the picture?",
        "What does it say?",
        "What does the text say?",
        f"What {noun} is written in the picture?",
        f"What {noun} is in the picture?",
        f"Which {noun} do you see?",
        f"What is the {noun}?",
        f"Read the {noun}.",
    )
    return rng.choice(frames), scene.writing.text


def _yes(true: bool) -> str:
    return "Yes" if true else "No"


_ASKERS: dict[str, Callable[[Scene, random.Random], Made]] = {
    "describe": _ask_describe,
    "count": _ask_count,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "where": _ask_where,
    "relation": _ask_relation,
    "yes_no": _ask_yes_no,
    "read": _ask_read,
}
