/* y = x W^T: rows of activations by a weight that was packed once.

   A weight W [out, in] lies in panels of PANEL outputs. A panel has, input by input, the weights of
   its outputs side by side, so a product reads it from front to back:

       panel 0: W[0..PANEL, 0], W[0..PANEL, 1], ...    panel 1: W[PANEL..2 PANEL, 0], ...

   The rows of x are packed, too, in tiles of up to TILE rows (product_rows.h). What is left at the end
   of a panel or of the inputs is filled up with zeros.

   The innermost loop (product_tile.h) holds the sums of one tile and one panel in registers: for
   each input it loads PANEL weights and adds their products with one number of each row. Around it,
   `product` takes the work in an order in which what is used again is still in a cache.

   Every sum is added up input by input, in one chain, whatever the number of rows: so a row's
   result does not depend on the rows beside it, bit for bit. */

#include "calls.h"
#include "coarse.h"
#include "product_endings.h"
#include "product_rows.h"

/* How much is done at a time, so that what is used again is still in the second-level cache. The
   sizes change no result. */
#define MAX_BLOCK_TILES (96 / TILE)
#define MAX_BLOCK_X (384 * 1024) /* bytes: rows by depth */
#define MAX_DEPTH 2048
#define GROUP 8                  /* panels */

/* [0, total) cut into `count` parts of nearly one size: where part `i` begins. */
static inline int64_t part_begin(int64_t total, int64_t count, int64_t i) {
    return total / count * i + least(i, total % count);
}

/* Floats of a packed row. */
static inline int64_t packed_floats(int storage, int64_t in) {
    return quotient_up(in, inputs_in_line(storage)) * LINE_FLOATS;
}

/* Rows that are done together: some of the tiles that all rows are cut into. A tile takes time for its begin
   and end, so there are as few as can be. */
struct Block {
    int64_t rows, tiles; /* in all */
    int64_t first_tile, end_tile;
};

static inline int64_t tile_begin(const struct Block *block, int64_t tile) {
    return part_begin(block->rows, block->tiles, tile);
}

/* The rows of a block, packed in `x`, by the whole weight. */
static void multiply_block(
    const struct Product *p, const struct Block *block, const float *x, float *partial
) {
    const int64_t tiles = block->end_tile - block->first_tile;
    const int64_t begin_row = tile_begin(block, block->first_tile);
    const int64_t rows = tile_begin(block, block->end_tile) - begin_row;
    const int64_t number = size_of(p->storage), panel_size = p->in * PANEL * number;
    const int64_t line = inputs_in_line(p->storage), lines = quotient_up(p->in, line);
    const int64_t lines_limit =
        tiles == 1 ? lines : least(MAX_DEPTH / line, MAX_BLOCK_X / (LINE * rows));
    const int64_t num_depths = quotient_up(lines, lines_limit);
    const int64_t num_panels = p->out / PANEL;
    float aside[TILE * PANEL] __attribute__((aligned(LINE)));
    for (int64_t group = 0; group < num_panels; group += GROUP) {
        const int64_t group_end = least(group + GROUP, num_panels);
        for (int64_t d = 0; d < num_depths; d++) {
            const int64_t first_line = part_begin(lines, num_depths, d), begin = first_line * line;
            const int64_t end = least(p->in, part_begin(lines, num_depths, d + 1) * line);
            const int64_t chunk = (end - begin) * PANEL * number;
            int64_t panels;
            for (int64_t panel = group; panel < group_end; panel += panels) {
                const char *w = p->w + panel * panel_size + begin * PANEL * number;
                const int is_alone = tiles == 1 && panel + panels_at_once(rows) <= group_end;
                panels = is_alone ? panels_at_once(rows) : 1;
                const int goes_aside =
                    p->ending != ROWS || (panel + panels) * PANEL > p->num_outputs;
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const int64_t row = tile_begin(block, block->first_tile + tile);
                    const int tile_rows = tile_begin(block, block->first_tile + tile + 1) - row;
                    struct Sums to = {
                        .partial = partial + ((panel - group) * rows + row - begin_row) * PANEL,
                        .is_first = d == 0,
                        .is_last = d == num_depths - 1,
                        .bias = p->bias ? p->bias + panel * PANEL : 0,
                        .y = p->y + row * p->y_stride + panel * PANEL,
                        .y_stride = p->y_stride,
                        .onto = p->onto ? p->onto + row * p->onto_stride + panel * PANEL : 0,
                        .onto_stride = p->onto_stride,
                    };
                    if (to.is_last && p->ending != HIGHEST) {
                        to.end_width = p->ending == GATED ? LANES : PANEL;
                        to.end = p->y + row * p->y_stride + panel * to.end_width;
                        to.end_stride = p->y_stride;
                    }
                    if (!to.is_last) to.onto = 0;
                    if (goes_aside) {
                        to.bias = 0;
                        to.y = aside;
                        to.y_stride = panels * PANEL;
                        to.onto = 0;
                    }
                    /* Tiles share the work of fetching the next panel. */
                    const char *ahead =
                        tiles == 1 ? w + AHEAD : w + panel_size + chunk / tiles * tile;
                    const int64_t ahead_size =
                        inputs_at_once(p->storage) * PANEL * number / (tiles == 1 ? 1 : tiles);
                    multiply(
                        p->storage, tile_rows, is_alone,
                        x + ((row - begin_row) * lines + first_line * tile_rows) * LINE_FLOATS, w,
                        panel_size, end - begin, ahead, ahead_size, &to
                    );
                    for (int64_t r = 0; goes_aside && to.is_last && r < tile_rows; r++) {
                        for (int64_t i = 0; i < panels; i++) {
                            end_row(p, row + r, panel + i, aside + (r * panels + i) * PANEL);
                        }
                    }
                }
            }
        }
    }
}

