/* What all kernels are written in: vectors as wide as a register of the instruction set that the
   file is being compiled for. The compiler makes the same C into AVX2 and AVX512. */

#pragma once
#include <stdint.h>

#ifdef __AVX512F__
#define LANES 16 /* floats in a register */
#define NUM_REGISTERS 32
#else
#define LANES 8
#define NUM_REGISTERS 16
#endif

/* Aligned as one float is: may be loaded from and stored to any address of a float. */
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4)));

/* Marks what Python calls; all else is static. */
#define EXPORT __attribute__((visibility("default")))

/* a * b + c, rounded once. */
static inline Floats multiply_add_floats(Floats a, Floats b, Floats c) {
    return __builtin_elementwise_fma(a, b, c);
}

static inline Floats load_floats(const float *from) { return *(const Floats *)from; }

static inline void store_floats(float *to, Floats x) { *(Floats *)to = x; }

/* All lanes x. */
static inline Floats all_lanes(float x) { return x - (Floats){0}; }
