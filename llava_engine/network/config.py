"""What a LLaVA checkpoint's config.json says, as frozen records.

Fields that a file leaves out have transformers' defaults, since published files rely on them. What
this engine does not implement is refused here, before any weight is read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_engine.errors import ModelError, UnsupportedModel
from llava_engine.network.layers import ACTIVATIONS
from llava_engine.quant import Format

_FILE = "config.json"
# Far above every real model, and low enough that no product of sizes overflows 64 bits.
_MAX_SIZE = 1 << 20
_MAX_LAYERS = 1 << 10
_MAX_SIDE = 1 << 14
_MAX_HEAD_DIM = 1 << 13
_MAX_POSITIONS = 1 << 24
# transformers' vision tower where config.json has no vision_config at all.
_DEFAULT_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A CLIP vision tower. image_size, patch_size: sides in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies. kind: "default", "linear" or "llama3".

    factor: of the stretch, for the last two. original_len, low_freq_factor, high_freq_factor: of
    "llama3", in tokens and in periods per original_len.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """A Llama decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaConfig:
    """A LLaVA model.

    vision_feature_layers: which hidden states of the tower are taken, 0 being the first layer's
        input; several are concatenated.
    drop_class_token: whether the class token's row is left out (vision_feature_select_strategy
        "default"; "full" keeps it).
    image_token_id: the vocabulary's placeholder for a picture's rows.
    quantization: in which its matrices were saved, as far as they were quantised.
    """

    text: TextConfig
    vision: VisionConfig
    vision_feature_layers: tuple[int, ...]
    drop_class_token: bool
    projector_bias: bool
    projector_hidden_act: str
    image_token_id: int
    tie_word_embeddings: bool
    quantization: Format | None = None

    @property
    def image_tokens(self) -> int:
        """Placeholders, and embedding rows, of one picture."""
        return self.vision.num_patches + (0 if self.drop_class_token else 1)

    @property
    def max_model_len(self) -> int:
        """The longest sequence in tokens."""
        return self.text.max_position_embeddings

    @classmethod
    def from_directory(cls, directory: Path) -> LlavaConfig:
        """Read `directory`/config.json.

        Raises ModelError where it is missing or broken, UnsupportedModel where it asks for what is
        not implemented.
        """
        try:
            data = json.loads((directory / _FILE).read_bytes())
        except FileNotFoundError as error:
            raise ModelError(f"the model's directory has no {_FILE}") from error
        except OSError as error:
            raise ModelError(f"{_FILE} cannot be read") from error
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{_FILE} is not valid JSON") from error
        if not isinstance(data, dict):
            raise ModelError(f"{_FILE} must hold a JSON object")
        return _llava(_Section(data, ""))


