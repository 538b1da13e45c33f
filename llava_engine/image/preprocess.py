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
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava_engine.errors import UnsupportedModel, WeightsError
from llava_engine.image.load import LoadedImage, Pixels
from llava_engine.image.resample import (
    FILTER_SUPPORT,
    WHOLE_AXIS,
    Axis,
    pad_axis,
    resample_narrow,
    rows_first,
)
from llava_engine.kernels.preprocess import ROWS, DecodedPicture, Pass, identity

# Up to WHOLE_AXIS and this side a picture is padded to a square (bit-equal to Pillow).
_WHOLE_SIDE = 1 << 12
# Pictures are resampled with Pillow if more bytes than this would have to go to the device, or if
# a pixel is the sum of more than twice so many.
_MOST_BYTES = 32 << 20
_FURTHEST = 256
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
        if type(self.resample) is not int or self.resample not in FILTER_SUPPORT:
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
    levels = _levels(config)
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(levels[:, channel], pixels[:, :, channel], out=out[channel])
    return out


def decoded_picture(
    image: LoadedImage, config: ImageProcessorConfig, *, resample: bool
) -> DecodedPicture:
    """What kernels.preprocess makes the values of `preprocess` from, bit for bit, on any device.

    resample: whether to resample here, with Pillow, as is best for a model on the CPU. Without it,
    too, the few pictures are resampled here of which `preprocess` takes windows, or that are large.
    """
    window = None if resample else _window(image.pixels, _geometry(image.pixels, config))
    if window is None:
        pixels = np.ascontiguousarray(_crop_of_resized(image.pixels, config))
        window = pixels, (identity(ROWS, len(pixels)),)
    pixels, passes = window
    held = pixels.base if isinstance(pixels.base, np.ndarray) else pixels
    shown = list(pixels.shape[:2])
    for each in passes:
        shown[each.axis] = each.taps.shape[1]
    height, width = config.output_size
    pixels.flags.writeable = False
    return DecodedPicture(
        pixels,
        passes,
        (height, width),
        (_before(height, shown[0]), _before(width, shown[1])),
        _levels(config),
        held.nbytes,
    )


def picture_key(image: LoadedImage, config: ImageProcessorConfig) -> bytes:
    """16-byte digest of what was given, its size in pixels and how it is prepared."""
    size = repr(image.pixels.shape).encode()
    return hashlib.blake2b(
        image.content + config.variant + size, digest_size=16, person=b"picture"
    ).digest()


@lru_cache(maxsize=16)
def _levels(config: ImageProcessorConfig) -> npt.NDArray[np.float32]:
    """[256, 3]: a value per level and channel, computed as transformers computes each pixel."""
    levels: npt.NDArray[Any] = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    if config.do_rescale:
        levels = (levels.astype(np.float64) * config.rescale_factor).astype(np.float32)
    levels = levels.astype(np.float32)
    if config.do_normalize:
        mean = np.array(config.image_mean, np.float32)
        std = np.array(config.image_std, np.float32)
        levels = (levels - mean) / std
    levels.flags.writeable = False
    return levels


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What becomes of a picture's rows (0) and columns (1).

    padded: the axis that is first padded to the other's length, if any, with `before` pixels of the
    background on one side. narrow: whether that is so much that it is never laid out.
    """

    axes: tuple[Axis, Axis]
    padded: int | None
    before: int
    narrow: bool
    background: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether Pillow resizes the picture as it is, or padded; else windows of it."""
        return not self.narrow and all(axis.whole for axis in self.axes)


def _geometry(pixels: Pixels, config: ImageProcessorConfig) -> _Geometry:
    height, width = pixels.shape[:2]
    short, side = sorted((height, width))
    full = (side, side) if config.do_pad else (height, width)
    resized = _resized_size(full, config)
    spans = [_shown(*sizes) for sizes in zip(resized, config.output_size, strict=True)]
    rows, columns = (Axis(i, full[i], resized[i], *spans[i], config.resample) for i in (0, 1))
    padded = None
    if config.do_pad and short < side:
        padded = 0 if height < width else 1
    return _Geometry(
        (rows, columns),
        padded,
        before=(side - short) // 2,
        narrow=padded is not None and not (side <= WHOLE_AXIS * short and side <= _WHOLE_SIDE),
        background=tuple(int(value * 255) for value in config.image_mean),
    )


def _crop_of_resized(pixels: Pixels, config: ImageProcessorConfig) -> Pixels:
    """Pad, resize and crop to uint8 [*output, 3], computing only what the crop shows."""
    geometry = _geometry(pixels, config)
    axes, padded, background = geometry.axes, geometry.padded, geometry.background
    if padded is not None and not geometry.narrow:
        pixels = pad_axis(pixels, padded, geometry.before, axes[padded].length, background)
    if geometry.whole:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if config.do_resize:
            image = image.resize((axes[1].resized, axes[0].resized), config.resample)
        rows, columns = (slice(axis.start, axis.stop) for axis in axes)
        pixels = np.asarray(image)[rows, columns]
    else:
        order = axes if rows_first(*axes) else axes[::-1]
        todo = [axis for axis in order if not (geometry.narrow and axis.axis == padded)]
        for axis in todo:
            pixels = axis.cut(pixels)
        for axis in todo:
            pixels = axis.resample(pixels)
    if padded is not None and geometry.narrow:
        # The padding of a narrow picture would be most of the square, so this axis goes last, when
        # the other one is already short, and only where the picture shows through the filter.
        pixels = resample_narrow(pixels, axes[padded], background)
    for i, length in enumerate(config.output_size):
        if pixels.shape[i] < length:  # transformers pads a small picture to the crop with 0
            pixels = pad_axis(pixels, i, _before(length, pixels.shape[i]), length, (0, 0, 0))
    return pixels


def _before(length: int, shown: int) -> int:
    return math.ceil((length - shown) / 2)


def _window(pixels: Pixels, geometry: _Geometry) -> tuple[Pixels, tuple[Pass, ...]] | None:
    """What the crop shows of a picture, and the passes over it; None if Pillow must resample it."""
    if not geometry.whole or any(axis.reach > _FURTHEST for axis in geometry.axes):
        return None
    spans, passes = [], []
    for axis in geometry.axes:
        padded = geometry.padded == axis.axis
        low, high, step = axis.taps(
            geometry.before if padded else 0, pixels.shape[axis.axis], geometry.background
        )
        spans.append(slice(low, high))
        passes += [step] if step is not None else []
    window = pixels[spans[0], spans[1]]
    if window.nbytes > _MOST_BYTES:
        return None
    if 2 * window.nbytes < pixels.nbytes:
        window = window.copy()
    if not rows_first(*geometry.axes):
        passes.reverse()
    return window, tuple(passes) or (identity(ROWS, len(window)),)


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
