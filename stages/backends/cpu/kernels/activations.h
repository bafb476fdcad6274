/* The functions between the products of an MLP, of a register of floats. */

#pragma once
#include "numbers.h"

/* As Python names them (types.py). */
enum { SILU, GELU, GELU_TANH, RELU };

/* x times the chance of less than x in the normal distribution. Half of erfc(|x| / sqrt 2) within
   1e-7; source: Abramowitz and Stegun, 7.1.26. */
INLINE Floats gelu(Floats x) {
    Floats z = choose(x < 0.0f, -x, x) * 0.70710678f;
    Floats t = 1.0f / multiply_add_floats(z, all_lanes(0.3275911f), all_lanes(1));
    const float terms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    Floats tail = all_lanes(1.061405429f);
    for (int i = 0; i < 4; i++) tail = multiply_add_floats(tail, t, all_lanes(terms[i]));
    tail *= t * exponential(-z * z) * 0.5f;
    return x * choose(x < 0.0f, tail, 1.0f - tail);
}

/* `is_rough`: within 2e-4 of its size, for what is rounded to 8 bits next. */
INLINE Floats activated(Floats x, int activation, const bool is_rough) {
    if (activation == GELU) return gelu(x);
    if (activation == RELU) return choose(x < 0.0f, (Floats){0}, x);
    /* x times a logistic function: (1 + tanh(y)) / 2 is that of 2 y. */
    Floats y = x;
    if (activation == GELU_TANH)
        y = 1.59576912f * multiply_add_floats(x * x * 0.044715f, x, x);
    if (is_rough) return x * rough_inverse(1.0f + power_of_two(y * -1.44269504f, true));
    return x / (1.0f + exponential(-y));
}
