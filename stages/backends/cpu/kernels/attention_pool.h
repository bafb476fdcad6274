/* Where a tile's keys and values lie in the pool, and its copy in float32 where they are not multiplied
   there. */

#pragma once
#include "attention_tile.h"
#include "pool.h"

/* Whether units of a pool can be multiplied where they are. */
static bool lies_in_units(const Pool *pool) {
    return pool->key_position_step == 1 && pool->block_size % UNIT == 0 &&
           pool->head_size % LANES == 0;
}

/* Where position `position` of the request with the blocks `table` begins in the values of `head`,
   in numbers. Blocks of keys begin where those of values do. */
static int64_t place_of(const Pool *pool, int64_t head, const int32_t *table, int64_t position) {
    const int64_t block = table[position / pool->block_size];
    return head * pool->head_step + block * pool->block_step +
           position % pool->block_size * pool->head_size;
}

static const char *value_at(const Pool *pool, int64_t head, const int32_t *table, int64_t position) {
    return pool->values + place_of(pool, head, table, position) * size_of(pool->dtype);
}

static const char *key_at(const Pool *pool, int64_t head, const int32_t *table, int64_t position) {
    const int64_t in_block = position % pool->block_size;
    const int64_t place = place_of(pool, head, table, position) +
                          in_block * (pool->key_position_step - pool->head_size);
    return pool->keys + place * size_of(pool->dtype);
}

/* The tile at `first` for queries that see positions [seen, stop). In units that nobody sees, it is
   the nearest one that somebody does. */
static void locate(Tile *tile, int64_t first, int64_t seen, int64_t stop, const Pool *pool,
                   int64_t head, const int32_t *table) {
    tile->first = first;
    tile->from = most(0, seen - first), tile->to = least(TILE, stop - first);
    tile->key_step = pool->block_size, tile->value_step = pool->head_size;
    tile->dtype = pool->dtype;
    if (!lies_in_units(pool)) return;
    for (int64_t i = 0; i < UNITS; i++) {
        const int64_t unit = most(tile->from / UNIT, least(i, (tile->to - 1) / UNIT));
        tile->keys[i] = key_at(pool, head, table, first + unit * UNIT);
        tile->values[i] = value_at(pool, head, table, first + unit * UNIT);
    }
}

/* Copies what somebody sees as float32, and zeros for the rest: keys [UNITS, head size, UNIT],
   values [TILE, padded head size]. */
INLINE void copy(Tile *tile, const Pool *pool, int64_t head, const int32_t *table, float *keys,
                 float *values, int dtype) {
    const int64_t size = pool->head_size, padded_size = round_up(size, LANES);
    const int64_t bytes = size_of(dtype), key_step = pool->key_dimension_step * bytes;
    memset(keys, 0, TILE * size * sizeof *keys);
    memset(values, 0, TILE * padded_size * sizeof *values);
    for (int64_t i = tile->from; i < tile->to;) {
        const char *key = key_at(pool, head, table, tile->first + i);
        const char *value = value_at(pool, head, table, tile->first + i);
        float *to = keys + i / UNIT * size * UNIT + i % UNIT;
        const bool is_whole = i % UNIT == 0 && i + UNIT <= tile->to && lies_in_units(pool);
        const int64_t count = is_whole ? UNIT : 1;
        for (int64_t h = 0; h < size; h++, key += key_step, to += UNIT) {
            if (!is_whole) *to = read_some(key, 1, dtype)[0];
            else for (int64_t j = 0; j < UNIT; j += LANES)
                store_floats(to + j, read(key + j * bytes, dtype));
        }
        for (int64_t j = 0; j < count; j++, value += size * bytes)
            for (int64_t h = 0; h < size; h += LANES)
                store_floats(values + (i + j) * padded_size + h,
                             read_some(value + h * bytes, size - h, dtype));
        i += count;
    }
    for (int64_t i = 0; i < UNITS; i++) {
        tile->keys[i] = (char *)(keys + i * size * UNIT);
        tile->values[i] = (char *)(values + i * UNIT * padded_size);
    }
    tile->key_step = UNIT, tile->value_step = padded_size, tile->dtype = FLOAT32;
}

/* Where not every query sees every position. A weight of 0 hides a value, but not one that is no
   finite number, while the score of a key is masked. So such values become 0 and their keys NaN:
   that reaches those alone that see them. */
static void let_keys_tell(int64_t count, int64_t head_size, float *keys, float *values) {
    const int64_t padded_size = round_up(head_size, LANES);
    for (int64_t i = 0; i < count; i++, values += padded_size) {
        Floats zeros = {0};
        for (int64_t h = 0; h < padded_size; h += LANES) zeros += load_floats(values + h) * 0.0f;
        if (sum_of(zeros) == 0) continue;
        memset(values, 0, padded_size * sizeof *values);
        float *key = keys + i / UNIT * head_size * UNIT + i % UNIT;
        for (int64_t h = 0; h < head_size; h++) key[h * UNIT] = __builtin_nanf("");
    }
}
