"""config.json as transformers reads it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_engine.errors import ModelError, UnsupportedModel
from llava_engine.network.config import LlavaConfig
from llava_engine.network.llama import cos_sin_table, inverse_frequencies

# llava-hf/llava-1.5-7b-hf's file, which leaves most of text_config to transformers' defaults.
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def changed(**values: Any) -> dict[str, Any]:
    """PUBLISHED with fields set; `text_` and `vision_` ones in their sections."""
    config = json.loads(json.dumps(PUBLISHED))
    for key, value in values.items():
        if key.startswith("text_") and key != "text_config":
            config["text_config"][key.removeprefix("text_")] = value
        elif key.startswith("vision_") and key not in (
            "vision_config",
            "vision_feature_layer",
            "vision_feature_select_strategy",
        ):
            config["vision_config"][key.removeprefix("vision_")] = value
        else:
            config[key] = value
    return config


def read(directory: Path, config: object) -> LlavaConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return LlavaConfig.from_directory(directory)


def assert_as_transformers(directory: Path, config: dict[str, Any]) -> LlavaConfig:
    ours = read(directory, config)
    theirs = transformers.LlavaConfig.from_pretrained(directory)
    text, vision = theirs.text_config, theirs.vision_config
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "max_position_embeddings",
    ):
        assert getattr(ours.text, name) == getattr(text, name), name
    assert ours.text.num_layers == text.num_hidden_layers
    assert ours.text.num_heads == text.num_attention_heads
    assert ours.text.num_kv_heads == text.num_key_value_heads
    for name in (
        "hidden_size",
        "intermediate_size",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
    ):
        assert getattr(ours.vision, name) == getattr(vision, name), name
    assert ours.vision.num_layers == vision.num_hidden_layers
    assert ours.vision.num_heads == vision.num_attention_heads
    layers = theirs.vision_feature_layer
    states = list(range(vision.num_hidden_layers + 1))
    layers = layers if isinstance(layers, list) else [layers]
    assert ours.vision_feature_layers == tuple(states[layer] for layer in layers)
    assert ours.drop_class_token == (theirs.vision_feature_select_strategy == "default")
    assert ours.projector_bias == theirs.multimodal_projector_bias
    assert ours.projector_hidden_act == theirs.projector_hidden_act
    assert ours.image_token_id == theirs.image_token_id
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    rotary = LlamaRotaryEmbedding(text)
    torch.testing.assert_close(
        inverse_frequencies(ours.text.rope, ours.text.head_dim),
        rotary.inv_freq,
        rtol=1e-6,
        atol=0,
    )
    cos, sin = rotary(torch.zeros(1), torch.arange(50)[None])
    half = ours.text.head_dim // 2
    torch.testing.assert_close(
        cos_sin_table(ours.text.rope, ours.text.head_dim, 50, torch.device("cpu")),
        torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1),
        rtol=1e-5,
        atol=1e-5,
    )
    return ours


@pytest.mark.parametrize(
    "config",
    [
        PUBLISHED,
        {"model_type": "llava", "image_token_index": 5},
        {
            "model_type": "llava",
            "image_token_id": 31,
            "text_config": {},
            "vision_config": {"hidden_size": 96},
        },
        changed(vision_feature_layer=[-2, 3, 0], vision_feature_select_strategy="full"),
        changed(vision_feature_layer=24, multimodal_projector_bias=False),
        changed(projector_hidden_act="silu", text_hidden_act="gelu", vision_hidden_act="gelu"),
        changed(text_num_key_value_heads=8, text_head_dim=64, text_attention_bias=True),
        changed(text_num_key_value_heads=None, text_head_dim=None, text_mlp_bias=True),
        changed(text_tie_word_embeddings=True),
        changed(tie_word_embeddings=True),
        changed(vision_layer_norm_eps=1e-3, vision_image_size=224),
        changed(text_rope_theta=500000.0),
        changed(text_rope_scaling={"type": "linear", "factor": 2.5}, text_rope_theta=5000),
        changed(text_rope_scaling={"rope_type": "llama3", **LLAMA3}, text_rope_theta=5e5),
        changed(
            text_rope_scaling={
                "rope_type": "llama3",
                "original_max_position_embeddings": 1024,
                **LLAMA3,
            }
        ),
        changed(text_rope_scaling=None, text_rope_parameters={"rope_theta": 77.0}),
        changed(
            text_rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
        ),
        changed(text_rope_parameters={"rope_type": "default", "rope_theta": 2000.0}),
    ],
)
def test_fields_are_as_transformers_reads_them(config: dict[str, Any], tmp_path: Path) -> None:
    assert_as_transformers(tmp_path, config)


def test_the_published_file(tmp_path: Path) -> None:
    config = assert_as_transformers(tmp_path, PUBLISHED)
    assert config.image_tokens == 576
    assert config.max_model_len == 4096
    assert read(tmp_path, changed(vision_feature_select_strategy="full")).image_tokens == 577


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (changed(model_type="llava_next"), "llava_next"),
        (changed(text_model_type="mistral"), "text_config.model_type"),
        (changed(vision_model_type="siglip_vision_model"), "siglip_vision_model"),
        (changed(vision_feature_select_strategy="cls"), "vision_feature_select_strategy"),
        (changed(projector_hidden_act="xielu"), "projector_hidden_act"),
        (changed(text_hidden_act="mish"), "text_config.hidden_act"),
        (changed(text_hidden_act=["silu"]), "text_config.hidden_act"),
        (changed(vision_hidden_act="tanh"), "vision_config.hidden_act"),
        (changed(vision_num_channels=1), "num_channels"),
        (changed(vision_image_size=[336, 336]), "image_size"),
        (changed(text_rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
        (changed(text_rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (changed(text_partial_rotary_factor=0.5), "partial_rotary_factor"),
        (changed(quantization_config={"load_in_4bit": True}), "quantization_config"),
    ],
)
def test_what_is_not_implemented_is_refused(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=name) as raised:
        read(tmp_path, config)
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ([], "JSON object"),
        (changed(text_config=7), "text_config"),
        (changed(text_hidden_size="4096"), "text_config.hidden_size"),
        (changed(text_hidden_size=True), "text_config.hidden_size"),
        (changed(text_hidden_size=0), "text_config.hidden_size"),
        (changed(text_hidden_size=10**30), "text_config.hidden_size"),
        (changed(text_num_hidden_layers=10**9), "text_config.num_hidden_layers"),
        (changed(text_max_position_embeddings=10**9), "max_position_embeddings"),
        (changed(vision_num_hidden_layers=10**9), "vision_config.num_hidden_layers"),
        (changed(vision_image_size=10**6), "vision_config.image_size"),
        (changed(text_hidden_size=4100), "text_config.hidden_size"),
        (changed(text_num_key_value_heads=5), "num_key_value_heads"),
        (changed(text_head_dim=33), "head_dim"),
        (changed(text_rms_norm_eps="small"), "rms_norm_eps"),
        (changed(text_rope_theta=float("inf")), "rope_theta"),
        (changed(text_rope_theta=float("nan")), "rope_theta"),
        (changed(text_rope_scaling="linear"), "rope_scaling"),
        (changed(text_rope_scaling={"type": "linear"}), "rope_scaling.factor is missing"),
        (changed(text_rope_scaling={"rope_type": "llama3", "factor": 2}), "low_freq_factor"),
        (
            changed(text_rope_scaling={"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
            "low_freq_factor",
        ),
        (changed(text_attention_bias="no"), "attention_bias"),
        (changed(vision_num_attention_heads=3), "vision_config.hidden_size"),
        (changed(vision_patch_size=400), "patch_size"),
        (changed(vision_feature_layer=25), "vision_feature_layer"),
        (changed(vision_feature_layer=-26), "vision_feature_layer"),
        (changed(vision_feature_layer=[]), "vision_feature_layer"),
        (changed(vision_feature_layer="-2"), "vision_feature_layer"),
        (changed(image_token_index=32064), "image_token_index"),
        (changed(image_token_index=-1), "image_token_index"),
    ],
)
def test_a_wrong_value_is_named(config: object, name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=name) as raised:
        read(tmp_path, config)
    assert not isinstance(raised.value, UnsupportedModel)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"model_type": }'],
    ids=["empty", "cut", "not-utf8", "deep", "broken"],
)
def test_a_broken_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON") as raised:
        LlavaConfig.from_directory(tmp_path)
    assert str(tmp_path) not in str(raised.value)
    assert raised.value.__cause__ is not None


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        LlavaConfig.from_directory(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        LlavaConfig.from_directory(tmp_path)