class _Section:
    """One object of config.json: typed look-ups in which null stands for the default."""

    def __init__(self, data: dict[str, Any], prefix: str) -> None:
        self._data = data
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._data.get(key) is not None

    def raw(self, key: str) -> Any:
        return self._data.get(key)

    def where(self, key: str) -> str:
        return f"{_FILE}: {self._prefix}{key}"

    def section(self, key: str, default: dict[str, Any] | None = None) -> _Section:
        value = self._get(key, default or {})
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return _Section(value, f"{self._prefix}{key}.")

    def count(self, key: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
        """An integer from 1 to limit."""
        value = self._get(key, default)
        if not _is_int(value) or not 1 <= value <= limit:
            raise self._wrong(key, f"an integer from 1 to {limit}", value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if not (_is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
            raise self._wrong(key, "a number above 0", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def choice(self, key: str, default: str | None, known: tuple[str, ...]) -> str:
        """One of the names that are implemented."""
        value = self._get(key, default)
        if value not in known:
            raise UnsupportedModel(
                f"{self.where(key)} is {value!r}; implemented: {', '.join(known)}"
            )
        return str(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where(key)} is missing")
        return value

    def _wrong(self, key: str, wanted: str, value: object) -> ModelError:
        return ModelError(f"{self.where(key)} must be {wanted}, not {value!r}")


def _llava(top: _Section) -> LlavaConfig:
    top.choice("model_type", None, ("llava",))
    text_section = top.section("text_config")
    text = _text(text_section)
    vision = _vision(top.section("vision_config", _DEFAULT_VISION))
    image_token_id = top.raw("image_token_index")
    if image_token_id is None:
        image_token_id = top.raw("image_token_id")
    if image_token_id is None:
        image_token_id = 32000
    if not _is_int(image_token_id) or not 0 <= image_token_id < text.vocab_size:
        raise ModelError(
            f"{top.where('image_token_index')} must be in the vocabulary of {text.vocab_size} "
            f"tokens, not {image_token_id!r}"
        )
    strategy = top.choice("vision_feature_select_strategy", "default", ("default", "full"))
    return LlavaConfig(
        text=text,
        vision=vision,
        vision_feature_layers=_feature_layers(top, vision.num_layers),
        drop_class_token=strategy == "default",
        projector_bias=top.flag("multimodal_projector_bias", True),
        projector_hidden_act=top.choice("projector_hidden_act", "gelu", tuple(ACTIVATIONS)),
        image_token_id=image_token_id,
        tie_word_embeddings=top.flag("tie_word_embeddings", False)
        or text_section.flag("tie_word_embeddings", False),
        quantization=_quantization(top.section("quantization_config"))
        if "quantization_config" in top
        else None,
    )


def _quantization(section: _Section) -> Format:
    """bitsandbytes' settings as transformers saves them.

    Which modules were left out (llm_int8_skip_modules) shows in the tensors, and how activations
    would be treated (llm_int8_threshold, bnb_4bit_compute_dtype) is of no concern here.
    """
    section.choice("quant_method", "bitsandbytes", ("bitsandbytes",))
    if section.flag("load_in_8bit", False):
        if section.flag("llm_int8_has_fp16_weight", False):
            raise UnsupportedModel(f"{section.where('llm_int8_has_fp16_weight')} is true")
        return "int8"
    if not section.flag("load_in_4bit", False):
        raise UnsupportedModel(f"{section.where('load_in_4bit')}: neither 4 bits nor 8")
    section.choice("bnb_4bit_quant_type", "fp4", ("nf4",))
    section.choice("bnb_4bit_quant_storage", "uint8", ("uint8",))
    if not section.flag("bnb_4bit_use_double_quant", False):
        raise UnsupportedModel(
            f"{section.where('bnb_4bit_use_double_quant')} is false; only NF4 with double "
            "quantisation is implemented"
        )
    return "nf4"


def _feature_layers(top: _Section, num_layers: int) -> tuple[int, ...]:
    value = top.raw("vision_feature_layer")
    if value is None:
        value = -2
    layers = value if isinstance(value, list) else [value]
    states = num_layers + 1
    if not layers or not all(_is_int(layer) and -states <= layer < states for layer in layers):
        raise ModelError(
            f"{top.where('vision_feature_layer')} must name hidden states of a tower of "
            f"{num_layers} layers, not {value!r}"
        )
    return tuple(layer % states for layer in layers)


def _vision(section: _Section) -> VisionConfig:
    section.choice("model_type", "clip_vision_model", ("clip_vision_model",))
    if section.count("num_channels", 3) != 3:
        raise UnsupportedModel(f"{section.where('num_channels')}: only pictures of 3 channels")
    vision = VisionConfig(
        hidden_size=section.count("hidden_size", 768),
        intermediate_size=section.count("intermediate_size", 3072),
        num_layers=section.count("num_hidden_layers", 12, _MAX_LAYERS),
        num_heads=section.count("num_attention_heads", 12),
        image_size=_side(section, "image_size", 224),
        patch_size=_side(section, "patch_size", 32),
        hidden_act=section.choice("hidden_act", "quick_gelu", tuple(ACTIVATIONS)),
        layer_norm_eps=section.number("layer_norm_eps", 1e-5),
    )
    if vision.hidden_size % vision.num_heads:
        raise ModelError(
            f"{section.where('hidden_size')} must be a multiple of num_attention_heads"
        )
    if vision.patch_size > vision.image_size:
        raise ModelError(f"{section.where('patch_size')} must not exceed image_size")
    return vision


def _side(section: _Section, key: str, default: int) -> int:
    value = section.raw(key)
    if isinstance(value, list):
        raise UnsupportedModel(f"{section.where(key)}: only one number, the side of a square")
    return section.count(key, default, _MAX_SIDE)


def _text(section: _Section) -> TextConfig:
    section.choice("model_type", "llama", ("llama",))
    hidden_size = section.count("hidden_size", 4096)
    num_heads = section.count("num_attention_heads", 32)
    num_kv_heads = section.count("num_key_value_heads", num_heads)
    if hidden_size % num_heads:
        raise ModelError(
            f"{section.where('hidden_size')} must be a multiple of num_attention_heads"
        )
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{section.where('num_attention_heads')} must be a multiple of num_key_value_heads"
        )
    head_dim = section.count("head_dim", hidden_size // num_heads, _MAX_HEAD_DIM)
    if head_dim % 2:
        raise ModelError(f"{section.where('head_dim')} must be even, not {head_dim}")
    max_len = section.count("max_position_embeddings", 2048, _MAX_POSITIONS)
    return TextConfig(
        vocab_size=section.count("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=section.count("intermediate_size", 11008),
        num_layers=section.count("num_hidden_layers", 32, _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_act=section.choice("hidden_act", "silu", tuple(ACTIVATIONS)),
        rms_norm_eps=section.number("rms_norm_eps", 1e-6),
        rope=_rope(section, max_len),
        attention_bias=section.flag("attention_bias", False),
        mlp_bias=section.flag("mlp_bias", False),
        max_position_embeddings=max_len,
    )


def _rope(text: _Section, max_len: int) -> RopeConfig:
    """rope_scaling with rope_theta beside it (transformers 4), or rope_parameters (5)."""
    scaling = text.section("rope_scaling" if text.raw("rope_scaling") else "rope_parameters")
    for section in (text, scaling):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(
                f"{section.where('partial_rotary_factor')}: only whole heads are rotated"
            )
    theta = scaling.number("rope_theta", text.number("rope_theta", 10000.0))
    key = "rope_type" if "rope_type" in scaling else "type"
    kind = scaling.choice(key, "default", ("default", "linear", "llama3"))
    if kind == "default":
        return RopeConfig(kind=kind, theta=theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=factor)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{scaling.where('low_freq_factor')} must be below high_freq_factor")
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_len=scaling.count("original_max_position_embeddings", max_len, _MAX_POSITIONS),
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
