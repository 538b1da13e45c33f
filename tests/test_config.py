"""Configuration: checked values, and the environment."""

from __future__ import annotations

import math
import socket
import threading

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
        (EngineConfig, "device", "cuda:\N{ARABIC-INDIC DIGIT THREE}", ValueError),
        (EngineConfig, "dtype", "int8", ValueError),
        (EngineConfig, "prefill", "fp4", ValueError),
        (EngineConfig, "quantization", "fp4", ValueError),
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


SECONDS = [
    (EngineConfig, "fetch_timeout"),
    (PoolConfig, "default_timeout"),
    (PoolConfig, "spawn_timeout"),
    (PoolConfig, "idle_timeout"),
    (PoolConfig, "breaker_reset"),
    (PoolConfig, "drain"),
]


@pytest.mark.parametrize(("config", "field"), [*SECONDS, (PoolConfig, "memory_fraction")])
def test_nan_is_no_number(config: type, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"{field}.* not nan"):
        config(**{field: math.nan})
    monkeypatch.setenv(f"LLAVA_ENGINE_{field.upper()}", "nan")
    with pytest.raises(ValueError, match=f"^LLAVA_ENGINE_{field.upper()}: {field}.* not nan"):
        config.from_env()


@pytest.mark.parametrize("seconds", [math.inf, 1e10, 10**400])
@pytest.mark.parametrize(("config", "field"), SECONDS)
def test_for_ever_is_as_long_as_can_be_waited(config: type, field: str, seconds: float) -> None:
    kept = getattr(config(**{field: seconds}), field)
    assert kept > 2_000_000
    assert config(**{field: seconds}) == config(**{field: math.inf})
    assert threading.Lock().acquire(timeout=kept)
    if config is EngineConfig:
        with socket.socket() as sock:
            sock.settimeout(kept)


@pytest.mark.parametrize(
    ("config", "field", "value", "error", "message"),
    [
        (
            EngineConfig,
            "dtype",
            "float17",
            ValueError,
            "dtype must be one of auto, float32, float16, bfloat16, not 'float17'",
        ),
        (
            EngineConfig,
            "quantization",
            "nf5",
            ValueError,
            "quantization must be one of nf4, int8, fp8, None, not 'nf5'",
        ),
        (EngineConfig, "quantization", 4, TypeError, "quantization must be str or None, not int"),
        (EngineConfig, "dtype", None, TypeError, "dtype must be str, not None"),
        (EngineConfig, "device", None, TypeError, "device must be str, not None"),
        (EngineConfig, "kv_cache_mb", "8", TypeError, "kv_cache_mb must be int or None, not str"),
        (EngineConfig, "max_batch", 1.5, TypeError, "max_batch must be int, not float"),
        (EngineConfig, "allow_hosts", "a", TypeError, "allow_hosts must be tuple of str, not str"),
        (
            EngineConfig,
            "allow_hosts",
            ("a", 1),
            TypeError,
            "allow_hosts must be tuple of str, not tuple of int, str",
        ),
        (EngineConfig, "nvtx", 1, TypeError, "nvtx must be bool, not int"),
        (PoolConfig, "drain", "5", TypeError, "drain must be float, not str"),
        (
            PoolConfig,
            "min_workers",
            3,
            ValueError,
            "min_workers must be between 0 and max_workers (2), not 3",
        ),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(
    config: type, field: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        config(**{field: value})
    assert type(caught.value) is error and str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "field", "text", "message"),
    [
        (PoolConfig, "MAX_WORKERS", "0", "max_workers must be above 0, not 0"),
        (PoolConfig, "MIN_WORKERS", "9", "min_workers must be between 0 and max_workers (2), not"),
        (EngineConfig, "DEVICE", "gpu", 'device must be "auto", "cpu", "cuda" or "cuda:N", not'),
        (EngineConfig, "QUANTIZATION", "nf5", "quantization must be one of nf4, int8, fp8, None"),
        (EngineConfig, "ALLOW_HOSTS", "a:80", "allow_hosts must hold host names or addresses"),
    ],
)
def test_the_variable_with_the_wrong_value_is_named(
    config: type, field: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_MAX_BATCH", "8")  # which is right
    monkeypatch.setenv("LLAVA_ENGINE_MAX_QUEUE", "8")
    monkeypatch.setenv(f"LLAVA_ENGINE_{field}", text)
    with pytest.raises(ValueError) as caught:
        config.from_env()
    assert str(caught.value).startswith(f"LLAVA_ENGINE_{field}: {message}")


def test_two_variables_that_do_not_go_together_are_both_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAVA_ENGINE_PREFILL", "fp8")
    monkeypatch.setenv("LLAVA_ENGINE_ATTENTION", "torch")
    with pytest.raises(ValueError) as caught:
        EngineConfig.from_env()
    said = str(caught.value).partition(": ")[0]
    assert set(said.split(", ")) == {"LLAVA_ENGINE_PREFILL", "LLAVA_ENGINE_ATTENTION"}


@pytest.mark.parametrize(
    "host",
    [
        "",
        " localhost",
        ".",
        "127.0.0.1:8000",
        "localhost:80",
        "[::1]:80",
        "10.0.0.0/8",
        "http://localhost",
        "*.example.org",
        "[127.0.0.1]",
        "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example",
    ],
)
def test_a_host_that_no_url_would_match_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="allow_hosts must hold host names or addresses"):
        EngineConfig(allow_hosts=("localhost", host))


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "my_host-1.example", "10.0.0.1", "::1", "[fd00::1]"]
)
def test_hosts_that_urls_may_name(host: str) -> None:
    assert EngineConfig(allow_hosts=(host,)).allow_hosts == (host,)


def test_a_proxy_s_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(proxy="http://user:secret@[::1]:3128/")
    assert "secret" not in repr(config)
    with pytest.raises(ValueError) as caught:
        EngineConfig(proxy="http://user:secret@proxy.test")
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match="^proxy must be str or None, not bytes$"):
        EngineConfig(proxy=b"http://user:secret@proxy.test:3128")  # type: ignore[arg-type]
    monkeypatch.setenv("LLAVA_ENGINE_PROXY", "http://user:secret@proxy.test")
    with pytest.raises(ValueError, match="^LLAVA_ENGINE_PROXY: proxy") as caught:
        EngineConfig.from_env()
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
