"""From upright RGB pixels to the normalised array that a vision tower takes.

The same numbers as transformers' PIL ("slow") CLIP and LLaVA processors, from the same JSON, but a
picture of extreme proportions costs only the window that survives the centre crop. Knows nothing
of files, of URLs or of models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava_engine.errors import UnsupportedModel, WeightsError
from llava_engine.image.load import LoadedImage, Pixels

# Pillow's filters by number: half their width in source pixels at scale 1 (libImaging/Resample.c).
# NEAREST (0) is no filter there and no LLaVA checkpoint uses it.
_FILTER_SUPPORT = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
# Up to this factor the whole axis is resampled (bit-equal to Pillow) rather than a window of it.
_WHOLE_AXIS = 4
_WHOLE_SQUARE = 1 << 24  # pixels of a square to pad to, at most, likewise
_CLIP, _CLIP_OLD, _LLAVA = "CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor"
_FLAGS = (
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_pad",
)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class ImageProcessorConfig:
    """How pixels are prepared; the fields and defaults of transformers' image processors.

    shortest_edge or size (height, width) is what the picture is resized to; crop_size is
    (height, width). do_pad is LLaVA's: first pad to a square with the mean colour. Pictures are
    always RGB here, so do_convert_rgb changes nothing.
    """

    do_resize: bool = True
    shortest_edge: int | None = 224
    size: tuple[int, int] | None = None
    resample: int = 3
    do_center_crop: bool = True
    crop_size: tuple[int, int] = (224, 224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = _CLIP_MEAN
    image_std: tuple[float, float, float] = _CLIP_STD
    do_convert_rgb: bool = True
    do_pad: bool = False

    def __post_init__(self) -> None:
        if self.do_resize and (self.shortest_edge is None) == (self.size is None):
            raise UnsupportedModel("image size must be shortest_edge or height and width")
        if type(self.resample) is not int or self.resample not in _FILTER_SUPPORT:
            raise UnsupportedModel(f"resample {self.resample!r} is not supported")
        if 0 in self.image_std:
            raise UnsupportedModel("image_std must not hold 0")
        _ = self.output_size

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> ImageProcessorConfig:
        """Read `image_processor` of processor_config.json, or else preprocessor_config.json.

        Raises WeightsError for a missing file or broken JSON, UnsupportedModel for values that
        this engine does not implement.
        """
        nested = _read_json(path, "processor_config.json")
        settings = nested.get("image_processor") if nested is not None else None
        if settings is None:
            settings = _read_json(path, "preprocessor_config.json")
        if settings is None:
            raise WeightsError("preprocessor_config.json is missing")
        if not isinstance(settings, dict):
            raise WeightsError("image_processor of processor_config.json is not an object")
        return cls(**_fields({k: v for k, v in settings.items() if v is not None}))

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every prepared picture. Raises UnsupportedModel if they differ."""
        if self.do_center_crop:
            return self.crop_size
        if self.do_resize and self.size is not None:
            return self.size
        if self.do_resize and self.shortest_edge is not None and self.do_pad:
            return self.shortest_edge, self.shortest_edge
        raise UnsupportedModel("without a crop, pictures would be prepared to different sizes")

    @property
    def variant(self) -> bytes:
        """16-byte digest of the configuration."""
        return hashlib.blake2b(repr(astuple(self)).encode(), digest_size=16).digest()


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """The record's fields from the JSON's; keys that change no pixel are not looked at."""
    kind = given.get("image_processor_type", given.get("feature_extractor_type", _CLIP))
    if str(kind).removesuffix("Fast").removesuffix("Pil") not in (_CLIP, _CLIP_OLD, _LLAVA):
        raise UnsupportedModel(f"image processor {kind!r} is not supported")
    fields: dict[str, Any] = {}
    for name in _FLAGS:
        if name in given:
            if not isinstance(given[name], bool):
                raise UnsupportedModel(f"{name} must be true or false, not {given[name]!r}")
            fields[name] = given[name]
    if fields.get("do_pad") and not str(kind).startswith(_LLAVA):
        raise UnsupportedModel(f"do_pad is not supported with {kind}")
    if "size" in given:
        fields["shortest_edge"], fields["size"] = _size(given["size"], "size")
    if "crop_size" in given:
        edge, crop = _size(given["crop_size"], "crop_size")
        fields["crop_size"] = crop or (edge, edge)
    if "resample" in given:
        fields["resample"] = given["resample"]
    if "rescale_factor" in given:
        (fields["rescale_factor"],) = _numbers([given["rescale_factor"]], "rescale_factor", 1)
    for name in ("image_mean", "image_std"):
        if name in given:
            fields[name] = _numbers(given[name], name, 3)
    return fields


