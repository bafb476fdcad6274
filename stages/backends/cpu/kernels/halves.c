/* The halves of a decoder layer, each in one call, and whole layers in one: with few rows, Python takes as
   long from one kernel to the next as many a kernel takes. The kernels are those that Python calls one by
   one where this will not do, in the same order, so rows have the same bits either way. Many rows go a
   block at a time, which what comes next finds in the second-level cache.

   Rows lie one behind the other. Each call returns how many floats of memory it wants to work in, where
   there are fewer: then nothing was done; else 0. */

#include "calls.h"
#include "numbers.h"

#define MAX_BLOCK 96 /* rows: as many as products take at a time */

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Of the first of `num_rows`: blocks are of nearly one size. */
static int64_t block_of(int64_t num_rows) {
    const int64_t num_blocks = (num_rows + MAX_BLOCK - 1) / MAX_BLOCK;
    return num_rows / num_blocks;
}

/* A packed weight, and a bias or NULL, as products take them. */
typedef struct {
    const void *packed;
    const float *bias;
    int64_t out, in;
    int32_t storage;
} Weight;

static void multiply(const Weight *weight, const float *x, int64_t num_rows, const float *onto,
                     float *to, float *memory) {
    product(weight->storage, x, weight->in, num_rows, weight->packed, weight->out, weight->in,
            weight->bias, onto, weight->out, to, weight->out, memory);
}

/* With a bias it takes the mean away; without, root mean squares are made alike. */
typedef struct {
    const float *weight, *bias;
    float eps;
} Norm;

/* Rows [num_rows, size], normed into `memory`, or as they are where `norm` is NULL. */
static const float *normed(const Norm *norm, const float *x, int64_t num_rows, int64_t size,
                           float *memory) {
    if (!norm) return x;
    if (norm->bias)
        layer_norm(x, norm->weight, norm->bias, norm->eps, num_rows, size, memory);
    else
        rms_norm(x, norm->weight, norm->eps, num_rows, size, memory);
    return memory;
}

/* ---- attention -------------------------------------------------------------------------------*/

/* What a microbatch has all layers of one window do. */
typedef struct {
    int64_t num_rows;
    const int64_t *positions; /* of each row in its request */
    const int64_t *slots;     /* of the pool, where each row's keys and values go */
    const Queries *queries;   /* all rows'; block tables one after the other */
    const int32_t *tables;
    int64_t num_queries;
    int64_t num_together;     /* rows that attention works on together, at most */
} Batch;

static void norm_heads(const Norm *norm, float *heads, int64_t step, int64_t num_rows,
                       int64_t num_heads, int64_t head_size) {
    for (int64_t row = 0; norm && row < num_rows; row++, heads += step)
        normed(norm, heads, num_heads, head_size, heads);
}

/* `norm`: of x, before `qkv`; or NULL. `q_norm`, `k_norm`: over each head of queries and of keys; or NULL.
   `turns`: what turns the first dimensions of these heads, `turned` floats for each position; or NULL. */
EXPORT int64_t attention_half(const Batch *batch, const Pool *pool, const Scoring *scoring,
                              const Norm *norm, const Weight *qkv, const Norm *q_norm,
                              const Norm *k_norm, const float *turns, int64_t turned,
                              const Weight *out, const float *x, const float *onto, float *to,
                              float *memory, int64_t memory_size) {
    const int64_t size = pool->head_size, num_rows = batch->num_rows, step = qkv->out;
    const int64_t q_size = out->in, kv_size = pool->num_kv_heads * size;
    const int64_t num_heads = q_size / size, num_turned = num_heads + pool->num_kv_heads;
    const int64_t kernel_size = most(attention_scratch(batch->num_together, size),
                                     most(product_scratch(num_rows, qkv->in),
                                          product_scratch(num_rows, out->in)));
    const int64_t wanted = MAX_BLOCK * qkv->in + num_rows * (step + q_size) + kernel_size;
    if (wanted > memory_size) return wanted;
    float *block = memory, *heads = block + MAX_BLOCK * qkv->in;
    float *attended = heads + num_rows * step, *rest = attended + num_rows * q_size;

    for (int64_t row = 0, count; row < num_rows; row += count) {
        count = block_of(num_rows - row);
        float *q = heads + row * step, *k = q + q_size, *v = k + kv_size;
        multiply(qkv, normed(norm, x + row * qkv->in, count, qkv->in, block), count, NULL, q, rest);
        norm_heads(q_norm, q, step, count, num_heads, size);
        norm_heads(k_norm, k, step, count, pool->num_kv_heads, size);
        if (turns)
            rotate_heads(q, step, count, num_turned, size, turns, batch->positions + row, turned);
        write_heads(k, step, v, step, count, batch->slots + row, pool);
    }
    attend(pool, scoring, heads, step, attended, num_heads, batch->queries, batch->tables, 0,
           batch->num_queries, batch->num_together, rest);
    multiply(out, attended, num_rows, onto, to, rest);
    return 0;
}

