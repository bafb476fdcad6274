/* One layer of the paged KV pool. */

#pragma once
#include <stdint.h>

typedef struct {
    const char *keys, *values; /* [kv heads, blocks, block size * head size] */
    /* Keys: how many numbers lie between two positions, and between two dimensions. Values are
       [block size, head size]. */
    int64_t key_position_step, key_dimension_step;
    int64_t num_blocks, block_size;
    int32_t num_kv_heads, head_size, dtype;
} Pool;
