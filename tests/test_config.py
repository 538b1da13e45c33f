"""Configuration: checked values, and the environment."""

from __future__ import annotations

import pytest

from llava_engine import EngineConfig, PoolConfig


def test_environment_sets_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_DEVICE", "cuda:1")
    monkeypatch.setenv("LLAVA_ENGINE_KV_CACHE_MB", "512")
    monkeypatch.setenv("LLAVA_ENGINE_PREFILL", "fp8")
    monkeypatch.setenv("LLAVA_ENGINE_FETCH_TIMEOUT", "2.5")
    monkeypatch.setenv("LLAVA_ENGINE_ALLOW_HOSTS", "localhost, 10.0.0.1")
    monkeypatch.setenv("LLAVA_ENGINE_MAX_WORKERS", "4")
    monkeypatch.setenv("LLAVA_ENGINE_DEFAULT_TIMEOUT", "none")
    engine, pool = EngineConfig.from_env(), PoolConfig.from_env()
    assert (engine.device, engine.kv_cache_mb, engine.fetch_timeout) == ("cuda:1", 512, 2.5)
    assert engine.prefill == "fp8"
    assert engine.allow_hosts == ("localhost", "10.0.0.1")
    assert (pool.max_workers, pool.default_timeout) == (4, None)


def test_the_environment_is_read_by_from_env_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_DEVICE", "cuda:1")
    assert EngineConfig().device == "auto"


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_MAX_WORKER", "4")
    with pytest.raises(ValueError, match="LLAVA_ENGINE_MAX_WORKER names no setting.*max_workers"):
        EngineConfig.from_env()


def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_MAX_BATCH", "many")
    with pytest.raises(ValueError, match="LLAVA_ENGINE_MAX_BATCH='many'"):
        EngineConfig.from_env()


@pytest.mark.parametrize(
    ("config", "field", "value", "error"),
    [
        (EngineConfig, "device", "tpu", ValueError),
        (EngineConfig, "device", "cuda:x", ValueError),
        (EngineConfig, "dtype", "int8", TypeError),
        (EngineConfig, "prefill", "fp4", TypeError),
        (EngineConfig, "quantization", "fp4", TypeError),
        (EngineConfig, "quantization", 4, TypeError),
        (EngineConfig, "block_size", 0, ValueError),
        (EngineConfig, "block_size", "64", TypeError),
        (EngineConfig, "kv_cache_mb", -1, ValueError),
        (EngineConfig, "image_cache_mb", -1, ValueError),
        (EngineConfig, "pixel_cache_mb", -1, ValueError),
        (EngineConfig, "max_batch", True, TypeError),
        (EngineConfig, "allow_hosts", "localhost", TypeError),
        (EngineConfig, "max_unread_tokens", 0, ValueError),
        (EngineConfig, "proxy", "https://proxy.test:3128", ValueError),
        (EngineConfig, "proxy", "http://proxy.test", ValueError),
        (EngineConfig, "proxy", "http://proxy.test:65536", ValueError),
        (EngineConfig, "proxy", "http://a?b@proxy.test:3128", ValueError),
        (EngineConfig, "proxy", "http://proxy.test:3128/path", ValueError),
        (PoolConfig, "memory_fraction", 1.5, ValueError),
        (PoolConfig, "min_workers", 3, ValueError),
        (PoolConfig, "drain", -1.0, ValueError),
        (PoolConfig, "max_queue", 0, ValueError),
        (PoolConfig, "max_fetch_bytes", 0, ValueError),
    ],
)
def test_a_bad_value_names_its_field(
    config: type, field: str, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=field):
        config(**{field: value})


def test_a_proxy_s_password_is_not_shown() -> None:
    config = EngineConfig(proxy="http://user:secret@[::1]:3128/")
    assert "secret" not in repr(config)
    with pytest.raises(ValueError) as caught:
        EngineConfig(proxy="http://user:secret@proxy.test")
    assert "secret" not in str(caught.value)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="unknown"):
        PoolConfig(unknown=1)


@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("1", True), ("False", False), ("true", True)]
)
def test_a_switch_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, value: bool
) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_PROGRAMMATIC_LAUNCH", text)
    assert EngineConfig.from_env().programmatic_launch is value


def test_a_switch_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_PROGRAMMATIC_LAUNCH", "maybe")
    with pytest.raises(ValueError, match="LLAVA_ENGINE_PROGRAMMATIC_LAUNCH='maybe'"):
        EngineConfig.from_env()


@pytest.mark.parametrize("text", ["nf4", "int8", "fp8"])
def test_a_format_comes_from_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_QUANTIZATION", text)
    assert EngineConfig.from_env().quantization == text
    monkeypatch.setenv("LLAVA_ENGINE_QUANTIZATION", "none")
    assert EngineConfig.from_env().quantization is None


def test_prefill_in_fp8_is_for_weights_that_are_whole_or_in_fp8() -> None:
    for quantization in ("nf4", "int8"):
        with pytest.raises(ValueError, match='prefill="fp8".*16 bits'):
            EngineConfig(prefill="fp8", quantization=quantization)  # type: ignore[arg-type]
    assert EngineConfig(prefill="fp8", quantization="fp8").prefill == "fp8"
