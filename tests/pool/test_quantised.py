"""Quantised models in the pool: beside whole ones, on the machines that they are for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.checkpoints import make_checkpoint
from support.pool_fakes import GB, FakeProbe, model_of
from support.quantised import WAYS, WIDE_ENOUGH, save_quantised

import llava_engine
from llava_engine import EngineConfig, MemoryExhausted, PoolConfig, UnsupportedModel, WorkerPool
from llava_engine.network.llava import LlavaModel
from llava_engine.pool.sizing import DeviceMemory

QUERY = "Describe the picture."
SETTINGS: dict[str, Any] = {"device": "cpu", "kv_cache_mb": 32, "image_cache_mb": 8}


def picture() -> Image.Image:
    image = Image.new("RGB", (112, 112), (200, 200, 190))
    image.paste((200, 30, 30), (20, 10, 60, 50))
    return image


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(PoolConfig(max_workers=1)) as made:
        yield made


def network(pool: WorkerPool, model: llava_engine.VisionModel) -> LlavaModel:
    """The weights that a model's worker runs."""
    (site,) = model_of(pool, model.registry_key).sites.values()
    found = site.backend._runtime._steps._runner._model  # type: ignore[attr-defined]
    assert isinstance(found, LlavaModel)
    return found


def storages(model: LlavaModel) -> set[int]:
    found = {view.untyped_storage().data_ptr() for _, view in model.slots()}
    for product, _ in model.quantised():
        assert product.quantised is not None
        found |= {x.untyped_storage().data_ptr() for x in product.quantised.tensors()}
    return found


def test_one_checkpoint_in_four_ways_in_one_process(pool: WorkerPool) -> None:
    """Each has workers, weights and an answer of its own, also while all are at work."""
    formats = [None, "nf4", "int8", "fp8"]
    models = [
        llava_engine.get("llava-tiny", EngineConfig(quantization=format, **SETTINGS), pool=pool)
        for format in formats
    ]
    assert len({model.registry_key for model in models}) == 4
    alone = [model.describe_image(picture(), QUERY, max_new_tokens=24).text() for model in models]
    together = [model.describe_image(picture(), QUERY, max_new_tokens=24) for model in models]
    assert [stream.text() for stream in together] == alone and all(alone)
    networks = [network(pool, model) for model in models]
    for format, one in zip(formats, networks, strict=True):
        kinds = {product.format for product, _ in one.quantised()}
        assert kinds == ({format} if format else set())
    for one, other in itertools.combinations(networks, 2):
        assert not storages(one) & storages(other)
    whole, nf4, int8, fp8 = (one.nbytes for one in networks)
    assert nf4 < int8 < whole and fp8 <= int8


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_was_saved_quantised_needs_no_setting(
    way: Any, tmp_path: Path, pool: WorkerPool
) -> None:
    make_checkpoint(tmp_path / "plain", text_config=WIDE_ENOUGH)
    save_quantised(tmp_path / "plain", tmp_path / way, **WAYS[way])
    config = EngineConfig(**SETTINGS)
    model = llava_engine.get(tmp_path / way, config, pool=pool)
    text = model.describe_image(picture(), QUERY, max_new_tokens=8, ignore_eos=True).text()
    assert {product.format for product, _ in network(pool, model).quantised()} == {way}
    same = llava_engine.get(tmp_path / way, EngineConfig(quantization=way, **SETTINGS), pool=pool)
    assert same.describe_image(picture(), QUERY, max_new_tokens=8, ignore_eos=True).text() == text
    other = llava_engine.get(
        tmp_path / way, EngineConfig(quantization="fp8", **SETTINGS), pool=pool
    )
    with pytest.raises(UnsupportedModel, match=f"saved in {way}"):
        other.describe_image(picture(), QUERY).text()


def test_the_7b_on_a_card_of_8_gb_says_what_would_fit() -> None:
    card = FakeProbe(DeviceMemory("cuda:0", 8188, 8000), host=32 * GB)
    with WorkerPool(PoolConfig(), probe=card) as pool:
        config = EngineConfig(device="cuda", kernels="reference")
        model = llava_engine.get("llava-1.5-7b", config, pool=pool)
        with pytest.raises(MemoryExhausted, match=r'would fit with "nf4" \(5504 MB\)$'):
            model.describe_image(picture(), QUERY).text()


def test_no_other_format_is_offered_for_what_was_saved_quantised(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "plain", text_config=WIDE_ENOUGH)
    save_quantised(tmp_path / "plain", tmp_path / "int8", **WAYS["int8"])
    small = FakeProbe(DeviceMemory("cuda:0", 128, 128), host=32 * GB)
    for name, offered in (("plain", True), ("int8", False)):
        with WorkerPool(PoolConfig(), probe=small) as pool:
            config = EngineConfig(device="cuda", kernels="reference", kv_cache_mb=70)
            model = llava_engine.get(tmp_path / name, config, pool=pool)
            with pytest.raises(MemoryExhausted) as raised:
                model.describe_image(picture(), QUERY).text()
            assert ("nf4" in str(raised.value)) == offered
