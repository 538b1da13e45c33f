"""The two configuration records, and the only place that reads os.environ.

Each field may be set by a variable `LLAVA_ENGINE_<FIELD>`; `from_env` refuses variables of that
prefix that name no field, so that a misspelt one is not silently ignored.
"""

from __future__ import annotations

import ipaddress
import os
import re
import threading
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

PREFIX = "LLAVA_ENGINE_"

PROXY_URL = re.compile(
    r"http://(?:([^\s@/?#]*)@)?(\[[0-9a-fA-F:.]+\]|[^\s@/?#:\[\]]+):([0-9]{1,5})/?"
)
"""Credentials or None, host (an IPv6 address in brackets), port."""

_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

# Longer ones would be OverflowErrors of the functions that wait: locks take 292 years at most,
# sockets 24 days.
_LONGEST_WAIT = threading.TIMEOUT_MAX
_LONGEST_SOCKET_WAIT = float((2**31 - 1) // 1000)

_Config = TypeVar("_Config", "EngineConfig", "PoolConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one model is run.

    device: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
    dtype: of weights and activations; "auto" is float16 on CUDA and float32 on the CPU.
    quantization: of the decoder's matrices, which are nine tenths of a model: "nf4" (4 bits) or
        "int8" as bitsandbytes has them, which must be installed, or "fp8" (e4m3, a scale per row).
        None leaves them as the checkpoint has them; one that was saved in nf4 or int8 stays so.
    kernels: "auto" runs the compiled kernels on CUDA and the torch references on the CPU;
        "reference" runs the references everywhere.
    attention: how prefill attends on CUDA. "auto" and "paged" take the engine's own kernels for
        all; "torch" and "flash_attn" the flash kernel of torch or of the flash-attn package for
        every chunk, with a call from Python for each kernel of each layer. Decoding always takes
        the engine's own, and so does what flash kernels are not made for, such as float32.
    programmatic_launch: let the kernels of a decoding step start before their predecessors end, on
        GPUs that can (Hopper and later).
    block_size: tokens per KV block.
    kv_cache_mb: a worker's share of the KV cache in MiB; None takes the model's default.
    max_batch: sequences that decode at once.
    prefill_chunk: tokens that one step may prefill, so that a long prompt cannot stall others.
    max_unread_tokens: of an answer that may wait for their reader, before it is paused until they
        are read; see ChunkStream. Below 256, decoding is interrupted for all.
    max_model_len: context limit in tokens; None takes the model's.
    image_cache_mb: encoded pictures kept for reuse, in MiB.
    pixel_cache_mb: host memory for the pixels of recent pictures, in MiB, so that the same
        file, in whatever request, is decoded once; 0 keeps none.
    max_image_bytes, max_image_pixels: limits of one encoded picture.
    image_decode: who decodes JPEGs. "cpu" is libjpeg-turbo, to the bit; "gpu" is nvImageCodec (the
        extra gpu-decode, CUDA alone) for plain ones, whose pixels differ a little; see
        image.gpu_decode.
    fetch_timeout: seconds for one URL, redirects included; what is above 24 days, math.inf too, is
        24 days.
    allow_hosts: host names or addresses that `describe_url` may reach although they are private, as
        they stand in URLs but without a port; no networks and no patterns.
    proxy: "http://[user:password@]host:port" for all downloads; HTTP_PROXY and its like are never
        read. Names are looked up and judged here all the same, and the proxy is asked (CONNECT,
        for http too) for the address that was judged, never for a name. Its own is not judged.
    nvtx: name the runtime's steps and its decoding runs in NVTX ranges and in torch's profiler.
    progress_bar: show on stderr how far loading is, where that is a terminal and it takes over a
        second.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    kernels: Literal["auto", "reference"] = "auto"
    attention: Literal["auto", "paged", "torch", "flash_attn"] = "auto"
    prefill: Literal["exact", "fp8"] = "exact"
    programmatic_launch: bool = True
    block_size: int = 64
    kv_cache_mb: int | None = None
    max_batch: int = 64
    prefill_chunk: int = 2048
    max_unread_tokens: int = 1024
    max_model_len: int | None = None
    image_cache_mb: int = 256
    pixel_cache_mb: int = 128
    max_image_bytes: int = 32 << 20
    max_image_pixels: int = 64 << 20
    image_decode: Literal["cpu", "gpu"] = "cpu"
    fetch_timeout: float = 10.0
    allow_hosts: tuple[str, ...] = ()
    proxy: str | None = field(default=None, repr=False)  # it may hold a password
    nvtx: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        kind, _, index = self.device.partition(":")
        if self.device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and _is_index(index)):
            raise ValueError(
                f'device must be "auto", "cpu", "cuda" or "cuda:N", not {self.device!r}'
            )
        _check_positive(
            self,
            "block_size",
            "kv_cache_mb",
            "max_batch",
            "prefill_chunk",
            "max_unread_tokens",
            "max_model_len",
            "max_image_bytes",
            "max_image_pixels",
            "fetch_timeout",
        )
        _limit_seconds(self, _LONGEST_SOCKET_WAIT, "fetch_timeout")
        for host in self.allow_hosts:
            if not _is_host(host):
                raise ValueError(
                    "allow_hosts must hold host names or addresses as they stand in URLs, without "
                    f"port, mask or pattern, not {host!r}"
                )
        if self.proxy is not None:
            found = PROXY_URL.fullmatch(self.proxy)
            if found is None or not 0 < int(found[3]) < 1 << 16:
                raise ValueError('proxy must be "http://host:port", with or without user:password@')
        if self.prefill == "fp8" and self.attention not in ("auto", "paged"):
            raise ValueError('prefill="fp8" needs the engine\'s own attention ("auto" or "paged")')
        if self.prefill == "fp8" and self.quantization not in (None, "fp8"):
            raise ValueError('prefill="fp8" is for weights in 16 bits or quantization="fp8"')
        _check_not_negative(self, "image_cache_mb", "pixel_cache_mb")

    @classmethod
    def from_env(cls) -> EngineConfig:
        """The defaults, with what `LLAVA_ENGINE_*` variables set. Raises ValueError."""
        return _from_env(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The pool's limits. Seconds may be math.inf, for ever; above 292 years they are 292 years.

    memory_fraction: share of a device's memory, and of the host's, that the pool may reserve.
    min_workers, max_workers: per model; eviction stops at the first, growth at the second.
    max_queue: requests per model that may wait, paused ones for their readers included; beyond that
        new ones are refused.
    default_timeout: seconds for a request that names none; None is no deadline.
    spawn_timeout: seconds in which a worker must have loaded its model.
    idle_timeout: seconds without work after which a worker is Idle and may be evicted.
    breaker_failures, breaker_reset, breaker_successes: the circuit opens after so many model
        failures in a row, tries again after so many seconds, closes after so many successes.
    prepare_threads: threads per worker that fetch, decode and tokenise.
    max_fetch_bytes: what all downloads together may hold until they are decoded, of whatever model;
        one that does not fit waits, within its own time.
    drain: seconds that shutdown waits for running requests.
    """

    memory_fraction: float = 0.8
    min_workers: int = 0
    max_workers: int = 2
    max_queue: int = 256
    default_timeout: float | None = None
    spawn_timeout: float = 600.0
    idle_timeout: float = 300.0
    breaker_failures: int = 5
    breaker_reset: float = 60.0
    breaker_successes: int = 3
    prepare_threads: int = 4
    max_fetch_bytes: int = 128 << 20
    drain: float = 5.0

    def __post_init__(self) -> None:
        _check_types(self)
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must be in (0, 1], not {self.memory_fraction}")
        _check_positive(
            self,
            "max_workers",
            "max_queue",
            "default_timeout",
            "spawn_timeout",
            "idle_timeout",
            "breaker_failures",
            "breaker_successes",
            "prepare_threads",
            "max_fetch_bytes",
        )
        if not 0 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"min_workers must be between 0 and max_workers ({self.max_workers}), "
                f"not {self.min_workers}"
            )
        _check_not_negative(self, "breaker_reset", "drain")
        _limit_seconds(
            self,
            _LONGEST_WAIT,
            "default_timeout",
            "spawn_timeout",
            "idle_timeout",
            "breaker_reset",
            "drain",
        )

    @classmethod
    def from_env(cls) -> PoolConfig:
        """The defaults, with what `LLAVA_ENGINE_*` variables set. Raises ValueError."""
        return _from_env(cls)


def _from_env(cls: type[_Config]) -> _Config:
    known = {f.name for config in (EngineConfig, PoolConfig) for f in fields(config)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise ValueError(f"{variable} names no setting; known are: {', '.join(sorted(known))}")
        if name in hints:
            try:
                values[name] = _parse(text, hints[name])
            except ValueError as error:
                raise ValueError(f"{variable}={text!r}: {error}") from None
    try:
        return cls(**values)
    except ValueError as error:
        # It names the fields. Their values are its own to show: one may hold a password.
        wrong = [name for name in values if re.search(rf"\b{name}\b", str(error))]
        variables = ", ".join(PREFIX + name.upper() for name in wrong)
        raise ValueError(f"{variables}: {error}") from None


def _parse(text: str, hint: Any) -> Any:
    options = _options(hint)
    if type(None) in options and text.lower() in ("", "none"):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is bool:
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError("must be 0, 1, false or true")
        return text.lower() in ("1", "true")
    if kind is int:
        return int(text)
    if kind is float:
        return float(text)
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a field's hint allows."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _check_types(config: EngineConfig | PoolConfig) -> None:
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, options = getattr(config, item.name), _options(hints[item.name])
        if any(_is_a(value, option) for option in options):
            continue
        choices = [choice for option in options for choice in _choices(option)]
        if choices and isinstance(value, str):
            choices += ["None"] if type(None) in options else []
            raise ValueError(f"{item.name} must be one of {', '.join(choices)}, not {value!r}")
        # The value itself is not shown: a proxy in bytes holds the password too.
        wanted = " or ".join(map(_type_name, options))
        raise TypeError(f"{item.name} must be {wanted}, not {_kind(value)}")


def _is_a(value: object, kind: Any) -> bool:
    if _choices(kind):
        return isinstance(value, str) and value in _choices(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind)


def _choices(kind: Any) -> tuple[str, ...]:
    """The strings of a Literal, none of another type."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _type_name(kind: Any) -> str:
    """A field's type for people."""
    if kind is type(None):
        return "None"
    if typing.get_origin(kind) is tuple:
        return "tuple of str"
    return "str" if _choices(kind) else str(kind.__name__)


def _kind(value: object) -> str:
    """A value's type for people."""
    if isinstance(value, tuple) and value:
        return f"tuple of {', '.join(sorted({_kind(item) for item in value}))}"
    return "None" if value is None else type(value).__name__


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_host(text: str) -> bool:
    if _HOST_NAME.fullmatch(text):
        return True
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return ipaddress.ip_address(bare).version == 6
    except ValueError:
        return False


# Each says what is right rather than what is wrong, so that NaN is refused.


def _check_positive(config: EngineConfig | PoolConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value is None or value > 0):
            raise ValueError(f"{name} must be above 0, not {value}")


def _check_not_negative(config: EngineConfig | PoolConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, not {value}")


def _limit_seconds(config: EngineConfig | PoolConfig, longest: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value > longest:
            object.__setattr__(config, name, longest)
