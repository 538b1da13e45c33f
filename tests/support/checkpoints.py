"""Tiny random-weight LLaVA checkpoints in the Hugging Face layout, which transformers loads too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from support.tokenizers import make_tokenizer
from tokenizers import Tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_engine.registry import CLIP_MEAN, CLIP_STD

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def make_checkpoint(
    directory: Path,
    *,
    layout: Literal["single", "sharded"] = "single",
    naming: Literal["published", "new"] = "published",
    seed: int = 0,
    metaspace: bool = False,
    **config_overrides: Any,
) -> None:
    """Write a checkpoint with tokenizer and preprocessor_config.json into `directory`.

    layout: one file, or three with an index. naming: of the tensors, see network.weights.
    metaspace: which tokenizer, see make_tokenizer. config_overrides: fields of LlavaConfig; the
    dicts text_config and vision_config are laid over TEXT and VISION.
    """
    make_tokenizer(directory, metaspace=metaspace)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = {
        **TEXT,
        "vocab_size": tokenizer.get_vocab_size(),
        **config_overrides.pop("text_config", {}),
    }
    vision = {**VISION, **config_overrides.pop("vision_config", {})}
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        **{"image_token_index": tokenizer.token_to_id("<image>"), **config_overrides},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        _randomise(model, config.tie_word_embeddings)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if naming == "published":
        tensors = {_published(name): tensor for name, tensor in tensors.items()}
    if layout == "single":
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        _save_sharded(tensors, directory)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    _write_processor(directory, config)


@torch.no_grad()
def _randomise(model: torch.nn.Module, tied: bool) -> None:
    """Weights under which rows keep their size from layer to layer and logits differ clearly.

    transformers' own initialisation gives nearly equal logits at these sizes, so that the greedy
    token would hang on rounding.
    """
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.normal_(1, 0.2)
        elif parameter.ndim < 2:
            parameter.normal_(0, 0.2)
        elif "embed" in name and "patch" not in name:
            parameter.normal_(0, 0.15 if tied else 1)  # a tied head would repeat its input
        else:
            gain = 3 if "lm_head" in name or "q_proj" in name else 1
            parameter.normal_(0, gain * parameter[0].numel() ** -0.5)


def _published(name: str) -> str:
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1)
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head") else name


def _save_sharded(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, directory / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_processor(directory: Path, config: LlavaConfig) -> None:
    side = config.vision_config.image_size
    preprocessor = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config.vision_config.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))
