"""Quantised models on the GPU: loaded, measured, and their tokens beside bitsandbytes'.

bitsandbytes is not part of the GPU machine's installation: what needs it is left out where no wheel
was carried there.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU, Sink, World
from support.kernels import within_twice
from support.pictures import random_pictures
from support.seven_b import configuration, random_oracle

import llava_engine
from bench.demo_model.scenes import make_scene, render
from llava_engine import EngineConfig, PoolConfig, WorkerPool
from llava_engine.kernels.library import references
from llava_engine.network.config import LlavaConfig
from llava_engine.network.llava import Batch, LlavaModel
from llava_engine.network.safetensors_file import SafetensorsFile
from llava_engine.network.tensor_reader import read_in_turn
from llava_engine.network.weights import load_model, published_name, random_model
from llava_engine.quant import Format, QuantisedWeight, quantised
from llava_engine.runtime.runtime import DeviceRuntime

pytestmark = NEEDS_GPU

CPU = torch.device("cpu")
FORMATS: list[Format] = ["nf4", "int8", "fp8"]
WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SPIN_CYCLES = 100_000_000


def need(format: Format) -> Any:
    """bitsandbytes, or the test is skipped: the machine may not have it."""
    if format == "fp8":
        return None
    return pytest.importorskip("bitsandbytes", reason="no bitsandbytes wheel was carried here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_saved_checkpoint_is_to_the_bit_what_the_cpu_has(
    format: Format, dtype: torch.dtype, tmp_path: Path
) -> None:
    need(format)
    from support.quantised import write_quantised

    make_checkpoint(tmp_path / "plain", text_config={**WIDE, "num_hidden_layers": 2})
    write_quantised(tmp_path / "plain", tmp_path / "saved", format)
    ours, theirs = (load_model(tmp_path / "saved", device=d, dtype=dtype) for d in (GPU, CPU))
    pairs = list(zip(ours.quantised(), theirs.quantised(), strict=True))
    assert len(pairs) == 8
    for (one, _), (other, _) in pairs:
        assert one.matrix is not None and one.quantised is None
        assert torch.equal(one.whole(dtype).cpu(), other.whole(dtype))
    slots = dict(theirs.slots())
    assert all(torch.equal(view.cpu(), slots[name]) for name, view in ours.slots())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of half a gigabyte."""
    made: Path = tmp_path_factory.mktemp("wide")
    make_checkpoint(made, text_config=WIDE)
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_loading_takes_little_more_than_the_model(
    format: Format, wide: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two rooms of the largest product in 16 bits, what quantising and packing take of it, and
    nothing of them afterwards."""
    need(format)
    load_model(wide, device=GPU, dtype=torch.float16, quantization=format)
    gc.collect()
    torch.cuda.empty_cache()
    reserved, before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_model(wide, device=GPU, dtype=torch.float16, quantization=format)
    peak = torch.cuda.max_memory_allocated() - before
    taken = torch.cuda.memory_allocated() - before
    largest = 2 * 2 * WIDE["intermediate_size"] * WIDE["hidden_size"]
    record_property("bytes", f"peak {peak}, then {taken}, for {model.nbytes}")
    assert taken < model.nbytes + (2 << 20)
    assert peak < model.nbytes + 6 * largest
    assert torch.cuda.memory_reserved() - reserved < 1.1 * model.nbytes + (30 << 20)  # rooms: 32


def test_a_room_is_filled_anew_only_when_its_work_is_done(tmp_path: Path) -> None:
    """Every use is behind a kernel that spins."""
    content = {str(index): torch.randn(1 << 20) for index in range(8)}
    save_file(content, tmp_path / "model.safetensors")
    rooms = torch.empty(2, 1 << 20, device=GPU)
    found: list[torch.Tensor] = []

    def use(step: int) -> None:
        torch.cuda._sleep(SPIN_CYCLES)
        found.append(rooms[step % 2].clone())

    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        steps = [[(file.tensors[name], rooms[int(name) % 2])] for name in content]
        read_in_turn(steps, GPU, lambda _: None, use)
    for one, expected in zip(found, content.values(), strict=True):
        assert torch.equal(one.cpu(), expected)


def test_the_7b_in_nf4_takes_no_more_than_4_6_gb(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    need("nf4")
    configuration().save_pretrained(tmp_path)
    config = LlavaConfig.from_directory(tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    reserved, before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(config, device=GPU, dtype=torch.float16, seed=0, quantization="nf4")
    taken = torch.cuda.memory_reserved() - reserved
    record_property("gb_reserved", taken / 1e9)
    record_property("gb_allocated", (torch.cuda.memory_allocated() - before) / 1e9)
    record_property("gb_peak", (torch.cuda.max_memory_allocated() - before) / 1e9)
    assert len(list(model.quantised())) == 4 * 32
    assert model.nbytes <= taken <= 4.6e9
    assert torch.cuda.max_memory_allocated() - before < taken + 0.8e9


class Quantised:
    """7B's shape in a format, shallow or not: ours, transformers' with the same weights, and what
    they were quantised to."""

    def __init__(self, format: Format, directory: Path, **depth: int) -> None:
        package = need(format)
        config = configuration(**depth)
        theirs = random_oracle(config, GPU)
        config.save_pretrained(directory)
        self.config = LlavaConfig.from_directory(directory)
        self.ours = LlavaModel(
            self.config, device=GPU, dtype=torch.float16, format=lambda names, inputs: format
        )
        weights = {published_name(name): value for name, value in theirs.named_parameters()}
        self.natural: list[QuantisedWeight] = []
        with torch.no_grad():
            for name, view in self.ours.slots():
                view.copy_(weights[name])
            for product, parts in self.ours.quantised():
                natural = quantised(format, [weights[f"{name}.weight"] for name in parts])
                product.load(natural)
                if depth:  # or there is no room for both
                    self.natural.append(natural)
        modules = {
            published_name(f"{name}.weight").removesuffix(".weight"): (name, module)
            for name, module in theirs.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for product, parts in self.ours.quantised():
            split = product.whole(torch.float16).split(list(parts.values()))
            for part, whole in zip(parts, split, strict=True):
                name, module = modules[part]
                theirs.set_submodule(name, self._oracle(package, format, module, whole))
        self.world = World(self.ours, theirs, random_pictures(1, 8, 336))

    @staticmethod
    def _oracle(
        package: Any, format: Format, linear: torch.nn.Linear, whole: torch.Tensor
    ) -> torch.nn.Module:
        """A product of transformers in the format; `whole`, ours, must be what bitsandbytes has."""
        weight = linear.weight.data
        if format == "nf4":
            new = package.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.float16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            new.weight = package.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
            ).to(weight.device)
            theirs = package.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
            assert torch.equal(whole, theirs)
            return new
        if format == "int8":  # its own product quantises the activations, too
            values, scb, _ = package.functional.int8_vectorwise_quant(weight)
            theirs = package.functional.int8_vectorwise_dequant(values, scb).half()
        else:
            theirs = quantised("fp8", [weight.cpu()]).dequantize(torch.float16).to(weight.device)
        assert torch.equal(whole, theirs)
        linear.weight = torch.nn.Parameter(theirs, requires_grad=False)
        return linear

    def answers(self, prompts: int) -> tuple[int, float]:
        """How many of so many prompts are answered as by transformers, the others by near ties; and
        the logits' error."""
        world, chance = self.world, random.Random(2)
        asked = [
            (index % 8, [chance.randrange(3, 31_000) for _ in range(chance.randint(5, 40))])
            for index in range(prompts)
        ]
        world.measure(asked[:4])
        assert world.error < 0.5
        runtime = DeviceRuntime(world.ours, device=GPU, config=EngineConfig(device="cuda"))
        try:
            runtime.add_worker("one", 4 << 30)
            alone = Sink()
            runtime.submit(world.sequence(*asked[0], alone))
            first = alone.wait()
            sinks = [Sink() for _ in asked]
            for request, sink in zip(asked, sinks, strict=True):
                runtime.submit(world.sequence(*request, sink))
            answers = [sink.wait() for sink in sinks]
        finally:
            runtime.close()
        world.agrees(*asked[0], first)
        assert len({tuple(answer) for answer in answers}) == len(answers)
        same = [world.agrees(*one, said) for one, said in zip(asked, answers, strict=True)]
        return sum(same), world.error

    def whole(self, device: torch.device, dtype: torch.dtype) -> LlavaModel:
        """The same model, its products dequantised."""
        model = LlavaModel(self.config, device=device, dtype=dtype)
        slots, weights = dict(self.ours.slots()), {}
        for (_, parts), natural in zip(self.ours.quantised(), self.natural, strict=True):
            split = natural.dequantize(dtype).split(list(parts.values()))
            weights.update(
                {f"{name}.weight": part for name, part in zip(parts, split, strict=True)}
            )
        with torch.no_grad():
            for name, view in model.slots():
                view.copy_(slots[name] if name in slots else weights[name])
        return model


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_of_few_layers(
    format: Format, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One sequence alone, then sixteen together."""
    same, error = Quantised(format, tmp_path, vision=2, text=2).answers(16)
    record_property("identical", f"{same} of 16")
    record_property("logit_error", error)


def test_tokens_of_the_7b_in_nf4(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    same, error = Quantised("nf4", tmp_path).answers(16)
    record_property("identical", f"{same} of 16")
    record_property("logit_error", error)


@pytest.mark.parametrize("format", FORMATS)
def test_a_steps_logits_against_the_dequantised_model(format: Format, tmp_path: Path) -> None:
    """Float32 on the CPU is the truth, float16 in plain torch on the GPU what may err half as
    much; steps of few and many rows, and prefill in the same batch's shape."""
    made = Quantised(format, tmp_path, vision=2, text=2)
    truth_model, plain_model = made.whole(CPU, torch.float32), made.whole(GPU, torch.float16)
    for rows in (1, 3, 8, 16, 40, 200):
        truth = first_logits(truth_model, rows, decode=False).double()
        with references():
            plain = first_logits(plain_model, rows, decode=False).cpu()
        for decode in (True, False):
            ours = first_logits(made.ours, rows, decode=decode).cpu()
            assert not ours.isnan().any()
            within_twice(ours, plain, truth)


@torch.inference_mode()
def first_logits(model: LlavaModel, rows: int, *, decode: bool) -> torch.Tensor:
    """Logits [rows, vocab] after one token each, as a step of decoding or of prefill."""
    text, device = model.config.text, model.device
    tokens = torch.arange(100, 100 + rows, device=device)
    shape = (rows, text.num_kv_heads, 64, text.head_dim)
    layers = text.num_layers
    caches = [
        torch.full(shape, torch.nan, dtype=model.dtype, device=device) for _ in range(2 * layers)
    ]
    batch = Batch(
        positions=torch.zeros(rows, dtype=torch.int64, device=device),
        slot_mapping=torch.arange(rows, device=device) * 64,
        block_table=torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1),
        query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens=torch.ones(rows, dtype=torch.int32, device=device),
        max_query_len=1,
    )
    if decode:
        return model.decode_logits(tokens, batch, caches[:layers], caches[layers:])
    hidden = model.forward(model.embed(tokens), batch, caches[:layers], caches[layers:])
    return model.logits(hidden)


def test_one_checkpoint_in_several_formats_in_one_pool() -> None:
    """Each says together with the others what it says alone."""
    need("nf4")
    picture = render(make_scene(77, 0))
    with WorkerPool(PoolConfig(max_workers=1)) as pool:
        models = [
            llava_engine.get(
                "llava-tiny",
                EngineConfig(device="cuda:0", kv_cache_mb=64, quantization=format),
                pool=pool,
            )
            for format in (None, *FORMATS)
        ]
        alone = [model.describe_image(picture, "Describe the picture.").text() for model in models]
        assert all(alone)
        for _ in range(3):
            streams = [model.describe_image(picture, "Describe the picture.") for model in models]
            assert [stream.text() for stream in streams] == alone
