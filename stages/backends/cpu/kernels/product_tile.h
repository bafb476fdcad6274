/* The innermost loop of products.c, which says how x and W lie: the sums of one tile of rows and one
   panel of outputs, in registers. */

#pragma once
#include "numbers.h"

#define PANEL (2 * LANES)                         /* outputs: two registers */
#define TILE ((NUM_REGISTERS == 32) ? 12 : 6)     /* rows: 24 or 12 registers of sums */
#define STEP 2                                    /* inputs at a time; a whole number of them */
#define MAX_PANELS 4                              /* side by side, for few rows */
#define LINE 64                                   /* bytes of a cache line */
#define LINE_FLOATS (LINE / 4)
#define AHEAD 12288                               /* bytes from what is read to what is fetched */

/* How a weight's numbers are kept: by their type (numbers.h), bfloat16 with two inputs side by side,
   [in / 2][PANEL][2]. Products and sums are float32, except under PAIRS: there the weight is kept as
   bfloat16, and x is rounded to it, too, and multiplied in pairs. */
enum { PAIRS = BFLOAT16 + 1 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Those that lie side by side; of others one, or the compiler runs out of registers. */
static inline int inputs_at_once(int storage) {
    return storage == BFLOAT16 || storage == PAIRS ? 2 : 1;
}

/* Of a row of x that is packed. */
static inline int inputs_in_line(int storage) {
    return storage == PAIRS ? 2 * LINE_FLOATS : LINE_FLOATS;
}

/* Where a tile's sums come from and go to. */
struct Sums {
    float *partial;    /* [rows][panels * PANEL]: what was added up so far */
    int is_first;      /* nothing so far */
    int is_last;       /* write y */
    const float *bias; /* of the first output, or none */
    float *y;
    int64_t y_stride;  /* floats from one row of y to the next */
    const float *onto; /* what the product is added to, or none */
    int64_t onto_stride;
    /* Of the first row, where `end_width` floats of it are written in the end; or none. */
    const float *end;
    int64_t end_stride, end_width;
};

/* Weights of LANES outputs and one input: number `input` of a step that begins at `from`. */
INLINE Floats
load_weights(const char *from, int input, int reg, const int storage, const int rows) {
    if (storage == FLOAT32) {
        return load_floats((const float *)from + input * PANEL + reg * LANES);
    }
    if (storage == FLOAT16) {
        const _Float16 *at = (const _Float16 *)from + input * PANEL + reg * LANES;
        return __builtin_convertvector(*(const Halves *)at, Floats);
    }
    const Ints *at = (const Ints *)((const int32_t *)from + reg * LANES);
    /* Read anew for each input: to keep it would take a register from the sums. */
    if (rows == TILE) __asm__ volatile("" : "+r"(at));
    const Ints pairs = *at;
    return (Floats)(input == 0 ? pairs << 16 : pairs & (int32_t)0xffff0000);
}

/* Few rows are done with a weight soon, so the core waits for memory: more lines can be on their way
   to the second-level cache than to the first (8 rows 20 % faster, with AVX512 16 rows 12 %). So do
   the rows of a tile that is alone, up to TILE of them (with AVX512 10 rows 18 %, with AVX2 6 rows
   20 %). More rows wait for nothing, and find it nearer in the first (32 rows 10 % faster). Of a tile:
   up to twice as many rows are cut into such. */
#define FEW_ROWS (NUM_REGISTERS / 4)
INLINE void fetch(const char *at, const int is_for_few) {
    if (is_for_few) __builtin_prefetch(at, 0, 2);
    else __builtin_prefetch(at, 0, 3);
}

/* `width` floats that are written soon, or read and written: two lines at most. */
INLINE void fetch_row(const float *at, int64_t width) {
    __builtin_prefetch(at, 1);
    __builtin_prefetch(at + width - 1, 1);
}

/* `depth` inputs of `rows` rows by `panels` panels. `x`: the packed tile; `w`: of each panel, where
   the inputs begin; panels lie `panel_size` bytes apart. `is_alone`: no other rows are multiplied by
   these panels. Meanwhile `ahead` is fetched into the cache, `ahead_size` bytes for each step; with
   several panels the core does so unasked, and better (one row 20 % faster). Where the sums of many rows
   go is in no near cache any more, and is asked for row by row: for all at once, what is multiplied next
   would have to wait. */
INLINE void multiply_tile(
    const int storage, const int rows, const int panels, const int is_alone, const float *x,
    const char *w, int64_t panel_size, int64_t depth, const char *ahead, int64_t ahead_size,
    const struct Sums *to
) {
    const int num_registers = 2 * panels;
    const int step = inputs_at_once(storage);
    const int64_t step_size = step * PANEL * size_of(storage);
    const int lines = step_size < LINE ? 1 : step_size / LINE;
    Floats sums[TILE][2 * MAX_PANELS]; /* in registers, if every loop over them is unrolled */
    const float *end = to->end, *onto = to->onto;
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int c = 0; c < num_registers; c++) {
            const float *at = to->partial + (r * num_registers + c) * LANES;
            sums[r][c] = to->is_first ? (Floats){0} : load_floats(at);
        }
    }
    for (int64_t left = depth; left > 0; left -= inputs_in_line(storage)) {
        if (rows > FEW_ROWS) { /* also of the tile that comes next, where there is time for it */
            if (end) fetch_row(end, to->end_width), end += to->end_stride;
            if (onto) fetch_row(onto, PANEL), onto += to->onto_stride;
        }
        const float *own = x;
        for (int64_t k = 0; k < least(left, inputs_in_line(storage)); k += step) {
            for (int l = 0; panels == 1 && l < lines; l++) {
                fetch(ahead + l * ahead_size / lines, is_alone || rows <= FEW_ROWS);
            }
            ahead += ahead_size;
            UNROLL for (int input = 0; input < (storage == PAIRS ? 1 : step); input++, own++) {
                Floats weights[2 * MAX_PANELS];
                UNROLL for (int c = 0; c < num_registers; c++) {
                    const char *at = w + (c / 2) * panel_size;
                    weights[c] = storage == PAIRS
                                     ? load_floats((const float *)at + c % 2 * LANES)
                                     : load_weights(at, input, c % 2, storage, rows);
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    Floats row = all_lanes(own[r * LINE_FLOATS]);
                    UNROLL for (int c = 0; c < num_registers; c++) {
#ifdef __AVX512BF16__
                        if (storage == PAIRS) {
                            sums[r][c] = add_pairs(sums[r][c], row, weights[c]);
                            continue;
                        }
#endif
                        sums[r][c] = multiply_add_floats(weights[c], row, sums[r][c]);
                    }
                }
            }
            w += step_size;
        }
        x += rows * LINE_FLOATS;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int c = 0; c < num_registers; c++) {
            if (!to->is_last) {
                store_floats(to->partial + (r * num_registers + c) * LANES, sums[r][c]);
                continue;
            }
            Floats sum = sums[r][c];
            float *y = to->y + r * to->y_stride + c * LANES;
            if (to->bias) sum += load_floats(to->bias + c * LANES);
            if (to->onto) sum += load_floats(to->onto + r * to->onto_stride + c * LANES);
            store_floats(y, sum);
        }
    }
}

