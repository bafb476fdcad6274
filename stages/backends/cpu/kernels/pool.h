/* One layer of the paged KV pool. */

#pragma once
#include <stdint.h>

typedef struct {
    const char *keys, *values;
    /* How many numbers lie between two heads and between two blocks; within a head's part of a block, of
       keys, between two positions and between two dimensions. There values are [block size, head size]. */
    int64_t head_step, block_step, key_position_step, key_dimension_step;
    int64_t block_size;
    int32_t num_kv_heads, head_size, dtype;
} Pool;
