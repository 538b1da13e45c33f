"""The table of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_engine import ModelInfo, QuantisedEstimate, UnknownModel, models, register
from llava_engine.registry import lookup


def test_the_published_models_are_known() -> None:
    assert {"llava-tiny", "llava-1.5-7b", "llava-1.5-13b"} <= {m.registry_key for m in models()}
    assert lookup("llava-1.5-7b").repo_id == "llava-hf/llava-1.5-7b-hf"


def test_an_unknown_name_is_told_the_nearest_and_the_known() -> None:
    with pytest.raises(UnknownModel, match=r"Did you mean 'llava-1.5-7b'.*llava-tiny"):
        lookup("lava-1.5-7b")


def test_register_is_idempotent_and_never_replaces() -> None:
    info = ModelInfo(
        registry_key="registered-by-a-test",
        directory=Path("registered-by-a-test"),
        est_memory_allocation_mb=10,
    )
    register(info)
    register(info)
    assert lookup("registered-by-a-test") is info
    other = ModelInfo(
        registry_key="registered-by-a-test",
        directory=Path("registered-by-a-test"),
        est_memory_allocation_mb=20,
    )
    with pytest.raises(ValueError, match="another model is registered as 'registered-by-a-test'"):
        register(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registry_key": ""}, "registry_key"),
        ({"repo_id": "a/b"}, "either a repo_id or a directory"),
        ({"directory": None}, "either a repo_id or a directory"),
        ({"est_memory_allocation_mb": 0}, "est_memory_allocation_mb"),
        ({"est_worker_share_mb": 11}, "est_worker_share_mb"),
        ({"prompt_template": "{query}"}, "prompt_template"),
        ({"prompt_template": "{query} <image>"}, "prompt_template"),
        ({"prompt_template": "<image><image> {query}"}, "prompt_template"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    fields = {"registry_key": "x", "directory": Path("x"), "est_memory_allocation_mb": 10}
    with pytest.raises(ValueError, match=message):
        ModelInfo(**{**fields, **change})


@pytest.mark.parametrize(("memory", "share"), [(100, 0), (100, 101), (0, 0)])
def test_a_share_is_a_part_of_the_whole_in_any_format(memory: int, share: int) -> None:
    with pytest.raises(ValueError, match="worker_share_mb"):
        QuantisedEstimate(quantization="nf4", memory_allocation_mb=memory, worker_share_mb=share)


def test_every_format_of_the_published_models_has_an_estimate() -> None:
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        info = lookup(name)
        sizes = {each.quantization: each.memory_allocation_mb for each in info.est_quantised}
        assert sizes["nf4"] < sizes["int8"] == sizes["fp8"] < info.est_memory_allocation_mb
