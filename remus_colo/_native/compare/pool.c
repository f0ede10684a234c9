/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pool.h"

#include <stdio.h>
#include <stdlib.h>

/* More than that goes back to the system: a burst's memory need not be kept. */
#define SPARE_BYTES_MAX ((size_t)4 << 20)

void out_of_memory(void)
{
    fprintf(stderr, "remus_colo: out of memory while comparing packets\n");
    abort();
}

static void *system_take(size_t size)
{
    void *block = malloc(size);

    if (!block)
        out_of_memory();
    return block;
}

void *pool_take_aligned(size_t alignment, size_t size)
{
    void *block = aligned_alloc(alignment, size);

    if (!block)
        out_of_memory();
    return block;
}

/* The class that holds *size bytes, which becomes that of its blocks; POOL_CLASSES if none does. */
static unsigned class_of(size_t *size)
{
    unsigned shift, quarter;

    if (*size <= (size_t)1 << POOL_SHIFT_MIN) {
        *size = (size_t)1 << POOL_SHIFT_MIN;
        return 0;
    }
    if (*size > (size_t)1 << POOL_SHIFT_MAX)
        return POOL_CLASSES;
    shift = 8 * sizeof(unsigned long) - 1 - (unsigned)__builtin_clzl(*size - 1);
    quarter = (*size - 1) >> (shift - 2) & 3;
    *size = (size_t)(quarter + 5) << (shift - 2);
    return 4 * (shift - POOL_SHIFT_MIN) + quarter + 1;
}

#ifdef COLO_SANITIZED /* every block from malloc, so that the sanitizer sees each of them */

void *pool_take(struct pool *pool, size_t size)
{
    (void)pool;
    (void)class_of;
    return system_take(size);
}

void pool_give(struct pool *pool, void *block, size_t size)
{
    (void)pool;
    (void)size;
    free(block);
}

#else

void *pool_take(struct pool *pool, size_t size)
{
    unsigned class = class_of(&size);
    struct pool_block *block = class < POOL_CLASSES ? pool->free[class] : NULL;

    if (!block)
        return system_take(size);
    pool->free[class] = block->next;
    pool->spare_bytes -= size;
    return block;
}

void pool_give(struct pool *pool, void *pointer, size_t size)
{
    unsigned class = class_of(&size);
    struct pool_block *block = pointer;

    if (class == POOL_CLASSES || pool->spare_bytes + size > SPARE_BYTES_MAX) {
        free(pointer);
        return;
    }
    block->next = pool->free[class];
    pool->free[class] = block;
    pool->spare_bytes += size;
}

#endif

void pool_empty(struct pool *pool)
{
    for (unsigned class = 0; class < POOL_CLASSES; class++) {
        while (pool->free[class]) {
            struct pool_block *block = pool->free[class];

            pool->free[class] = block->next;
            free(block);
        }
    }
    pool->spare_bytes = 0;
}

struct buf *buf_new(struct pool *pool, size_t size)
{
    struct buf *buf = pool_take(pool, sizeof(*buf) + size);

    buf->refs = 1;
    buf->size = (uint32_t)size;
    return buf;
}

void buf_drop(struct pool *pool, struct buf *buf)
{
    if (buf && --buf->refs == 0)
        pool_give(pool, buf, sizeof(*buf) + buf->size);
}
