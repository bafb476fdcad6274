/* Causal attention over the paged KV pool, read where it lies.

   The work is cut into items: some queries of one chunk that follow each other, with all the query
   heads of one kv head, over the keys that they see. An item goes over its keys a tile at a time:
   scores, weights, and what the values add to what the earlier tiles gave (online softmax: Milakov
   and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135). So K and V are read once and
   no score is kept.

   Tiles begin at multiples of TILE of the context, and every sum goes over dimensions or positions
   in order. So what a row becomes, bit for bit, is a matter of its own context alone: not of the
   batch, nor of how its prompt was cut into chunks. */

#include "pool.h"
#include "attention_tile.h"

typedef struct {
    int32_t row;         /* of the first query */
    int32_t num_queries; /* one after the other */
    int32_t position;    /* of the first query, in its request */
    int32_t table;       /* where its request's blocks begin in the block tables */
} Queries;

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
        const int64_t key_place = place + in_block * (pool->key_position_step - size);
        const char *key = pool->keys + key_place * bytes;
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
