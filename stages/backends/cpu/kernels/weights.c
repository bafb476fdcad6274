/* Packs weights, once, at load: products.c says how they lie then. A weight is read from front to back
   twice at most: to find how narrow its numbers may be kept, and to pack them. */

#include "coarse.h"

#define PIECE 32     /* inputs of a panel that are turned at a time */
#define STRETCH 4096 /* numbers between two looks whether something was lost */

/* Of `sides` kinds of outputs, which lie in turn, each has an equal part of a panel. */
static inline int64_t panels_of(int64_t out, int sides) {
    return quotient_up(out / sides, PANEL / sides);
}

/* Bytes of a packed weight. */
EXPORT int64_t packed_size(int storage, int64_t out, int64_t in, int sides) {
    return panels_of(out, sides) * PANEL * quotient_up(in, STEP) * STEP * size_of(storage);
}

/* Outputs that a panel is filled up to. */
EXPORT int64_t panel_outputs(void) { return PANEL; }

/* ---- how narrow ---- */

INLINE int any_set(Ints found) {
    int32_t any = 0;
    for (int i = 0; i < LANES; i++) any |= found[i];
    return any != 0;
}

/* Whether `count` numbers are all as they were when they are kept in `storage`, of 16 bits. */
INLINE int are_exact(const char *from, const int dtype, int64_t count, const int storage) {
    for (int64_t begin = 0; begin < count; begin += STRETCH) {
        const int64_t stop = least(count, begin + STRETCH);
        Ints lost = {0};
        for (int64_t i = begin; i < stop; i += LANES) {
            Floats x = read_some(from + i * size_of(dtype), stop - i, dtype);
            if (storage == BFLOAT16) {
                lost |= (Ints)x & 0xffff;
            } else {
                lost |= __builtin_convertvector(__builtin_convertvector(x, Halves), Floats) != x;
            }
        }
        if (any_set(lost)) return 0;
    }
    return 1;
}

/* Of BFLOAT16, FLOAT16 and FLOAT32 the first that holds each of `count` numbers as it is. */
EXPORT int narrowest_exact(const void *from, int dtype, int64_t count) {
    if (dtype == BFLOAT16) return BFLOAT16;
    if (dtype == FLOAT16) return are_exact(from, FLOAT16, count, BFLOAT16) ? BFLOAT16 : FLOAT16;
    if (are_exact(from, FLOAT32, count, BFLOAT16)) return BFLOAT16;
    return are_exact(from, FLOAT32, count, FLOAT16) ? FLOAT16 : FLOAT32;
}

/* ---- packing ---- */

/* `count` numbers, as `storage` keeps them. Returns the sums of their squares. */
INLINE Floats copy_numbers(
    char *to, const int storage, const char *from, const int dtype, int64_t count
) {
    Floats squares = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        Floats x = read_some(from + i * size_of(dtype), count - i, dtype);
        squares = multiply_add_floats(x, x, squares);
        if (storage != dtype) write_some(to + i * size_of(storage), x, count - i, storage);
    }
    if (storage == dtype) memcpy(to, from, count * size_of(dtype));
    return squares;
}

/* Rows of units side by side become units of all rows side by side. */
#define TURN(UNIT)                                                                                \
    for (int64_t i = 0; i < units; i++) {                                                         \
        for (int c = 0; c < PANEL; c++) ((UNIT *)to)[i * PANEL + c] = ((UNIT *)piece[c])[i];      \
    }