/* ---- the MLP ---------------------------------------------------------------------------------*/

/* `norm`: of x; or NULL. `is_gated`: `up` has gates, too, in turn with what they are for. */
EXPORT int64_t mlp_half(const Norm *norm, const Weight *up, int activation, bool is_gated,
                        const Weight *down, int64_t num_rows, const float *x, const float *onto,
                        float *to, float *memory, int64_t memory_size) {
    const int64_t in = up->in, out = down->out, size = down->in;
    const int64_t wanted = MAX_BLOCK * (in + size) + most(product_scratch(num_rows, in),
                                                          product_scratch(num_rows, size));
    if (wanted > memory_size) return wanted;
    float *block = memory, *inner = block + MAX_BLOCK * in, *rest = inner + MAX_BLOCK * size;

    for (int64_t row = 0, count; row < num_rows; row += count) {
        count = block_of(num_rows - row);
        const float *own = normed(norm, x + row * in, count, in, block);
        if (is_gated) {
            gated_product(up->storage, own, in, count, up->packed, up->out, in, up->bias, activation,
                          inner, rest);
        } else {
            multiply(up, own, count, NULL, inner, rest);
            activate(inner, activation, count * size, inner);
        }
        multiply(down, inner, count, onto ? onto + row * out : NULL, to + row * out, rest);
    }
    return 0;
}

/* ---- layers ----------------------------------------------------------------------------------*/

/* What both halves are told of one; each is normed before, and added to what it was given. */
typedef struct {
    const Pool *pool;
    const Scoring *scoring;
    const Norm *attention_norm;
    const Weight *qkv;
    const Norm *q_norm, *k_norm;
    const Weight *out;
    const Norm *mlp_norm;
    const Weight *up, *down;
    int32_t activation;
    bool is_gated;
} Layer;

static int64_t run_layer(const Layer *layer, const Batch *batch, const float *turns, int64_t turned,
                         const float *x, float *between, float *to, float *memory,
                         int64_t memory_size) {
    const int64_t of_attention = attention_half(
        batch, layer->pool, layer->scoring, layer->attention_norm, layer->qkv, layer->q_norm,
        layer->k_norm, turns, turned, layer->out, x, x, between, memory, memory_size
    );
    const int64_t of_mlp = mlp_half(
        layer->mlp_norm, layer->up, layer->activation, layer->is_gated, layer->down,
        batch->num_rows, between, between, to, memory, memory_size
    );
    return most(of_attention, of_mlp);
}

/* `x` [rows, size] through `count` layers, one at least, `to` [rows, size]. */
EXPORT int64_t run_layers(const Layer *layers, int64_t count, const Batch *batch,
                          const float *turns, int64_t turned, const float *x, float *to,
                          float *memory, int64_t memory_size) {
    const int64_t size = batch->num_rows * layers->out->out;
    int64_t wanted = 0;
    for (int64_t i = 0; i < count; i++)
        wanted = most(wanted, run_layer(layers + i, batch, 0, 0, 0, 0, 0, 0, 0));
    if (size + wanted > memory_size) return size + wanted;
    for (int64_t i = 0; i < count; i++, x = to)
        run_layer(layers + i, batch, turns, turned, x, memory, to, memory + size, wanted);
    return 0;
}
