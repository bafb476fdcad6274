"""The paged KV cache as ids: which block holds what, who shares it, which may be reused.

No tensor is here. A block may be freed, reused or shared as soon as the microbatch that frees or
fills it is *planned*, because every stage runs every microbatch in index order.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from pipeserve.core.nouns import BlockId

KEY_BYTES = 16


def new_keys(
    keys: Sequence[bytes], token_ids: "array[int]", block_size: int, salt: str
) -> tuple[bytes, ...]:
    """What follows `keys`: the prefix key of each full block of `token_ids` that has none yet.

    The key of a block is a digest of all tokens from the start of the sequence to the block's end,
    chained block by block. Not Python's `hash`: two prompts that collide would read each other's
    KV. The salt has its own hash personalisation, so that no salt can imitate a chain.
    """
    parent = keys[-1] if keys else _digest(salt.encode(), person=b"salt")
    new = []
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = _digest(parent + token_ids[start : start + block_size].tobytes())
        new.append(parent)
    return tuple(new)


def _digest(data: bytes, person: bytes = b"") -> bytes:
    return blake2b(data, digest_size=KEY_BYTES, person=person).digest()


class _Queue:
    """Blocks in the order in which they were appended; any of them can be taken out. A linked list
    in arrays, whose contents the garbage collector does not visit, as it would an OrderedDict's."""

    def __init__(self, num_blocks: int) -> None:
        self._end = num_blocks  # behind the last block and before the first
        self._next = array("i", [num_blocks]) * (num_blocks + 1)
        self._previous = array("i", [num_blocks]) * (num_blocks + 1)
        self._size = 0

    @property
    def first(self) -> BlockId:
        return BlockId(self._next[self._end])

    def append(self, block: BlockId) -> None:
        end, last = self._end, self._previous[self._end]
        self._next[last] = self._previous[end] = block
        self._previous[block], self._next[block] = last, end
        self._size += 1

    def remove(self, block: BlockId) -> None:
        previous, following = self._previous[block], self._next[block]
        self._next[previous], self._previous[following] = following, previous
        self._size -= 1

    def __len__(self) -> int:
        return self._size


class BlockPool:
    """Hands out block ids, counts who holds each, and remembers the content of full ones.

    A block that nobody holds is free; if its content is cached it keeps it, and gives it up, least
    recently used first, only when no other block is free.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reset()

    def reset(self) -> None:
        """Every block is free again and no content is remembered (the stages lost their KV)."""
        num_blocks = self.num_blocks
        self._free = array("i", reversed(range(num_blocks)))
        self._holders = array("i", [0]) * num_blocks
        # By the first byte of the key: a single table of a million would stop the run to grow.
        self._cached: list[dict[bytes, BlockId]] = [{} for _ in range(256)]
        self._is_cached = bytearray(num_blocks)
        self._keys = bytearray(num_blocks * KEY_BYTES)  # of those that are cached
        self._idle = _Queue(num_blocks)  # cached, held by nobody; least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: the empty ones and the cached ones nobody holds."""
        return len(self._free) + len(self._idle)

    def match(self, keys: Iterable[bytes]) -> list[BlockId]:
        """The blocks that hold the longest cached prefix of `keys`. Takes none of them."""
        blocks = []
        for key in keys:
            block = self._cached[key[0]].get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Iterable[BlockId]) -> int:
        """How many of these cached blocks count as free now, and would not once they are shared."""
        return sum(not self._holders[block] for block in blocks)

    def num_freed(self, blocks: Iterable[BlockId]) -> int:
        """How many blocks come free when these are released, one holder for each mention."""
        mentions: dict[BlockId, int] = {}
        for block in blocks:
            mentions[block] = mentions.get(block, 0) + 1
        return sum(self._holders[block] == count for block, count in mentions.items())

    def share(self, blocks: Iterable[BlockId]) -> None:
        """One more holder for each of these cached blocks."""
        for block in blocks:
            if not self._holders[block]:
                self._idle.remove(block)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[BlockId]:
        """`count` blocks of one holder each. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = []
        for _ in range(count):
            block = BlockId(self._free.pop()) if self._free else self._evict()
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> BlockId:
        block = self._idle.first
        self._idle.remove(block)
        self._is_cached[block] = False
        key = bytes(self._keys[block * KEY_BYTES : (block + 1) * KEY_BYTES])
        del self._cached[key[0]][key]
        return block

    def publish(self, block: BlockId, key: bytes) -> None:
        """Makes a held, full block findable. Does nothing when equal content is cached already."""
        blocks = self._cached[key[0]]
        if key not in blocks:
            blocks[key] = block
            self._is_cached[block] = True
            self._keys[block * KEY_BYTES : (block + 1) * KEY_BYTES] = key

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """No later request finds these contents; who shares them already goes on."""
        for key in keys:
            block = self._cached[key[0]].pop(key, None)
            if block is None:
                continue
            self._is_cached[block] = False
            if not self._holders[block]:
                self._idle.remove(block)
                self._free.append(block)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One holder fewer for each; `blocks` in position order.

        The last positions go first into the LRU order: a prefix without its end is still of use,
        an end without its prefix is not.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, f"block {block} released twice"
            if self._holders[block]:
                continue
            if self._is_cached[block]:
                self._idle.append(block)
            else:
                self._free.append(block)


class BlockTable:
    """The blocks of one request, in position order: position p lies in `blocks[p // size]`."""

    __slots__ = ("_num_published", "_pool", "blocks")

    def __init__(self, pool: BlockPool):
        self._pool = pool
        self._num_published = 0
        self.blocks: tuple[BlockId, ...] = ()

    @property
    def num_slots(self) -> int:
        """Positions that the blocks have room for."""
        return len(self.blocks) * self._pool.block_size

    def num_missing(self, num_positions: int) -> int:
        """Blocks still to be added so that `num_positions` positions have room."""
        return max(0, -(-num_positions // self._pool.block_size) - len(self.blocks))

    def share(self, prefix: Sequence[BlockId]) -> None:
        """Starts the table with cached blocks."""
        assert not self.blocks, "a prefix is shared into an empty table"
        self._pool.share(prefix)
        self.blocks = tuple(prefix)
        self._num_published = len(prefix)

    def grow(self, num_positions: int) -> tuple[BlockId, ...]:
        """Makes room for `num_positions` positions; the new blocks. The caller checked the pool."""
        missing = self.num_missing(num_positions)
        if not missing:
            return ()
        new = tuple(self._pool.allocate(missing))
        self.blocks += new
        return new

    def publish(self, keys: Sequence[bytes], num_planned: int) -> None:
        """Makes findable each block whose ids are known (it has a key) and whose KV is planned."""
        full = min(len(keys), num_planned // self._pool.block_size)
        for position in range(self._num_published, full):
            self._pool.publish(self.blocks[position], keys[position])
        self._num_published = max(self._num_published, full)

    def clear(self) -> None:
        """Gives every block back."""
        self._pool.release(self.blocks)
        self.forget()

    def forget(self) -> None:
        """Drops the blocks without giving them back: the pool was reset."""
        self.blocks = ()
