"""BlockPool against a shadow memory that remembers what was really written to each block."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llava_engine.runtime.kv_cache import BlockPool, KVCache, block_content, extend_digests

SIZE = 4


class Holder:
    """A sequence as the pool sees it."""

    def __init__(self, ids: list[int], salt: bytes) -> None:
        self.ids = ids
        self.salt = salt
        self.digests: list[bytes] = []
        self.blocks: list[int] = []
        self.published = 0


class PoolMachine(RuleBasedStateMachine):
    """Random life of sequences. `memory[block]` is what the model would have written there: the
    whole prefix up to the token, since keys and values depend on all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, SIZE)
        self.memory: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}
        self.holders: list[Holder] = []

    def write(self, holder: Holder, start: int) -> None:
        for place in range(start, len(holder.ids)):
            block = holder.blocks[place // SIZE]
            cells = self.memory.setdefault(block, [])
            del cells[place % SIZE :]
            cells.append((holder.salt, tuple(holder.ids[: place + 1])))

    def publish(self, holder: Holder) -> None:
        extend_digests(holder.digests, holder.ids, SIZE, holder.salt)
        for index in range(holder.published, len(holder.ids) // SIZE):
            content = block_content(holder.ids, index, SIZE)
            self.pool.publish(holder.blocks[index], holder.digests[index], content)
        holder.published = len(holder.ids) // SIZE

    @rule(
        ids=st.lists(st.integers(-2, 1), min_size=1, max_size=20),
        salt=st.sampled_from([b"", b"tenant"]),
    )
    def admit(self, ids: list[int], salt: bytes) -> None:
        holder = Holder(ids, salt)
        extend_digests(holder.digests, ids, SIZE, salt)
        cached = self.pool.acquire_prefix(holder.digests, ids, len(ids) - 1)
        assert len(cached) * SIZE < len(ids)
        for index, block in enumerate(cached):
            assert self.memory[block] == [
                (salt, tuple(ids[: place + 1])) for place in range(index * SIZE, (index + 1) * SIZE)
            ], "a prefix hit must hold exactly this prompt's beginning, of this tenant"
        needed = -(-len(ids) // SIZE) - len(cached)
        if needed > self.pool.num_free:
            self.pool.free(cached)
            return
        holder.blocks = cached + self.pool.allocate(needed)
        holder.published = len(cached)
        self.write(holder, len(cached) * SIZE)
        self.publish(holder)
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(-2, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if len(holder.ids) % SIZE == 0:
            if not self.pool.num_free:
                return
            holder.blocks += self.pool.allocate(1)
        holder.ids.append(token)
        self.write(holder, len(holder.ids) - 1)
        self.publish(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.pool.free(holder.blocks)

    @rule(num_blocks=st.integers(1, 16))
    def resize(self, num_blocks: int) -> None:
        if self.pool.num_blocks - self.pool.num_free > num_blocks:
            return
        moves = self.pool.resize(num_blocks)
        moved = {new: list(self.memory.get(old, [])) for old, new in moves.items()}
        self.memory.update(moved)
        for holder in self.holders:
            holder.blocks = [moves.get(block, block) for block in holder.blocks]
        assert self.pool.num_blocks == num_blocks

    @invariant()
    def holds(self) -> None:
        held = Counter(block for holder in self.holders for block in holder.blocks)
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        assert all(0 <= block < self.pool.num_blocks for block in held)
        for holder in self.holders:
            for block in holder.blocks[holder.published :]:
                assert held[block] == 1, "a block that is still written to has one holder"
            for place in range(len(holder.ids)):
                cell = self.memory[holder.blocks[place // SIZE]][place % SIZE]
                assert cell == (holder.salt, tuple(holder.ids[: place + 1]))

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.free(holder.blocks)
        assert self.pool.num_free == self.pool.num_blocks


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_ids_are_compared_on_a_hash_hit() -> None:
    pool = BlockPool(4, SIZE)
    (block,) = pool.allocate(1)
    pool.publish(block, b"collision", block_content([1, 2, 3, 4], 0, SIZE))
    assert pool.acquire_prefix([b"collision"], [1, 2, 3, 4, 5], 4) == [block]
    assert pool.acquire_prefix([b"collision"], [1, 2, 3, 9, 5], 4) == []


def test_freed_blocks_are_reused_oldest_first_and_empty_ones_before_all() -> None:
    pool = BlockPool(3, SIZE)
    digests: dict[int, list[bytes]] = {}
    for first in (1, 2):
        ids = [first] * SIZE
        (block,) = pool.allocate(1)
        extend_digests(digests.setdefault(first, []), ids, SIZE, b"")
        pool.publish(block, digests[first][0], block_content(ids, 0, SIZE))
        pool.free([block])
    pool.allocate(2)  # the one that was never used, then the content of [1, 1, 1, 1]
    assert pool.acquire_prefix(digests[1], [1] * 5, 4) == []
    assert len(pool.acquire_prefix(digests[2], [2] * 5, 4)) == 1


def test_misuse_is_refused() -> None:
    pool = BlockPool(1, SIZE)
    (block,) = pool.allocate(1)
    with pytest.raises(ValueError, match="asked for"):
        pool.allocate(1)
    with pytest.raises(ValueError, match="do not fit"):
        pool.resize(0)
    pool.free([block])
    with pytest.raises(ValueError, match="freed twice"):
        pool.free([block])
    with pytest.raises(ValueError, match="nobody"):
        pool.publish(block, b"", b"")


def test_cache_tensors_follow_the_pool_when_it_shrinks() -> None:
    pool = BlockPool(0, SIZE)
    cache = KVCache(
        num_layers=2,
        num_kv_heads=3,
        head_dim=8,
        block_size=SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.resize(6, pool.resize(6))
    held = pool.allocate(6)
    pool.free(held[:4])
    for layer in range(2):
        cache.keys[layer].copy_(torch.randn(cache.keys[layer].shape))
        cache.values[layer].copy_(torch.randn(cache.values[layer].shape))
    before = [(cache.keys[i][held[4:]].clone(), cache.values[i][held[4:]].clone()) for i in (0, 1)]
    moves = pool.resize(2)
    cache.resize(2, moves)
    blocks = [moves.get(block, block) for block in held[4:]]
    assert sorted(blocks) == [0, 1]
    for layer, (keys, values) in enumerate(before):
        assert torch.equal(cache.keys[layer][blocks], keys)
        assert torch.equal(cache.values[layer][blocks], values)
    assert cache.keys[0].nbytes * 4 == 2 * cache.block_bytes