INLINE float pack(
    const int storage, const char *from, const int dtype, int64_t out, int64_t in, int sides,
    char *to
) {
    const int kept_as = storage == PAIRS ? BFLOAT16 : storage;
    const int step = inputs_at_once(storage), unit = step * size_of(storage);
    const int64_t depth = quotient_up(in, STEP) * STEP, each = out / sides, part = PANEL / sides;
    float longest = 0;
    for (int64_t panel = 0; panel < panels_of(out, sides); panel++) {
        Floats squares[PANEL] = {{0}};
        for (int64_t k = 0; k < depth; k += PIECE) {
            char piece[PANEL][PIECE * 4] __attribute__((aligned(LINE))) = {{0}};
            const int64_t count = least(PIECE, in - k), units = least(PIECE, depth - k) / step;
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t n = panel * part + c % part; /* of its side */
                if (n >= each) continue;
                const char *row = from + ((c / part * each + n) * in + k) * size_of(dtype);
                squares[c] += count == PIECE ? copy_numbers(piece[c], kept_as, row, dtype, PIECE)
                                             : copy_numbers(piece[c], kept_as, row, dtype, count);
            }
            if (unit == 4) TURN(int32_t) else TURN(int16_t)
            to += units * PANEL * unit;
        }
        for (int c = 0; c < PANEL; c++) {
            const float sum = sum_of(squares[c]);
            longest = sum > longest ? sum : longest;
        }
    }
    return __builtin_sqrtf(longest) * (1 + in * 6e-8f); /* no less than it is */
}

/* Packs `from` [out, in], of type `dtype`, into `to`; all of it is written, with zeros where a panel or
   a step has no numbers. Numbers that `storage` does not have are rounded. `sides`: 2 where the first
   half of the outputs and the second are to lie in turn, half a panel of each; else 1. Returns the
   length of the longest output's weights, or a little more. */
EXPORT float pack_weight(
    int storage, const void *from, int dtype, int64_t out, int64_t in, int sides, void *to
) {
#define CASE(S, D) if (storage == S && dtype == D) return pack(S, from, D, out, in, sides, to);
    CASE(FLOAT32, FLOAT32)
    CASE(FLOAT16, FLOAT32) CASE(FLOAT16, FLOAT16)
    CASE(BFLOAT16, FLOAT32) CASE(BFLOAT16, FLOAT16) CASE(BFLOAT16, BFLOAT16)
    CASE(PAIRS, BFLOAT16)
#undef CASE
    return -1;
}

/* ---- the coarse copy ---------------------------------------------------------------------------*/

/* Bytes of it; 0 where the CPU has no use for it. */
EXPORT int64_t coarse_size(int64_t out, int64_t in) {
#ifdef __AVX512VNNI__
    return quotient_up(out, PANEL) * coarse_panel_size(in);
#else
    return 0;
#endif
}

/* The coarse copy (coarse.h) of `from` [out, in], of type `dtype`. `mixed`: as many floats as whole MIXes
   of inputs have, to work in. Returns whether all numbers are finite. */
EXPORT int coarsen_weight(const void *from, int dtype, int64_t out, int64_t in, float *mixed, char *to) {
    const int64_t depth = coarse_inputs(in), size = coarse_panel_size(in);
    float lengths = 0;
    memset(to, 0, quotient_up(out, PANEL) * size);
    for (int64_t n = 0; n < out; n++) {
        const char *row = (const char *)from + n * in * size_of(dtype);
        char *panel = to + n / PANEL * size, *numbers = panel + n % PANEL * 4;
        CoarseOutputs *outputs = (CoarseOutputs *)(panel + depth * PANEL);
        memset(mixed, 0, depth * sizeof *mixed);
        for (int64_t k = 0; k < in; k += LANES)
            write_some(mixed + k, read_some(row + k * size_of(dtype), in - k, dtype), in - k, FLOAT32);
        const Coarse own = coarsen(mixed, depth, 0, numbers, 4 * PANEL);
        int32_t sum = 0;
        for (int64_t k = 0; k < depth; k++) sum += (int8_t)numbers[k / 4 * 4 * PANEL + k % 4];
        const int side = n % PANEL / LANES, lane = n % LANES;
        outputs->scales[side][lane] = own.scale;
        outputs->offsets[side][lane] = OFFSET * sum;
        outputs->lengths[side][lane] = own.length;
        outputs->losses[side][lane] = own.loss;
        lengths += own.length * 0;
    }
    return lengths == 0;
}
