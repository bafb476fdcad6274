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

/* Four rows' four numbers of 32 bits, from [row][number] to [number][row]. */
INLINE void turn_four(const float *from, int64_t from_step, float *to, int64_t to_step) {
    typedef float Four __attribute__((vector_size(16), aligned(4)));
    Four rows[4], mixed[4];
    for (int i = 0; i < 4; i++) rows[i] = *(const Four *)(from + i * from_step);
    for (int i = 0; i < 2; i++) {
        mixed[i] = __builtin_shufflevector(rows[i], rows[i + 2], 0, 4, 1, 5);
        mixed[i + 2] = __builtin_shufflevector(rows[i], rows[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 4; i += 2) {
        Four first = __builtin_shufflevector(mixed[i], mixed[i + 1], 0, 4, 1, 5);
        Four second = __builtin_shufflevector(mixed[i], mixed[i + 1], 2, 6, 3, 7);
        *(Four *)(to + i * to_step) = first;
        *(Four *)(to + (i + 1) * to_step) = second;
    }
}

/* [rows][count] to [count][rows], four numbers of four rows at a time, of which the last rows may have
   been among those before them. `count`: a multiple of four. */
INLINE void turn(int rows, const float *from, int64_t from_step, int64_t count, float *to) {
    if (rows < 4) {
        for (int64_t i = 0; i < count; i++)
            for (int r = 0; r < rows; r++) to[i * rows + r] = from[r * from_step + i];
        return;
    }
    for (int64_t i = 0; i < count; i += 4) {
        for (int r = 0; r < rows; r += 4) {
            const int64_t row = least(r, rows - 4);
            turn_four(from + row * from_step + i, from_step, to + i * rows + row, rows);
        }
    }
}

/* The part of a tile that fills whole vectors; returns how many inputs that was. Rows of pairs are rounded
   first, as they lie: an instruction for each LANES numbers. */
static int64_t pack_vectors(
    int storage, int rows, const float *x, int64_t x_stride, int64_t in, float *to
) {
    if (storage != PAIRS) {
        turn(rows, x, x_stride, in / 4 * 4, to);
        return in / 4 * 4;
    }
#ifdef __AVX512BF16__
    typedef __bf16 Rounded __attribute__((vector_size(LANES * 2), aligned(2)));
    float pairs[TILE][LANES / 2];
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES) {
        for (int r = 0; r < rows; r++) {
            Floats numbers = load_floats(x + r * x_stride + k);
            *(Rounded *)pairs[r] = __builtin_convertvector(numbers, Rounded);
        }
        turn(rows, pairs[0], LANES / 2, LANES / 2, to + k / 2 * rows);
    }
    return k;
#else
    return 0;
#endif
}

/* One tile: [in][rows], or of pairs of bfloat16 [in / 2][rows]. */
static void pack_tile(
    int storage, int rows, const float *x, int64_t x_stride, int64_t in, float *to
) {
    for (int64_t k = pack_vectors(storage, rows, x, x_stride, in, to); k < in; k += STEP) {
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
