"""`get` a model by name or directory, and the two verbs that ask it about a picture.

A VisionModel holds no weights: it knows how the pool can bring up its workers, and routes every
request through the pool. Nothing here imports torch, which takes longer than a caller may wait.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from llava_engine.config import EngineConfig
from llava_engine.hub import checkpoint_mb, saved_quantised
from llava_engine.network.safetensors_file import narrowed_bytes
from llava_engine.pool.model import ModelSpec
from llava_engine.pool.pool import WorkerPool, vision_pool
from llava_engine.pool.sizing import DeviceMemory, Need, estimate_need, formats_needed
from llava_engine.pool.stages import Stages
from llava_engine.pool.warm_up import warmed_up
from llava_engine.pool.worker import Backend
from llava_engine.progress import ProgressBar
from llava_engine.registry import ModelInfo, lookup, models
from llava_engine.stream import ChunkStream
from llava_engine.types import ImageInput, SamplingParams

Progress = Callable[[str, int, int], None]
"""Called with a stage ("load"), the bytes that are done and the bytes in all."""

_MIN_SHARE_MB = 128
_DIGEST_KEY = os.urandom(16)  # so that no log has what a password could be guessed with


class VisionModel:
    """A model that can be asked about pictures; made by `get`.

    info: its record. config: how it is run. registry_key: its name in the pool.
    """

    def __init__(
        self,
        info: ModelInfo,
        config: EngineConfig,
        *,
        pool: WorkerPool | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {type(config).__name__}")
        if pool is not None and not isinstance(pool, WorkerPool):
            raise TypeError(f"pool must be a WorkerPool, not {type(pool).__name__}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {type(progress).__name__}")
        self.info = info
        self.config = config
        self.registry_key = _pool_key(info.registry_key, config)
        self._pool = pool
        self._spec = _spec(self.registry_key, info, config, progress)

    def describe_image(
        self,
        image: ImageInput,
        query: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] | None = (),
        seed: int | None = None,
        ignore_eos: bool = False,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ChunkStream:
        """Ask about a picture; returns at once with the stream of the answer.

        image: a path, encoded bytes, a binary file, a PIL image, or a uint8 height x width x 3
            array. It is read later, on another thread, and must not change until then. Give a
            file whose read() may block a timeout: without one it holds that thread for good.
        max_new_tokens, temperature: None takes the model's default.
        top_p, top_k, repetition_penalty, stop, seed, ignore_eos: see SamplingParams.
        timeout: seconds for all of it, the wait in the queue included; None takes the pool's.
        priority: lower goes first. cache_salt: requests share cached prefixes only with the same.

        The first request spawns the model's workers. Raises TypeError or ValueError for arguments;
        everything else is raised by the stream, as a LlavaError.
        """
        sampling = self._sampling(
            max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed, ignore_eos
        )
        return self._ready_pool().describe_image(
            self.registry_key,
            image,
            query,
            sampling=sampling,
            timeout=timeout,
            priority=priority,
            cache_salt=cache_salt,
        )

    def describe_url(
        self,
        url: str,
        query: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] | None = (),
        seed: int | None = None,
        ignore_eos: bool = False,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ChunkStream:
        """`describe_image` for the picture that an http or https URL leads to.

        Addresses that are not public are refused unless EngineConfig.allow_hosts names them.
        """
        sampling = self._sampling(
            max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed, ignore_eos
        )
        return self._ready_pool().describe_url(
            self.registry_key,
            url,
            query,
            sampling=sampling,
            timeout=timeout,
            priority=priority,
            cache_salt=cache_salt,
        )

    def __repr__(self) -> str:
        return f"<VisionModel {self.registry_key!r} on {self.config.device}>"

    def _ready_pool(self) -> WorkerPool:
        """The cold-start step: a pool that knows how to spawn this model's workers, and will for
        the first request that finds none."""
        pool = self._pool if self._pool is not None else vision_pool()
        pool.add_model(self._spec)
        return pool

    def _sampling(
        self,
        max_new_tokens: int | None,
        temperature: float | None,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        stop: str | Iterable[str] | None,
        seed: int | None,
        ignore_eos: bool,
    ) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.info.default_temperature if temperature is None else temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            stop=stop,  # type: ignore[arg-type]  # which makes a tuple of it
            seed=seed,
            ignore_eos=ignore_eos,
        )


def get(
    name: str | os.PathLike[str],
    config: EngineConfig | None = None,
    *,
    pool: WorkerPool | None = None,
    progress: Progress | None = None,
) -> VisionModel:
    """The model of a registered name, or of a checkpoint directory in the Hugging Face layout.

    config: EngineConfig.from_env() if None. pool: vision_pool() if None.
    progress: called from the loading thread, in place of EngineConfig.progress_bar; the first one
        given for a model counts.

    Nothing is loaded or downloaded before the first request. Raises UnknownModel naming the known
    names and the nearest, and WeightsError for a directory that cannot be read.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a str or a path, not {type(name).__name__}")
    config = config if config is not None else EngineConfig.from_env()
    return VisionModel(_find(name), config, pool=pool, progress=progress)


