/* Which outputs of a product may be a row's highest, by a coarse copy of the weight: numbers of 8 bits,
   multiplied four at a time. So twice as many products are made in a second as of pairs of bfloat16,
   and half as much is read. Nobody gets a number of it: it tells between which two each output is, and
   what may be the highest is multiplied again (products.c).

   Before they are rounded, x and W are mixed by a Hadamard matrix, MIX inputs at a time. That changes no
   product of the two, and makes all inputs of like size: else the few that are large leave no bits to
   the others (QuaRot, arXiv:2404.00456). Each row of x and each output has a scale of its own. */

#pragma once
#include "product_tile.h"

#define MIX 64
#define DIGITS 127.0f /* the largest whole number */
#define OFFSET 128    /* of x's, because the CPU multiplies signed numbers by unsigned ones */
#define TINY 1e-17f   /* what squares may lose by being too small for a float */

/* Of a panel's outputs: behind its numbers, [in / 4][PANEL][4]. */
typedef struct {
    Floats scales[2];
    Ints offsets[2];   /* OFFSET times the sum of an output's numbers */
    Floats lengths[2]; /* of the weight */
    Floats losses[2];  /* length of what rounding changed */
} CoarseOutputs;

typedef struct {
    float scale, length, loss;
} Coarse;

static inline int64_t coarse_inputs(int64_t in) { return quotient_up(in, MIX) * MIX; }
static inline int64_t coarse_panel_size(int64_t in) {
    return coarse_inputs(in) * PANEL + sizeof(CoarseOutputs);
}

static void mix(float *x) {
    for (int half = 1; half < MIX; half *= 2) {
        for (int i = 0; i < MIX; i += 2 * half) {
            for (int j = i; j < i + half; j++) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b, x[j + half] = a - b;
            }
        }
    }
    for (int i = 0; i < MIX; i++) x[i] *= 0.125f; /* over the root of MIX */
}

/* Mixes x [in], whole MIXes of which are there, and writes it as whole numbers and `offset`, each four of
   them `step` bytes behind those before. What is not finite comes out as a length that is not. */
static Coarse coarsen(float *x, int64_t in, int offset, char *to, int64_t step) {
    typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
    const float rounding = 12582912.0f; /* 1.5 * 2^23: sums with it are whole numbers */
    Floats largest = {0}, squares = {0}, lost = {0};
    for (int64_t k = 0; k < in; k += MIX) mix(x + k);
    for (int64_t k = 0; k < in; k += LANES)
        largest = larger((Floats)((Ints)load_floats(x + k) & 0x7fffffff), largest);
    const float most = __builtin_reduce_max(largest);
    Coarse found = {.scale = most > TINY ? most / DIGITS : 0};
    const float inverse = found.scale ? 1 / found.scale : 0;
    for (int64_t k = 0; k < in; k += LANES) {
        const Floats own = load_floats(x + k);
        const Floats whole = own * inverse + rounding - rounding, rest = own - whole * found.scale;
        squares = multiply_add_floats(own, own, squares);
        lost = multiply_add_floats(rest, rest, lost);
        const Bytes bytes =
            __builtin_convertvector(__builtin_convertvector(whole, Ints) + offset, Bytes);
        for (int i = 0; i < LANES; i += 4)
            memcpy(to + (k + i) / 4 * step, (const char *)&bytes + i, 4);
    }
    /* No less than they are. */
    found.length = __builtin_sqrtf(sum_of(squares)) * 1.0001f + TINY;
    found.loss = __builtin_sqrtf(sum_of(lost)) * 1.0001f + TINY;
    return found;
}

#ifdef __AVX512VNNI__

