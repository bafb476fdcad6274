"""The block pool: who holds what, what is remembered, what is given up first."""

from array import array

from pipeserve.core.blocks import BlockPool, BlockTable, new_keys


def keys_of(tokens, salt="", block_size=2):
    return new_keys((), array("i", tokens), block_size, salt)


def filled(pool: BlockPool, tokens) -> BlockTable:
    """A table whose blocks hold `tokens`, all published."""
    table = BlockTable(pool)
    table.grow(len(tokens))
    table.publish(keys_of(tokens), len(tokens))
    return table


def test_a_key_covers_everything_before_it_and_only_full_blocks():
    assert len(keys_of([1, 2, 3, 4, 5])) == 2
    assert keys_of([1, 2, 3, 4])[0] == keys_of([1, 2, 9, 9])[0]
    assert keys_of([1, 2, 3, 4])[1] != keys_of([9, 9, 3, 4])[1]


def test_keys_grow_as_tokens_do():
    keys: tuple[bytes, ...] = ()
    for stop in range(8):
        keys += new_keys(keys, array("i", range(stop)), 2, "salt")
    assert keys == keys_of(range(7), "salt")


def test_salts_share_nothing_and_none_can_imitate_a_chain():
    plain = keys_of([1, 2, 3, 4])
    assert not set(plain) & set(keys_of([1, 2, 3, 4], salt="x"))
    text = plain[0].decode("latin-1")
    assert not set(plain) & set(keys_of([3, 4], salt=text))


def test_a_released_block_is_found_until_it_is_needed_for_something_else():
    pool = BlockPool(3, 2)
    filled(pool, [1, 2, 3, 4]).clear()
    assert pool.num_free == 3
    assert len(pool.match(keys_of([1, 2, 3, 4]))) == 2
    other = BlockTable(pool)
    other.grow(4)  # the empty block first, then the end of the cached prefix
    assert len(pool.match(keys_of([1, 2, 3, 4]))) == 1
    other.grow(6)
    assert pool.match(keys_of([1, 2, 3, 4])) == []
    assert pool.num_free == 0


def test_the_least_recently_used_prefix_goes_first():
    pool = BlockPool(2, 2)
    first, second = filled(pool, [1, 1]), filled(pool, [2, 2])
    first.clear()
    second.clear()
    again = BlockTable(pool)
    again.share(pool.match(keys_of([1, 1])))
    again.clear()
    pool.allocate(1)
    assert pool.match(keys_of([1, 1]))
    assert not pool.match(keys_of([2, 2]))


def test_a_shared_block_is_free_only_when_its_last_holder_let_go():
    pool = BlockPool(2, 2)
    owner = filled(pool, [1, 2])
    sharer = BlockTable(pool)
    sharer.share(pool.match(keys_of([1, 2])))
    assert pool.num_free == 1
    assert pool.num_freed(owner.blocks) == 0
    assert pool.num_freed([*owner.blocks, *sharer.blocks]) == 1
    owner.clear()
    assert pool.num_free == 1
    sharer.clear()
    assert pool.num_free == 2


def test_an_idle_block_counts_as_free_until_it_is_shared():
    pool = BlockPool(2, 2)
    filled(pool, [1, 2]).clear()
    blocks = pool.match(keys_of([1, 2]))
    assert pool.num_idle(blocks) == 1
    pool.share(blocks)
    assert pool.num_idle(blocks) == 0
    assert pool.num_free == 1


def test_equal_content_is_cached_once():
    pool = BlockPool(2, 2)
    first, second = filled(pool, [1, 2]), filled(pool, [1, 2])
    assert pool.match(keys_of([1, 2])) == list(first.blocks)
    second.clear()
    assert pool.match(keys_of([1, 2])) == list(first.blocks)
    assert pool.num_free == 1


def test_a_table_grows_by_what_is_missing():
    pool = BlockPool(4, 3)
    table = BlockTable(pool)
    assert len(table.grow(4)) == 2
    assert table.grow(6) == ()
    assert (table.num_slots, table.num_missing(7)) == (6, 1)


def test_reset_forgets_content_and_holders():
    pool = BlockPool(2, 2)
    filled(pool, [1, 2])
    pool.reset()
    assert pool.num_free == 2
    assert pool.match(keys_of([1, 2])) == []


def test_what_is_withdrawn_is_found_no_more():
    pool = BlockPool(4, 2)
    held, left = filled(pool, [1, 2, 3, 4]), filled(pool, [7, 8])
    left.clear()
    pool.withdraw([*keys_of([1, 2, 3, 4]), *keys_of([7, 8]), *keys_of([5, 5])])
    assert pool.match(keys_of([1, 2, 3, 4])) == pool.match(keys_of([7, 8])) == []
    assert pool.num_free == 2
    held.clear()
    assert pool.num_free == 4
    assert len(pool.allocate(4)) == 4
