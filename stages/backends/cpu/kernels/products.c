/* y = x W^T: rows of activations by a weight that was packed once.

   A weight W [out, in] lies in panels of PANEL outputs. A panel has, input by input, the weights of
   its outputs side by side, so a product reads it from front to back:

       panel 0: W[0..PANEL, 0], W[0..PANEL, 1], ...    panel 1: W[PANEL..2 PANEL, 0], ...

   The rows of x are packed in the same way, in tiles of up to TILE rows. What is left at the end of
   a panel or of the inputs is filled up with zeros.

   The innermost loop (product_tile.h) holds the sums of one tile and one panel in registers: for
   each input it loads PANEL weights and adds their products with one number of each row. Around it,
   `product` takes the work in an order in which what is used again is still in a cache.

   Every sum is added up input by input, in one chain, whatever the number of rows: so a row's
   result does not depend on the rows beside it, bit for bit. */

#include "product_tile.h"

/* ---- packing ---- */

/* The nearest bfloat16, ties to even, as the upper half of a float32; NaN stays NaN. */
static inline uint32_t rounded_bfloat16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
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
    const int64_t done = storage == DOT ? pack_pairs(rows, x, x_stride, in, to) : 0;
    for (int64_t k = done; k < in; k += STEP) {
        for (int r = 0; r < rows; r++) {
            const float *row = x + r * x_stride;
            float first = row[k], second = number_at(row, k + 1, in);
            if (storage == DOT) {
                uint32_t pair = rounded_bfloat16(second) << 16 | rounded_bfloat16(first);
                __builtin_memcpy(to + k / 2 * rows + r, &pair, 4);
            } else {
                to[k * rows + r] = first;
                to[(k + 1) * rows + r] = second;
            }
        }
    }
}

/* Bytes of a packed weight. */
EXPORT int64_t packed_size(int storage, int64_t out, int64_t in) {
    return quotient_up(out, PANEL) * PANEL * quotient_up(in, STEP) * STEP * num_bytes(storage);
}

/* Outputs that a panel is filled up to. */
EXPORT int64_t panel_outputs(void) { return PANEL; }

/* Packs `from` [out, in], whose numbers are those of `storage`, into `to`, which holds zeros. */
EXPORT void pack_weight(int storage, const void *from, int64_t out, int64_t in, void *to) {
    const int64_t depth = quotient_up(in, STEP) * STEP;
    for (int64_t n = 0; n < out; n++) {
        const int64_t panel = n / PANEL * PANEL * depth, column = n % PANEL;
        if (storage == FLOAT32) {
            const float *row = (const float *)from + n * in;
            float *at = (float *)to + panel + column;
            for (int64_t k = 0; k < in; k++) at[k * PANEL] = row[k];
            continue;
        }
        const uint16_t *row = (const uint16_t *)from + n * in;
        uint16_t *at = (uint16_t *)to + panel;
        for (int64_t k = 0; k < in; k++) {
            int64_t offset = storage == FLOAT16 ? k * PANEL + column
                                                : (k / 2 * PANEL + column) * 2 + k % 2;
            at[offset] = row[k];
        }
    }
}

/* ---- the product ---- */

/* How much is done at a time, so that what is used again is still in the second-level cache. The
   sizes change no result. */
#define MAX_BLOCK_ROWS 240
#define MAX_BLOCK_X (96 * 1024) /* floats: rows by depth */
#define MAX_DEPTH 1024
#define GROUP 8                 /* panels */

/* Rows [begin, begin + size) of `total` cut into `count` parts of nearly one size: part `i`. */
static inline int64_t part_begin(int64_t total, int64_t count, int64_t i) {
    return total / count * i + least(i, total % count);
}

struct Product {
    int storage;
    int64_t in, out; /* as packed: whole steps and panels */
    const char *w;
    const float *bias;
    float *y;
    int64_t y_stride, num_outputs;
    int adds_to_y;
};

/* The last panel's outputs, where not all of them are there. */
static void write_part_of_panel(
    const struct Product *p, int64_t row, int rows, int64_t column, const float *sums
) {
    for (int r = 0; r < rows; r++) {
        for (int64_t c = column; c < p->num_outputs; c++) {
            float *y = p->y + (row + r) * p->y_stride + c;
            float sum = sums[r * PANEL + c - column];
            if (p->bias) sum += p->bias[c];
            *y = p->adds_to_y ? sum + *y : sum;
        }
    }
}

