/* What is done to the heads of a fused product before attention: queries and keys are rotated, keys
   and values go into the pool. */

#include "calls.h"
#include "numbers.h"

/* In place, the first `num_heads` heads of each row by the turns of the row's position: half-split, of which
   the dimensions behind the first `turned` stay as they are. `turns`: of each position the cosines of
   `turned` / 2 pairs, then their sines. */
EXPORT void rotate_heads(float *rows, int64_t row_step, int64_t num_rows, int64_t num_heads,
                         int64_t head_size, const float *turns, const int64_t *positions,
                         int64_t turned) {
    const int64_t half = turned / 2;
    for (int64_t row = 0; row < num_rows; row++) {
        const float *cosines = turns + positions[row] * turned, *sines = cosines + half;
        for (int64_t head = 0; head < num_heads; head++) {
            float *left = rows + row * row_step + head * head_size, *right = left + half;
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t count = half - i;
#define SOME(from) read_some((from) + i, count, FLOAT32)
                const Floats x = SOME(left), y = SOME(right);
                const Floats first = x * SOME(cosines) - y * SOME(sines);
                const Floats second = y * SOME(cosines) + x * SOME(sines);
#undef SOME
                write_some(left + i, first, count, FLOAT32);
                write_some(right + i, second, count, FLOAT32);
            }
        }
    }
}

/* [size] numbers to places `step` numbers apart, in the pool's type. */
INLINE void scatter(const float *from, char *to, int64_t step, int64_t size, int dtype) {
    const int64_t bytes = size_of(dtype);
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = size - i < LANES ? size - i : LANES;
        Floats x = read_some(from + i, count, FLOAT32);
        if (step == 1) {
            write_some(to + i * bytes, x, count, dtype);
            continue;
        }
        char lanes[LANES * 4];
        write(lanes, x, dtype);
        for (int64_t j = 0; j < count; j++)
            memcpy(to + (i + j) * step * bytes, lanes + j * bytes, bytes);
    }
}

INLINE void write_side(const float *rows, int64_t row_step, int64_t num_rows, const int64_t *slots,
                       const Pool *pool, char *side, int64_t position_step, int64_t dimension_step,
                       int dtype) {
    const int64_t size = pool->head_size;
    for (int64_t head = 0; head < pool->num_kv_heads; head++)
        for (int64_t row = 0; row < num_rows; row++) {
            const int64_t place = head * pool->head_step +
                                  slots[row] / pool->block_size * pool->block_step +
                                  slots[row] % pool->block_size * position_step;
            scatter(rows + row * row_step + head * size, side + place * size_of(dtype),
                    dimension_step, size, dtype);
        }
}

/* Keys and values, whose rows begin with [kv heads, head size], to the pool's slots (block * block
   size + position in it). */
EXPORT void write_heads(const float *keys, int64_t key_row_step, const float *values,
                        int64_t value_row_step, int64_t num_rows, const int64_t *slots,
                        const Pool *pool) {
#define WRITE(DTYPE)                                                                               \
    write_side(keys, key_row_step, num_rows, slots, pool, (char *)pool->keys,                      \
               pool->key_position_step, pool->key_dimension_step, DTYPE);                          \
    write_side(values, value_row_step, num_rows, slots, pool, (char *)pool->values,                \
               pool->head_size, 1, DTYPE)
    if (pool->dtype == FLOAT32) {
        WRITE(FLOAT32);
    } else if (pool->dtype == FLOAT16) {
        WRITE(FLOAT16);
    } else {
        WRITE(BFLOAT16);
    }
}
