"""Draws the scenes that llava-tiny learns from: coloured shapes, at times a word or number.

A scene is a pure function of (seed, index). Coordinates are fractions of the centre square, the
part that survives the processor's centre crop, so nothing asked about can be cropped away.
Knows nothing of questions, tokens or torch: pillow and numpy only.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (212, 38, 38),
    "green": (44, 158, 66),
    "blue": (36, 80, 214),
    "yellow": (246, 212, 40),
    "orange": (245, 132, 28),
    "purple": (124, 48, 168),
    "pink": (248, 142, 190),
    "black": (20, 20, 22),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
SIZES: dict[str, tuple[float, float]] = {
    "small": (0.060, 0.072),
    "medium": (0.088, 0.106),
    "large": (0.132, 0.155),
}
_WORDS = """
ACE AIR ANT APE ARM ART BAG BEE BIG BIRD BLUE BOAT BOOK BOX BOY BUS CAFE CAKE CAR CAT COLD COW
CUP DAY DOG DOOR DUCK EAR EGG EXIT EYE FAN FARM FISH FIVE FLAG FLY FOG FOUR FOX FROG FUN GAME
GATE GIFT GOAT GOLD GOOD HAND HAT HELLO HELP HEN HI HILL HOME HOT HOTEL ICE INK JAM JET JOB JOY
JUMP KEY KING KITE LAKE LAMP LEAF LEFT LION LOVE MAP MILK MOON MOUSE MUG NEST NET NEW NO NOSE
NOW NUT OAK OIL OK ONE OPEN OWL PARK PEN PIG PINK PIZZA PLAY PUSH QUEEN QUIZ RAIN RED RICE ROAD
ROSE RUN SALE SEA SHOP SKY SNOW SOUP STAR STOP SUN TAXI TEA TEN TOY TREE TWO UP VAN WAVE WAX
WEST WIND WOLF YES ZERO ZOO
"""
WORDS = tuple(_WORDS.split())
CELLS = (0.18, 0.5, 0.82)  # the centres of the three rows and of the three columns
JITTER = 0.06
CLEAR = 80.0  # the least RGB distance between a background and what is drawn on it


@dataclass(frozen=True)
class Shape:
    """One object; cx, cy, radius are fractions of the centre square, row and col its cell."""

    shape: str
    colour: str
    size: str
    row: int
    col: int
    cx: float
    cy: float
    radius: float
    angle: float
    rgb: RGB


@dataclass(frozen=True)
class Writing:
    """A word or number in a row without shapes; cx, cy is the centre of its letters."""

    text: str
    row: int
    cx: float
    cy: float
    cap: float  # height of a capital letter
    bold: bool
    rgb: RGB

    @property
    def noun(self) -> str:
        return "number" if self.text.isdigit() else "word"


@dataclass(frozen=True)
class Background:
    kind: str  # plain, gradient, stripes, checks, clouds
    first: RGB
    second: RGB
    angle: float
    period: float


@dataclass(frozen=True)
class Scene:
    """Everything that is in one picture and how it was taken; `shapes` run in reading order."""

    seed: int
    index: int
    width: int
    height: int
    background: Background
    shapes: tuple[Shape, ...]
    writing: Writing | None
    noise: float
    quality: int  # of the JPEG round trip; 0 means none

    @property
    def side(self) -> int:
        return min(self.width, self.height)

    @property
    def origin(self) -> tuple[float, float]:
        """Left and top of the centre square, in pixels."""
        return (self.width - self.side) / 2, (self.height - self.side) / 2


def make_scene(seed: int, index: int) -> Scene:
    """The scene of (seed, index)."""
    rng = random.Random(f"llava-tiny/{seed}/{index}")
    background, allowed = _background(rng)
    writing = _writing(rng, allowed) if rng.random() < 0.4 else None
    shapes = None
    while shapes is None:
        shapes = _shapes(rng, allowed, writing)
    short = rng.randint(112, 336) if rng.random() < 0.85 else rng.randint(337, 640)
    long = round(short * rng.choice((1.0, 1.0, rng.uniform(1.0, 1.34))))
    width, height = (short, long) if rng.random() < 0.4 else (long, short)
    return Scene(
        seed=seed,
        index=index,
        width=width,
        height=height,
        background=background,
        shapes=shapes,
        writing=writing,
        noise=rng.uniform(1.0, 10.0) if rng.random() < 0.6 else 0.0,
        quality=rng.randint(55, 95) if rng.random() < 0.75 else 0,
    )


def distance(a: RGB, b: RGB) -> float:
    return math.dist(a, b)


def _background(rng: random.Random) -> tuple[Background, list[str]]:
    """A muted background, and the colours that stand out clearly against every part of it."""
    while True:
        hue, saturation = rng.random(), rng.uniform(0.0, 0.35)
        value = rng.uniform(0.28, 0.97)
        shift = rng.uniform(-0.2, 0.2)
        first = _rgb(hue, saturation, value)
        kind = rng.choice(("plain", "gradient", "gradient", "stripes", "checks", "clouds"))
        reach = 1.0 if kind == "gradient" else 0.35
        second = _rgb(hue + shift * 0.5, saturation, min(0.98, max(0.24, value + shift * reach)))
        if kind == "plain":
            second = first
        steps = [_mix(first, second, t) for t in (0.0, 0.5, 1.0)]
        allowed = [
            name
            for name, rgb in COLOURS.items()
            if min(distance(rgb, step) for step in steps) >= CLEAR
        ]
        if len(allowed) >= 5:
            angle, period = rng.uniform(0.0, math.pi), rng.uniform(0.08, 0.3)
            return Background(kind, first, second, angle, period), allowed


def _shapes(
    rng: random.Random, allowed: list[str], writing: Writing | None
) -> tuple[Shape, ...] | None:
    """One to four shapes in cells of their own, or None where the draw made two of them touch."""
    count = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4))
    # A narrow choice makes pairs alike, so that counting and telling apart need looking.
    colours = rng.sample(allowed, 2) if rng.random() < 0.35 else allowed
    kinds = rng.sample(SHAPES, 2) if rng.random() < 0.35 else list(SHAPES)
    cells = [(r, c) for r in range(3) for c in range(3) if writing is None or r != writing.row]
    shapes: list[Shape] = []
    for row, col in sorted(rng.sample(cells, count)):
        size = rng.choice(tuple(SIZES))
        radius = rng.uniform(*SIZES[size])
        low, high = radius * 1.1 + 0.01, 1.0 - radius * 1.1 - 0.01
        cx = min(high, max(low, CELLS[col] + rng.uniform(-JITTER, JITTER)))
        cy = min(high, max(low, CELLS[row] + rng.uniform(-JITTER, JITTER)))
        colour = rng.choice(colours)
        rgb = _jitter(rng, COLOURS[colour])
        angle = rng.uniform(-0.2, 0.2)
        shape = Shape(rng.choice(kinds), colour, size, row, col, cx, cy, radius, angle, rgb)
        if any(_touch(shape, other) for other in shapes):
            return None
        if writing is not None and abs(cy - writing.cy) < radius * 1.1 + writing.cap * 0.5 + 0.03:
            return None
        shapes.append(shape)
    return tuple(shapes)


def _touch(a: Shape, b: Shape) -> bool:
    return math.dist((a.cx, a.cy), (b.cx, b.cy)) < (a.radius + b.radius) * 1.1 + 0.02


def _writing(rng: random.Random, allowed: list[str]) -> Writing:
    if rng.random() < 0.5:
        # Any letters at times, so that words are read and not only told apart.
        any_letters = "".join(rng.choices(ascii_uppercase, k=rng.randint(2, 5)))
        text = rng.choice(WORDS) if rng.random() < 0.7 else any_letters
    else:
        digits = rng.choice((1, 2, 2, 3))
        text = str(rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))
    bold = rng.random() < 0.5
    cap = rng.uniform(0.12, 0.17)
    cap = min(cap, cap * 0.86 / _ink_width(text, cap, bold))
    half = _ink_width(text, cap, bold) / 2 + 0.02
    row = rng.randrange(3)
    cx = min(1.0 - half, max(half, 0.5 + rng.uniform(-0.18, 0.18)))
    cy = min(0.97 - cap / 2, max(0.03 + cap / 2, CELLS[row] + rng.uniform(-0.05, 0.03)))
    dark_or_light = [c for c in ("black", "white") if c in allowed]
    colour = rng.choice(dark_or_light) if dark_or_light and rng.random() < 0.7 else None
    rgb = _jitter(rng, COLOURS[colour or rng.choice(allowed)])
    return Writing(text, row, cx, cy, cap, bold, rgb)


@lru_cache(maxsize=512)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # Aileron, which travels inside pillow
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


CAP = 0.7  # Aileron: a capital's height over the font size
MEASURE = 200


def _advance(text: str, cap: float) -> float:
    return _font(MEASURE).getlength(text) / MEASURE * cap / CAP


def _ink_width(text: str, cap: float, bold: bool) -> float:
    return _advance(text, cap) + (0.1 * cap if bold else 0.0)


def letter_centres(writing: Writing) -> list[tuple[str, float, float]]:
    """Each character with the centre and the half width of its box along x."""
    left = writing.cx - _advance(writing.text, writing.cap) / 2
    ends = [left + _advance(writing.text[:n], writing.cap) for n in range(len(writing.text) + 1)]
    return [
        (c, (a + b) / 2, (b - a) / 2)
        for c, a, b in zip(writing.text, ends[:-1], ends[1:], strict=True)
    ]


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of scene.width x scene.height."""
    pixels = _paint_background(scene)
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    for shape in scene.shapes:
        _paint_shape(image, scene, shape)
    if scene.writing is not None:
        _paint_writing(image, scene, scene.writing)
    if scene.noise:
        grain = np.random.default_rng((scene.seed, scene.index))
        noise = grain.standard_normal((scene.height, scene.width, 3), dtype=np.float32)
        noisy = np.asarray(image, dtype=np.float32) + noise * scene.noise
        image = Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
    if scene.quality:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=scene.quality)
        image = Image.open(buffer).convert("RGB")
    return image


