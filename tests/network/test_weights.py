"""Loading: what is read, what is let pass, and what each broken checkpoint is told."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.paged import Prompt, greedy
from transformers import LlavaForConditionalGeneration

from llava_engine.errors import MemoryExhausted, ModelError, WeightsError
from llava_engine.network.llava import LlavaConfig, LlavaModel
from llava_engine.network.weights import load_model, random_model

CPU = torch.device("cpu")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
UP = "language_model.model.layers.1.mlp.up_proj.weight"
TOWER = "vision_tower.vision_model"
PROMPT = Prompt([1, 20, 21, 22])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model twice: in one published file, and in shards under the new names."""
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(root / "single", layout="single", naming="published")
    make_checkpoint(root / "sharded", layout="sharded", naming="new")
    return root


@pytest.fixture
def single(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "single", tmp_path / "model")


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "sharded", tmp_path / "model")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> LlavaModel:
    return load_model(directory, device=CPU, dtype=dtype)


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(directory: Path, *names: str, kind: type[ModelError] = WeightsError) -> ModelError:
    """Load, and require a refusal that names `names` but not where the model lies."""
    with pytest.raises(kind) as raised:
        load(directory)
    for name in names:
        assert name in str(raised.value)
    assert str(directory.parent) not in str(raised.value)
    return raised.value


def test_both_layouts_hold_the_same_model(made: Path) -> None:
    one, two = (dict(load(made / layout).slots()) for layout in ("single", "sharded"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16], ids=str)
def test_weights_are_converted(stored: torch.dtype, dtype: torch.dtype, single: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    edit(single / SINGLE, convert)
    file = load_file(single / SINGLE)
    model = load(single, dtype)
    assert model.dtype == dtype
    for name, view in model.slots():
        assert view.dtype == dtype
        assert not view.requires_grad
        assert torch.equal(view, file[name].to(dtype))


def test_progress_ends_at_the_bytes_of_what_is_needed(sharded: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    model = load_model(
        sharded, device=CPU, dtype=torch.float16, progress=lambda *call: calls.append(call)
    )
    total = sum(view.numel() * 4 for _, view in model.slots())  # stored as float32
    assert {(stage, whole) for stage, _, whole in calls} == {("load", total)}
    done = [call[1] for call in calls]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, total)
    assert model.nbytes == total // 2


def test_tensors_that_are_not_needed_may_be_there_or_not(made: Path, single: Path) -> None:
    expected = greedy(load(made / "single"), [PROMPT], 4)[0].token_ids

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{TOWER}.embeddings.position_ids"] = torch.arange(17)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        add(tensors)
        behind = (f"{TOWER}.post_layernorm.", f"{TOWER}.encoder.layers.2.")
        for name in [name for name in tensors if name.startswith(behind)]:
            del tensors[name]

    for change in (add, strip):
        edit(single / SINGLE, change)
        assert greedy(load(single), [PROMPT], 4)[0].token_ids == expected


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_model_with_a_head_all_the_same(differs: bool, tmp_path: Path) -> None:
    """transformers ties only where the stored head equals the embedding; so do we."""
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    assert load(tmp_path).config.tie_word_embeddings

    def add(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["language_model.model.embed_tokens.weight"].clone()
        tensors["language_model.lm_head.weight"] = head.flip(0) if differs else head

    edit(tmp_path / SINGLE, add)
    oracle = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours = greedy(load(tmp_path), [PROMPT], 1)[0].logits[0]
    with torch.inference_mode():
        expected = oracle(torch.tensor([PROMPT.token_ids])).logits[0, -1]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_tensor(single: Path) -> None:
    edit(single / SINGLE, lambda tensors: tensors.pop(UP))
    refused(single, UP)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.2.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.bias",
        "language_model.model.layers.0.mlp.up_proj.weight.absmax",
        f"{TOWER}.encoder.layers.3.mlp.fc1.weight",
        f"{TOWER}.encoder.layers.2.mlp.fc3.weight",
        "image_newline",
    ],
)
def test_a_surplus_tensor(name: str, single: Path) -> None:
    edit(single / SINGLE, lambda tensors: tensors.update({name: torch.ones(3)}))
    refused(single, name)


