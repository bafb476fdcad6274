/* Packs weights, once, at load: products.c says how they lie then. */

#include "product_tile.h"

/* Bytes of a packed weight. */
EXPORT int64_t packed_size(int storage, int64_t out, int64_t in) {
    return quotient_up(out, PANEL) * PANEL * quotient_up(in, STEP) * STEP * size_of(storage);
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