/* Floats that `product` needs to work in. */
EXPORT int64_t product_scratch(int64_t rows, int64_t in) {
    const int64_t block_rows = least(rows, MAX_BLOCK_TILES * TILE);
    return block_rows * (packed_floats(FLOAT32, in) + GROUP * PANEL);
}

static void multiply_rows(
    const struct Product *p, const float *x, int64_t x_stride, int64_t rows, int64_t in,
    float *scratch
) {
    const int64_t tiles = quotient_up(rows, TILE), blocks = quotient_up(tiles, MAX_BLOCK_TILES);
    const int64_t size = packed_floats(p->storage, in);
    float *partial = scratch + least(rows, MAX_BLOCK_TILES * TILE) * size;
    for (int64_t i = 0; i < blocks; i++) {
        const struct Block block = {
            rows, tiles, part_begin(tiles, blocks, i), part_begin(tiles, blocks, i + 1)
        };
        const int64_t begin_row = tile_begin(&block, block.first_tile);
        for (int64_t tile = block.first_tile; tile < block.end_tile; tile++) {
            const int64_t row = tile_begin(&block, tile);
            pack_tile(
                p->storage, tile_begin(&block, tile + 1) - row, x + row * x_stride, x_stride, in,
                scratch + (row - begin_row) * size
            );
        }
        multiply_block(p, &block, scratch, partial);
    }
}

static struct Product product_of(
    int storage, const void *w, int64_t out, int64_t in, const float *bias, enum Ending ending
) {
    return (struct Product){
        .storage = storage,
        .in = quotient_up(in, STEP) * STEP,
        .out = quotient_up(out, PANEL) * PANEL,
        .w = w,
        .bias = bias,
        .ending = ending,
        .num_outputs = out,
    };
}

/* y [rows, out] = x [rows, in] W^T + bias, or that added to `onto` [rows, out].

   `x_stride` and the like: floats from one row to the next. `bias`: none, or as many floats as whole
   panels have outputs. `scratch`: `product_scratch` floats. */
EXPORT void product(
    int storage, const float *x, int64_t x_stride, int64_t rows, const void *w, int64_t out,
    int64_t in, const float *bias, const float *onto, int64_t onto_stride, float *y,
    int64_t y_stride, float *scratch
) {
    struct Product p = product_of(storage, w, out, in, bias, ROWS);
    p.y = y, p.y_stride = y_stride, p.onto = onto, p.onto_stride = onto_stride;
    multiply_rows(&p, x, x_stride, rows, in, scratch);
}

/* y [rows, out / 2] = activation(gates) * others, where W holds LANES gates and LANES others in turn. */
EXPORT void gated_product(
    int storage, const float *x, int64_t x_stride, int64_t rows, const void *w, int64_t out,
    int64_t in, const float *bias, int activation, float *y, float *scratch
) {
    struct Product p = product_of(storage, w, out, in, bias, GATED);
    p.y = y, p.y_stride = out / 2, p.activation = activation;
    multiply_rows(&p, x, x_stride, rows, in, scratch);
}

/* ---- the likeliest token ---- */

/* Floats that `likeliest` needs to work in. */
EXPORT int64_t likeliest_scratch(int64_t rows, int64_t out, int64_t in) {
    int64_t floats = product_scratch(rows, in) + rows * (quotient_up(out, PANEL) + 1 + LANES);
#ifdef __AVX512VNNI__
    floats += coarse_scratch(rows, in);
#endif
    return floats;
}

/* How far a row's products by pairs may be from those in float32: what x loses by rounding, times the
   `norm` of the largest weight (Cauchy and Schwarz), and of both what their sums may lose. */