@pytest.mark.parametrize(
    "name", [UP, "multi_modal_projector.linear_1.bias", f"{TOWER}.embeddings.class_embedding"]
)
def test_a_misshaped_tensor(name: str, single: Path) -> None:
    edit(single / SINGLE, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    refused(single, name)


def test_a_transposed_tensor(sharded: Path) -> None:
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    file = next(file for file in sharded.glob("*.safetensors") if name in load_file(file))
    edit(file, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(sharded, name, "[48, 24]", "[24, 48]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_that_is_not_of_a_plain_float_type(dtype: torch.dtype, single: Path) -> None:
    edit(single / SINGLE, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refused(single, UP)


def test_one_tensor_under_both_names(single: Path) -> None:
    new = "model.language_model.layers.1.mlp.up_proj.weight"
    edit(single / SINGLE, lambda tensors: tensors.update({new: tensors[UP].clone()}))
    refused(single, "up_proj", "twice")


def test_a_config_of_another_size(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "language_model.model.layers.2.")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_truncated_file(
    layout: str, kept: float, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(layout)
    file = directory / (SINGLE if layout == "single" else SECOND)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    error = refused(directory, file.name, "truncated")
    assert error.__cause__ is not None


@pytest.mark.parametrize(
    "content",
    [
        b"not a safetensors file at all, but long enough to have a header",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 14) + b'{"a": "broken"',
        struct.pack("<Q", 2) + b"\xff\xfe",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["text", "huge", "array", "json", "utf8", "lfs"],
)
def test_a_corrupt_file(content: bytes, single: Path) -> None:
    (single / SINGLE).write_bytes(content)
    error = refused(single, SINGLE, "corrupt")
    assert error.__cause__ is not None


def test_a_directory_in_a_files_place(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    refused(single, SINGLE)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, SECOND, "missing")


def test_an_index_that_names_a_tensor_its_shard_lacks(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(name for name, shard in weight_map.items() if shard == FIRST)
    edit_json(sharded / INDEX, weight_map={**weight_map, name: SECOND})
    refused(sharded, name, SECOND)


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "model.bin", "", 7, None, ".."]
)
def test_an_index_that_leads_elsewhere(shard: object, sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(iter(weight_map))
    edit_json(sharded / INDEX, weight_map={**weight_map, name: shard})
    refused(sharded, INDEX, name)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": []}', b"\xff"])
def test_a_broken_index(content: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(content)
    refused(sharded, INDEX)


def test_pickled_weights_are_not_read(single: Path) -> None:
    tensors = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    torch.save(tensors, single / "pytorch_model.bin")
    refused(single, SINGLE, "other formats are not read")


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, "config.json", kind=ModelError)


def test_weights_that_fit_no_memory(made: Path) -> None:
    """The attention alone would take 2**56 bytes, more than an address space has."""
    config = LlavaConfig.from_directory(made / "single")
    size = 1 << 20
    text = replace(
        config.text, hidden_size=size, num_heads=size, num_kv_heads=size, head_dim=1 << 13
    )
    with pytest.raises(MemoryExhausted, match="do not fit the memory of cpu"):
        random_model(replace(config, text=text), device=CPU, dtype=torch.float32, seed=0)


def test_random_weights_have_the_configs_shapes_and_the_seeds_values(made: Path) -> None:
    config = LlavaConfig.from_directory(made / "single")
    one, same, other = (
        dict(random_model(config, device=CPU, dtype=torch.float16, seed=seed).slots())
        for seed in (1, 1, 2)
    )
    loaded = dict(load(made / "single", torch.float16).slots())
    assert {name: view.shape for name, view in one.items()} == {
        name: view.shape for name, view in loaded.items()
    }
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[UP], other[UP])
    assert all(view.isfinite().all() for view in one.values())
    tied = replace(config, tie_word_embeddings=True)
    model = random_model(tied, device=CPU, dtype=torch.float32, seed=1)
    assert len(greedy(model, [PROMPT], 3)[0].token_ids) == 3
