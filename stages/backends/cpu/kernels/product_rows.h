/* Rows of activations as the innermost loop of a product reads them: tiles of up to TILE rows, of which a
   cache line of inputs of each row lies in turn, [in / inputs in a line][rows][LINE_FLOATS]. So they are
   copied, and nothing is turned. What is left at the end of the inputs is filled up with zeros. */

#pragma once
#include "product_tile.h"

static inline uint32_t rounded_bfloat16(float x) {
    return bfloat16_bits(all_lanes(x))[0] & 0xffff;
}

/* LANES inputs from `k` on, rounded to bfloat16 for PAIRS. */
INLINE void pack_lanes(const int storage, const float *row, int64_t k, int64_t in, char *to) {
    const Floats numbers = k < in ? read_some(row + k, in - k, FLOAT32) : (Floats){0};
#ifdef __AVX512BF16__
    typedef __bf16 Rounded __attribute__((vector_size(LANES * 2), aligned(2)));
    if (storage == PAIRS) {
        *(Rounded *)to = __builtin_convertvector(numbers, Rounded);
        return;
    }
#endif
    store_floats((float *)to, numbers);
}

INLINE void pack_rows(
    const int storage, int rows, const float *x, int64_t x_stride, int64_t in, float *to
) {
    const int inputs = inputs_in_line(storage);
    for (int r = 0; r < rows; r++, x += x_stride) {
        char *line = (char *)to + r * LINE;
        for (int64_t k = 0; k < in; k += inputs, line += rows * LINE) {
            for (int i = 0; i < inputs; i += LANES) {
                pack_lanes(storage, x, k + i, in, line + i * LINE / inputs);
            }
        }
    }
}

static void pack_tile(
    int storage, int rows, const float *x, int64_t x_stride, int64_t in, float *to
) {
    if (storage == PAIRS) pack_rows(PAIRS, rows, x, x_stride, in, to);
    else pack_rows(FLOAT32, rows, x, x_stride, in, to);
}