/* Sums of `rows` rows by a panel. `x`: [in / 4][rows][4]. */
INLINE void
multiply_coarse_tile(const int rows, const int32_t *x, const char *w, int64_t in, const char *ahead,
                     int64_t ahead_size, Ints sums[TILE][2]) {
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (Ints){0};
    for (int64_t k = 0; k < in; k += 4, x += rows, w += 4 * PANEL, ahead += ahead_size) {
        fetch(ahead, rows <= FEW_ROWS);
        fetch(ahead + ahead_size / 2, rows <= FEW_ROWS);
        const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 2 * PANEL);
        for (int r = 0; r < rows; r++) {
            const __m512i row = _mm512_set1_epi32(x[r]);
            sums[r][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][0], row, first);
            sums[r][1] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][1], row, second);
        }
    }
}

static void
multiply_coarsely(int rows, const int32_t *x, const char *w, int64_t in, const char *ahead,
                  int64_t ahead_size, Ints sums[TILE][2]) {
#define CASE(R)                                                                                   \
    case R: multiply_coarse_tile(R, x, w, in, ahead, ahead_size, sums); return;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* Floats that `bound_outputs` needs to work in. */
static int64_t coarse_scratch(int64_t rows, int64_t in) {
    return (rows + 4) * coarse_inputs(in) / 4 + rows * (sizeof(Coarse) / 4 + LANES);
}

/* Of each row and panel the number above which no output of `product` is, [rows, panels], and of each
   row one below which its highest is not; NaN where outputs may not be finite. */
static void bound_outputs(const float *x, int64_t x_stride, int64_t rows, const char *w, int64_t out,
                          int64_t in, float *above, float *below, float *scratch) {
    const int64_t depth = coarse_inputs(in), panels = quotient_up(out, PANEL);
    const int64_t tiles = quotient_up(rows, TILE), panel_size = coarse_panel_size(in);
    const float sums_lose = 2.0f * depth * 6e-8f; /* twice: of `product`, and what is mixed here */
    float *mixed = scratch, *lows = mixed + depth;
    Coarse *row_of = (Coarse *)(lows + rows * LANES);
    char *packed = (char *)(row_of + rows);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
        for (int64_t r = 0; r < count; r++) {
            memset(mixed, 0, depth * sizeof *mixed);
            memcpy(mixed, x + (first + r) * x_stride, in * sizeof *mixed);
            char *to = packed + first * depth + r * 4;
            Coarse *row = row_of + first + r;
            *row = coarsen(mixed, depth, OFFSET, to, count * 4);
            row->loss += sums_lose * row->length;
            store_floats(lows + (first + r) * LANES, all_lanes(-__builtin_inff()));
        }
    }
    for (int64_t panel = 0; panel < panels; panel++, w += panel_size) {
        const CoarseOutputs *outputs = (const CoarseOutputs *)(w + depth * PANEL);
        const float left = out - panel * PANEL;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
            /* Tiles share the work of fetching the next panel. */
            const int64_t part = depth * PANEL / tiles;
            const char *ahead = tiles == 1 ? w + AHEAD : w + panel_size + part * tile;
            Ints sums[TILE][2];
            multiply_coarsely(count, (const int32_t *)(packed + first * depth), w, depth, ahead,
                              4 * PANEL / tiles, sums);
            for (int64_t r = first; r < first + count; r++) {
                const Coarse *row = row_of + r;
                Floats high = all_lanes(-__builtin_inff()), low = load_floats(lows + r * LANES);
                for (int c = 0; c < 2; c++) {
                    const Ints sum = sums[r - first][c] - outputs->offsets[c];
                    const Floats middle =
                        __builtin_convertvector(sum, Floats) * (outputs->scales[c] * row->scale);
                    const Floats error =
                        row->loss * outputs->lengths[c] + row->length * outputs->losses[c];
                    const Ints is_output = lane_numbers() + (float)(c * LANES) < left;
                    const Floats none = all_lanes(-__builtin_inff());
                    high = larger(high, choose(is_output, middle + error, none));
                    low = larger(low, choose(is_output, middle - error, none));
                }
                above[r * panels + panel] = __builtin_reduce_max(high);
                store_floats(lows + r * LANES, low);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++)
        below[r] = __builtin_reduce_max(load_floats(lows + r * LANES)) + row_of[r].length * 0;
}

#endif
