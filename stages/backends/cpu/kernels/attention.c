/* Causal attention over the paged KV pool, read where it lies.

   The work is cut into items: some queries of one chunk that follow each other, with all the query
   heads of one kv head, over the keys that they see. An item goes over its keys a tile at a time, and
   of a single query all heads' items side by side:
   scores, weights, and what the values add to what the earlier tiles gave (online softmax: Milakov
   and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135). So K and V are read once and
   no score is kept.

   A pool of bfloat16 is multiplied in pairs where the CPU can (attention_pairs.h), all else in float32
   (attention_tile.h).

   Tiles begin at multiples of TILE of the context, and every sum goes over dimensions or positions
   in order. So what a row becomes, bit for bit, is a matter of its own context alone: not of the
   batch, nor of how its prompt was cut into chunks. */

#include "attention_rows.h"
#include "calls.h"

/* ---- items -----------------------------------------------------------------------------------*/

static int64_t stop_of(const Queries *queries) { return queries->position + queries->num_queries; }

/* A tile of a head of some queries. */
typedef struct {
    int64_t queries, head, first;
} Place;

static int64_t first_seen(const Queries *queries, const Scoring *scoring) {
    return most(0, queries->position + 1 - scoring->window);
}

static Place begin_of(const Call *call, int64_t queries, int64_t head) {
    const Queries *own = call->queries + queries;
    return (Place){queries, head, first_seen(own, call->scoring) / TILE * TILE};
}

/* A single query has all heads go over a tile before the next, for their keys lie side by side in a
   block. Several are long at one head's tile, and work in less memory head by head. */
static bool takes_heads_together(const Queries *queries) { return queries->num_queries == 1; }

/* The place behind `at`; that of queries `stop` is none. */
static Place place_behind(const Call *call, Place at, int64_t stop) {
    const Queries *own = call->queries + at.queries;
    const bool is_last_tile = at.first + TILE >= stop_of(own);
    const bool is_last_head = at.head + 1 == call->pool->num_kv_heads;
    if (takes_heads_together(own)) {
        if (!is_last_head) return (Place){at.queries, at.head + 1, at.first};
        if (!is_last_tile) return (Place){at.queries, 0, at.first + TILE};
    } else {
        if (!is_last_tile) return (Place){at.queries, at.head, at.first + TILE};
        if (!is_last_head) return begin_of(call, at.queries, at.head + 1);
    }
    return at.queries + 1 < stop ? begin_of(call, at.queries + 1, 0) : (Place){stop, 0, 0};
}

static void locate_at(Tile *tile, const Call *call, Place place) {
    const Queries *queries = call->queries + place.queries;
    locate(tile, place.first, first_seen(queries, call->scoring), stop_of(queries), call->pool,
           place.head, call->tables + queries->table);
}

#ifdef __AVX512BF16__
/* One query's few rows read a whole tile in the pool, others a copy. */
static void take_any_paired_tile(const Call *call, const Queries *queries, int64_t head,
                                 const Tile *tile, const Tile *next, const Scratch *s,
                                 bool all_see_all) {
    const Pool *pool = call->pool;
    const PairedTile copied = {s->keys, s->values};
    const bool is_few = queries->num_queries * call->num_heads <= ROWS * pool->num_kv_heads;
    if (lies_in_units(pool) && is_few && all_see_all) {
        take_paired_tile(call, queries, head, tile, next, &copied, s, true);
        return;
    }
    if (lies_in_units(pool)) copy_units(tile, next, pool->head_size, &copied);
    else copy_numbers(tile, pool, head, call->tables + queries->table, &copied);
    if (!all_see_all && queries->num_queries > 1)
        let_paired_keys_tell(tile, pool->head_size, &copied);
    take_paired_tile(call, queries, head, tile, next, &copied, s, false);
}
#endif

/* One query reads the pool itself, and several do where that needs no change of type and hides
   nothing. Else they read a copy. */
