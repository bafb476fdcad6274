/* What a core can do at most: how fast it reads and how fast it multiplies. Products and attention
   are held against these, measured in the same run. */

#include "common.h"

#define NUM_CHAINS 12 /* independent sums: enough to hide the latency of an addition or product */

/* Reads `size` bytes (a multiple of NUM_CHAINS registers; what is over is left out) and returns a
   sum, so that nothing is left out by the compiler. */
EXPORT float read_all(const float *from, int64_t size) {
    Floats sums[NUM_CHAINS] = {0};
    const int64_t step = NUM_CHAINS * LANES;
    for (int64_t i = 0; i + step <= size / 4; i += step) {
        for (int c = 0; c < NUM_CHAINS; c++) {
            sums[c] += load_floats(from + i + c * LANES);
        }
    }
    Floats total = sums[0];
    for (int c = 1; c < NUM_CHAINS; c++) total += sums[c];
    return total[0];
}

/* Does `repeats` times as many products and sums of registers as it returns, counted as floats'
   operations: two for each lane. */
EXPORT int64_t multiply_add(int64_t repeats) {
    Floats sums[NUM_CHAINS];
    for (int c = 0; c < NUM_CHAINS; c++) sums[c] = all_lanes((float)c);
    Floats a = all_lanes(0.5f), b = all_lanes(1.0f);
    for (int64_t i = 0; i < repeats; i++) {
        for (int c = 0; c < NUM_CHAINS; c++) {
            sums[c] = multiply_add_floats(sums[c], a, b);
            __asm__ volatile("" : "+v"(sums[c])); /* done, though nobody reads it */
        }
    }
    return 2 * NUM_CHAINS * LANES;
}

/* Whether products of bfloat16 are made by the CPU's instruction for pairs of them. */
EXPORT int multiplies_pairs(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