/* Panels that are multiplied side by side: few rows have few sums, and each addition to one has to
   wait for the last; eight or more keep the core busy. */
INLINE int panels_at_once(const int rows) {
    return rows == 1 ? MAX_PANELS : rows * 4 <= NUM_REGISTERS / 2 ? 2 : 1;
}

/* `multiply_tile` for numbers of rows that the compiler does not know: a tile that `is_alone` by
   `panels_at_once`, others by one. */
INLINE void multiply_tile_of(
    const int storage, int rows, int is_alone, const float *x, const char *w, int64_t panel_size,
    int64_t depth, const char *ahead, int64_t ahead_size, const struct Sums *to
) {
#define CASE(R)                                                                                   \
    case R:                                                                                       \
        if (R > TILE) return;                                                                     \
        if (is_alone) {                                                                           \
            multiply_tile(storage, R, panels_at_once(R), 1, x, w, panel_size, depth, ahead,       \
                          ahead_size, to);                                                        \
        } else {                                                                                  \
            multiply_tile(storage, R, 1, 0, x, w, panel_size, depth, ahead, ahead_size, to);      \
        }                                                                                         \
        return;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

static void multiply(
    int storage, int rows, int is_alone, const float *x, const char *w, int64_t panel_size,
    int64_t depth, const char *ahead, int64_t ahead_size, const struct Sums *to
) {
#define STORED(S)                                                                                 \
    case S:                                                                                       \
        multiply_tile_of(S, rows, is_alone, x, w, panel_size, depth, ahead, ahead_size, to);      \
        return;
    switch (storage) {
        STORED(FLOAT32) STORED(FLOAT16) STORED(BFLOAT16)
#ifdef __AVX512BF16__
        STORED(PAIRS)
#endif
    }
#undef STORED
}
