"""Random checkpoints against transformers and safetensors: all tensors, right, and random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers import LlavaConfig as TheirConfig

import llava_engine
from llava_engine.cli.bench.random_checkpoint import write_random_checkpoint
from llava_engine.cli.describe import BadInput
from llava_engine.demo import model_dir
from llava_engine.network.weights import published_name


def info_of(name: str) -> llava_engine.ModelInfo:
    (info,) = [info for info in llava_engine.models() if info.registry_key == name]
    return info


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random")
    write_random_checkpoint(info_of("llava-tiny"), directory, seed=3)
    return directory


def test_transformers_finds_every_tensor(tiny):
    model, found = LlavaForConditionalGeneration.from_pretrained(
        tiny, dtype="float32", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = json.loads((model_dir() / "config.json").read_bytes())
    assert model.config.text_config.hidden_size == theirs["text_config"]["hidden_size"]


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
def test_the_shapes_are_those_of_the_true_models(name, tmp_path, monkeypatch):
    """All names and shapes of the model that transformers builds from the same config.json."""
    written = {}
    module = "llava_engine.cli.bench.random_checkpoint"
    monkeypatch.setattr(f"{module}._write_weights", lambda at, shapes, seed: written.update(shapes))
    monkeypatch.setattr(f"{module}.shutil.disk_usage", lambda path: type("", (), {"free": 1 << 40}))
    write_random_checkpoint(info_of(name), tmp_path, 0)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(TheirConfig.from_pretrained(tmp_path))
    theirs = {published_name(n): tuple(p.shape) for n, p in model.named_parameters()}
    assert written == theirs
    parameters = sum(p.numel() for p in model.parameters())
    # As the models are published: 7.06 and 13.35 thousand million.
    assert round(parameters / 1e9, 2) == {"llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35}[name]


def test_the_weights_are_random_and_no_two_rows_the_same(tiny):
    tensors: dict[str, torch.Tensor] = {}
    for path in tiny.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    index = json.loads((tiny / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16
        values = tensor.float()
        if "norm" in name:
            assert values.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        elif tensor.numel() > 10_000:
            assert abs(float(values.std()) - 0.02) < 0.001, name
            assert abs(float(values.mean())) < 0.001, name
    head = tensors["language_model.lm_head.weight"]
    assert len(head.unique(dim=0)) == len(head)


def test_rows_differ_where_a_matrix_is_larger_than_the_block_of_numbers(tmp_path, monkeypatch):
    """As the head of a 7B is; here with a small block."""
    module = "llava_engine.cli.bench.random_checkpoint"
    monkeypatch.setattr(f"{module}._BLOCK", 10_007)
    write_random_checkpoint(info_of("llava-tiny"), tmp_path, 0)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        head = file.get_tensor("language_model.lm_head.weight")
    assert head.numel() > 10 * 10_007
    assert len(head.unique(dim=0)) == len(head)


def test_a_seed_gives_the_same_and_another_another(tiny, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    for directory, seed in ((again, 3), (other, 4)):
        directory.mkdir()
        write_random_checkpoint(info_of("llava-tiny"), directory, seed)
    name = "model-00001-of-00001.safetensors"
    assert (again / name).read_bytes() == (tiny / name).read_bytes()
    assert (other / name).read_bytes() != (tiny / name).read_bytes()


def test_the_tokenizer_is_llava_tinys_with_a_word_for_every_id(tmp_path, monkeypatch):
    module = "llava_engine.cli.bench.random_checkpoint"
    monkeypatch.setattr(f"{module}._write_weights", lambda *ignored: None)
    monkeypatch.setattr(f"{module}.shutil.disk_usage", lambda path: type("", (), {"free": 1 << 40}))
    write_random_checkpoint(info_of("llava-1.5-7b"), tmp_path, 0)
    ours, tiny = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(model_dir())
    assert len(ours) == 32064
    text = "USER: Describe the large red star. ASSISTANT:"
    assert ours.encode(text) == tiny.encode(text)
    words = ours.convert_ids_to_tokens(list(range(len(tiny), 32064)))
    assert len(set(words)) == len(words)
    assert ours.decode([768, 32063]).split() == ["w768", "w32063"]


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    unknown = llava_engine.ModelInfo(
        registry_key="another", repo_id="a/b", est_memory_allocation_mb=1
    )
    with pytest.raises(BadInput, match="another"):
        write_random_checkpoint(unknown, tmp_path, 0)
    full = "llava_engine.cli.bench.random_checkpoint.shutil.disk_usage"
    monkeypatch.setattr(full, lambda path: type("", (), {"free": 1 << 30}))
    with pytest.raises(BadInput, match=r"14\.1 GB"):
        write_random_checkpoint(info_of("llava-1.5-7b"), tmp_path, 0)
    assert not list(tmp_path.iterdir())
