"""The paged KV cache: `BlockPool` decides who holds which block, `KVCache` holds the tensors.

BlockPool is pure Python and knows block ids only. Full blocks are found again by a digest chained
over everything before them, so equal prompt beginnings share blocks; a block that is still being
written is never shared. Freed blocks keep their content until they are needed, oldest first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch

from llava_engine.kernels.library import hold


def extend_digests(
    digests: list[bytes], token_ids: Sequence[int], block_size: int, salt: bytes
) -> None:
    """Append to `digests` those of the blocks of `token_ids` that are full by now.

    digest[i] = blake2b(digest[i - 1] or the salt's digest, ids of block i), 16 bytes.
    """
    for index in range(len(digests), len(token_ids) // block_size):
        before = digests[index - 1] if index else blake2b(salt, digest_size=16).digest()
        ids = block_content(token_ids, index, block_size)
        digests.append(blake2b(before + ids, digest_size=16).digest())


def block_content(token_ids: Sequence[int], index: int, block_size: int) -> bytes:
    """The ids of block `index`, as 64-bit words."""
    return array("q", token_ids[index * block_size : (index + 1) * block_size]).tobytes()


class BlockPool:
    """Hands out blocks of `block_size` tokens, with reference counts and reuse of content.

    Every operation is O(1) per block. Not thread-safe: the runtime's loop thread owns it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._content: list[bytes] = [b""] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        # Unreferenced blocks in order of reuse: empty ones, then the least recently used.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks that nobody references, with reusable content or without."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` writable blocks, referenced once. The caller has checked `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def acquire_prefix(
        self, digests: Sequence[bytes], token_ids: Sequence[int], limit: int
    ) -> list[int]:
        """Reference the longest run of cached blocks that begins `token_ids`, and return it.

        At most `limit` tokens are covered: the last token must be computed to get its logits. The
        ids are compared too, so that two prompts of one digest cannot be taken for each other.
        """
        blocks: list[int] = []
        for index, digest in enumerate(digests[: limit // self.block_size]):
            block = self._by_digest.get(digest)
            if block is None:
                break
            if self._content[block] != block_content(token_ids, index, self.block_size):
                break
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes, content: bytes) -> None:
        """The block is full and computed: others may share it from now on, as read-only."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is published by nobody who holds it")
        if self._digest[block] is None and digest not in self._by_digest:
            self._digest[block] = digest
            self._content[block] = content
            self._by_digest[digest] = block

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block.

        Pass a sequence's blocks in their order: the last are reused before the first, since a
        prefix is worth nothing without its beginning.
        """
        for block in reversed(list(blocks)):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is freed twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Grow or shrink to `num_blocks`; returns where referenced blocks moved, old id to new.

        The caller has checked that the referenced blocks fit.
        """
        old = self.num_blocks
        if num_blocks >= old:
            more = num_blocks - old
            self._references += [0] * more
            self._digest += [None] * more
            self._content += [b""] * more
            for block in range(old, num_blocks):
                self._free[block] = None
                self._free.move_to_end(block, last=False)
            return {}
        if old - len(self._free) > num_blocks:
            raise ValueError(f"{old - len(self._free)} blocks in use do not fit {num_blocks}")
        for block in range(num_blocks, old):
            if self._references[block] == 0:
                self._forget(block)
                del self._free[block]
        moves: dict[int, int] = {}
        for block in range(num_blocks, old):
            if self._references[block] > 0:
                target, _ = self._free.popitem(last=False)
                self._forget(target)
                self._references[target] = self._references[block]
                digest = self._digest[block]
                if digest is not None:
                    self._digest[target], self._content[target] = digest, self._content[block]
                    self._by_digest[digest] = target
                moves[block] = target
        del self._references[num_blocks:], self._digest[num_blocks:], self._content[num_blocks:]
        return moves

    def clear(self) -> None:
        """Forget all reusable content of unreferenced blocks."""
        for block in self._free:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digest[block] = None
            self._content[block] = b""


class KVCache:
    """Keys and values of every layer, in blocks.

    keys[layer], values[layer]: [num_blocks, num_kv_heads, block_size, head_dim]; a block is
    contiguous per head.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._block_shape = (num_kv_heads, block_size, head_dim)
        self.block_size = block_size
        self.block_bytes = 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize
        empty = torch.empty((0, *self._block_shape), dtype=dtype, device=device)
        self.keys = [empty] * num_layers
        self.values = [empty] * num_layers
        self._held: object = None

    @property
    def num_blocks(self) -> int:
        """Blocks that the tensors have room for."""
        return self.keys[0].shape[0]

    def resize(self, num_blocks: int, moves: dict[int, int]) -> None:
        """Follow BlockPool.resize, one tensor at a time, so that only one is there twice."""
        self._held = None
        sources, targets = list(moves.keys()), list(moves.values())
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old.shape[0] == num_blocks:
                    continue
                new = old.new_empty((num_blocks, *self._block_shape))
                kept = min(num_blocks, old.shape[0])
                new[:kept] = old[:kept]
                if moves:
                    new[targets] = old[sources]
                tensors[layer] = new
        self._held = hold([*self.keys, *self.values])
