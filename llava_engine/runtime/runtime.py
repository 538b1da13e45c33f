"""DeviceRuntime: one model on one device, and the one thread that runs all its sequences.

The workers of a device share it: one copy of the weights, one KV cache to which each adds its
share, one loop in which all their sequences are batched. Knows no text, no URL and no pool.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext

import torch

from llava_engine.config import EngineConfig
from llava_engine.errors import MemoryExhausted, WorkerDied
from llava_engine.kernels.library import references
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import quantize_for_prefill
from llava_engine.quant.fp8 import require_fp8
from llava_engine.runtime.decode_loop import TokenEvent
from llava_engine.runtime.decoder import Decoder
from llava_engine.runtime.failures import LOST, device_lost
from llava_engine.runtime.feature_cache import FeatureCache
from llava_engine.runtime.inbox import Inbox, Item
from llava_engine.runtime.kv_cache import BlockPool, KVCache
from llava_engine.runtime.model_runner import ModelRunner
from llava_engine.runtime.ranges import ranges
from llava_engine.runtime.scheduler import Scheduler
from llava_engine.runtime.sequence import Sequence
from llava_engine.runtime.steps import Steps
from llava_engine.runtime.streams import DeviceStreams

logger = logging.getLogger(__name__)


class DeviceRuntime:
    """Runs sequences of `model` on `device` until `close`.

    It starts without KV blocks; each `add_worker` brings a share. All methods are thread-safe.
    on_tokens: called on the loop thread with what decoding gave, in order; must return at once.
    Raises UnsupportedModel or MemoryExhausted where config.prefill cannot be had.
    """

    def __init__(
        self,
        model: LlavaModel,
        *,
        device: torch.device,
        config: EngineConfig,
        on_tokens: Callable[[list[TokenEvent]], None] | None = None,
    ) -> None:
        text = model.config.text
        self.device = device
        self._kernels = references if config.kernels == "reference" else nullcontext
        if config.prefill == "fp8":
            require_fp8(device, model.dtype, references=config.kernels == "reference")
            with torch.inference_mode(), self._kernels():
                quantize_for_prefill(model)
        self.max_model_len = min(
            config.max_model_len or model.config.max_model_len, model.config.max_model_len
        )
        self._weights_bytes = model.nbytes
        self._cache = KVCache(
            num_layers=text.num_layers,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            block_size=config.block_size,
            dtype=model.dtype,
            device=device,
        )
        self._blocks = BlockPool(0, config.block_size)
        self._features = FeatureCache(config.image_cache_mb << 20)
        self._scheduler = Scheduler(
            self._blocks,
            max_batch=config.max_batch,
            prefill_chunk=config.prefill_chunk,
            max_model_len=self.max_model_len,
        )
        attention = "paged" if config.kernels == "reference" else config.attention
        compiled = config.kernels == "auto" and device.type == "cuda"
        self._inbox = Inbox()
        self._shares: dict[str, int] = {}
        self._closing = False
        self._lock = threading.Lock()
        self._open = True
        """Guarded by `_lock`: whether the loop will still look at what is put in the inbox."""
        self._death: BaseException | None = None
        self._death_callbacks: list[Callable[[BaseException], None]] = []
        self._thread = threading.Thread(
            target=self._loop, name=f"llava-runtime-{device}", daemon=True
        )
        self._streams = DeviceStreams(device)
        try:
            runner = ModelRunner(
                model,
                self._cache,
                self._features,
                self._streams,
                attention=attention,
                captures=compiled,
                overlap=compiled and config.programmatic_launch,
            )
            self._decoder = Decoder(
                model,
                self._cache,
                self._streams,
                max_model_len=self.max_model_len,
                config=config,
            )
            self._steps = Steps(
                self._scheduler,
                runner,
                self._decoder,
                self._inbox,
                device,
                on_tokens=on_tokens,
                opened=ranges(config.nvtx, device),
            )
            self._thread.start()
        except BaseException:
            self._streams.close()  # who keeps the exception keeps this object, and so its threads
            raise

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        return self._cache.block_bytes

    @property
    def num_blocks(self) -> int:
        """KV blocks of all shares together."""
        return self._blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds; equal to `num_blocks` when nothing runs."""
        return self._blocks.num_free

    def memory_bytes(self) -> int:
        """Bytes of weights, KV cache and kept pictures on the device."""
        kv = self._blocks.num_blocks * self._cache.block_bytes
        return self._weights_bytes + kv + self._features.nbytes

    def load(self) -> int:
        """Sequences that run or wait, be it for their readers."""
        scheduler = self._scheduler
        held = len(scheduler.running) + scheduler.num_waiting + len(scheduler.paused)
        return held + len(self._inbox)

    def add_worker(self, name: str, kv_bytes: int) -> None:
        """Grow the KV cache by a worker's share, at least one block.

        Raises MemoryExhausted when the device has no room for it, WorkerDied when closed.
        """
        blocks = max(1, kv_bytes // self._cache.block_bytes)
        self._command(lambda: self._set_shares({**self._shares, name: blocks}))

    def remove_worker(self, name: str) -> None:
        """Give a worker's share back; sequences that no longer fit are computed again."""
        self._command(
            lambda: self._set_shares({k: v for k, v in self._shares.items() if k != name})
        )

    def submit(self, sequence: Sequence) -> None:
        """Run a sequence. Never blocks or raises: what fails goes to the sequence's sink."""
        if not self._put(sequence):
            sequence.sink.fail(self._gone())

    def wake(self) -> None:
        """Look now for sequences whose sink is cancelled or has room again. Takes no lock."""
        self._inbox.put(None)
        self._decoder.stop()

    def on_death(self, callback: Callable[[BaseException], None]) -> None:
        """Call `callback` with the cause if the loop thread dies; at once if it already has."""
        with self._lock:
            self._death_callbacks.append(callback)
            death = self._death
        if death is not None:
            callback(death)

    def close(self) -> None:
        """End the loop, fail what is left with WorkerDied, and free the device's memory."""
        self._closing = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, item: Item) -> bool:
        with self._lock:
            if self._open:
                self._inbox.put(item)
                self._decoder.stop()
            return self._open

    def _command(self, action: Callable[[], None]) -> None:
        """Run `action` on the loop thread, between steps, and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            if self._closing or self._death is not None:
                done.set_exception(self._gone())
                return
            try:
                action()
            except Exception as error:
                done.set_exception(error)
                if isinstance(error, LOST):
                    raise
            else:
                done.set_result(None)

        if not self._put(run):
            raise self._gone()
        done.result()

    def _set_shares(self, shares: dict[str, int]) -> None:
        total = sum(shares.values())
        self._scheduler.make_room(total)
        before, resized = self._blocks.num_blocks, False
        moves = self._blocks.resize(total)
        for sequence in self._scheduler.running:
            sequence.block_table = [moves.get(block, block) for block in sequence.block_table]
        self._decoder.forget()  # captured steps have the old tensors' addresses
        try:
            self._cache.resize(total, moves)
            resized = True
            if total > before:
                self._decoder.prepare(1)
        except LOST:
            raise
        except RuntimeError as error:  # torch's OutOfMemoryError, and what its CPU allocator raises
            self._restart_cache(min(total, before))
            if resized and not isinstance(error, torch.OutOfMemoryError):
                raise
            if total > before:
                raise MemoryExhausted(
                    f"No room on {self.device} for {total - before} more KV blocks."
                ) from error
        self._shares = shares
        # What was replaced is of no use to the allocator: the new tensors have other sizes.
        self._release_cached_memory()

    def _restart_cache(self, num_blocks: int) -> None:
        """Give up what the KV cache holds; running sequences are computed again.

        After a resize that failed some layers have the new size and some the old one, and blocks
        have moved in some alone.
        """
        self._scheduler.make_room(0)
        self._blocks.clear()
        self._blocks.resize(num_blocks)
        self._cache.resize(0, {})
        self._release_cached_memory()
        self._cache.resize(num_blocks, {})

    def _release_cached_memory(self) -> None:
        """Give what torch's allocator keeps for reuse back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _loop(self) -> None:
        try:
            with torch.inference_mode(), self._kernels(), self._streams.prefilling():
                while not self._closing:
                    self._receive()
                    self._steps.run(self._scheduler.schedule(time.monotonic()))
        except BaseException as error:  # noqa: BLE001  whatever it is, no stream may hang
            logger.exception("The runtime on %s died.", self.device)
            traceback.clear_frames(error.__traceback__)  # they hold the model
            self._death = error
        self._shut()

    def _receive(self) -> None:
        """Take in everything that has arrived; block while there is nothing else to do."""
        idle = not self._scheduler.running and not self._scheduler.num_waiting
        deadline = self._scheduler.next_deadline() if idle else None  # of one that is paused
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        reap = False
        for item in self._inbox.take(idle, patience):
            if item is None:
                reap = True
            elif isinstance(item, Sequence):
                self._scheduler.add(item)
            else:
                item()
        if reap:
            self._scheduler.reap()

    def _shut(self) -> None:
        """No more work: fail what is left, run what waits for an answer, free the memory."""
        with self._lock:
            self._open = False
            callbacks = list(self._death_callbacks)
        for sequence in self._scheduler.abandon():
            sequence.sink.fail(self._gone())
        for item in self._inbox.take(wait=False):
            if isinstance(item, Sequence):
                item.sink.fail(self._gone())
            elif item is not None:
                item()
        try:
            self._free_memory()
        except Exception as error:  # where the device is lost, this is too
            logger.warning("Freeing the memory of %s failed.", self.device, exc_info=error)
            self._death = self._death or error
        finally:
            self._streams.close()
        if self._death is not None:
            for callback in callbacks:
                callback(self._death)

    def _free_memory(self) -> None:
        try:
            self._steps.close()
        finally:
            self._weights_bytes = 0
            self._features.clear()
            self._blocks = BlockPool(0, self._blocks.block_size)
            self._cache.resize(0, {})
            self._release_cached_memory()

    def _gone(self) -> WorkerDied:
        died = WorkerDied(f"The runtime on {self.device} has ended.")
        if isinstance(self._death, LOST):
            died = device_lost(self.device)
        died.__cause__ = self._death
        return died
