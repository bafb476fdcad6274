/* Numbers of 32 and 16 bits, read and written as float32; and functions of a register of floats. */

#pragma once
#include "common.h"
#include <stdbool.h>
#include <string.h>
#include <immintrin.h>

/* As Python names them (library.py). */
enum { FLOAT32, FLOAT16, BFLOAT16 };

typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef _Float16 Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2), aligned(2)));

typedef __bf16 Pairs __attribute__((vector_size(LANES * 4), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("clang loop unroll(full)")

/* a where the comparison `is` holds, else b. */
INLINE Floats choose(Ints is, Floats a, Floats b) {
    return (Floats)((is & (Ints)a) | (~is & (Ints)b));
}

/* The larger and the smaller of a and b in each lane, and b where either is NaN: one instruction. */
#ifdef __AVX512F__
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

/* Whether any lane of a is above that of b. */
INLINE int any_above(Floats a, Floats b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#endif
}

#ifdef __AVX512BF16__
/* sums + the products of two pairs of bfloat16 in each lane, which a and b hold as the bits of floats:
   first that of the second numbers, then that of the first. */
INLINE Floats add_pairs(Floats sums, Floats a, Floats b) {
    return (Floats)__builtin_ia32_dpbf16ps_512(sums, (Pairs)a, (Pairs)b);
}
#endif

INLINE int size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE Floats read(const void *from, int dtype) {
    if (dtype == FLOAT32) return load_floats(from);
    if (dtype == FLOAT16) return __builtin_convertvector(*(const Halves *)from, Floats);
    return (Floats)(__builtin_convertvector(*(const Shorts *)from, Ints) << 16);
}

/* To the nearest number of 16 bits, of two equally near ones the even; NaN stays NaN. */
INLINE Ints bfloat16_bits(Floats x) {
    Ints bits = (Ints)x;
    Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Ints is_number = x == x;
    return (is_number & rounded) | (~is_number & 0x7fc0);
}

INLINE void write(void *to, Floats x, int dtype) {
    if (dtype == FLOAT32) store_floats(to, x);
    else if (dtype == FLOAT16) *(Halves *)to = __builtin_convertvector(x, Halves);
    else *(Shorts *)to = __builtin_convertvector(bfloat16_bits(x), Shorts);
}

/* The first `count` lanes alone, where there are fewer than LANES; the others are 0. */
INLINE Floats read_some(const void *from, int count, int dtype) {
    if (count >= LANES) return read(from, dtype);
    char lanes[LANES * 4] = {0};
    memcpy(lanes, from, count * size_of(dtype));
    return read(lanes, dtype);
}

INLINE void write_some(void *to, Floats x, int count, int dtype) {
    if (count >= LANES) {
        write(to, x, dtype);
        return;
    }
    char lanes[LANES * 4];
    write(lanes, x, dtype);
    memcpy(to, lanes, count * size_of(dtype));
}

/* 0, 1, 2, ... */
INLINE Floats lane_numbers(void) {
    Floats lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}

/* Halves are added to each other until one lane is left. */
INLINE float sum_of(Floats x) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
#if LANES == 16
    Eight eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    Eight eight = x;
#endif
    Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* e^x within 1e-7 of its size; exactly 1 for 0, 0 below -87 (what is next is no normal number), infinity
   where it is no float, NaN for NaN. 2^n times a polynomial over half of ln 2 to either side; source
   of its coefficients: Cephes, expf. */
INLINE Floats exponential(Floats x) {
    const float rounding = 12582912.0f; /* 1.5 * 2^23: sums with it are whole numbers */
    Floats bounded = larger(all_lanes(-87.5f), smaller(all_lanes(89.0f), x));
    Floats shifted = multiply_add_floats(bounded, all_lanes(1.44269504f), all_lanes(rounding));
    Floats n = shifted - rounding;
    Floats rest = multiply_add_floats(n, all_lanes(-0.693359375f), bounded);
    rest = multiply_add_floats(n, all_lanes(2.12194440e-4f), rest);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f};
    Floats y = all_lanes(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) y = multiply_add_floats(y, rest, all_lanes(terms[i]));
    y = multiply_add_floats(y, rest * rest, rest) + 1.0f;
    Ints power = ((Ints)shifted - (Ints)all_lanes(rounding)) << 23; /* n in the exponent */
    /* In two steps, because 2^128 is no float: n reaches 128. With the lowest, -126, it is 0. */
    return y * 2.0f * (Floats)(power + (126 << 23));
}

/* 2^x within 1e-7 of its size, or 1e-4 for what is rounded to 8 bits next; for x below 127 (with
   AVX512 for any: infinity where it is no float), exactly 1 for 0, exactly 0 for -infinity, NaN for NaN.
   2^n times a polynomial (least relative error) over half a power to either side. */
INLINE Floats power_of_two(Floats x, bool is_rough) {
#ifdef __AVX512F__
    Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); /* of infinity 0 */
#else
    const float rounding = 12582912.0f + 127; /* 1.5 * 2^23: sums with it are whole numbers */
    x = larger(all_lanes(-127), x);
    Floats shifted = x + rounding, rest = x - (shifted - rounding);
#endif
    const float terms[] = {9.671512645e-03f, 5.550733743e-02f, 2.402224209e-01f, 6.931469776e-01f,
                           1};
    const float rough_terms[] = {2.422109595e-01f, 6.932829272e-01f, 1};
    Floats y = all_lanes(is_rough ? 5.500893049e-02f : 1.326472712e-03f);
    UNROLL for (int i = 0; i < (is_rough ? 3 : 5); i++)
        y = multiply_add_floats(y, rest, all_lanes(is_rough ? rough_terms[i] : terms[i]));
#ifdef __AVX512F__
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)(x - rest));
#else
    return y * (Floats)((Ints)shifted << 23); /* n + 127 is the exponent; of -127 that is 0 */
#endif
}

/* 1 / x within 1e-4 of its size; 0 where that is no normal number. */
INLINE Floats rough_inverse(Floats x) {
#ifdef __AVX512F__
    return (Floats)_mm512_rcp14_ps((__m512)x);
#else
    return 1.0f / x;
#endif
}

/* Within 3e-7 of its size; NaN for NaN. A rational function; source: Eigen, `ptanh_float`. */
INLINE Floats hyperbolic_tangent(Floats x) {
    Floats bounded = choose(x > 7.9053111f, all_lanes(7.9053111f), x);
    bounded = choose(bounded < -7.9053111f, all_lanes(-7.9053111f), bounded);
    const float above[] = {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                           1.48572235717979e-05f, 6.37261928875436e-04f,  4.89352455891786e-03f};
    const float below[] = {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
    Floats square = bounded * bounded;
    Floats p = all_lanes(-2.76076847742355e-16f), q = all_lanes(1.19825839466702e-06f);
    for (int i = 0; i < 6; i++) p = multiply_add_floats(p, square, all_lanes(above[i]));
    for (int i = 0; i < 3; i++) q = multiply_add_floats(q, square, all_lanes(below[i]));
    return bounded * p / q;
}
