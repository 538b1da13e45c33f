"""Rows of a decoding batch for the `advance` op, and beside them the same as plain numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from llava_engine.kernels.decode_step import advance

POISON = -77
WIDTH = 16
Entry = tuple[int, int, int, int]


@dataclass
class Row:
    token: int
    position: int
    length: int
    remaining: int
    sample_position: int
    slot: int
    eos: list[int]


class Rows:
    """Calls the op with tensors on `device` and follows each row by hand."""

    def __init__(
        self,
        *,
        count: int,
        vocab: int,
        block_size: int,
        ring_steps: int,
        ring_rows: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.count, self.vocab, self.block_size = count, vocab, block_size
        self.rows = [Row(0, 0, 0, 0, 0, -1, []) for _ in range(count)]
        self.seen = [[False] * vocab for _ in range(count)]
        self.now = 0
        self.table = torch.randperm(count * WIDTH).view(count, WIDTH).int()
        shape = (ring_steps, ring_rows or count, 4)
        self.ring = torch.full(shape, POISON, dtype=torch.int32, pin_memory=device != "cpu")
        self.device = device
        self.placed: dict[str, torch.Tensor] = {}

    def admit(self, index: int, *, position: int, remaining: int, eos: list[int]) -> None:
        row = Row(index, position, position + 1, remaining, index + 3, 0, eos)
        row.slot = self.slot(index, position)
        self.rows[index] = row

    def slot(self, index: int, position: int) -> int:
        block = int(self.table[index, position // self.block_size])
        return block * self.block_size + position % self.block_size

    def set_step(self, step: int) -> None:
        self.now = step

    def tensors(self) -> dict[str, torch.Tensor]:
        def column(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype)

        width = max(1, *(len(row.eos) for row in self.rows)) if self.rows else 1
        return {
            "token": column([row.token for row in self.rows], torch.int64),
            "position": column([row.position for row in self.rows], torch.int64),
            "slot": column([row.slot for row in self.rows], torch.int64),
            "context_len": column([row.length for row in self.rows], torch.int32),
            "sample_position": column([row.sample_position for row in self.rows], torch.int64),
            "remaining": column([row.remaining for row in self.rows], torch.int32),
            "seen": torch.tensor(self.seen),
            "step": torch.tensor([self.now]),
            "eos": torch.tensor([row.eos + [-1] * (width - len(row.eos)) for row in self.rows]),
        }

    def step(self, sampled: list[int]) -> list[Entry | None]:
        """Run the op on the state as it is by hand, compare all it leaves with a step by hand, and
        return the ring's entries of this step."""
        placed = {name: x.to(self.device) for name, x in self.tensors().items()}
        before = self.ring.clone()
        eos = placed.pop("eos")
        advance(
            *placed.values(),
            self.ring,
            torch.tensor(sampled, device=self.device),
            eos,
            self.table.to(self.device),
            self.block_size,
        )
        if self.device != "cpu":
            torch.cuda.synchronize()
        entries = self._by_hand(sampled)
        for name, want in self.tensors().items():
            if name != "eos":
                torch.testing.assert_close(placed[name].cpu(), want, rtol=0, atol=0)
        place = (self.now - 1) % len(self.ring)
        for index, entry in enumerate(entries):
            if entry is not None:
                before[place, index] = torch.tensor(entry, dtype=torch.int32)
        torch.testing.assert_close(self.ring, before, rtol=0, atol=0)
        return entries

    def untouched(self) -> int:
        """Entries of the ring that were never written."""
        return int((self.ring == POISON).all(dim=-1).sum())

    def _by_hand(self, sampled: list[int]) -> list[Entry | None]:
        entries: list[Entry | None] = []
        number = (self.now + 1 + 2**31) % 2**32 - 2**31
        for index, (row, token) in enumerate(zip(self.rows, sampled, strict=True)):
            if row.length == 0:
                entries.append(None)
                continue
            last = token in row.eos or row.remaining == 1
            entries.append((number, token, int(last), 0))
            if last:
                row.length, row.slot = 0, -1
                continue
            row.token = token
            row.position += 1
            row.length += 1
            row.sample_position += 1
            row.remaining -= 1
            row.slot = self.slot(index, row.position)
            self.seen[index][token] = True
        self.now += 1
        return entries


def at_random(chance: random.Random, count: int, device: str = "cpu") -> Rows:
    """Some rows active, with room in their block tables for a dozen steps."""
    rows = Rows(
        count=count,
        vocab=chance.choice([6, 40]),
        block_size=chance.choice([1, 3, 16]),
        ring_steps=chance.choice([1, 5, 64]),
        ring_rows=count + chance.choice([0, 3]),
        device=device,
    )
    rows.set_step(chance.choice([0, 1, 1000, 2**31 - 5, 2**32 - 3]))
    for index in range(count):
        if chance.random() < 0.7:
            rows.admit(
                index,
                position=chance.randrange(WIDTH * rows.block_size - 12)
                if WIDTH * rows.block_size > 12
                else 0,
                remaining=chance.randint(1, 12),
                eos=[chance.randrange(rows.vocab) for _ in range(chance.randint(0, 2))],
            )
    return rows
