/* What layers do between their products, row by row or number by number. `out` may be `x`. */

#include "activations.h"
#include "calls.h"

/* ---- norms -----------------------------------------------------------------------------------*/

/* out = x / root mean square * weight, of each of `num_rows` rows of `size`. */
EXPORT void rms_norm(const float *x, const float *weight, float eps, int64_t num_rows, int64_t size,
                     float *out) {
    for (int64_t row = 0; row < num_rows; row++, x += size, out += size) {
        Floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) {
            Floats own = read_some(x + i, size - i, FLOAT32);
            squares = multiply_add_floats(own, own, squares);
        }
        const float scale = 1 / __builtin_sqrtf(sum_of(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats own = read_some(x + i, size - i, FLOAT32);
            Floats factor = read_some(weight + i, size - i, FLOAT32);
            write_some(out + i, own * scale * factor, size - i, FLOAT32);
        }
    }
}

/* out = (x - mean) / standard deviation * weight + bias. */
EXPORT void layer_norm(const float *x, const float *weight, const float *bias, float eps,
                       int64_t num_rows, int64_t size, float *out) {
    for (int64_t row = 0; row < num_rows; row++, x += size, out += size) {
        Floats total = {0}, squares = {0};
        for (int64_t i = 0; i < size; i += LANES) total += read_some(x + i, size - i, FLOAT32);
        const float mean = sum_of(total) / size;
        for (int64_t i = 0; i < size; i += LANES) {
            Floats rest = read_some(x + i, size - i, FLOAT32) - mean;
            rest = choose(lane_numbers() < (float)(size - i), rest, (Floats){0});
            squares = multiply_add_floats(rest, rest, squares);
        }
        const float scale = 1 / __builtin_sqrtf(sum_of(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats own = (read_some(x + i, size - i, FLOAT32) - mean) * scale;
            own = multiply_add_floats(own, read_some(weight + i, size - i, FLOAT32),
                                      read_some(bias + i, size - i, FLOAT32));
            write_some(out + i, own, size - i, FLOAT32);
        }
    }
}

/* ---- activations -----------------------------------------------------------------------------*/

/* out = activation(x), of `size` numbers. */
EXPORT void activate(const float *x, int activation, int64_t size, float *out) {
    for (int64_t i = 0; i < size; i += LANES) {
        Floats own = read_some(x + i, size - i, FLOAT32);
        write_some(out + i, activated(own, activation, false), size - i, FLOAT32);
    }
}
