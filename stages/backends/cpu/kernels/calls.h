/* Functions of one file that another calls: halves.c calls those that Python calls. */

#pragma once
#include "common.h"
#include "pool.h"

/* How a layer scores its keys. (Python's; while attention computes, scale and softcap count in powers of
   two, for weights are 2^score.) */
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

int64_t attention_scratch(int64_t num_rows, int64_t head_size);
void attend(const Pool *pool, const Scoring *scoring, const float *q, int64_t q_step, float *out,
            int64_t num_heads, const Queries *queries, const int32_t *tables, int64_t first,
            int64_t stop, int64_t num_rows, float *scratch_memory);

void rotate_heads(float *rows, int64_t row_step, int64_t num_rows, int64_t num_heads,
                  int64_t head_size, const float *turns, const int64_t *positions, int64_t turned);
void write_heads(const float *keys, int64_t key_row_step, const float *values,
                 int64_t value_row_step, int64_t num_rows, const int64_t *slots, const Pool *pool);

void rms_norm(const float *x, const float *weight, float eps, int64_t num_rows, int64_t size,
              float *out);
void layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t num_rows,
                int64_t size, float *out);
void activate(const float *x, int activation, int64_t size, float *out);

int64_t product_scratch(int64_t rows, int64_t in);
void product(int storage, const float *x, int64_t x_stride, int64_t rows, const void *w, int64_t out,
             int64_t in, const float *bias, const float *onto, int64_t onto_stride, float *y,
             int64_t y_stride, float *scratch);
void gated_product(int storage, const float *x, int64_t x_stride, int64_t rows, const void *w,
                   int64_t out, int64_t in, const float *bias, int activation, float *y,
                   float *scratch);
