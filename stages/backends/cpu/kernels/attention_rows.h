/* What the rows of an item make of a tile of its context. */

#pragma once
#include "attention_pairs.h"

/* What an item works in. M rows: query by query, and of each head by head. */
typedef struct {
    float *q;      /* [M, head size], scaled */
    float *out;    /* [M, padded head size], not divided by the sums yet */
    float *bases;  /* [M], scores that weights are taken against */
    float *sums;   /* [M, LANES], of the weights so far */
    float *keys;   /* a tile's, where they are copied */
    float *values;
} Scratch;

/* Cuts `memory` up, where it is no NULL; returns how many floats that takes. */
static int64_t divide(float *memory, int64_t num_rows, int64_t head_size, Scratch *scratch) {
    const int64_t padded_size = round_up(head_size, LANES);
    int64_t used = 0;
#define TAKE(size) (used += round_up(size, 16), memory ? memory + used - round_up(size, 16) : NULL)
    scratch->q = TAKE(num_rows * head_size);
    scratch->out = TAKE(num_rows * padded_size);
    scratch->bases = TAKE(num_rows);
    scratch->sums = TAKE(num_rows * LANES);
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

/* Some rows of an item: ROWS at a time take all steps of a tile, so that their scores stay in the
   first-level cache. */
typedef struct {
    int64_t first, count;
    int64_t to;       /* positions of the tile that any of them sees */
    bool all_see_all; /* the whole tile */
} Rows;

/* Those from `first` on. */
static Rows rows_from(const Call *call, const Queries *queries, const Tile *tile, int64_t first) {
    const int64_t group = call->num_heads / call->pool->num_kv_heads;
    const int64_t count = least(queries->num_queries * group - first, ROWS);
    const int64_t first_stop = queries->position + first / group + 1;
    const int64_t last_stop = queries->position + (first + count - 1) / group + 1;
    const bool all_see_all = first_stop >= tile->first + TILE &&
                             last_stop - call->scoring->window <= tile->first;
    return (Rows){first, count, least(tile->to, last_stop - tile->first), all_see_all};
}

/* Products with a tile's keys [rows, TILE], of which `width` are there, become scores. `bases`: what
   their weights are taken against. */
INLINE void finish_rows(const Call *call, const Queries *queries, int64_t head, const Tile *tile,
                        const Rows *rows, const Scratch *s, float *scores, int64_t width,
                        float *bases) {
    const int64_t padded_size = round_up(call->pool->head_size, LANES);
    const int64_t group = call->num_heads / call->pool->num_kv_heads;
    const float *slopes = call->scoring->slopes;
    const bool is_plain = !slopes && call->scoring->softcap == 0;
    for (int64_t r = 0; r < rows->count && !(is_plain && rows->all_see_all); r++) {
        const int64_t row = rows->first + r, stop = queries->position + row / group + 1;
        const int64_t seen = most(0, stop - call->scoring->window);
        const float slope = slopes ? slopes[head * group + row % group] : 0;
        finish_scores(scores + r * TILE, width, tile->first, seen, stop, call->scoring, slope);
    }
    for (int64_t r = 0; r < rows->count; r++) {
        const int64_t row = rows->first + r;
        const float factor = raise_base(scores + r * TILE, width, s->bases + row);
        /* Nothing but NaN or -infinity so far: what is NaN stays so, the others weigh nothing. */
        bases[r] = s->bases[row] == -__builtin_inff() ? 0 : s->bases[row];
        if (factor == 1) continue;
        float *out = s->out + row * padded_size, *sums = s->sums + row * LANES;
        store_floats(sums, load_floats(sums) * factor);
        for (int64_t h = 0; h < padded_size; h += LANES)
            store_floats(out + h, load_floats(out + h) * factor);
    }
}

/* What all rows make of one tile; asks memory for the keys of the `next`. */
INLINE void take_tile(const Call *call, const Queries *queries, int64_t head, const Tile *tile,
                      const Tile *next, const Scratch *s, int dtype, bool asks) {
    const int64_t size = call->pool->head_size, padded_size = round_up(size, LANES);
    const int64_t group = call->num_heads / call->pool->num_kv_heads;
    _Alignas(64) float scores[ROWS * TILE];
    float bases[ROWS];
    for (int64_t row = 0; row < queries->num_queries * group; row += ROWS) {
        const Rows rows = rows_from(call, queries, tile, row);
        if (rows.to <= 0) continue; /* none sees it */
        const int64_t width = round_up(rows.to, UNIT);
        const float *q = s->q + row * size;
        float *out = s->out + row * padded_size;
#define SCORE(M, N)                                                                                \
    for (int64_t unit = 0; unit * UNIT < width; unit += N * LANES / UNIT)                          \
        score_rows(M, N, q, size, tile, unit, scores, dtype, asks)
        FOR_ROWS(rows.count, SCORE)
        finish_rows(call, queries, head, tile, &rows, s, scores, width, bases);
        for (int64_t r = 0; r < rows.count; r++)
            weigh(scores + r * TILE, width, bases[r], s->sums + (row + r) * LANES);
#define ADD(M, N)                                                                                  \
    int64_t column = 0;                                                                            \
    for (; column + N * LANES <= padded_size; column += N * LANES)                                 \
        add_rows(M, N, scores, tile, rows.to, next, size, column, out, padded_size, dtype,         \
                 asks && column == 0);                                                             \
    for (; column < padded_size; column += LANES)                                                  \
        add_rows(M, 1, scores, tile, rows.to, next, size, column, out, padded_size, dtype,         \
                 asks && column == 0)
        FOR_ROWS(rows.count, ADD)
        asks = false;
    }
}

#ifdef __AVX512BF16__
/* Weighted values of some rows. */
INLINE void add_paired_rows(const Call *call, const Tile *tile, const Tile *next, Rows rows,
                            const PairedTile *copied, const Scratch *s, const float *weights,
                            bool in_pool) {
    const int64_t padded_size = round_up(call->pool->head_size, LANES);
    float *out = s->out + rows.first * padded_size;
#define ADD_PAIRS(M, N)                                                                            \
    int64_t column = 0;                                                                            \
    for (; column + N * LANES <= padded_size; column += N * LANES)                                 \
        add_value_pairs(M, N, weights, tile, rows.to, next, copied, padded_size, column, out,      \
                        in_pool);                                                                  \
    for (; column < padded_size; column += LANES)                                                  \
        add_value_pairs(M, 1, weights, tile, rows.to, next, copied, padded_size, column, out,      \
                        in_pool)
    FOR_ROWS(rows.count, ADD_PAIRS)
}

/* As `take_tile`, of a pool in bfloat16; the last step of rows comes when the next are scored. */
INLINE void take_paired_tile(const Call *call, const Queries *queries, int64_t head,
                             const Tile *tile, const Tile *next, const PairedTile *copied,
                             const Scratch *s, bool in_pool) {
    const int64_t group = call->num_heads / call->pool->num_kv_heads;
    const int64_t pairs = pairs_of(call->pool->head_size);
    Weighed weighed;
    weighed.num_rows = weighed.log_units = 0;
    Rows before;
    for (int64_t row = 0; row < queries->num_queries * group; row += ROWS) {
        const Rows rows = rows_from(call, queries, tile, row);
        if (rows.to <= 0) continue; /* none sees it */
        const float *q = s->q + row * pairs;
        const int64_t seen = in_pool ? 2 : log_units(rows.to);
#define SCORE_PAIRS(M, N)                                                                          \
    if (seen == 0)                                                                                 \
        score_pairs(M, 1, q, pairs, tile, next, copied, in_pool, &weighed);                        \
    else if (seen == 1)                                                                            \
        score_pairs(M, 2, q, pairs, tile, next, copied, in_pool, &weighed);                        \
    else                                                                                           \
        score_pairs(M, UNITS, q, pairs, tile, next, copied, in_pool, &weighed)
        FOR_ROWS(rows.count, SCORE_PAIRS)
        if (weighed.num_rows)
            add_paired_rows(call, tile, next, before, copied, s, weighed.weights, in_pool);
        finish_rows(call, queries, head, tile, &rows, s, weighed.scores, UNIT << seen,
                    weighed.bases);
        weighed.sums = s->sums + row * LANES, weighed.num_rows = rows.count;
        weighed.log_units = seen;
        before = rows;
    }
    for (int64_t i = 0; i < num_registers(&weighed); i++) weigh_pairs(&weighed, i);
    if (weighed.num_rows)
        add_paired_rows(call, tile, next, before, copied, s, weighed.weights, in_pool);
}
#endif
