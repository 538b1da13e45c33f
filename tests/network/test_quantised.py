"""Quantised models: what transformers and bitsandbytes saved, and what is quantised here."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.paged import Prompt, greedy
from support.quantised import (
    VISION_WIDE_ENOUGH,
    WAYS,
    WIDE_ENOUGH,
    dequantised,
    save_quantised,
)
from transformers import LlavaForConditionalGeneration

from llava_engine.errors import KernelsNotBuilt, ModelError, UnsupportedModel, WeightsError
from llava_engine.network import staging
from llava_engine.network.config import LlavaConfig
from llava_engine.network.layers import Linear
from llava_engine.network.llava import Batch, LlavaModel
from llava_engine.network.weights import load_model, random_model
from llava_engine.quant import Format, quantised

CPU = torch.device("cpu")
SINGLE = "model.safetensors"
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"
NF4_STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"


PROMPT = Prompt([1, 20, 21, 22])
LONG_PROMPT = Prompt([1, *range(30, 190)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as float32 and as transformers saves it in both ways."""
    root = tmp_path_factory.mktemp("quantised")
    make_checkpoint(root / "plain", seed=1, text_config=WIDE_ENOUGH)
    for name, settings in WAYS.items():
        save_quantised(root / "plain", root / name, **settings)
    return root


@pytest.fixture
def nf4(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "nf4", tmp_path / "model")


@pytest.fixture
def int8(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "int8", tmp_path / "model")


def load(
    directory: Path, quantization: Format | None = None, dtype: torch.dtype = torch.float32
) -> LlavaModel:
    return load_model(directory, device=CPU, dtype=dtype, quantization=quantization)


