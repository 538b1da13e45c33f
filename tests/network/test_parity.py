"""The model against transformers: tokens, logits, chunks, 16-bit types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.checkpoints import make_checkpoint
from support.paged import Prompt, greedy
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_engine.network.clip import patch_rows
from llava_engine.network.weights import load_model

CPU = torch.device("cpu")
NEW_TOKENS = 64

# Between them they vary every field of the configuration. The seeds are such that at every step the
# two best logits of transformers lie 1e-3 apart, far more than the order of additions may change.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped-queries": {"seed": 1},
    "full-last-layer": {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "text_config": {"num_key_value_heads": 4, "max_position_embeddings": 160},
    },
    "tied-one-kv-head": {
        "tie_word_embeddings": True,
        "vision_feature_layer": 2,
        "multimodal_projector_bias": False,
        "text_config": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    },
    "biases-and-head-dim": {
        "text_config": {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
    },
    "rope-linear": {
        "text_config": {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
        },
    },
    "rope-llama3": {
        "text_config": {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 2000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "several-feature-layers": {
        "vision_feature_layer": [-2, 0, -1],
        "vision_feature_select_strategy": "full",
    },
    "first-hidden-state": {"seed": 1, "vision_feature_layer": 0, "projector_hidden_act": "silu"},
    "activations": {
        "seed": 2,
        "projector_hidden_act": "gelu_pytorch_tanh",
        "vision_config": {"hidden_act": "gelu"},
        "text_config": {"hidden_act": "gelu"},
    },
    "other-activations": {
        "seed": 1,
        "projector_hidden_act": "quick_gelu",
        "vision_config": {"hidden_act": "relu"},
        "text_config": {"hidden_act": "gelu_new"},
    },
    "sizes-and-epsilons": {
        "image_token_index": 7,
        "vision_config": {
            "image_size": 57,
            "patch_size": 14,
            "hidden_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "layer_norm_eps": 1e-2,
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "rms_norm_eps": 1e-2,
            "vocab_size": 640,
        },
    },
}


def load_transformers(directory: Path, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts_for(directory: Path, model: LlavaForConditionalGeneration) -> list[Prompt]:
    """Four prompts: a picture between texts, two pictures, text alone, and a picture at the end."""
    config = model.config
    generator = torch.Generator().manual_seed(11)
    processor = AutoProcessor.from_pretrained(directory).image_processor
    rows = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    rows += config.vision_feature_select_strategy == "full"

    def text(count: int) -> list[int]:
        ids = torch.randint(8, 260, (count,), generator=generator).tolist()
        return [1, *ids]

    def pixels(*sizes: tuple[int, int]) -> torch.Tensor:
        pictures = []
        for width, height in sizes:
            noise = torch.randint(0, 256, (9, 9, 3), generator=generator, dtype=torch.uint8)
            pictures.append(Image.fromarray(noise.numpy()).resize((width, height)))
        return processor(images=pictures, return_tensors="pt")["pixel_values"]

    image = [config.image_token_index] * rows
    return [
        Prompt(text(5) + image + text(9), pixels((640, 480))),
        Prompt(text(3) + image + text(2) + image + text(4), pixels((333, 500), (64, 64)), chunk=7),
        Prompt(text(12), chunk=5),
        Prompt(text(1) + image, pixels((1024, 768)), chunk=1),
    ]


@torch.inference_mode()
def reference(
    model: LlavaForConditionalGeneration, prompt: Prompt, continuation: list[int] | None = None
) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens, and its logits for each of them from one uncached pass."""
    ids = torch.tensor([prompt.token_ids])
    pictures = {}
    if prompt.pixels is not None:
        pictures["pixel_values"] = prompt.pixels.to(model.dtype)
    if continuation is None:
        answer = model.generate(ids, **pictures, max_new_tokens=NEW_TOKENS, do_sample=False)
        continuation = answer[0, ids.shape[1] :].tolist()
    # Embeddings, not ids: the answer may hold the picture's token, which forward would count.
    embeds = model.get_input_embeddings()(torch.tensor([prompt.token_ids + continuation]))
    if pictures:
        features = torch.cat(list(model.get_image_features(**pictures).pooler_output))
        embeds[0, : ids.shape[1]][ids[0] == model.config.image_token_index] = features
    logits = model(inputs_embeds=embeds).logits[0, ids.shape[1] - 1 : -1]
    return continuation, logits


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    number = list(CONFIGS).index(name)
    make_checkpoint(
        tmp_path,
        layout=("single", "sharded")[number % 2],
        naming=("published", "new")[number // 2 % 2],
        **CONFIGS[name],
    )
    oracle = load_transformers(tmp_path, torch.float32)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    prompts = prompts_for(tmp_path, oracle)
    together = greedy(model, prompts, NEW_TOKENS)
    for prompt, ours in zip(prompts, together, strict=True):
        token_ids, logits = reference(oracle, prompt)
        assert ours.token_ids == token_ids
        assert len(set(token_ids)) > NEW_TOKENS // 4, "the oracle is degenerate"
        difference = (torch.stack(ours.logits) - logits).abs().max()
        assert difference < 1e-4


def test_tokens_of_a_save_by_transformers_itself(tmp_path: Path) -> None:
    """save_pretrained mixes the namings: language_model.model.*, but no vision_model."""
    make_checkpoint(tmp_path / "made", naming="new")
    oracle = load_transformers(tmp_path / "made", torch.float32)
    oracle.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    model = load_model(tmp_path / "saved", device=CPU, dtype=torch.float32)
    prompt = prompts_for(tmp_path / "made", oracle)[0]
    assert greedy(model, [prompt], 8)[0].token_ids == reference(oracle, prompt)[0][:8]


def test_image_features_equal_transformers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    oracle = load_transformers(tmp_path, torch.float32)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    pixels = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torch.stack(list(oracle.get_image_features(pixels).pooler_output))
        patches = patch_rows(pixels, model.config.vision.patch_size)
        features = model.encode_images(patches)
        assert features.shape == (5, model.config.image_tokens, 48)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        alone = torch.cat([model.encode_images(picture[None]) for picture in patches])
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)


