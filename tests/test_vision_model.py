"""get: which model, under which configuration; and the two verbs' arguments."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
from support.pool_fakes import FakeProbe, make_pool

import llava_engine
from llava_engine import (
    EngineConfig,
    MemoryExhausted,
    PoolConfig,
    UnknownModel,
    VisionModel,
    WorkerPool,
)
from llava_engine.pool.sizing import DeviceMemory, Need, plan_workers

PICTURE = np.zeros((2, 2, 3), dtype=np.uint8)


class PathOf(os.PathLike):
    """A path object that gives what it was given, or raises it."""

    def __init__(self, path: object) -> None:
        self.path = path

    def __fspath__(self) -> object:
        if isinstance(self.path, Exception):
            raise self.path
        return self.path


def cramped() -> WorkerPool:
    """A pool in which nothing fits, so that nothing is loaded."""
    return make_pool(FakeProbe(host=1))


def test_a_registered_name() -> None:
    model = llava_engine.get("llava-1.5-7b")
    assert model.registry_key == "llava-1.5-7b" == model.info.registry_key
    assert model.info.repo_id == "llava-hf/llava-1.5-7b-hf"
    assert model.config == EngineConfig()
    assert repr(model) == "<VisionModel 'llava-1.5-7b' on auto>"


def test_the_configuration_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_DTYPE", "bfloat16")
    model = llava_engine.get("llava-tiny")
    assert model.config.dtype == "bfloat16" and model.registry_key == "llava-tiny[dtype=bfloat16]"


def test_each_configuration_has_workers_of_its_own() -> None:
    config = EngineConfig(device="cpu", kv_cache_mb=64)
    assert llava_engine.get("llava-tiny", config).registry_key == (
        "llava-tiny[device=cpu, kv_cache_mb=64]"
    )
    assert llava_engine.get("llava-tiny", EngineConfig()).registry_key == "llava-tiny"


@pytest.mark.parametrize("other", ["http://user:OTHER@10.0.0.1:3128", "http://10.0.0.1:3128"])
def test_a_proxy_s_password_is_not_in_the_model_s_name(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(device="cpu", proxy="http://user:SECRET@10.0.0.1:3128")
    caplog.set_level("DEBUG")
    with cramped() as pool:
        model = llava_engine.get("llava-tiny", config, pool=pool)
        with pytest.raises(MemoryExhausted) as caught:
            model.describe_image(PICTURE, "What?").text()
        shown = f"{model!r} {model.registry_key} {pool.health()} {caught.value} {caplog.text}"
    assert "SECRET" not in shown and "10.0.0.1" not in shown and "proxy=" in shown
    again = llava_engine.get("llava-tiny", dataclasses.replace(config))
    assert again.registry_key == model.registry_key
    another = llava_engine.get("llava-tiny", dataclasses.replace(config, proxy=other))
    assert another.registry_key != model.registry_key


@pytest.mark.parametrize("name", ["llava-tony", Path("llava-tony")])
def test_an_unknown_name_says_what_is_known_and_nearest(name: str | Path) -> None:
    with pytest.raises(UnknownModel, match=r"mean 'llava-tiny'\?.*llava-1\.5-13b, llava-1\.5-7b"):
        llava_engine.get(name)


def test_a_name_of_another_type() -> None:
    with pytest.raises(TypeError, match="not int"):
        llava_engine.get(7)
    with pytest.raises(TypeError, match="name must be a str or a path of str, not of bytes"):
        llava_engine.get(PathOf(b"llava-tiny"))


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_a_blank_name_is_not_the_current_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    assert llava_engine.get(Path()).registry_key == str(tmp_path)
    with pytest.raises(UnknownModel, match="Known: .*llava-tiny"):
        llava_engine.get(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"device": "cpu"}}, "config must be an EngineConfig, not dict"),
        ({"config": PoolConfig()}, "config must be an EngineConfig, not PoolConfig"),
        ({"pool": "x"}, "pool must be a WorkerPool, not str"),
        ({"progress": 3}, "progress must be callable, not int"),
    ],
)
def test_arguments_of_get_of_another_type(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        llava_engine.get("llava-tiny", **options)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(bytes(40 << 20))
    model = llava_engine.get(kind("mine"))
    assert model.registry_key == str(tmp_path / "mine")
    assert model.info.prompt_template == "USER: <image>\n{query} ASSISTANT:"
    pixels = EngineConfig().pixel_cache_mb
    assert model._spec.need("cuda:0") == Need(40 + 128, 128, 1024 + pixels)
    assert model._spec.need("cpu") == Need(2 * (40 + 128) + pixels, 2 * 128, 0)


def test_the_7b_as_a_directory_has_two_workers_in_nf4_on_a_card_of_8_gb(tmp_path: Path) -> None:
    """As under its name, whose record has what is derived here."""
    file = tmp_path / "model.safetensors"
    file.touch()
    os.truncate(file, 14_130_000_000)  # of which nothing is written
    card, host = DeviceMemory("cuda:0", 8188, 8000), DeviceMemory("cpu", 32_768, 32_768)
    for quantization, workers in ((None, 0), ("int8", 0), ("nf4", 2)):
        spec = llava_engine.get(tmp_path, EngineConfig(quantization=quantization))._spec
        need = spec.need("cuda:0")
        plan = plan_workers(need, [card], host, {}, fraction=0.8, wanted=2)
        assert len(plan.placements) == workers
        assert ("nf4" in spec.smaller("cuda:0")) == (quantization != "nf4")


def test_a_registered_name_comes_before_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava-tiny").mkdir()
    assert llava_engine.get("llava-tiny").registry_key == "llava-tiny"


def test_a_model_has_two_verbs_and_they_take_the_same() -> None:
    public = [
        name
        for name, value in vars(VisionModel).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ]
    assert public == ["describe_image", "describe_url"]
    image = list(inspect.signature(VisionModel.describe_image).parameters.values())
    url = list(inspect.signature(VisionModel.describe_url).parameters.values())
    assert image[2:] == url[2:]
    assert (image[1].name, url[1].name) == ("image", "url")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -1}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"max_new_tokens": 0}, ValueError),
        ({"top_p": 0}, ValueError),
        ({"stop": [""]}, ValueError),
        ({"stop": [5]}, TypeError),
        ({"stop": 3}, TypeError),
        ({"repetition_penalty": 1e39}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"seed": 1.5}, TypeError),
    ],
)
def test_arguments_are_judged_at_the_call(options: dict[str, object], error: type) -> None:
    with cramped() as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
        with pytest.raises(error, match=next(iter(options))):
            model.describe_image(PICTURE, "What?", **options)
        with pytest.raises(error, match=next(iter(options))):
            model.describe_url("http://example.com/", "What?", **options)


def test_a_path_object_that_fails_is_the_caller_s_fault() -> None:
    with cramped() as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
        with pytest.raises(KeyError, match="where?"):
            model.describe_image(PathOf(KeyError("where?")), "What?")
        with pytest.raises(TypeError, match="__fspath__"):
            model.describe_image(PathOf(3), "What?")


def test_everything_else_comes_through_the_stream() -> None:
    with cramped() as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
        for stream in (
            model.describe_image(PICTURE, "What?"),
            model.describe_image("no such file", "What?"),
            model.describe_url("http://example.com/", "What?"),
        ):
            with pytest.raises(MemoryExhausted, match=r"workers for llava-tiny\[device=cpu\]\. N"):
                stream.text()


def test_options_and_the_models_defaults_reach_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with cramped() as pool:
        monkeypatch.setattr(
            pool, "describe_image", lambda *args, **options: seen.append((args, options))
        )
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
        model.describe_image(PICTURE, "What?")
        model.describe_image(
            PICTURE, "What?", temperature=0.5, stop="x", seed=3, priority=2, timeout=1.5
        )
        model.describe_image(PICTURE, "What?", stop=None)
    (args, defaults), (_, given), (_, none) = seen
    assert none["sampling"].stop == ()
    assert args == (model.registry_key, PICTURE, "What?")
    assert defaults["sampling"].temperature == model.info.default_temperature == 0
    sampling = given["sampling"]
    assert (sampling.temperature, sampling.stop, sampling.seed) == (0.5, ("x",), 3)
    assert (given["priority"], given["timeout"]) == (2, 1.5)
