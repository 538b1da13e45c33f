"""A checkpoint of a model's true shape with random weights, so that no download is needed.

Written as any LLaVA-1.5 checkpoint in the Hugging Face layout, so the engine and its peers all read
the same weights the way they always do. The tokenizer is llava-tiny's, filled up to the size of the
vocabulary: what such a model says is nonsense, but every token of it is a word.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import llava_engine
from llava_engine.cli.describe import BadInput

Shapes = dict[str, tuple[int, ...]]

_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32}
_LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_layers": 40, "num_heads": 40}
_TEXTS = {"llava-1.5-7b": _LLAMA_7B, "llava-1.5-13b": _LLAMA_13B}
_SHARD_BYTES = 2 << 30  # a thread writes each
_DEVIATION = 0.02
# A prime: rows of a matrix that is larger than the block are the block shifted, never the same.
_BLOCK = 16_777_213


def write_random_checkpoint(info: llava_engine.ModelInfo, directory: Path, seed: int) -> None:
    """Fill `directory` with what `get` needs for a model of `info`'s shape, in float16.

    The shapes known are those of LLaVA-1.5's and of models whose `info` names a directory. Raises
    BadInput for others, and where the disk has no room.
    """
    from llava_engine.demo import model_dir

    config = _config(info)
    tiny = model_dir()
    config["image_token_index"] = _read(tiny / "config.json")["image_token_index"]
    shapes = tensor_shapes(config)
    nbytes = 2 * sum(map(prod, shapes.values()))
    if nbytes > 0.95 * shutil.disk_usage(directory).free:
        raise BadInput(
            f"--random-weights writes {nbytes / 1e9:.1f} GB to {directory.parent}, which has no "
            "room for it; TMPDIR names another place"
        )
    _write(directory / "config.json", config)
    _write_tokenizer(tiny, directory, config["text_config"]["vocab_size"])
    _write_processor(tiny, directory, config["vision_config"])
    _write_weights(directory, shapes, seed)


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a LLaVA with CLIP and Llama, by the name that published checkpoints have."""
    text, vision = config["text_config"], config["vision_config"]
    shapes: Shapes = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (wide,)

    wide = vision["hidden_size"]
    tower = "vision_tower.vision_model"
    patch = vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    shapes[f"{tower}.embeddings.class_embedding"] = (wide,)
    shapes[f"{tower}.embeddings.patch_embedding.weight"] = (wide, 3, patch, patch)
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (positions, wide)
    layer_norm(f"{tower}.pre_layrnorm")
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", wide, wide, True)
        linear(f"{layer}.mlp.fc1", vision["intermediate_size"], wide, True)
        linear(f"{layer}.mlp.fc2", wide, vision["intermediate_size"], True)
        layer_norm(f"{layer}.layer_norm1")
        layer_norm(f"{layer}.layer_norm2")
    layer_norm(f"{tower}.post_layernorm")

    hidden, inner = text["hidden_size"], text["intermediate_size"]
    linear("multi_modal_projector.linear_1", hidden, wide, True)
    linear("multi_modal_projector.linear_2", hidden, hidden, True)
    heads = text["num_attention_heads"]
    dim = text.get("head_dim") or hidden // heads
    queries, keys = heads * dim, text.get("num_key_value_heads", heads) * dim
    model = "language_model.model"
    shapes[f"{model}.embed_tokens.weight"] = (text["vocab_size"], hidden)
    for index in range(text["num_hidden_layers"]):
        layer = f"{model}.layers.{index}"
        linear(f"{layer}.self_attn.q_proj", queries, hidden, False)
        linear(f"{layer}.self_attn.k_proj", keys, hidden, False)
        linear(f"{layer}.self_attn.v_proj", keys, hidden, False)
        linear(f"{layer}.self_attn.o_proj", hidden, queries, False)
        linear(f"{layer}.mlp.gate_proj", inner, hidden, False)
        linear(f"{layer}.mlp.up_proj", inner, hidden, False)
        linear(f"{layer}.mlp.down_proj", hidden, inner, False)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{model}.norm.weight"] = (hidden,)
    linear("language_model.lm_head", text["vocab_size"], hidden, False)
    return shapes


def _config(info: llava_engine.ModelInfo) -> dict[str, Any]:
    if info.directory is not None:
        return _read(Path(info.directory) / "config.json")
    text = _TEXTS.get(info.registry_key)
    if text is None:
        raise BadInput(f"--random-weights: the shape of {info.registry_key} is not known here")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float16",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "num_hidden_layers": text["num_layers"],
            "num_attention_heads": text["num_heads"],
            "num_key_value_heads": text["num_heads"],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    }


def _write_tokenizer(tiny: Path, directory: Path, vocabulary: int) -> None:
    tokenizer = _read(tiny / "tokenizer.json")
    words = tokenizer["model"]["vocab"]
    # No merge leads to these: the model can say them, and no text is encoded as them.
    words.update({f"▁w{index}": index for index in range(len(words), vocabulary)})
    _write(directory / "tokenizer.json", tokenizer)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, directory)


def _write_processor(tiny: Path, directory: Path, vision: dict[str, Any]) -> None:
    side = vision["image_size"]
    sizes = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    pictures = _read(tiny / "preprocessor_config.json") | sizes
    _write(directory / "preprocessor_config.json", pictures)
    processor = _read(tiny / "processor_config.json")
    processor |= {"image_processor": pictures, "patch_size": vision["patch_size"]}
    _write(directory / "processor_config.json", processor)


def _write_weights(directory: Path, shapes: Shapes, seed: int) -> None:
    import numpy as np

    random = np.random.default_rng(seed)
    block = random.standard_normal(_BLOCK, dtype=np.float32)
    numbers = (block * _DEVIATION).astype("<f2")
    shards = list(_shards(shapes))
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    weight_map = {}
    jobs = []
    for name, shard in zip(files, shards, strict=True):
        weight_map.update(dict.fromkeys(shard, name))
        starts = {tensor: int(random.integers(_BLOCK)) for tensor in shard}
        jobs.append((directory / name, {tensor: shapes[tensor] for tensor in shard}, starts))
    index = {
        "metadata": {"total_size": 2 * sum(map(prod, shapes.values()))},
        "weight_map": weight_map,
    }
    _write(directory / "model.safetensors.index.json", index)
    with ThreadPoolExecutor(len(jobs)) as writers:
        list(writers.map(lambda job: _write_shard(*job, numbers=numbers), jobs))


def _shards(shapes: Shapes) -> Iterator[list[str]]:
    shard: list[str] = []
    held = 0
    for name, shape in shapes.items():
        if shard and held + 2 * prod(shape) > _SHARD_BYTES:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += 2 * prod(shape)
    yield shard


def _write_shard(path: Path, shapes: Shapes, starts: dict[str, int], *, numbers: Any) -> None:
    """One file: 8 bytes with the header's length, the header, the tensors (safetensors' format)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if "norm" in name:
                one = b"\0\x3c" if name.endswith(".weight") else b"\0\0"
                file.write(one * prod(shape))
            else:
                _write_numbers(file, numbers, starts[name], prod(shape))


def _write_numbers(file: BinaryIO, numbers: Any, start: int, count: int) -> None:
    while count:
        piece = numbers[start : start + count]
        file.write(piece.data)
        count -= len(piece)
        start = 0


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path.name} of the model cannot be read") from error
    return value


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