static void take_any_tile(const Call *call, const Queries *queries, int64_t head, Tile *tile,
                          const Tile *next, const Scratch *s) {
    const Pool *pool = call->pool;
    const bool all_see_all = tile->first + TILE <= queries->position + 1 &&
                             stop_of(queries) - call->scoring->window <= tile->first;
    const bool is_single = queries->num_queries == 1;
#ifdef __AVX512BF16__
    if (pool->dtype == BFLOAT16) {
        take_any_paired_tile(call, queries, head, tile, next, s, all_see_all);
        return;
    }
#endif
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
    const float scale = call->scoring->scale;
    for (int64_t query = 0, row = 0; query < queries->num_queries; query++) {
        const float *from = call->q + (queries->row + query) * call->q_step + head * group * size;
        for (int64_t i = 0; i < group; i++, row++, from += size) {
#ifdef __AVX512BF16__
            if (call->pool->dtype == BFLOAT16)
                round_to_pairs(from, scale, size, s->q + row * pairs_of(size));
            else
#endif
            for (int64_t h = 0; h < size; h++) s->q[row * size + h] = from[h] * scale;
            s->bases[row] = -__builtin_inff();
            store_floats(s->sums + row * LANES, (Floats){0});
        }
    }
    memset(s->out, 0, num_rows * round_up(size, LANES) * sizeof *s->out);
}

static void finish(const Call *call, const Queries *queries, int64_t head, const Scratch *s) {
    const int64_t size = call->pool->head_size, group = call->num_heads / call->pool->num_kv_heads;
    const float *from = s->out, *sums = s->sums;
    for (int64_t query = 0; query < queries->num_queries; query++) {
        float *to = call->out + ((queries->row + query) * call->num_heads + head * group) * size;
        for (int64_t i = 0; i < group; i++, to += size, from += round_up(size, LANES)) {
            const Floats sum = all_lanes(sum_of(load_floats(sums)));
            for (int64_t h = 0; h < size; h += LANES)
                write_some(to + h, load_floats(from + h) / sum, size - h, FLOAT32);
            sums += LANES;
        }
    }
}

/* Floats of scratch memory that `attend` takes for at most `num_rows` rows: queries that go together
   times query heads of a kv head, or for single ones times all query heads. */
EXPORT int64_t attention_scratch(int64_t num_rows, int64_t head_size) {
    Scratch scratch;
    return divide(NULL, num_rows, head_size, &scratch);
}

/* What a head works in: rows of its own, where all heads go together. */
static Scratch scratch_of(const Scratch *whole, const Call *call, Place place) {
    Scratch own = *whole;
    if (!takes_heads_together(call->queries + place.queries)) return own;
    const int64_t size = call->pool->head_size;
    const int64_t row = place.head * (call->num_heads / call->pool->num_kv_heads);
    own.q += row * size, own.out += row * round_up(size, LANES);
    own.bases += row, own.sums += row * LANES;
    return own;
}

/* Of queries [first, stop), all heads. Others may be worked on by other threads, each with its own
   scratch memory. Reads K and V of the queries themselves in the pool. */
EXPORT void attend(const Pool *pool, const Scoring *scoring, const float *q, int64_t q_step,
                   float *out, int64_t num_heads, const Queries *queries, const int32_t *tables,
                   int64_t first, int64_t stop, int64_t num_rows, float *scratch_memory) {
    const float power = 1.44269504f; /* e is 2^power */
    const Scoring in_powers = {scoring->scale * power, scoring->softcap * power, scoring->window,
                               scoring->slopes};
    const Call call = {pool, &in_powers, q, out, q_step, num_heads, queries, tables};
    Scratch scratch;
    divide(scratch_memory, num_rows, pool->head_size, &scratch);
    if (first == stop) return;
    Place place = begin_of(&call, first, 0);
    Tile tile, next;
    locate_at(&next, &call, place);
    while (place.queries < stop) {
        const Queries *own = queries + place.queries;
        const Scratch its = scratch_of(&scratch, &call, place);
        if (place.first == begin_of(&call, place.queries, 0).first)
            begin(&call, own, place.head, &its);
        tile = next;
        const Place behind = place_behind(&call, place, stop);
        if (behind.queries < stop) locate_at(&next, &call, behind);
        take_any_tile(&call, own, place.head, &tile, &next, &its);
        if (place.first + TILE >= stop_of(own)) finish(&call, own, place.head, &its);
        place = behind;
    }
}