def test_chunks_and_neighbours_change_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    oracle = load_transformers(tmp_path, torch.float32)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    prompts = prompts_for(tmp_path, oracle)
    together = greedy(model, prompts, 16)
    for prompt, ours in zip(prompts, together, strict=True):
        for block_size, chunk in ((64, None), (1, 3), (16, 1), (4, 16)):
            alone = Prompt(prompt.token_ids, prompt.pixels, chunk)
            (other,) = greedy(model, [alone], 16, block_size=block_size)
            assert other.token_ids == ours.token_ids
            torch.testing.assert_close(
                torch.stack(other.logits), torch.stack(ours.logits), rtol=1e-5, atol=2e-5
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grouped-queries", "biases-and-head-dim", "activations"])
def test_16_bit_error_is_at_most_twice_transformers(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, **CONFIGS[name])
    oracle = load_transformers(tmp_path, dtype)
    model = load_model(tmp_path, device=CPU, dtype=dtype)
    prompts = prompts_for(tmp_path, oracle)
    forced, plain = zip(*(reference(oracle, prompt) for prompt in prompts), strict=True)
    ours = greedy(model, prompts, NEW_TOKENS, forced=list(forced))
    # The truth: the very same 16-bit weights and pixels, computed in float64.
    oracle = oracle.double()
    for prompt, continuation, theirs, answer in zip(prompts, forced, plain, ours, strict=True):
        if prompt.pixels is not None:
            prompt.pixels = prompt.pixels.to(dtype)
        _, truth = reference(oracle, prompt, continuation)
        logits = torch.stack(answer.logits)
        assert logits.dtype == torch.float32
        error = (logits - truth).pow(2).mean().sqrt()
        assert error < 2 * (theirs - truth).pow(2).mean().sqrt()
