"""Decodes a batch of sequences in runs: fills the rows, starts the loop, says whose tokens came.

Which sequences, for how many steps, and what a token means to them is the runtime's.
"""

from __future__ import annotations

from llava_engine.config import EngineConfig
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.decode_graph import StepGraphs, bucket_of
from llava_engine.runtime.decode_loop import DecodeLoop, EagerLoop, TokenEvent
from llava_engine.runtime.decode_state import MAX_EOS, DecodeState
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.native_loop import NativeLoop
from llava_engine.runtime.sequence import Sequence
from llava_engine.runtime.streams import DeviceStreams


class Decoder:
    """One model's decoding steps on one device; a run has at most RING_STEPS of them.

    On CUDA with the compiled kernels the native loop replays captured steps; otherwise each step
    runs as it is waited for. One thread owns it; only `stop` may be called from others.
    """

    def __init__(
        self,
        model: LlavaModel,
        cache: KVCache,
        streams: DeviceStreams,
        *,
        max_model_len: int,
        config: EngineConfig,
    ) -> None:
        self._model = model
        self._cache = cache
        self._streams = streams
        with streams.decoding():  # what initialises it must not run behind the first steps
            self._state = DecodeState(
                max_batch=config.max_batch,
                max_model_len=max_model_len,
                block_size=cache.block_size,
                vocab_size=model.config.text.vocab_size,
                image_token_id=model.config.image_token_id,
                device=model.device,
            )
        self._rows: list[Sequence] = []
        self._next_step = 0
        self._graphs: StepGraphs | None = None
        self._loop: DecodeLoop
        if streams.decode is not None and config.kernels == "auto":
            self._graphs = StepGraphs(
                self._step,
                streams.decode,
                max_batch=config.max_batch,
                overlap=config.programmatic_launch,
            )
            self._loop = NativeLoop(
                model.device, streams.decode.cuda_stream, self._state.ring, self._graphs
            )
        else:
            self._loop = EagerLoop(self._finished_step, self._state.ring)

    @property
    def decodes(self) -> bool:
        """Whether a run is on."""
        return bool(self._rows)

    def takes(self, sequence: Sequence) -> bool:
        """Whether its next token can be decoded in a run: it stands for no picture, and its end can
        be told on the device."""
        return sequence.token_ids[-1] >= 0 and len(sequence.eos_token_ids) <= MAX_EOS

    def start(
        self, sequences: list[Sequence], remaining: list[int], steps: int, *, until_one_ends: bool
    ) -> None:
        """Start a run of at most `steps` steps over sequences that have blocks for them.

        remaining: tokens that each may still sample. until_one_ends: stop when the first finishes,
        and otherwise when so many have that fewer rows will do. Raises what capturing a step raises
        and DeviceFailed.
        """
        rows = len(sequences)
        self.prepare(rows)
        with self._streams.decoding():
            self._state.fill(sequences, remaining, self._next_step)
        first, self._next_step = self._next_step, self._next_step + steps
        self._rows = sequences
        self._loop.run(rows, first, steps, rows - 1 if until_one_ends else self._worth(rows))

    def wait(self, timeout: float | None) -> tuple[list[tuple[Sequence, TokenEvent]], bool]:
        """New tokens and whose they are, and whether the run has ended; see DecodeLoop.wait.

        What an eager step raises ends the run.
        """
        ended = True
        try:
            events, ended = self._loop.wait(timeout)
        finally:
            rows = self._rows
            if ended:
                self._rows = []  # an idle decoder keeps no sequence, nor its pictures
                self._streams.decoded()
        return [(rows[event.row], event) for event in events], ended

    def stop(self) -> None:
        """End the run after the steps that are in flight, and let `wait` return; any thread."""
        self._loop.stop()

    def prepare(self, rows: int) -> None:
        """Capture what a run of `rows` rows needs, unless it is there. No run is on."""
        if self._graphs is not None and rows not in self._graphs:
            with self._streams.decoding():
                self._state.clear()
        try:
            self._loop.prepare(rows)
        finally:
            self._streams.decoded()

    def forget(self) -> None:
        """Drop what was captured, before the KV cache moves. No run is on."""
        if self._graphs is not None:
            self._graphs.clear()

    def close(self) -> None:
        """Wait for what is in flight and free the device's memory. Only `stop` may be called then,
        to no effect."""
        try:
            self._loop.close()
            self.forget()
        finally:
            del self._model, self._cache, self._state
            self._rows = []

    def _worth(self, rows: int) -> int:
        """The number of unfinished rows at which a new run with fewer is faster."""
        if self._graphs is None:
            return rows - 1
        bucket = bucket_of(rows, self._state.max_batch)
        return 0 if bucket == 1 else 1 << (bucket - 1).bit_length() - 1

    def _step(self, rows: int) -> None:
        """One decoding step of the first rows; nothing in it waits for the device."""
        state, cache = self._state, self._cache
        logits = self._model.decode_logits(
            state.token(rows), state.batch(rows), cache.keys, cache.values
        )
        state.advance(logits)

    def _finished_step(self, rows: int) -> None:
        with self._streams.decoding():
            self._step(rows)
        if self._streams.decode is not None:
            self._streams.decode.synchronize()