def preprocess(image: LoadedImage, config: ImageProcessorConfig) -> npt.NDArray[np.float32]:
    """Resize, crop, rescale and normalise to float32 [3, height, width].

    Equal to transformers' CLIPImageProcessorPil and LlavaImageProcessorPil within 1/255 before
    normalisation, and bit for bit where the picture's sides differ by less than a factor of 4.
    """
    pixels = _crop_of_resized(image.pixels, config)
    # One value per level and channel, computed as transformers computes each pixel.
    levels: npt.NDArray[Any] = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    if config.do_rescale:
        levels = (levels.astype(np.float64) * config.rescale_factor).astype(np.float32)
    levels = levels.astype(np.float32)
    if config.do_normalize:
        mean = np.array(config.image_mean, np.float32)
        std = np.array(config.image_std, np.float32)
        levels = (levels - mean) / std
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(levels[:, channel], pixels[:, :, channel], out=out[channel])
    return out


def picture_key(image: LoadedImage, config: ImageProcessorConfig) -> bytes:
    """16-byte digest of what was given, its size in pixels and how it is prepared."""
    size = repr(image.pixels.shape).encode()
    return hashlib.blake2b(
        image.content + config.variant + size, digest_size=16, person=b"picture"
    ).digest()


def _crop_of_resized(pixels: Pixels, config: ImageProcessorConfig) -> Pixels:
    """Pad, resize and crop to uint8 [*output, 3], computing only what the crop shows."""
    height, width = pixels.shape[:2]
    short, side = sorted((height, width))
    padded = (side, side) if config.do_pad else (height, width)
    resized = _resized_size(padded, config)
    output = config.output_size
    spans = [_shown(size, shown) for size, shown in zip(resized, output, strict=True)]
    background = tuple(int(value * 255) for value in config.image_mean)
    narrow = None
    if config.do_pad and short < side:
        if side <= _WHOLE_AXIS * short and side * side <= _WHOLE_SQUARE:
            pixels = _pad_axis(
                pixels, 0 if height < width else 1, (side - short) // 2, side, background
            )
        else:
            narrow = 0 if height < width else 1
    axes = [_Axis(i, padded[i], resized[i], *spans[i], config.resample) for i in (0, 1)]
    if narrow is None and axes[0].whole and axes[1].whole:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if config.do_resize:
            image = image.resize(resized[::-1], config.resample)
        pixels = np.asarray(image)[slice(*spans[0]), slice(*spans[1])]
    else:
        # Pillow rounds to 8 bits between its two passes; the order below is the one it takes for
        # pictures of such proportions (found by experiment with Pillow 13).
        shrinks = resized[0] < padded[0]
        order = (0, 1) if shrinks and height > width else (1, 0)
        todo = [axes[i] for i in order if i != narrow]
        for axis in todo:
            pixels = axis.cut(pixels)
        for axis in todo:
            pixels = axis.resample(pixels)
    if narrow is not None:
        # The padding of a narrow picture would be most of the square, so this axis goes last, when
        # the other one is already short, and only where the picture shows through the filter.
        pixels = _resample_narrow(
            pixels, narrow, side, resized[narrow], spans[narrow], config.resample, background
        )
    for i in (0, 1):
        if pixels.shape[i] < output[i]:  # transformers pads a small picture to the crop with 0
            before = math.ceil((output[i] - pixels.shape[i]) / 2)
            pixels = _pad_axis(pixels, i, before, output[i], (0, 0, 0))
    return pixels