static float pairs_error(const float *x, int64_t in, float norm) {
    double lost = 0, whole = 0;
    for (int64_t k = 0; k < in; k++) {
        uint32_t bits = rounded_bfloat16(x[k]) << 16;
        float rounded;
        memcpy(&rounded, &bits, 4);
        lost += ((double)x[k] - rounded) * ((double)x[k] - rounded);
        whole += (double)x[k] * x[k];
    }
    const double sums = 2.0 * in * 6e-8; /* of either: half a unit for each addition */
    return (__builtin_sqrt(lost) + sums * __builtin_sqrt(whole)) * norm;
}

/* The same as `bound_outputs`, by a product in pairs (`storage` BFLOAT16, `by_pairs`) or of `storage`.
   `norm`: of W's outputs the largest. */
static void bound_by_product(
    int storage, int by_pairs, const float *x, int64_t x_stride, int64_t rows, const void *w,
    int64_t out, int64_t in, float norm, float *above, float *below, float *scratch
) {
    struct Product p = product_of(by_pairs ? PAIRS : storage, w, out, in, 0, HIGHEST);
    const int64_t panels = p.out / PANEL;
    p.y = above, p.y_stride = panels;
    p.zeros = scratch + product_scratch(rows, in);
    memset(p.zeros, 0, rows * LANES * sizeof *p.zeros);
    multiply_rows(&p, x, x_stride, rows, in, scratch);
    for (int64_t row = 0; row < rows; row++, above += panels) {
        const float error = by_pairs ? pairs_error(x + row * x_stride, in, norm) : 0;
        float best = above[0];
        for (int64_t i = 0; i < panels; i++) {
            best = above[i] > best ? above[i] : best;
            above[i] += error;
        }
        below[row] = best - error + sum_of(load_floats(p.zeros + row * LANES));
    }
}

/* Of one packed row the outputs of panel `i`, as `product` makes them: whether the highest is above, or as
   high and comes before. */
static void take_highest(
    int storage, const float *x, const char *w, int64_t out, int64_t depth, int64_t i,
    float *highest, int64_t *output
) {
    float sums[PANEL];
    struct Sums to = {.is_first = 1, .is_last = 1, .y = sums};
    const int64_t panel_size = depth * PANEL * size_of(storage);
    multiply(storage, 1, 0, x, w + i * panel_size, panel_size, depth, w + i * panel_size, 0, &to);
    for (int64_t c = 0; c < least(PANEL, out - i * PANEL); c++) {
        const int64_t n = i * PANEL + c;
        if (sums[c] > *highest || (sums[c] == *highest && n < *output)) *highest = sums[c], *output = n;
    }
}

/* Of each row the highest output of x W^T and the first output that has it: those of `product`, bit for
   bit, and no output is written. Returns whether all are finite: where an output of a row may not be, its
   highest is NaN.

   First bounds say how high a panel's outputs may be: by W's copy `coarse` (or NULL), else by pairs,
   where it can be, each twice as fast as the next. The few panels that may have the highest are then
   multiplied as `product` does, the one with the highest bound first: it leaves fewest to the others. */
EXPORT bool likeliest(
    int storage, int by_pairs, const float *x, int64_t x_stride, int64_t rows, const void *w,
    const void *coarse, int64_t out, int64_t in, float norm, float *highest, int64_t *outputs,
    float *scratch
) {
    const int64_t panels = quotient_up(out, PANEL), depth = quotient_up(in, STEP) * STEP;
    float *above = scratch, *below = above + rows * panels, *rest = below + rows;
    bool are_finite = true;
#ifdef __AVX512VNNI__
    if (coarse) bound_outputs(x, x_stride, rows, coarse, out, in, above, below, rest);
    else
#endif
        bound_by_product(storage, by_pairs, x, x_stride, rows, w, out, in, norm, above, below, rest);
    for (int64_t row = 0; row < rows; row++, x += x_stride, above += panels) {
        highest[row] = below[row] == below[row] ? -__builtin_inff() : below[row];
        outputs[row] = 0;
        if (below[row] != below[row]) {
            are_finite = false;
            continue;
        }
        pack_tile(storage, 1, x, x_stride, in, rest);
        int64_t first = 0;
        for (int64_t i = 1; i < panels; i++) first = above[i] > above[first] ? i : first;
        take_highest(storage, rest, w, out, depth, first, highest + row, outputs + row);
        for (int64_t i = 0; i < panels; i++) {
            if (i == first || above[i] < below[row] || above[i] < highest[row]) continue;
            take_highest(storage, rest, w, out, depth, i, highest + row, outputs + row);
        }
        if (!__builtin_isfinite(highest[row])) are_finite = false;
    }
    return are_finite;
}
