"""LLaVA-1.5-7B's shape as transformers has it, with random weights."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as TheirConfig


def configuration(**depth: int) -> TheirConfig:
    """7B's configuration; `depth` may make it shallow."""
    layers = {"vision": 24, "text": 32, **depth}
    return TheirConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=layers["vision"],
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            num_hidden_layers=layers["text"],
            vocab_size=32064,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_token_index=32000,
    )


def random_oracle(config: TheirConfig, device: torch.device) -> LlavaForConditionalGeneration:
    """transformers' model with random float16 weights, made on the device."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).half().eval()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "layrnorm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    # Buffers are computed, in float32: take those of a shallow model, made in the ordinary way.
    shallow = LlavaForConditionalGeneration(configuration(vision=1, text=1))
    for name, buffer in shallow.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)
    assert model.get_buffer("model.language_model.rotary_emb.inv_freq").dtype == torch.float32
    return model