def weights(model: LlavaModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What every matrix and vector of a checkpoint has become, dequantised."""
    found = {name: view.clone() for name, view in model.slots()}
    for product, parts in model.quantised():
        assert product.quantised is not None
        split = product.quantised.dequantize(dtype).split(list(parts.values()))
        found.update({f"{name}.weight": part for name, part in zip(parts, split, strict=True)})
    return found


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_state(file: Path, **values: Any) -> None:
    """Change the JSON beside one NF4 matrix; None takes a field out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = {**json.loads(bytes(tensors[NF4_STATE].tolist())), **values}
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[NF4_STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    edit(file, change)


def edit_settings(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(values)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_what_was_saved_is_read_to_the_bit(way: str, dtype: torch.dtype, made: Path) -> None:
    model = load(made / way, dtype=dtype)
    assert model.config.quantization == way
    assert [product.format for product, _ in model.quantised()] == [way] * 8
    expected = dequantised(made / way / SINGLE, dtype)
    ours = weights(model, dtype)
    assert len(ours) > 60
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers(way: str, tmp_path: Path) -> None:
    """Which dequantises here, too: its own products quantise the activations, or round them."""
    make_checkpoint(tmp_path / "plain", text_config=WIDE_ENOUGH, vision_config=VISION_WIDE_ENOUGH)
    save_quantised(tmp_path / "plain", tmp_path / way, **WAYS[way])
    oracle = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / way, dtype=torch.float32, device_map="cpu"
    )
    oracle = oracle.dequantize(dtype=torch.float32).eval()
    model = load(tmp_path / way)
    generator = torch.Generator().manual_seed(3)
    image = model.config.image_token_id
    picture = torch.randn(1, 3, 28, 28, generator=generator)
    prompts = [
        Prompt([1, 30, 31, *[image] * model.config.image_tokens, 32, 33], picture),
        Prompt([1, *torch.randint(8, 260, (20,), generator=generator).tolist()]),
    ]
    ours = greedy(model, prompts, 24)
    for prompt, answer in zip(prompts, ours, strict=True):
        inputs = torch.tensor([prompt.token_ids])
        with torch.inference_mode():
            theirs = oracle.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                pixel_values=prompt.pixels,
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert answer.token_ids == theirs[0, len(prompt.token_ids) :].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_quantising_while_loading_gives_what_transformers_saves(way: Format, made: Path) -> None:
    """Of the decoder: its other parts stay whole here."""
    ours, saved = load(made / "plain", way), load(made / way)
    pairs = zip(ours.quantised(), saved.quantised(), strict=True)
    for (product, parts), (other, other_parts) in pairs:
        assert parts == other_parts and product.quantised is not None and other.quantised
        for one, two in zip(product.quantised.tensors(), other.quantised.tensors(), strict=True):
            assert torch.equal(one, two)
    assert ours.nbytes == saved.nbytes
    plain = load_file(made / "plain" / SINGLE)
    for name, view in ours.slots():
        assert torch.equal(view, plain[name]), name


def test_fp8_has_each_row_to_half_a_step(made: Path) -> None:
    ours, plain = (
        weights(load(made / "plain", "fp8"), torch.float32),
        load_file(made / "plain" / SINGLE),
    )
    quantised = [name for name, tensor in ours.items() if not torch.equal(tensor, plain[name])]
    assert len(quantised) == 2 * 7 and all(".layers." in name for name in quantised)
    for name in quantised:
        off = (ours[name] - plain[name]).abs()
        least = plain[name].abs().amax(dim=1, keepdim=True) / 448 * 2.0**-10
        assert (off <= torch.maximum(plain[name].abs() * 2.0**-4, least) * 1.0001).all()


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_logits_are_those_of_the_dequantised_model(format: Format, made: Path) -> None:
    """Float64 products of transformers, with our weights in their places."""
    model = load(made / "plain", format)
    oracle = LlavaForConditionalGeneration.from_pretrained(made / "plain", dtype=torch.float64)
    state = weights(model, torch.float64)
    file = {
        name.replace("language_model.model.", "model.language_model.", 1)
        .replace("language_model.lm_head", "lm_head", 1)
        .replace("vision_tower.vision_model.", "model.vision_tower.", 1)
        .replace("multi_modal", "model.multi_modal", 1): tensor
        for name, tensor in state.items()
    }
    missing, unexpected = oracle.load_state_dict(file, strict=False)
    assert not unexpected and not any("language_model" in name for name in missing)
    prompt = Prompt([1, 20, 21, 22, 40, 41])
    ours = greedy(model, [prompt], 1)[0].logits[0]
    with torch.inference_mode():
        theirs = oracle.eval()(torch.tensor([prompt.token_ids])).logits[0, -1]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_modules_that_were_skipped_stay_as_they_are(made: Path, tmp_path: Path) -> None:
    """A whole product, a part of one, and all of the vision tower."""
    skipped = ["lm_head", "vision_tower", "down_proj", "k_proj"]
    save_quantised(made / "plain", tmp_path / "saved", **WAYS["nf4"], llm_int8_skip_modules=skipped)
    model = load(tmp_path / "saved")
    formats = [name.rpartition(".")[2] for _, parts in model.quantised() for name in parts]
    assert formats == ["o_proj", "gate_proj", "up_proj"] * 2
    expected = dequantised(tmp_path / "saved" / SINGLE, torch.float32)
    for name, tensor in weights(model, torch.float32).items():
        assert torch.equal(tensor, expected[name]), name
    plain = load_file(made / "plain" / SINGLE)
    assert torch.equal(expected[DOWN], plain[DOWN])
    assert len(greedy(model, [Prompt([1, 20, 21])], 3)[0].token_ids) == 3


def test_products_of_no_whole_blocks_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As they were, or dequantised where they were saved so."""
    text = {**WIDE_ENOUGH, "intermediate_size": 96}
    make_checkpoint(tmp_path / "plain", text_config=text)
    with caplog.at_level(logging.INFO):
        model = load(tmp_path / "plain", "nf4")
    assert "[96] inputs are not quantised to nf4" in caplog.text
    save_quantised(tmp_path / "plain", tmp_path / "nf4", **WAYS["nf4"])
    saved = load(tmp_path / "nf4")
    for ours in (model, saved):
        names = [name.rpartition(".")[2] for _, parts in ours.quantised() for name in parts]
        assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"] * 2
    expected = dequantised(tmp_path / "nf4" / SINGLE, torch.float32)
    assert torch.equal(dict(saved.slots())[DOWN], expected[DOWN])
    assert torch.equal(dict(model.slots())[DOWN], load_file(tmp_path / "plain" / SINGLE)[DOWN])


def test_a_model_without_any_product_for_it_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, text_config={"hidden_size": 48, "intermediate_size": 96})
    with pytest.raises(UnsupportedModel, match="no product.*nf4.*48 or 96"):
        load(tmp_path, "nf4")
    assert [product.format for product, _ in load(tmp_path, "int8").quantised()] == ["int8"] * 8


@pytest.mark.parametrize("way", WAYS)
def test_bytes_of_progress_and_of_the_model(way: str, made: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    model = load_model(
        made / way, device=CPU, dtype=torch.float16, progress=lambda *call: calls.append(call)
    )
    done = [call[1] for call in calls]
    assert done == sorted(set(done)) and {call[2] for call in calls} == {done[-1]}
    tensors = load_file(made / way / SINGLE)
    read = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if not name.endswith((".quant_map", "_format"))
        and "quant_state" not in name
        and "post_layernorm" not in name
        and "layers.2." not in name
    )
    assert done[-1] == read
    quantised = sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if tensor.element_size() == 1
        and name.startswith("language_model")
        and name.endswith("weight")
    )
    rows = 2 * (64 + 2 * 32 + 64 + 2 * 192 + 64)
    scales = {"nf4": quantised // 32 + 16 * rows + 8 * 1024, "int8": 4 * rows}[way]
    slots = sum(view.nbytes for _, view in model.slots())
    assert model.nbytes == slots + quantised + scales


def test_the_biases_of_quantised_products_are_kept(tmp_path: Path) -> None:
    text = {**WIDE_ENOUGH, "attention_bias": True, "mlp_bias": True}
    make_checkpoint(tmp_path / "plain", text_config=text)
    save_quantised(tmp_path / "plain", tmp_path / "int8", **WAYS["int8"])
    model, plain = load(tmp_path / "int8"), load_file(tmp_path / "plain" / SINGLE)
    biases = [name for name in plain if name.startswith("language_model") and "bias" in name]
    ours = dict(model.slots())
    assert len(biases) == 2 * 7 and all(torch.equal(ours[name], plain[name]) for name in biases)
    assert len(greedy(model, [Prompt([1, 20, 21])], 3)[0].token_ids) == 3


@pytest.mark.parametrize(("way", "other"), [("nf4", "int8"), ("int8", "nf4"), ("nf4", "fp8")])
def test_another_format_than_the_saved_one_is_refused(
    way: Format, other: Format, made: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=f'quantization="{other}".*saved in {way}'):
        load(made / way, other)
    assert load(made / way, way).config.quantization == way


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq"}, "quant_method"),
        ({"load_in_4bit": False}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_ways_to_quantise_are_refused_by_their_settings(
    settings: dict[str, Any], told: str, nf4: Path
) -> None:
    edit_settings(nf4, **settings)
    with pytest.raises(UnsupportedModel, match=f"config.json: quantization_config.{told}"):
        load(nf4)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ],
    ids=["fp4", "single"],
)
def test_what_transformers_saves_in_other_ways_is_refused_even_if_the_settings_lie(
    settings: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    save_quantised(made / "plain", tmp_path / "saved", **settings)
    with pytest.raises(UnsupportedModel, match="config.json"):
        load(tmp_path / "saved")
    edit_settings(tmp_path / "saved", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with pytest.raises(UnsupportedModel, match="tensor .*quant_state.*(nf4|bnb_4bit_use_double)"):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ({"shape": [64]}, WeightsError, "no shape"),
        ({"shape": [64, "192"]}, WeightsError, "no shape"),
        ({"shape": [192, 64]}, WeightsError, "config.json asks for another"),
        ({"shape": [64, 193]}, WeightsError, "asks for"),
        ({"shape": [1 << 40, 1 << 40]}, WeightsError, "no shape"),
        ({"blocksize": 128}, UnsupportedModel, "128"),
        ({"nested_blocksize": 128}, UnsupportedModel, "256"),
        ({"nested_dtype": "float16"}, UnsupportedModel, "float32"),
        ({"nested_offset": float("nan")}, WeightsError, "nested_offset"),
        ({"nested_offset": "1"}, WeightsError, "nested_offset"),
        ({"nested_offset": None}, UnsupportedModel, "double quantisation"),
    ],
    ids=str,
)
def test_a_wrong_state_is_told(
    values: dict[str, Any], kind: type[ModelError], told: str, nf4: Path
) -> None:
    edit_state(nf4 / SINGLE, **values)
    with pytest.raises(kind, match=told) as raised:
        load(nf4)
    assert DOWN in str(raised.value) and str(nf4) not in str(raised.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b"[" * 3000])
def test_a_state_that_is_no_object_is_told(text: bytes, nf4: Path) -> None:
    state = torch.tensor(list(text), dtype=torch.uint8)
    edit(nf4 / SINGLE, lambda tensors: tensors.update({NF4_STATE: state}))
    with pytest.raises(WeightsError, match="JSON"):
        load(nf4)


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_part_that_is_missing_mistyped_or_misshaped_is_told(part: str, nf4: Path) -> None:
    name = f"{DOWN}.{part}"
    whole = load_file(nf4 / SINGLE)[name]
    for change, told in (
        (lambda tensors: tensors.pop(name), "lacks"),
        (lambda tensors: tensors.update({name: whole.to(torch.int32)}), "type I32"),
        (lambda tensors: tensors.update({name: torch.cat((whole, whole))}), "has shape"),
    ):
        copy = shutil.copytree(nf4, nf4.parent / told)
        edit(copy / SINGLE, change)
        with pytest.raises(WeightsError, match=told) as raised:
            load(copy)
        assert name in str(raised.value)


def test_another_codebook_is_refused(nf4: Path) -> None:
    name = f"{DOWN}.quant_map"
    edit(nf4 / SINGLE, lambda tensors: tensors[name].mul_(0.5))
    with pytest.raises(UnsupportedModel, match="quant_map has other levels"):
        load(nf4)


def test_an_8_bit_matrix_that_is_broken_is_told(int8: Path) -> None:
    scb, layout = DOWN.replace("weight", "SCB"), DOWN.replace("weight", "weight_format")
    changes: list[tuple[Callable[[dict[str, torch.Tensor]], object], type[ModelError], str]] = [
        (lambda tensors: tensors.pop(DOWN), WeightsError, "lacks"),
        (lambda tensors: tensors.pop(scb), WeightsError, "of type I8"),
        (lambda tensors: tensors.update({scb: torch.ones(3)}), WeightsError, "has shape"),
        (lambda tensors: tensors[layout].fill_(2), UnsupportedModel, "weight_format"),
        (
            lambda tensors: tensors.update({DOWN: tensors[DOWN].flatten()}),
            WeightsError,
            "no matrix",
        ),
    ]
    for index, (change, kind, told) in enumerate(changes):
        copy = shutil.copytree(int8, int8.parent / str(index))
        edit(copy / SINGLE, change)
        with pytest.raises(kind, match=told):
            load(copy)


def test_a_surplus_quantised_matrix_is_told(int8: Path) -> None:
    other = DOWN.replace("layers.1", "layers.2")
    scb = other.replace("weight", "SCB")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[other], tensors[scb] = tensors[DOWN].clone(), torch.ones(64)

    edit(int8 / SINGLE, add)
    with pytest.raises(WeightsError, match=f"no place for tensor {other}"):
        load(int8)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_without_bitsandbytes_nothing_is_read(
    format: Format, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setattr("llava_engine.network.weights.read_in_turn", pytest.fail)
    with pytest.raises(KernelsNotBuilt, match="pip install"):
        load(made / "plain", format)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_saved_needs_no_bitsandbytes(
    way: Format, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert load(made / way, way).nbytes


def test_fp8_copies_of_quantised_weights_are_refused(made: Path) -> None:
    for model in (load(made / "nf4"), load(made / "plain", "fp8")):
        with pytest.raises(UnsupportedModel, match=r'prefill="fp8".*16 bits'):
            model.quantize_for_prefill()


def test_weights_in_fp8_serve_prefill_as_they_are(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 128 rows on, whose inputs are quantised; against a model that keeps copies."""
    dtype = torch.bfloat16
    monkeypatch.setattr(Linear, "_compiled", lambda product: True)
    ours, copies = load(made / "plain", "fp8", dtype), load(made / "plain", dtype=dtype)
    exact = greedy(ours, [PROMPT, LONG_PROMPT], 1)
    before = ours.nbytes
    ours.quantize_for_prefill()
    copies.quantize_for_prefill()
    assert ours.nbytes == before < copies.nbytes
    one, other = (greedy(model, [LONG_PROMPT], 1)[0].logits[0] for model in (ours, copies))
    assert torch.equal(one, other)
    assert not torch.equal(one, exact[1].logits[0])
    torch.testing.assert_close(
        greedy(ours, [PROMPT], 1)[0].logits[0], exact[0].logits[0], rtol=0.05, atol=0.1
    )


def test_shards_under_the_new_names_are_quantised_alike(tmp_path: Path) -> None:
    for layout, naming in (("single", "published"), ("sharded", "new")):
        make_checkpoint(
            tmp_path / layout,
            layout=layout,  # type: ignore[arg-type]
            naming=naming,  # type: ignore[arg-type]
            text_config=WIDE_ENOUGH,
        )
    one, other = (
        weights(load(tmp_path / layout, "nf4"), torch.float32) for layout in ("single", "sharded")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("place", ["plain", "nf4", "int8"])
def test_nothing_is_left_of_a_load_that_fails(
    place: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the error is kept, and without the cycle collector, which may come late."""
    found: list[weakref.ref[object]] = []

    class Watched(LlavaModel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append(weakref.ref(self))

    class WatchedRoom(staging.Room):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(weakref.ref(self))

    def progress(stage: str, done: int, total: int) -> None:
        if done > total * 0.8:
            raise KeyError(done)

    monkeypatch.setattr("llava_engine.network.weights.LlavaModel", Watched)
    monkeypatch.setattr("llava_engine.network.weights.Room", WatchedRoom)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyError) as raised:
            load_model(
                made / place,
                device=CPU,
                dtype=torch.float16,
                quantization="fp8" if place == "plain" else None,
                progress=progress,
            )
        assert raised.value.__traceback__ is not None
        assert len(found) == 3 and not any(each() for each in found)
    finally:
        gc.enable()


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_random_weights_are_quantised_too(format: Format, made: Path) -> None:
    config = replace(LlavaConfig.from_directory(made / "plain"))
    one, same = (
        random_model(config, device=CPU, dtype=torch.float16, seed=4, quantization=format)
        for _ in range(2)
    )
    for (product, _), (other, _) in zip(one.quantised(), same.quantised(), strict=True):
        assert product.quantised is not None and other.quantised is not None
        whole = product.quantised.dequantize(torch.float32)
        assert whole.shape == (product.outputs, product.inputs)
        assert 0.015 < float(whole.std()) < 0.025
        assert torch.equal(whole, other.quantised.dequantize(torch.float32))
    assert len(greedy(one, [Prompt([1, 20, 21])], 3)[0].token_ids) == 3


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_a_step_with_what_kernels_take(
    format: Format, rows: int, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels' references. More rows than those of the head and of 8 bits take, too."""
    dtype = torch.bfloat16
    plain = load(made / "plain", format, dtype)
    monkeypatch.setattr(Linear, "_compiled", lambda product: True)
    packed = load(made / "plain", format, dtype)
    for (ours, _), (other, _) in zip(packed.quantised(), plain.quantised(), strict=True):
        assert ours.quantised is None and ours.matrix is not None and other.quantised is not None
        assert torch.equal(ours.whole(dtype), other.quantised.dequantize(dtype))

    def step(model: LlavaModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
        text = model.config.text
        shape = (rows, text.num_kv_heads, 4, text.head_dim)
        caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2 * text.num_layers)]
        batch = Batch(
            positions=torch.zeros(rows, dtype=torch.int64),
            slot_mapping=torch.arange(rows) * 4,
            block_table=torch.arange(rows, dtype=torch.int32).unsqueeze(1),
            query_start=torch.arange(rows + 1, dtype=torch.int32),
            context_lens=torch.ones(rows, dtype=torch.int32),
            max_query_len=1,
        )
        layers = text.num_layers
        with torch.inference_mode():
            logits = model.decode_logits(
                torch.arange(20, 20 + rows), batch, caches[:layers], caches[layers:]
            )
        return logits, caches

    assert packed._decoder.fused_rows == (16 if format == "nf4" else 8)
    assert plain._decoder.fused_rows == 0
    ours, our_caches = step(packed)
    theirs, their_caches = step(plain)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)
    for one, other in zip(our_caches, their_caches, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.1, equal_nan=True)


def test_parts_of_a_product_are_quantised_by_themselves() -> None:
    parts = [torch.randn(rows, 128) for rows in (3, 5)]
    fused = quantised("nf4", parts).dequantize(torch.float32)
    apart = torch.cat([quantised("nf4", [part]).dequantize(torch.float32) for part in parts])
    assert torch.equal(fused, apart)
