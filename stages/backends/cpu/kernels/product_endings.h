/* What becomes of a product's finished sums. Those that are no plain rows of outputs go to a place aside
   first, and are ended from there, one row and panel at a time. */

#pragma once
#include "activations.h"
#include "product_tile.h"

enum Ending {
    ROWS,      /* y [rows, outputs] */
    GATED,     /* y [rows, outputs / 2]: a panel is LANES gates and the LANES outputs that they are for */
    HIGHEST,   /* no y: the highest of each row and panel */
};

struct Product {
    int storage;
    int64_t in, out; /* as packed: whole steps and panels */
    const char *w;
    const float *bias;
    enum Ending ending;
    float *y;
    const float *onto;
    int64_t y_stride, onto_stride, num_outputs;
    int activation; /* of GATED */
    float *zeros;   /* of HIGHEST, [rows, LANES]: NaN where an output is not finite, else 0 */
};

/* The last panel's outputs, where not all of them are there. */
static void end_part_of_row(const struct Product *p, int64_t row, int64_t panel, const float *sums) {
    for (int64_t c = panel * PANEL; c < least(p->num_outputs, (panel + 1) * PANEL); c++) {
        float sum = sums[c - panel * PANEL];
        if (p->bias) sum += p->bias[c];
        if (p->onto) sum += p->onto[row * p->onto_stride + c];
        p->y[row * p->y_stride + c] = sum;
    }
}

/* Under PAIRS the product that comes next rounds it, so roughly will do. */
static void end_gated(const struct Product *p, int64_t row, int64_t panel, const float *sums) {
    Floats gates = load_floats(sums), own = load_floats(sums + LANES);
    if (p->bias) {
        gates += load_floats(p->bias + panel * PANEL);
        own += load_floats(p->bias + panel * PANEL + LANES);
    }
    const int64_t first = panel * LANES;
    float *y = p->y + row * p->y_stride + first;
    gates = p->storage == PAIRS ? activated(gates, p->activation, true)
                                : activated(gates, p->activation, false);
    write_some(y, gates * own, p->num_outputs / 2 - first, FLOAT32);
}

static void end_highest(const struct Product *p, int64_t row, int64_t panel, const float *sums) {
    Floats first = load_floats(sums), second = load_floats(sums + LANES);
    const Floats last = lane_numbers() + (float)LANES;
    const float count = p->num_outputs - panel * PANEL;
    float *zeros = p->zeros + row * LANES;
    store_floats(zeros, load_floats(zeros) + first * 0.0f + second * 0.0f);
    if (count < PANEL) { /* behind them the sums of no output, which are 0 */
        first = choose(lane_numbers() < count, first, all_lanes(-__builtin_inff()));
        second = choose(last < count, second, all_lanes(-__builtin_inff()));
    }
    p->y[row * p->y_stride + panel] = __builtin_reduce_max(choose(second > first, second, first));
}

static void end_row(const struct Product *p, int64_t row, int64_t panel, const float *sums) {
    if (p->ending == ROWS) end_part_of_row(p, row, panel, sums);
    else if (p->ending == GATED) end_gated(p, row, panel, sums);
    else end_highest(p, row, panel, sums);
}