/* Rows [row, row + rows), packed in `x`, by the whole weight. */
static void multiply_block(
    const struct Product *p, int64_t row, int64_t rows, const float *x, float *partial
) {
    const int64_t tiles = quotient_up(rows, TILE);
    const int64_t number = num_bytes(p->storage), panel_size = p->in * PANEL * number;
    const int64_t x_step = p->storage == DOT ? 1 : 2; /* floats of a row in each two inputs */
    const int64_t depth_limit =
        tiles == 1 ? p->in : least(MAX_DEPTH, MAX_BLOCK_X / rows / STEP * STEP);
    const int64_t num_depths = quotient_up(p->in, depth_limit);
    const int64_t num_panels = p->out / PANEL;
    float part_of_panel[TILE * PANEL];
    for (int64_t group = 0; group < num_panels; group += GROUP) {
        const int64_t group_end = least(group + GROUP, num_panels);
        for (int64_t d = 0; d < num_depths; d++) {
            const int64_t begin = STEP * part_begin(p->in / STEP, num_depths, d);
            const int64_t depth = STEP * part_begin(p->in / STEP, num_depths, d + 1) - begin;
            int64_t panels;
            for (int64_t panel = group; panel < group_end; panel += panels) {
                const char *w = p->w + panel * panel_size + begin * PANEL * number;
                /* Several at once only where nobody needs the temporary place for a part. */
                panels = tiles == 1 ? panels_at_once(rows) : 1;
                if ((panel + panels) * PANEL > p->num_outputs || panel + panels > group_end) {
                    panels = 1;
                }
                const int is_part = (panel + 1) * PANEL > p->num_outputs;
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const int64_t first = part_begin(rows, tiles, tile);
                    const int tile_rows = part_begin(rows, tiles, tile + 1) - first;
                    struct Sums to = {
                        .partial = partial + ((panel - group) * rows + first) * PANEL,
                        .is_first = d == 0,
                        .is_last = d == num_depths - 1,
                        .bias = p->bias ? p->bias + panel * PANEL : 0,
                        .y = p->y + (row + first) * p->y_stride + panel * PANEL,
                        .y_stride = p->y_stride,
                        .adds_to_y = p->adds_to_y,
                    };
                    if (is_part) {
                        to.bias = 0;
                        to.y = part_of_panel;
                        to.y_stride = PANEL;
                        to.adds_to_y = 0;
                    }
                    /* Tiles share the work of fetching the next panel. */
                    const int64_t chunk = depth * PANEL * number;
                    const char *ahead =
                        tiles == 1 ? w + AHEAD : w + panel_size + chunk / tiles * tile;
                    const int64_t ahead_size =
                        inputs_at_once(p->storage) * PANEL * number / (tiles == 1 ? 1 : tiles);
                    multiply(
                        p->storage, tile_rows, panels,
                        x + (first * p->in + begin * tile_rows) / 2 * x_step, w, panel_size, depth,
                        ahead, ahead_size, &to
                    );
                    if (is_part && to.is_last) {
                        write_part_of_panel(p, row + first, tile_rows, panel * PANEL, to.y);
                    }
                }
            }
        }
    }
}

/* Floats that `product` needs to work in. */
EXPORT int64_t product_scratch(int64_t rows, int64_t in) {
    int64_t block_rows = least(rows, MAX_BLOCK_ROWS);
    return block_rows * quotient_up(in, STEP) * STEP + block_rows * GROUP * PANEL;
}

/* y [rows, out] = x [rows, in] W^T + bias, or y + x W^T + bias.

   `x_stride`, `y_stride`: floats from one row to the next. `bias`: none, or as many floats as whole
   panels have outputs. `scratch`: `product_scratch` floats. */
EXPORT void product(
    int storage, const float *x, int64_t x_stride, int64_t rows, const void *w, int64_t out,
    int64_t in, const float *bias, float *y, int64_t y_stride, int adds_to_y, float *scratch
) {
    const struct Product p = {
        .storage = storage,
        .in = quotient_up(in, STEP) * STEP,
        .out = quotient_up(out, PANEL) * PANEL,
        .w = w,
        .bias = bias,
        .y = y,
        .y_stride = y_stride,
        .num_outputs = out,
        .adds_to_y = adds_to_y,
    };
    const int64_t blocks = quotient_up(rows, MAX_BLOCK_ROWS);
    float *partial = scratch + least(rows, MAX_BLOCK_ROWS) * p.in;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t row = part_begin(rows, blocks, block);
        const int64_t block_rows = part_begin(rows, blocks, block + 1) - row;
        const int64_t tiles = quotient_up(block_rows, TILE);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = part_begin(block_rows, tiles, tile);
            pack_tile(
                storage, part_begin(block_rows, tiles, tile + 1) - first,
                x + (row + first) * x_stride, x_stride, in,
                scratch + first * (storage == DOT ? p.in / 2 : p.in)
            );
        }
        multiply_block(&p, row, block_rows, scratch, partial);
    }
}
