"""The rows of a decoding batch on the device: what a step reads, and what it leaves for the next.

The tensors keep their addresses, so that a step can be captured once and replayed. The host writes
them before a run and then only reads the ring of sampled tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from llava_engine.kernels.decode_step import advance
from llava_engine.kernels.sampling import sample
from llava_engine.network.llama import Batch
from llava_engine.runtime.sampler import seen_ids
from llava_engine.runtime.sequence import Sequence

RING_STEPS = 256
"""Steps whose tokens the ring holds: the longest run."""

MAX_EOS = 8
"""End-of-sequence ids that a row can have."""

_ALIGNMENT = 16  # of each column, in bytes


class DecodeState:
    """`max_batch` rows, each a sequence's newest token and how to go on from it.

    An idle row has context length 0 and slot -1: its KV is not written, and its token is neither
    random nor delivered. ring: int32 [RING_STEPS, max_batch, 4], pinned beside CUDA tensors; see
    kernels.decode_step.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        image_token_id: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._image_token_id = image_token_id
        pinned = device.type == "cuda"
        rows, width = max_batch, -(-max_model_len // block_size)
        columns: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "step": ((1,), torch.int64),
            "token": ((rows,), torch.int64),
            "position": ((rows,), torch.int64),
            "slot": ((rows,), torch.int64),
            "context_len": ((rows,), torch.int32),
            "block_table": ((rows, width), torch.int32),
            "temperature": ((rows,), torch.float32),
            "top_k": ((rows,), torch.int32),
            "top_p": ((rows,), torch.float32),
            "repetition_penalty": ((rows,), torch.float32),
            "seed": ((rows,), torch.int64),
            "sample_position": ((rows,), torch.int64),
            "remaining": ((rows,), torch.int32),
            "eos": ((rows, MAX_EOS), torch.int64),
        }
        places, end = {}, 0
        for name, (shape, dtype) in columns.items():
            count = int(np.prod(shape)) * dtype.itemsize
            places[name] = slice(end, end + count)
            end += -(-count // _ALIGNMENT) * _ALIGNMENT
        # Every column is a part of one buffer, so that a run begins with a single copy.
        self._staged = torch.zeros(end, dtype=torch.uint8, pin_memory=pinned)
        self._packed = torch.zeros(end, dtype=torch.uint8, device=device)

        def views(packed: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: packed[places[name]].view(dtype).view(shape)
                for name, (shape, dtype) in columns.items()
            }

        self._host = {name: view.numpy() for name, view in views(self._staged).items()}
        self._device = views(self._packed)
        self._seen = torch.zeros((rows, vocab_size), dtype=torch.bool, device=device)
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=device)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.ring = torch.zeros((RING_STEPS, rows, 4), dtype=torch.int32, pin_memory=pinned)

    @property
    def max_batch(self) -> int:
        """Rows in all."""
        return len(self._sampled)

    def fill(self, sequences: list[Sequence], remaining: list[int], first_step: int) -> None:
        """Give each sequence a row in order, leave the rest idle, and upload it all.

        Each sequence has one uncomputed token, no placeholder, and blocks for it and the steps to
        come. remaining: tokens that each may still sample. first_step: the number of the next step.
        """
        host = self._host
        self._staged.zero_()
        host["slot"].fill(-1)
        host["top_p"].fill(1)
        host["repetition_penalty"].fill(1)
        host["eos"].fill(-1)
        host["step"][0] = first_step
        for row, (sequence, left) in enumerate(zip(sequences, remaining, strict=True)):
            position, params = sequence.computed, sequence.sampling
            table, size = sequence.block_table, self._block_size
            host["token"][row] = sequence.token_ids[-1]
            host["position"][row] = position
            host["slot"][row] = table[position // size] * size + position % size
            host["context_len"][row] = position + 1
            host["block_table"][row, : len(table)] = table
            host["temperature"][row] = params.temperature
            host["top_k"][row] = params.top_k
            host["top_p"][row] = params.top_p
            host["repetition_penalty"][row] = params.repetition_penalty
            host["seed"][row] = sequence.seed
            host["sample_position"][row] = sequence.completion_len
            host["remaining"][row] = left
            if not params.ignore_eos:
                host["eos"][row, : len(sequence.eos_token_ids)] = list(sequence.eos_token_ids)
        # Waits until the copy is done, so the staging buffer is free for the next run.
        self._packed.copy_(self._staged)
        for row, sequence in enumerate(sequences):
            if sequence.sampling.repetition_penalty != 1.0:
                ids = torch.tensor(seen_ids(sequence, self._image_token_id), dtype=torch.int64)
                self._seen[row].zero_()
                self._seen[row, ids.to(self._seen.device)] = True

    def clear(self) -> None:
        """Make every row idle."""
        self.fill([], [], 0)

    def token(self, rows: int) -> torch.Tensor:
        """int64 [rows]: the tokens that the next step computes."""
        return self._device["token"][:rows]

    def batch(self, rows: int) -> Batch:
        """The first rows as a decoder's batch."""
        state = self._device
        return Batch(
            positions=state["position"][:rows],
            slot_mapping=state["slot"][:rows],
            block_table=state["block_table"][:rows],
            query_start=self._query_start[: rows + 1],
            context_lens=state["context_len"][:rows],
            max_query_len=1,
        )

    def advance(self, logits: torch.Tensor) -> None:
        """Sample a token for each of the first rows, report it in the ring and make it the next.

        logits: float32 [rows, vocab_size]. Needs no host synchronisation where the compiled kernels
        run; the references do.
        """
        rows = len(logits)
        state = {name: column[:rows] for name, column in self._device.items()}
        sampled, seen = self._sampled[:rows], self._seen[:rows]
        sample(
            sampled,
            logits,
            state["temperature"],
            state["top_k"],
            state["top_p"],
            state["repetition_penalty"],
            seen,
            state["seed"],
            state["sample_position"],
        )
        advance(
            state["token"],
            state["position"],
            state["slot"],
            state["context_len"],
            state["sample_position"],
            state["remaining"],
            seen,
            self._device["step"],
            self.ring,
            sampled,
            state["eos"],
            state["block_table"],
            self._block_size,
        )