def _paint_background(scene: Scene) -> NDArray[np.float32]:
    look = scene.background
    x = np.arange(scene.width, dtype=np.float32)[None, :] / scene.side
    y = np.arange(scene.height, dtype=np.float32)[:, None] / scene.side
    along = x * math.cos(look.angle) + y * math.sin(look.angle)
    across = y * math.cos(look.angle) - x * math.sin(look.angle)
    if look.kind == "gradient":
        t = (along - along.min()) / max(float(along.max() - along.min()), 1e-6)
    elif look.kind == "stripes":
        t = 0.5 + 0.5 * np.sin(along * (2 * math.pi / look.period))
    elif look.kind == "checks":
        t = (np.floor(along / look.period) + np.floor(across / look.period)) % 2
    elif look.kind == "clouds":
        grain = np.random.default_rng((scene.seed, scene.index, 1))
        coarse = Image.fromarray(grain.integers(0, 256, (6, 6), dtype=np.uint8))
        smooth = coarse.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
        t = np.asarray(smooth, dtype=np.float32) / 255.0
    else:
        t = np.zeros_like(along)
    first, second = (np.array(c, dtype=np.float32) for c in (look.first, look.second))
    mixed: NDArray[np.float32] = first + (second - first) * t[..., None].astype(np.float32)
    return mixed


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around the origin, y downward."""
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
    if shape == "diamond":
        return [(0.0, -1.1), (0.78, 0.0), (0.0, 1.1), (-0.78, 0.0)]
    if shape == "cross":
        arm, end = 0.3, 0.98
        corner = [(arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm), (arm, end)]
        return corner + [(-x, -y) for x, y in corner]
    if shape == "star":
        points = []
        for i in range(10):
            reach, turn = (1.1, 0.46)[i % 2], math.pi * i / 5
            points.append((reach * math.sin(turn), 0.05 - reach * math.cos(turn)))
        return points
    if shape == "heart":
        curve = []
        for i in range(48):
            t = 2 * math.pi * i / 48
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            curve.append((math.sin(t) ** 3 * 1.02, -y / 15.5 - 0.1))
        return curve
    return [
        (math.cos(2 * math.pi * i / 64), math.sin(2 * math.pi * i / 64)) for i in range(64)
    ]  # circle and ring


def _paint_shape(image: Image.Image, scene: Scene, shape: Shape, fine: int = 4) -> None:
    left, top = scene.origin
    cx, cy = left + shape.cx * scene.side, top + shape.cy * scene.side
    radius = shape.radius * scene.side
    box_left, box_top = math.floor(cx - radius * 1.25), math.floor(cy - radius * 1.25)
    edge = math.ceil(radius * 2.5) + 2
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)

    def place(points: list[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
        return [
            (
                ((x * cos - y * sin) * scale * radius + cx - box_left) * fine,
                ((x * sin + y * cos) * scale * radius + cy - box_top) * fine,
            )
            for x, y in points
        ]

    mask = Image.new("L", (edge * fine, edge * fine))
    draw = ImageDraw.Draw(mask)
    draw.polygon(place(outline(shape.shape), 1.0), fill=255)
    if shape.shape == "ring":
        draw.polygon(place(outline("circle"), 0.52), fill=0)
    image.paste(shape.rgb, (box_left, box_top), mask.reduce(fine))


def _paint_writing(image: Image.Image, scene: Scene, writing: Writing) -> None:
    left, top = scene.origin
    size = max(8, round(writing.cap * scene.side / CAP))
    x, y = left + writing.cx * scene.side, top + writing.cy * scene.side
    stroke = round(0.05 * writing.cap * scene.side) if writing.bold else 0
    width = _font(size).getlength(writing.text)
    baseline = y + writing.cap * scene.side / 2
    draw = ImageDraw.Draw(image)
    draw.text(
        (x - width / 2, baseline),
        writing.text,
        fill=writing.rgb,
        font=_font(size),
        anchor="ls",
        stroke_width=stroke,
        stroke_fill=writing.rgb,
    )


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def _mix(a: RGB, b: RGB, t: float) -> RGB:
    r, g, b_ = (round(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return r, g, b_


def _jitter(rng: random.Random, rgb: RGB) -> RGB:
    r, g, b = (min(255, max(0, c + rng.randint(-10, 10))) for c in rgb)
    return r, g, b
