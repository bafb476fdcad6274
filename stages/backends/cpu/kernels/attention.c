/* Causal attention over the paged KV pool, read where it lies.

   The work is cut into items: some queries of one chunk that follow each other, with all the query
   heads of one kv head, over the keys that they see. An item goes over its keys a tile at a time:
   scores, weights, and what the values add to what the earlier tiles gave (online softmax: Milakov
   and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135). So K and V are read once and
   no score is kept.

   Tiles begin at multiples of TILE of the context, and every sum goes over dimensions or positions
   in order. So what a row becomes, bit for bit, is a matter of its own context alone: not of the
   batch, nor of how its prompt was cut into chunks. */

#include "numbers.h"
#include "pool.h"
#include <stdbool.h>

#define UNIT 16  /* positions that lie together, where blocks hold a multiple of it */
#define UNITS 4  /* of a tile */
#define TILE (UNIT * UNITS)
#define ROWS 6   /* that are multiplied together: with as many columns, all sums fit in registers */

typedef struct {
    float scale;
    float softcap;       /* scores become softcap * tanh(score / softcap); 0: they stay */
    int64_t window;      /* positions that a query sees, its own included */
    const float *slopes; /* ALiBi, of each query head; or NULL */
} Scoring;

typedef struct {
    int32_t row;         /* of the first query */
    int32_t num_queries; /* one after the other */
    int32_t position;    /* of the first query, in its request */
    int32_t table;       /* where its request's blocks begin in the block tables */
} Queries;

/* Some positions of a request, and where their keys and values are: in the pool, or copied. */
typedef struct {
    int64_t first;              /* position in the request: a multiple of TILE */
    int64_t from, to;           /* the positions that any query sees, counted from the first */
    const char *keys[UNITS];    /* [head size, key_step], of which UNIT positions are used */
    const char *values[UNITS];  /* [UNIT, value_step], of which head size are used */
    int64_t key_step, value_step;
    int dtype;
} Tile;

static inline int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- products --------------------------------------------------------------------------------*/

#define UNROLL _Pragma("clang loop unroll(full)")

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

