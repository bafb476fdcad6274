/* What rows of queries make of one tile of a context that is kept in bfloat16, where the CPU
   multiplies pairs of bfloat16 and adds them up in float32: twice as fast as float32's products.

   The instruction wants the two numbers of a product's pair side by side: for scores two dimensions
   of a key, for values two positions. The pool has them in different rows, so a tile is copied first
   and each two rows interleaved, which takes a small part of the time that even one query needs.
   Queries and weights are rounded to bfloat16; scores, sums and maxima are float32. All rows take
   this way, decodes as well as chunks, so a row has the same bits in either. */

#pragma once
#include "attention_pool.h"

#ifdef __AVX512BF16__

/* What is copied of a tile. */
typedef struct {
    float *keys;   /* [UNITS, pairs of dimensions, UNIT] */
    float *values; /* [TILE / 2, padded head size] */
} PairedTile;

INLINE int64_t pairs_of(int64_t size) { return (size + 1) / 2; }

/* Numbers of a and b in turn. */
INLINE Floats interleaved(Shorts a, Shorts b) {
    return (Floats)__builtin_shufflevector(
        a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27,
        12, 28, 13, 29, 14, 30, 15, 31
    );
}

INLINE Shorts load_shorts(const void *from) { return *(const Shorts *)from; }

typedef __bf16 Rounded __attribute__((vector_size(LANES * 2), aligned(2)));

/* Times `scale` to bfloat16, in pairs: [pairs of size]. */
INLINE void round_to_pairs(const float *from, float scale, int64_t size, float *to) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        *(Rounded *)(to + i / 2) = __builtin_convertvector(load_floats(from + i) * scale, Rounded);
    if (i == size) return;
    Floats x = read_some(from + i, size - i, FLOAT32) * scale;
    Rounded rounded = __builtin_convertvector(x, Rounded);
    memcpy(to + i / 2, &rounded, pairs_of(size - i) * sizeof *to);
}

/* ---- the copy ----------------------------------------------------------------------------------*/

/* Whole rows of registers, as they lie in units of the pool. Meanwhile asks memory for the next tile. */
INLINE void copy_units(const Tile *tile, const Tile *next, int64_t size, const PairedTile *to) {
    const int64_t step = tile->key_step * 2, stop = round_up(tile->to, UNIT) / UNIT;
    for (int64_t unit = tile->from / UNIT; unit < stop; unit++) {
        float *at = to->keys + unit * size / 2 * UNIT;
        for (int64_t h = 0; h < size; h += 2, at += UNIT) {
            const char *row = tile->keys[unit] + h * step;
            ask_for(next->keys[unit] + h * step, 1);
            store_floats(at, interleaved(load_shorts(row), load_shorts(row + step)));
        }
    }
    const Shorts zeros = {0};
    for (int64_t i = tile->from / 2; i * 2 < tile->to; i++) {
        const int64_t unit = i * 2 / UNIT, place = i * 2 % UNIT * size * 2;
        for (int64_t h = 0; h < size; h += LANES) {
            const char *row = tile->values[unit] + place + h * 2;
            ask_for(next->values[unit] + place + h * 4, 1);
            const Shorts first = i * 2 < tile->from ? zeros : load_shorts(row);
            const Shorts second = i * 2 + 1 < tile->to ? load_shorts(row + size * 2) : zeros;
            store_floats(to->values + i * size + h, interleaved(first, second));
        }
    }
}

/* Number by number, from a pool of any layout and heads of any size. */
INLINE void copy_numbers(const Tile *tile, const Pool *pool, int64_t head, const int32_t *table,
                         const PairedTile *to) {
    const int64_t size = pool->head_size, padded_size = round_up(size, LANES);
    uint16_t *keys = (uint16_t *)to->keys, *values = (uint16_t *)to->values;
    memset(keys, 0, TILE * pairs_of(size) * 4);
    memset(values, 0, TILE * padded_size * 2);
    for (int64_t i = tile->from; i < tile->to; i++) {
        const uint16_t *key = (const uint16_t *)key_at(pool, head, table, tile->first + i);
        const uint16_t *value = (const uint16_t *)value_at(pool, head, table, tile->first + i);
        for (int64_t h = 0; h < size; h++) {
            const int64_t pair = (i / UNIT * pairs_of(size) + h / 2) * UNIT + i % UNIT;
            keys[pair * 2 + h % 2] = key[h * pool->key_dimension_step];
            values[(i / 2 * padded_size + h) * 2 + i % 2] = value[h];
        }
    }
}

/* As `let_keys_tell`: values that are no finite numbers become 0, and their keys NaN. */
INLINE void let_paired_keys_tell(const Tile *tile, int64_t size, const PairedTile *copied) {
    const int64_t padded_size = round_up(size, LANES);
    for (int64_t i = tile->from / 2; i * 2 < tile->to; i++) {
        float *values = copied->values + i * padded_size;
        Floats zeros = {0}; /* NaN in the end, where anything is not finite */
        for (int64_t h = 0; h < padded_size; h += LANES)
            zeros = add_pairs(zeros, load_floats(values + h), (Floats){0});
        if (sum_of(zeros) == 0) continue;
        for (int64_t j = 0; j < 2; j++) {
            uint16_t *value = (uint16_t *)values + j, *key = (uint16_t *)copied->keys;
            const int64_t place = i * 2 + j;
            bool is_finite = true;
            for (int64_t h = 0; h < size; h++) is_finite &= (value[h * 2] & 0x7f80) != 0x7f80;
            if (is_finite) continue;
            for (int64_t h = 0; h < size; h++) value[h * 2] = 0;
            key += (place / UNIT * pairs_of(size) * UNIT + place % UNIT) * 2;
            for (int64_t h = 0; h < pairs_of(size); h++) key[h * UNIT * 2] = 0x7fc0;
        }
    }
}

