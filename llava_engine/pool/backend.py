"""A model on a device, as the pool's workers use it: from a request to a sequence of the runtime.

The only file of pool/ that knows the runtime, the models, and what a request's preparation takes.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llava_engine.config import EngineConfig
from llava_engine.errors import (
    KernelsNotBuilt,
    LlavaError,
    MemoryExhausted,
    ModelError,
    SpawnFailed,
    UnsupportedModel,
    WorkerDied,
)
from llava_engine.hub import resolve
from llava_engine.image.gpu_decode import jpeg_decoder
from llava_engine.image.picture_cache import PictureCache
from llava_engine.image.preprocess import ImageProcessorConfig
from llava_engine.kernels.library import references, require_kernels
from llava_engine.network.attention import require_attention
from llava_engine.network.weights import load_model
from llava_engine.pool.request import Request, in_short
from llava_engine.pool.sizing import HOST, DeviceMemory, kv_share_mb
from llava_engine.pool.stages import Stages
from llava_engine.quant.fp8 import require_fp8
from llava_engine.registry import ModelInfo
from llava_engine.runtime.failures import LOST, device_lost
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Picture, Sequence
from llava_engine.text.detokenizer import Detokenizer
from llava_engine.text.prompt import build_prompt, check_length, check_prompt
from llava_engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llava_engine.image.budget import ByteBudget
    from llava_engine.image.fetch import Fetcher

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class ModelBackend:
    """A checkpoint directory on a device: runtime, tokenizer, image processor, fetcher."""

    def __init__(
        self,
        directory: Path,
        info: ModelInfo,
        config: EngineConfig,
        device: str,
        kv_mb: int,
        progress: Progress,
        stages: Stages,
    ) -> None:
        """Raises ModelError or MemoryExhausted."""
        self._info = info
        self._config = config
        self._kv_bytes = kv_mb << 20
        self._device = torch.device(device)
        self._stages = stages
        if config.kernels == "auto":
            with stages("library"):  # with the context, if no other stage has made it
                require_kernels(self._device)
        if self._device.type == "cuda":
            with stages("context"):
                torch.cuda.synchronize(self._device)
        require_settings(config, device)
        self._decode_jpeg = jpeg_decoder(config.image_decode, self._device)
        dtype = _dtype(config, device)
        self._baseline = self._reserved()
        with stages("tokenizer"):
            self._tokenizer = Tokenizer.from_directory(directory)
        self._processor = ImageProcessorConfig.from_directory(directory)
        kernels = references if config.kernels == "reference" else nullcontext
        with stages("weights"), kernels():
            model = load_model(
                directory,
                device=self._device,
                dtype=dtype,
                quantization=config.quantization,
                progress=progress,
            )
        self._model_config = model.config
        side = model.config.vision.image_size
        if self._processor.output_size != (side, side):
            raise UnsupportedModel(
                f"The image processor makes pictures of {self._processor.output_size}, the vision "
                f"tower takes {(side, side)}."
            )
        self._fetcher: Fetcher | None = None
        self._fetcher_lock = threading.Lock()
        self._closed = False
        self._pictures = PictureCache(
            self._processor,
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
            capacity=config.pixel_cache_mb << 20,
            resample=self._device.type == "cpu",
            decode_jpeg=self._decode_jpeg,
        )
        with stages("kv cache, graphs"):
            self._runtime = DeviceRuntime(model, device=self._device, config=config)

    def add_worker(self, name: str) -> None:
        """Grow the KV cache by a worker's share.

        Where that is an estimate, the cache gets room for one full context at least, if it fits.
        """
        share = self._kv_bytes
        if self._config.kv_cache_mb is None and not self._runtime.num_blocks:
            blocks = -(-self._runtime.max_model_len // self._config.block_size)
            share = max(share, blocks * self._runtime.kv_block_bytes)
        with _telling_loss(self._device), self._stages("kv cache, graphs"):
            try:
                self._runtime.add_worker(name, share)
            except MemoryExhausted:
                if share == self._kv_bytes:
                    raise
                logger.info("There is no room for the KV cache of a full context.")
                self._runtime.add_worker(name, self._kv_bytes)

    def remove_worker(self, name: str) -> None:
        """Shrink the KV cache again."""
        self._runtime.remove_worker(name)

    def memory_mb(self) -> int:
        """What torch's allocator holds since before the load, at least the runtime's own count.

        On the CPU the kept pixels count too; beside a GPU, `estimate_need` has room for them all.
        """
        held = max(self._runtime.memory_bytes(), self._reserved() - self._baseline)
        if self._device.type == "cpu":
            held += self._pictures.nbytes
        return -(-held // (1 << 20))

    def on_death(self, callback: Callable[[BaseException], None]) -> None:
        """See Backend."""

        def died(cause: BaseException) -> None:
            if isinstance(cause, LOST):
                lost = device_lost(self._device)
                lost.__cause__ = cause
                cause = lost
            callback(cause)

        self._runtime.on_death(died)

    def close(self) -> None:
        """See Backend."""
        with self._fetcher_lock:
            self._closed = True
            if self._fetcher is not None:
                self._fetcher.close()
        self._pictures.close()
        if self._decode_jpeg is not None:
            self._decode_jpeg.close()
        self._runtime.close()

    def fetch(self, request: Request) -> bytes:
        """See Backend."""
        assert request.url is not None
        check_prompt(
            self._tokenizer,
            self._info.prompt_template,
            request.query,
            self._model_config.image_tokens,
            self._runtime.max_model_len,
        )
        return self._open_fetcher(request.fetches).fetch(request.url, request.channel.deadline)

    def start(self, request: Request, worker: str) -> None:
        """See Backend."""
        channel = request.channel
        check_length(request.query, self._runtime.max_model_len)
        picture = self._pictures.prepare(request.image)
        request.image = None
        channel.stamp("image")
        prompt = build_prompt(
            self._tokenizer,
            self._info.prompt_template,
            request.query,
            self._model_config.image_token_id,
            self._model_config.image_tokens,
            picture.key,
        )
        channel.bind(
            Detokenizer(self._tokenizer),
            len(prompt.token_ids),
            prompt.image_length,
            self._config.max_unread_tokens,
        )
        channel.on_change(self._runtime.wake)
        sampling = request.sampling
        self._runtime.submit(
            Sequence(
                prompt.token_ids,
                (Picture(picture.key, prompt.image_offset, prompt.image_length, picture.pixels),),
                sampling,
                sampling.max_new_tokens or self._info.max_output_tokens,
                self._tokenizer.eos_token_ids,
                channel,
                seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
                deadline=channel.deadline,
                cache_salt=request.cache_salt.encode("utf-8", "surrogatepass"),
                priority=request.priority,
                worker=worker,
            )
        )

    def _open_fetcher(self, budget: ByteBudget) -> Fetcher:
        """Made for the first URL: its HTTP client would make every cold start longer. All requests
        come from one pool, and so with one budget."""
        from llava_engine.image.fetch import Fetcher

        with self._fetcher_lock:
            if self._closed:
                raise WorkerDied("The worker has ended.")
            if self._fetcher is None:
                self._fetcher = Fetcher(
                    max_bytes=self._config.max_image_bytes,
                    timeout=self._config.fetch_timeout,
                    allow_hosts=self._config.allow_hosts,
                    budget=budget,
                    proxy=self._config.proxy,
                )
            return self._fetcher

    def _reserved(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_reserved(self._device)


def candidate_devices(
    config: EngineConfig, gpus: list[DeviceMemory], host: DeviceMemory
) -> list[DeviceMemory]:
    """Where a model may run under `config.device`. Raises ModelError for a GPU that is not there.

    "auto" takes the GPUs that the engine's kernels run on, else the host. Of the GPUs that "cuda"
    allows, too, only these; if there are none, loading the model will say why.
    """
    if config.device == "cpu":
        return [host]
    if config.device == "auto":
        return [gpu for gpu in gpus if _kernels_usable(config, gpu)] or [host]
    wanted = [gpu for gpu in gpus if config.device in ("cuda", gpu.name)]
    if not wanted:
        raise ModelError(
            f"EngineConfig asks for device {config.device!r}; torch can use {len(gpus)} GPUs here."
        )
    if len(wanted) == 1:
        return wanted
    return [gpu for gpu in wanted if _kernels_usable(config, gpu)] or wanted


def _kernels_usable(config: EngineConfig, gpu: DeviceMemory) -> bool:
    if config.kernels == "reference":
        return True
    try:
        require_kernels(torch.device(gpu.name))
    except KernelsNotBuilt as error:
        logger.info("No model is put on %s: %s", gpu.name, error)
        return False
    return True


@contextmanager
def _telling_loss(device: torch.device) -> Iterator[None]:
    """Raise DeviceLost for what says that the device is."""
    try:
        yield
    except LOST as error:
        raise device_lost(device) from error


def load_worker_model(
    info: ModelInfo, config: EngineConfig, device: str, progress: Progress, stages: Stages
) -> ModelBackend:
    """Find the checkpoint, downloading it if need be, and load it onto `device`.

    progress: called as in network.weights. stages: told how long it all takes. Raises ModelError,
    MemoryExhausted or DeviceLost, and SpawnFailed for what `progress` raises.
    """

    def told(stage: str, done: int, total: int) -> None:
        try:
            progress(stage, done, total)
        except LlavaError:
            raise
        except BaseException as error:
            failed = SpawnFailed(f"the progress callback raised {in_short(error)}")
            failed.retryable = False  # it is the caller's, and will raise again
            raise failed from error

    kv_mb = kv_share_mb(info, config, device)
    with stages("checkpoint"):
        directory = resolve(info)
    with _telling_loss(torch.device(device)):
        return ModelBackend(directory, info, config, device, kv_mb, told, stages)


def require_settings(config: EngineConfig, device: str) -> None:
    """Raise the ModelError of settings under which no model runs on `device`; the kernels are asked
    for apart, with require_kernels."""
    there = torch.device(device)
    require_attention(config.attention, there)
    if config.prefill == "fp8":
        dtype = _dtype(config, device)
        require_fp8(there, dtype, references=config.kernels == "reference")


def _dtype(config: EngineConfig, device: str) -> torch.dtype:
    if config.dtype == "auto":
        return torch.float32 if device == HOST else torch.float16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
