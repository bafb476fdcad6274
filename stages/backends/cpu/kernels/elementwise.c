/* What layers do between their products, row by row or number by number: in float32, whatever the
   type of what comes in and of what goes out. */

#include "activations.h"
#include "calls.h"

/* ---- norms -----------------------------------------------------------------------------------*/

/* out = x / root mean square * weight, of each of `num_rows` rows of `size`. Where `added` is no
   NULL it is added to x first, and the sum left in x. */
EXPORT void rms_norm(float *x, const void *added, int added_dtype, const float *weight, float eps,
                     int64_t num_rows, int64_t size, void *out, int out_dtype) {
    for (int64_t row = 0; row < num_rows; row++, x += size) {
        const char *more = added ? (const char *)added + row * size * size_of(added_dtype) : NULL;
        char *to = (char *)out + row * size * size_of(out_dtype);
        Floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) {
            Floats own = read_some(x + i, size - i, FLOAT32);
            if (more) {
                own += read_some(more + i * size_of(added_dtype), size - i, added_dtype);
                write_some(x + i, own, size - i, FLOAT32);
            }
            squares = multiply_add_floats(own, own, squares);
        }
        const float scale = 1 / __builtin_sqrtf(sum_of(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats own = read_some(x + i, size - i, FLOAT32);
            Floats factor = read_some(weight + i, size - i, FLOAT32);
            write_some(to + i * size_of(out_dtype), own * scale * factor, size - i, out_dtype);
        }
    }
}

/* out = (x - mean) / standard deviation * weight + bias. */
EXPORT void layer_norm(const float *x, const float *weight, const float *bias, float eps,
                       int64_t num_rows, int64_t size, void *out, int out_dtype) {
    for (int64_t row = 0; row < num_rows; row++, x += size) {
        char *to = (char *)out + row * size * size_of(out_dtype);
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
            write_some(to + i * size_of(out_dtype), own, size - i, out_dtype);
        }
    }
}

/* ---- activations -----------------------------------------------------------------------------*/

/* out = activation(x), of `size` numbers. */
EXPORT void activate(const void *x, int dtype, int activation, int64_t size, void *out,
                     int out_dtype) {
    for (int64_t i = 0; i < size; i += LANES) {
        Floats own = read_some((const char *)x + i * size_of(dtype), size - i, dtype);
        write_some((char *)out + i * size_of(out_dtype), activated(own, activation, false), size - i,
                   out_dtype);
    }
}

/* x += added, of `size` numbers. */
EXPORT void add_to(float *x, const void *added, int added_dtype, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const char *from = (const char *)added + i * size_of(added_dtype);
        Floats more = read_some(from, size - i, added_dtype);
        write_some(x + i, read_some(x + i, size - i, FLOAT32) + more, size - i, FLOAT32);
    }
}