/* ---- products --------------------------------------------------------------------------------*/

/* Below, `in_pool`: read there, in which the tile has whole units; and the next tile is asked for. */

/* Some rows' scores of a tile, and what comes of them. */
typedef struct {
    _Alignas(64) float scores[ROWS * TILE];
    _Alignas(64) float weights[ROWS * TILE / 2]; /* in pairs */
    float bases[ROWS];                           /* that they are taken against */
    float *sums;                                 /* [rows, LANES], of the weights so far */
    int64_t num_rows;
    int64_t log_units; /* of the units that any of them sees, rounded up to a power of two */
} Weighed;

/* Of a tile in which nobody sees anything behind position `to`. */
static int64_t log_units(int64_t to) { return to <= UNIT ? 0 : to <= 2 * UNIT ? 1 : 2; }

static int64_t num_registers(const Weighed *rows) { return rows->num_rows << rows->log_units; }

/* The register `i` of all rows' scores. */
INLINE void weigh_pairs(Weighed *rows, int64_t i) {
    const int64_t row = i >> rows->log_units;
    const int64_t at = row * TILE + (i - (row << rows->log_units)) * LANES;
    Floats weight = power_of_two(load_floats(rows->scores + at) - rows->bases[row], true);
    *(Rounded *)(rows->weights + at / 2) = __builtin_convertvector(weight, Rounded);
    store_floats(rows->sums + row * LANES, load_floats(rows->sums + row * LANES) + weight);
}

/* sums [M, N] += of pair `h` of dimensions, q [M, pairs] * keys of N units. */
INLINE void score_pair(int M, int N, const float *q, int64_t pairs, int64_t h, const Tile *tile,
                       const Tile *next, const PairedTile *copied, bool in_pool,
                       Floats sums[ROWS][UNITS]) {
    const int64_t step = tile->key_step * 2;
    Floats key[UNITS];
    UNROLL for (int n = 0; n < N; n++) {
        const char *row = tile->keys[n] + h * 2 * step;
        key[n] = in_pool ? interleaved(load_shorts(row), load_shorts(row + step))
                         : load_floats(copied->keys + (n * pairs + h) * UNIT);
        if (in_pool) ask_for(next->keys[n] + h * 2 * step, 1);
    }
    UNROLL for (int m = 0; m < M; m++) {
        Floats factor = all_lanes(q[m * pairs + h]);
        UNROLL for (int n = 0; n < N; n++)
            sums[m][n] = add_pairs(sums[m][n], factor, key[n]);
    }
}

/* Scores of M rows, which see nothing behind the first N units. Meanwhile those of the rows before
   are weighed, a register at a time: products leave idle what adds and scales, so that takes less
   than half of what it takes alone. */
INLINE void score_pairs(int M, int N, const float *q, int64_t pairs, const Tile *tile,
                        const Tile *next, const PairedTile *copied, bool in_pool, Weighed *rows) {
    const int64_t num_before = num_registers(rows);
    Floats sums[ROWS][UNITS];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        sums[m][n] = (Floats){0};
    int64_t h = 0;
    for (; h < least(num_before, pairs); h++) {
        score_pair(M, N, q, pairs, h, tile, next, copied, in_pool, sums);
        weigh_pairs(rows, h);
    }
    for (; h < pairs; h++) score_pair(M, N, q, pairs, h, tile, next, copied, in_pool, sums);
    for (; h < num_before; h++) weigh_pairs(rows, h);
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        store_floats(rows->scores + m * TILE + n * LANES, sums[m][n]);
}

/* out [M, size] += weights [M, TILE / 2] * values, of N registers' dimensions
   from `column` on. `to`: positions of the tile that any of these rows sees. */
INLINE void add_value_pairs(int M, int N, const float *weights, const Tile *tile, int64_t to,
                            const Tile *next,
                            const PairedTile *copied, int64_t size, int64_t column, float *out,
                            bool in_pool) {
    Floats sums[ROWS][4];
    out += column;
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        sums[m][n] = load_floats(out + m * size + n * LANES);
    for (int64_t i = tile->from / 2; i * 2 < to; i++) {
        const int64_t unit = i * 2 / UNIT, place = i * 2 % UNIT * size * 2;
        Floats value[4];
        UNROLL for (int n = 0; n < N; n++) {
            const int64_t h = column + n * LANES;
            const char *row = tile->values[unit] + place + h * 2;
            value[n] = in_pool ? interleaved(load_shorts(row), load_shorts(row + size * 2))
                               : load_floats(copied->values + i * size + h);
            if (in_pool) ask_for(next->values[unit] + place + h * 4, 1);
        }
        UNROLL for (int m = 0; m < M; m++) {
            Floats weight = all_lanes(weights[m * TILE / 2 + i]);
            UNROLL for (int n = 0; n < N; n++)
                sums[m][n] = add_pairs(sums[m][n], weight, value[n]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        store_floats(out + m * size + n * LANES, sums[m][n]);
}

#endif
