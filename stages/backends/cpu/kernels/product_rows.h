/* Rows of activations as the innermost loop of a product reads them: tiles of up to TILE rows, input by
   input. What is left at the end of the inputs is filled up with zeros. */

#pragma once
#include "product_tile.h"

static inline uint32_t rounded_bfloat16(float x) {
    return bfloat16_bits(all_lanes(x))[0] & 0xffff;
}

static inline float number_at(const float *row, int64_t k, int64_t in) {
    return k < in ? row[k] : 0;
}

/* The part of a tile of pairs that fills whole registers; returns how many inputs that was. Rows are
   rounded first, as they lie, and then turned: the rounding is then an instruction for each LANES
   numbers. */
static int64_t pack_pairs(int rows, const float *x, int64_t x_stride, int64_t in, float *to) {
#ifdef __AVX512BF16__
    typedef __bf16 Rounded __attribute__((vector_size(LANES * 2), aligned(2)));
    uint32_t pairs[TILE][LANES / 2];
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES) {
        for (int r = 0; r < rows; r++) {
            Floats numbers = load_floats(x + r * x_stride + k);
            *(Rounded *)pairs[r] = __builtin_convertvector(numbers, Rounded);
        }
        for (int i = 0; i < LANES / 2; i++) {
            for (int r = 0; r < rows; r++) {
                __builtin_memcpy(to + (k / 2 + i) * rows + r, &pairs[r][i], 4);
            }
        }
    }
    return k;
#else
    (void)rows, (void)x, (void)x_stride, (void)in, (void)to;
    return 0;
#endif
}

/* One tile: [in][rows], or of pairs of bfloat16 [in / 2][rows]. */
static void pack_tile(
    int storage, int rows, const float *x, int64_t x_stride, int64_t in, float *to
) {
    const int64_t done = storage == PAIRS ? pack_pairs(rows, x, x_stride, in, to) : 0;
    for (int64_t k = done; k < in; k += STEP) {
        for (int r = 0; r < rows; r++) {
            const float *row = x + r * x_stride;
            float first = row[k], second = number_at(row, k + 1, in);
            if (storage == PAIRS) {
                uint32_t pair = rounded_bfloat16(second) << 16 | rounded_bfloat16(first);
                __builtin_memcpy(to + k / 2 * rows + r, &pair, 4);
            } else {
                to[k * rows + r] = first;
                to[(k + 1) * rows + r] = second;
            }
        }
    }
}
