/* What rows of queries make of one tile of their context: scores, weights, weighted values. */

#pragma once
#include "calls.h"
#include "numbers.h"

#define UNIT 16  /* positions that lie together, where blocks hold a multiple of it */
#define UNITS 4  /* of a tile */
#define TILE (UNIT * UNITS)
#define SLACK 12.0f
#define ROWS 6   /* that are multiplied together: with as many columns, all sums fit in registers */

/* Some positions of a request, and where their keys and values are: in the pool, or copied. */
typedef struct {
    int64_t first;              /* position in the request: a multiple of TILE */
    int64_t from, to;           /* the positions that any query sees, counted from the first */
    const char *keys[UNITS];    /* [head size, key_step], of which UNIT positions are used */
    const char *values[UNITS];  /* [UNIT, value_step], of which head size are used */
    int64_t key_step, value_step;
    int dtype;
} Tile;

static inline int64_t round_up(int64_t number, int64_t unit) {
    return (number + unit - 1) / unit * unit;
}
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- products --------------------------------------------------------------------------------*/

/* What is read next is asked for while something else is multiplied. */
INLINE void ask_for(const char *from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* scores [M, TILE] = q [M, size] * keys, of N registers' positions from `unit` on. */
INLINE void score_rows(int M, int N, const float *q, int64_t size, const Tile *tile, int64_t unit,
                       float *scores, int dtype, bool asks) {
    const int of_unit = UNIT / LANES;
    const char *keys[4];
    UNROLL for (int n = 0; n < N; n++)
        keys[n] = tile->keys[unit + n / of_unit] + n % of_unit * LANES * size_of(dtype);
    const int64_t step = tile->key_step * size_of(dtype);
    Floats sums[ROWS][4];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) sums[m][n] = (Floats){0};
    for (int64_t h = 0; h < size; h++) {
        Floats key[4];
        UNROLL for (int n = 0; n < N; n++) key[n] = read(keys[n] + h * step, dtype);
        if (asks)
            UNROLL for (int n = 0; n < N; n += of_unit)
                ask_for(tile->values[unit + n / of_unit] + h * UNIT * size_of(dtype), 1);
        UNROLL for (int m = 0; m < M; m++) {
            Floats factor = all_lanes(q[m * size + h]);
            UNROLL for (int n = 0; n < N; n++)
                sums[m][n] = multiply_add_floats(factor, key[n], sums[m][n]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        store_floats(scores + m * TILE + unit * UNIT + n * LANES, sums[m][n]);
}

/* out [M, out_step] += weights [M, TILE] * values, of N registers' dimensions from `column` on. `to`:
   positions of the tile that any of these rows sees. */
INLINE void add_rows(int M, int N, const float *weights, const Tile *tile, int64_t to,
                     const Tile *next, int64_t size, int64_t column, float *out, int64_t out_step,
                     int dtype, bool asks) {
    const int64_t step = tile->value_step * size_of(dtype);
    Floats sums[ROWS][4];
    out += column;
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        sums[m][n] = load_floats(out + m * out_step + n * LANES);
    for (int64_t unit = tile->from / UNIT; unit * UNIT < to; unit++) {
        const int64_t start = most(0, tile->from - unit * UNIT);
        const int64_t stop = least(UNIT, to - unit * UNIT);
        const char *values = tile->values[unit] + column * size_of(dtype);
        const char *next_keys = next->keys[unit];
        for (int64_t i = start; i < stop; i++) {
            Floats value[4];
            UNROLL for (int n = 0; n < N; n++)
                value[n] = read(values + i * step + n * LANES * size_of(dtype), dtype);
            if (asks) ask_for(next_keys + i * size * size_of(dtype), size * size_of(dtype));
            UNROLL for (int m = 0; m < M; m++) {
                Floats weight = all_lanes(weights[m * TILE + unit * UNIT + i]);
                UNROLL for (int n = 0; n < N; n++)
                    sums[m][n] = multiply_add_floats(weight, value[n], sums[m][n]);
            }
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        store_floats(out + m * out_step + n * LANES, sums[m][n]);
}

/* For each number of rows, because their sums are to be in registers. */
#define FOR_ROWS(rows, CALL)                                                                       \
    switch (rows) {                                                                                \
    case 1: { CALL(1, 4); break; }                                                                 \
    case 2: { CALL(2, 4); break; }                                                                 \
    case 3: { CALL(3, 4); break; }                                                                 \
    case 4: { CALL(4, WIDE); break; }                                                              \
    case 5: { CALL(5, WIDE); break; }                                                              \
    default: { CALL(6, WIDE); break; }                                                             \
    }
#define WIDE (NUM_REGISTERS / 8) /* registers of columns for ROWS rows; for up to 3 rows, 4 */

/* ---- weights ---------------------------------------------------------------------------------*/

INLINE Floats rounded_to_bfloat16(Floats x) { return (Floats)(bfloat16_bits(x) << 16); }

/* ALiBi's bias of positions, as Falcon was trained: in bfloat16, and before scaling. */
INLINE Floats alibi_bias(float slope, Floats positions) {
    return rounded_to_bfloat16(rounded_to_bfloat16(all_lanes(slope)) *
                               rounded_to_bfloat16(positions));
}

/* One row's products with keys [count], of the positions from `first` on, become scores: -infinity
   where it does not see them, which is outside [seen, stop). */
static void finish_scores(float *scores, int64_t count, int64_t first, int64_t seen, int64_t stop,
                          const Scoring *scoring, float slope) {
    const float lowest = seen - first, highest = stop - first;
    /* Most rows are hidden no more than what comes behind them. */
    const bool is_plain = lowest <= 0 && scoring->softcap == 0 && slope == 0;
    const int64_t first_changed = is_plain ? most(0, stop - first) / LANES * LANES : 0;
    for (int64_t i = first_changed; i < count; i += LANES) {
        Floats x = load_floats(scores + i), place = lane_numbers() + (float)i;
        if (scoring->softcap != 0)
            x = scoring->softcap * hyperbolic_tangent(x / scoring->softcap);
        if (slope != 0) /* less the query's own, so that what matters stays small */
            x += (alibi_bias(slope, place + (float)first) -
                  alibi_bias(slope, all_lanes(stop - 1))) * scoring->scale;
        x = choose(place < lowest, all_lanes(-__builtin_inff()), x);
        x = choose(place >= highest, all_lanes(-__builtin_inff()), x);
        store_floats(scores + i, x);
    }
}

/* `base`: a score that stands for a row's largest so far. It is let be until one of `scores` exceeds it
   by SLACK: so it hardly ever changes, and a weight is still at most 2^SLACK. Returns what all that
   the row has so far is to be multiplied with. */
INLINE float raise_base(const float *scores, int64_t count, float *base) {
    const float limit = *base + SLACK;
    Floats highest = all_lanes(limit);
    for (int64_t i = 0; i < count; i += LANES)
        highest = larger(load_floats(scores + i), highest);
    if (!any_above(highest, all_lanes(limit))) return 1;
    const float before = *base;
    *base = __builtin_reduce_max(highest);
    if (before == -__builtin_inff()) return 1; /* it has nothing but zeros, or NaN */
    return power_of_two(all_lanes(before - *base), false)[0];
}

/* A row's scores [count] become weights: 2 to the power of how far they are above `base`. `sums`: of
   the weights so far, of each lane. */
INLINE void weigh(float *scores, int64_t count, float base, float *sums) {
    Floats total = load_floats(sums);
    for (int64_t i = 0; i < count; i += LANES) {
        Floats weight = power_of_two(load_floats(scores + i) - base, false);
        store_floats(scores + i, weight);
        total += weight;
    }
    store_floats(sums, total);
}