/* out [M, out_step] += weights [M, TILE] * values, of N registers' dimensions from `column` on. */
INLINE void add_rows(int M, int N, const float *weights, const Tile *tile, const Tile *next,
                     int64_t size, int64_t column, float *out, int64_t out_step, int dtype,
                     bool asks) {
    const int64_t step = tile->value_step * size_of(dtype);
    Floats sums[ROWS][4];
    out += column;
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        sums[m][n] = load_floats(out + m * out_step + n * LANES);
    for (int64_t unit = tile->from / UNIT; unit * UNIT < tile->to; unit++) {
        const int64_t start = most(0, tile->from - unit * UNIT);
        const int64_t stop = least(UNIT, tile->to - unit * UNIT);
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

INLINE void score_tile(int64_t num_rows, const float *q, int64_t size, const Tile *tile, float *scores,
                  int dtype, bool asks) {
    const int64_t stop = round_up(tile->to, UNIT) / UNIT;
    for (int64_t row = 0; row < num_rows; row += ROWS, asks = false) {
#define SCORE(M, N)                                                                                \
    for (int64_t unit = 0; unit < stop; unit += N * LANES / UNIT)                                  \
        score_rows(M, N, q + row * size, size, tile, unit, scores + row * TILE, dtype, asks)
        FOR_ROWS(least(num_rows - row, ROWS), SCORE)
    }
}

INLINE void add_tile(int64_t num_rows, const float *weights, const Tile *tile, const Tile *next,
                int64_t size, float *out, int64_t out_step, int dtype, bool asks) {
    for (int64_t row = 0; row < num_rows; row += ROWS, asks = false) {
#define ADD(M, N)                                                                                  \
    int64_t column = 0;                                                                            \
    for (; column + N * LANES <= out_step; column += N * LANES)                                    \
        add_rows(M, N, weights + row * TILE, tile, next, size, column, out + row * out_step,       \
                 out_step, dtype, asks && column == 0);                                            \
    for (; column < out_step; column += LANES)                                                     \
        add_rows(M, 1, weights + row * TILE, tile, next, size, column, out + row * out_step,       \
                 out_step, dtype, asks && column == 0)
        FOR_ROWS(least(num_rows - row, ROWS), ADD)
    }
}

/* ---- weights ---------------------------------------------------------------------------------*/

INLINE Floats rounded_to_bfloat16(Floats x) { return (Floats)(bfloat16_bits(x) << 16); }

/* ALiBi's bias of positions, as Falcon was trained: in bfloat16, and before scaling. */
INLINE Floats alibi_bias(float slope, Floats positions) {
    return rounded_to_bfloat16(rounded_to_bfloat16(all_lanes(slope)) *
                               rounded_to_bfloat16(positions));
}

/* One row's scores [count] of the positions from `first` on become weights, of which it sees
   [seen, stop). Returns what the sums so far are to be multiplied with. */
static float weigh(float *scores, int64_t count, int64_t first, int64_t seen, int64_t stop,
                   const Scoring *scoring, float slope, float *maximum, float *sum) {
    const float lowest = seen - first, highest = stop - first;
    const bool sees_all = lowest <= 0 && highest >= count;
    Floats maxima = all_lanes(*maximum);
    for (int64_t i = 0; i < count; i += LANES) {
        Floats x = load_floats(scores + i), place = lane_numbers() + (float)i;
        if (scoring->softcap != 0)
            x = scoring->softcap * hyperbolic_tangent(x / scoring->softcap);
        if (slope != 0) /* less the query's own, so that what matters stays small */
            x += (alibi_bias(slope, place + (float)first) -
                  alibi_bias(slope, all_lanes(stop - 1))) * scoring->scale;
        if (!sees_all) {
            x = choose(place < lowest, all_lanes(-__builtin_inff()), x);
            x = choose(place >= highest, all_lanes(-__builtin_inff()), x);
        }
        store_floats(scores + i, x);
        maxima = choose(x > maxima, x, maxima);
    }
    const float largest = __builtin_reduce_max(maxima);
    /* Nothing but NaN or -infinity so far: what is NaN stays so, the others weigh nothing. */
    const float base = largest == -__builtin_inff() ? 0 : largest;
    Floats total = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        Floats weight = exponential(load_floats(scores + i) - base);
        store_floats(scores + i, weight);
        total += weight;
    }
    const float factor = largest == *maximum ? 1 : exponential(all_lanes(*maximum - base))[0];
    *maximum = largest;
    *sum = *sum * factor + sum_of(total);
    return factor;
}


/* ---- keys and values of a tile ---------------------------------------------------------------*/

/* Whether units of a pool can be multiplied where they are. */
static bool lies_in_units(const Pool *pool) {
    return pool->key_position_step == 1 && pool->block_size % UNIT == 0 &&
           pool->head_size % LANES == 0;
}

/* Where position `position` of the request with the blocks `table` begins in the values of `head`,
   in numbers. Blocks of keys begin where those of values do. */
static int64_t place_of(const Pool *pool, int64_t head, const int32_t *table, int64_t position) {
    const int64_t block = table[position / pool->block_size];
    const int64_t position_in_pool = (head * pool->num_blocks + block) * pool->block_size;
    return (position_in_pool + position % pool->block_size) * pool->head_size;
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
        const int64_t position = first + unit * UNIT, in_block = position % pool->block_size;
        const int64_t place = place_of(pool, head, table, position);
        const int64_t size = size_of(pool->dtype);
        tile->keys[i] = pool->keys + (place - in_block * (pool->head_size - 1)) * size;
        tile->values[i] = pool->values + place * size;
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
        const int64_t position = tile->first + i, in_block = position % pool->block_size;
        const int64_t place = place_of(pool, head, table, position);
        const char *key = pool->keys + (place + in_block * (pool->key_position_step - size)) * bytes;
        const char *value = pool->values + place * bytes;
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

/* Where not every query sees every position. A weight of 0 hides a value, but not one that is no finite number, while the score of a key is
   masked. So such values become 0 and their keys NaN: that reaches those alone that see them. */
static void let_keys_tell(int64_t count, int64_t head_size, float *keys, float *values) {
    const int64_t padded_size = round_up(head_size, LANES);
    for (int64_t i = 0; i < count; i++, values += padded_size) {
        Floats zeros = {0};
        for (int64_t h = 0; h < padded_size; h += LANES) zeros += load_floats(values + h) * 0.0f;
        if (sum_of(zeros) == 0) continue;
        memset(values, 0, padded_size * sizeof *values);
        for (int64_t h = 0; h < head_size; h++) keys[(i / UNIT * head_size + h) * UNIT + i % UNIT] = __builtin_nanf("");
    }
}


/* ---- items -----------------------------------------------------------------------------------*/

/* What an item works in. M rows: query by query, and of each head by head. */
typedef struct {
    float *q;      /* [M, head size], scaled */
    float *scores; /* [M, TILE], then weights */
    float *out;    /* [M, padded head size], not divided by the sums yet */
    float *maxima; /* [M], of the scores so far */
    float *sums;   /* [M], of the weights so far */
    float *keys;   /* a tile's, where they are copied */
    float *values;
} Scratch;

/* Cuts `memory` up; returns how many floats that takes. */
static int64_t divide(float *memory, int64_t num_rows, int64_t head_size, Scratch *scratch) {
    const int64_t padded_size = round_up(head_size, LANES);
    int64_t used = 0;
#define TAKE(size) (used += round_up(size, 16), memory + used - round_up(size, 16))
    scratch->q = TAKE(num_rows * head_size);
    scratch->scores = TAKE(num_rows * TILE);
    scratch->out = TAKE(num_rows * padded_size);
    scratch->maxima = TAKE(num_rows);
    scratch->sums = TAKE(num_rows);
    scratch->keys = TAKE(TILE * head_size);
    scratch->values = TAKE(TILE * padded_size);
    return used;
}

typedef struct {
    const Pool *pool;
    const Scoring *scoring;
    const float *q; /* [rows, q_step], of which a row begins with [query heads, head size] */
    float *out;     /* [rows, query heads, head size] */
    int64_t q_step, num_heads;
    const Queries *queries;
    const int32_t *tables;
} Call;

static int64_t stop_of(const Queries *queries) { return queries->position + queries->num_queries; }

/* The tile of an item that begins at `first`, or its first one where that is negative. */
static void locate_of(Tile *tile, const Call *call, int64_t item, int64_t first) {
    const Queries *queries = call->queries + item / call->pool->num_kv_heads;
    const int64_t seen = most(0, queries->position + 1 - call->scoring->window);
    locate(tile, first < 0 ? seen / TILE * TILE : first, seen, stop_of(queries), call->pool,
           item % call->pool->num_kv_heads, call->tables + queries->table);
}

/* What rows [num_rows] make of one tile; asks memory for the keys of the `next`. */
INLINE void take_tile(const Call *call, const Queries *queries, int64_t head, const Tile *tile,
                      const Tile *next, const Scratch *s, int dtype, bool asks) {
    const int64_t size = call->pool->head_size, padded_size = round_up(size, LANES);
    const int64_t group = call->num_heads / call->pool->num_kv_heads;
    const int64_t num_rows = queries->num_queries * group, end = tile->first + tile->to;
    const float *slopes = call->scoring->slopes;
    score_tile(num_rows, s->q, size, tile, s->scores, dtype, asks);
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t stop = queries->position + row / group + 1;
        const int64_t seen = most(0, stop - call->scoring->window);
        const int64_t count = round_up(tile->to, UNIT);
        float *scores = s->scores + row * TILE, *out = s->out + row * padded_size;
        if (stop <= tile->first || end <= seen) {
            memset(scores, 0, count * sizeof *scores);
            continue;
        }
        const float slope = slopes ? slopes[head * group + row % group] : 0;
        const float factor = weigh(scores, count, tile->first, seen, stop, call->scoring, slope,
                                   s->maxima + row, s->sums + row);
        if (factor == 1) continue;
        for (int64_t h = 0; h < padded_size; h += LANES)
            store_floats(out + h, load_floats(out + h) * factor);
    }
    add_tile(num_rows, s->scores, tile, next, size, s->out, padded_size, dtype, asks);
}

/* One query reads the pool itself, and several do where that needs no change of type and hides
   nothing. Else they read a copy. */
static void take_any_tile(const Call *call, int64_t item, Tile *tile, const Tile *next,
                          const Scratch *s) {
    const Pool *pool = call->pool;
    const Queries *queries = call->queries + item / pool->num_kv_heads;
    const int64_t head = item % pool->num_kv_heads;
    const bool all_see_all = tile->first + TILE <= queries->position + 1 &&
                             stop_of(queries) - call->scoring->window <= tile->first;
    const bool is_single = queries->num_queries == 1;
    if (lies_in_units(pool) && (is_single || (all_see_all && pool->dtype == FLOAT32))) {
        if (pool->dtype == FLOAT32)
            take_tile(call, queries, head, tile, next, s, FLOAT32, true);
        else if (pool->dtype == FLOAT16)
            take_tile(call, queries, head, tile, next, s, FLOAT16, true);
        else
            take_tile(call, queries, head, tile, next, s, BFLOAT16, true);
        return;
    }
    const int32_t *table = call->tables + queries->table;
    if (pool->dtype == FLOAT32) copy(tile, pool, head, table, s->keys, s->values, FLOAT32);
    else if (pool->dtype == FLOAT16) copy(tile, pool, head, table, s->keys, s->values, FLOAT16);
    else copy(tile, pool, head, table, s->keys, s->values, BFLOAT16);
    if (!all_see_all && !is_single) let_keys_tell(TILE, pool->head_size, s->keys, s->values);
    take_tile(call, queries, head, tile, next, s, FLOAT32, false);
}
static void begin(const Call *call, const Queries *queries, int64_t head, const Scratch *s) {
    const int64_t size = call->pool->head_size, group = call->num_heads / call->pool->num_kv_heads;
    const int64_t num_rows = queries->num_queries * group;
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = call->q + (queries->row + row / group) * call->q_step +
                            (head * group + row % group) * size;
        for (int64_t h = 0; h < size; h++) s->q[row * size + h] = from[h] * call->scoring->scale;
        s->maxima[row] = -__builtin_inff();
        s->sums[row] = 0;
    }
    memset(s->out, 0, num_rows * round_up(size, LANES) * sizeof *s->out);
}