def _find(name: str | os.PathLike[str]) -> ModelInfo:
    text = os.fspath(name)
    if not isinstance(text, str):
        raise TypeError(f"name must be a str or a path of str, not of {type(text).__name__}")
    if isinstance(name, str) and any(info.registry_key == name for info in models()):
        return lookup(name)
    directory = Path(text)
    if not text.strip() or not directory.is_dir():  # "" would be the current one
        return lookup(text)  # which says what is known
    directory = directory.resolve()
    weights = max(1, checkpoint_mb(directory) - (narrowed_bytes(directory) >> 20))
    share = max(_MIN_SHARE_MB, weights // 4)
    return ModelInfo(
        registry_key=str(directory),
        directory=directory,
        est_memory_allocation_mb=weights + share,
        est_worker_share_mb=share,
    )


def _pool_key(registry_key: str, config: EngineConfig) -> str:
    """The model's name, and what of the configuration is not the default: each combination has
    workers of its own. Health, metrics and logs show it."""
    default = EngineConfig()
    changed = [
        f"{field.name}={_shown(getattr(config, field.name), secret=not field.repr)}"
        for field in fields(config)
        if field.name != "progress_bar"  # what is shown changes nothing of what is run
        and getattr(config, field.name) != getattr(default, field.name)
    ]
    return f"{registry_key}[{', '.join(changed)}]" if changed else registry_key


def _shown(value: object, *, secret: bool) -> str:
    """A setting in a model's key; of a secret one a digest, which is another in every process."""
    if not secret:
        return str(value)
    return hashlib.blake2b(str(value).encode(), key=_DIGEST_KEY, digest_size=8).hexdigest()


def _spec(key: str, info: ModelInfo, config: EngineConfig, progress: Progress | None) -> ModelSpec:
    """How the pool brings up the model's workers; all of it runs on the pool's threads, and so
    torch is first imported there."""
    stages = Stages()

    def devices(gpus: list[DeviceMemory], host: DeviceMemory) -> list[DeviceMemory]:
        from llava_engine.pool.backend import candidate_devices

        with stages("library"):
            return candidate_devices(config, gpus, host)

    def need(device: str) -> Need:
        return estimate_need(info, config, device)

    def smaller(device: str) -> dict[str, Need]:
        if info.directory is not None and saved_quantised(info.directory):
            return {}
        return formats_needed(info, config, device)

    def loader(device: str, check: Callable[[], None]) -> Backend:
        from llava_engine.pool.backend import load_worker_model

        with ProgressBar(Path(info.registry_key).name) as bar:

            def report(stage: str, done: int, total: int) -> None:
                check()
                if progress is not None:
                    progress(stage, done, total)
                elif config.progress_bar:
                    bar.update(done, total)

            return load_worker_model(info, config, device, report, stages)

    return ModelSpec(
        key, loader, need, devices, lambda: warmed_up(config.device, stages), stages, smaller
    )