def _resized_size(size: tuple[int, int], config: ImageProcessorConfig) -> tuple[int, int]:
    """transformers' get_resize_output_image_size, with its truncation."""
    if not config.do_resize:
        return size
    if config.shortest_edge is None:
        assert config.size is not None
        return config.size
    edge = config.shortest_edge
    height, width = size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _shown(size: int, shown: int) -> tuple[int, int]:
    """The range of a resized axis that the centre crop keeps."""
    start = max((size - shown) // 2, 0)
    return start, start + min(size, shown)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis (0 rows, 1 columns) resampled from `length` to `resized`, of which start..stop show.

    A window of the output is computed where the whole would be much longer. Its filter taps are the
    same, since enough source pixels are kept beyond its edges.
    """

    axis: int
    length: int
    resized: int
    start: int
    stop: int
    filter: int

    @property
    def whole(self) -> bool:
        return self.resized <= _WHOLE_AXIS * (self.stop - self.start)

    @property
    def first(self) -> int:
        """The first source pixel of the window."""
        scale = self.length / self.resized
        return 0 if self.whole else max(0, math.floor(self.start * scale) - self._reach)

    @property
    def last(self) -> int:
        scale = self.length / self.resized
        end = math.ceil(self.stop * scale) + self._reach
        return self.length if self.whole else min(self.length, end)

    @property
    def _reach(self) -> int:
        return _reach(self.filter, self.length / self.resized)

    def cut(self, pixels: Pixels) -> Pixels:
        """The source pixels that the shown ones are computed from."""
        return _along(pixels, self.axis, self.first, self.last)

    def resample(self, pixels: Pixels) -> Pixels:
        """From what `cut` kept to the shown pixels."""
        if self.whole:
            pixels = _resize(pixels, self.axis, 0, self.length, self.resized, self.filter)
            return _along(pixels, self.axis, self.start, self.stop)
        scale = self.length / self.resized
        box = self.start * scale - self.first, self.stop * scale - self.first
        return _resize(pixels, self.axis, *box, self.stop - self.start, self.filter)


def _resample_narrow(
    pixels: Pixels,
    axis: int,
    side: int,
    resized: int,
    span: tuple[int, int],
    filter: int,
    background: tuple[int, ...],
) -> Pixels:
    """The span of an axis resampled as if it were padded to `side` before."""
    length, scale, reach = pixels.shape[axis], side / resized, _reach(filter, side / resized)
    offset = (side - length) // 2
    start = max(span[0], math.floor((offset - reach) / scale))
    stop = min(span[1], math.ceil((offset + length + reach) / scale))
    if start >= stop:  # the crop shows nothing of the picture
        return _pad_axis(_along(pixels, axis, 0, 0), axis, 0, span[1] - span[0], background)
    first = max(0, min(offset, math.floor(start * scale) - reach))
    last = min(side, max(offset + length, math.ceil(stop * scale) + reach))
    strip = _pad_axis(pixels, axis, offset - first, last - first, background)
    box = start * scale - first, stop * scale - first
    strip = _resize(strip, axis, *box, stop - start, filter)
    return _pad_axis(strip, axis, start - span[0], span[1] - span[0], background)


def _reach(filter: int, scale: float) -> int:
    """Source pixels to each side that a filter may touch, and one for rounding."""
    return math.ceil(_FILTER_SUPPORT[filter] * max(scale, 1.0)) + 1


def _resize(
    pixels: Pixels, axis: int, start: float, stop: float, count: int, filter: int
) -> Pixels:
    """Resample source start..stop of one axis to `count` pixels, with Pillow."""
    stop = min(stop, float(pixels.shape[axis]))
    height, width = pixels.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if axis == 1:
        resized = image.resize((count, height), filter, box=(start, 0, stop, height))
    else:
        resized = image.resize((width, count), filter, box=(0, start, width, stop))
    return np.asarray(resized)


def _along(pixels: Pixels, axis: int, start: int, stop: int) -> Pixels:
    return pixels[start:stop] if axis == 0 else pixels[:, start:stop]


def _pad_axis(
    pixels: Pixels, axis: int, before: int, total: int, colour: tuple[int, ...]
) -> Pixels:
    """Lay pixels on a plain ground that is `total` long on this axis."""
    shape = [*pixels.shape]
    length, shape[axis] = shape[axis], total
    ground = np.empty(shape, np.uint8)
    ground[:] = colour
    _along(ground, axis, before, before + length)[:] = pixels
    return ground


def _read_json(directory: str | os.PathLike[str], name: str) -> Any:
    try:
        with open(os.path.join(directory, name), encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{name} cannot be read") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{name} does not hold an object")
    return content


def _size(value: Any, name: str) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, None) or (None, (height, width))."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        if value.keys() == {"shortest_edge"}:
            return _positive(value["shortest_edge"], name), None
        if value.keys() == {"height", "width"}:
            return None, (_positive(value["height"], name), _positive(value["width"], name))
        raise UnsupportedModel(f"{name} with {sorted(value)} is not supported")
    return _positive(value, name), None


def _positive(value: Any, name: str) -> int:
    # Above 4096 a picture would take gigabytes; the largest LLaVA input is 384.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 4096:
        raise UnsupportedModel(f"{name} {value!r} is not supported")
    return value


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise UnsupportedModel(f"{name} must hold {count} numbers, not {value!r}")
    for number in value:
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not math.isfinite(number)
        ):
            raise UnsupportedModel(f"{name} must hold finite numbers, not {number!r}")
    return tuple(float(number) for number in value)