static void finish(const Call *call, const Queries *queries, int64_t head, const Scratch *s) {
    const int64_t size = call->pool->head_size, group = call->num_heads / call->pool->num_kv_heads;
    for (int64_t row = 0; row < queries->num_queries * group; row++) {
        float *to = call->out + ((queries->row + row / group) * call->num_heads + head * group +
                                 row % group) * size;
        const float *from = s->out + row * round_up(size, LANES);
        for (int64_t h = 0; h < size; h++) to[h] = from[h] / s->sums[row];
    }
}

/* Floats of scratch memory that `attend` takes for items of at most `num_rows` rows: queries times
   query heads of a kv head. */
EXPORT int64_t attention_scratch(int64_t num_rows, int64_t head_size) {
    Scratch scratch;
    return divide(NULL, num_rows, head_size, &scratch);
}

/* Items [item, stop_item), each of them of one kv head: item i is of queries i / kv heads and of
   head i % kv heads. Items may be worked on by different threads, each with its own scratch memory.
   Reads K and V of the queries themselves in the pool. */
EXPORT void attend(const Pool *pool, const Scoring *scoring, const float *q, int64_t q_step,
                   float *out, int64_t num_heads, const Queries *queries, const int32_t *tables,
                   int64_t item, int64_t stop_item, int64_t num_rows, float *scratch_memory) {
    const Call call = {pool, scoring, q, out, q_step, num_heads, queries, tables};
    Scratch scratch;
    divide(scratch_memory, num_rows, pool->head_size, &scratch);
    Tile tile, next;
    if (item < stop_item) locate_of(&next, &call, item, -1);
    for (; item < stop_item; item++) {
        const Queries *own = queries + item / pool->num_kv_heads;
        const int64_t head = item % pool->num_kv_heads;
        begin(&call, own, head, &scratch);
        for (bool is_last = false; !is_last;) {
            tile = next;
            is_last = tile.first + TILE >= stop_of(own);
            if (!is_last) locate_of(&next, &call, item, tile.first + TILE);
            else if (item + 1 < stop_item) locate_of(&next, &call, item + 1, -1);
            take_any_tile(&call, item, &tile, &next, &scratch);
        }
        finish(&call, own, head, &scratch);
    }
}
