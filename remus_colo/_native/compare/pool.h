/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memory: blocks in classes by size, kept for the next packet when they are given back, and buffers on top of
 * them, which several may share.
 *
 * If the system has no memory the process ends: a packet that is not accounted for could leave, or stay for ever.
 * What a comparator asks for is bounded by its limits.
 */
#ifndef COLO_POOL_H
#define COLO_POOL_H

#include <stddef.h>
#include <stdint.h>

/* Four classes to each power of two, from 64 bytes to 128 KiB (a superpacket with all its headers). */
#define POOL_SHIFT_MIN 6
#define POOL_SHIFT_MAX 17
#define POOL_CLASSES (4 * (POOL_SHIFT_MAX - POOL_SHIFT_MIN) + 1)

struct pool {
    struct pool_block {
        struct pool_block *next;
    } *free[POOL_CLASSES];
    size_t spare_bytes; /* in the free lists */
};

_Noreturn void out_of_memory(void);

void *pool_take(struct pool *pool, size_t size);
/* Outside the classes: to be given back with free(). */
void *pool_take_aligned(size_t alignment, size_t size);
void pool_give(struct pool *pool, void *block, size_t size);
void pool_empty(struct pool *pool);

struct buf {
    uint32_t refs;
    uint32_t size;
    uint8_t bytes[];
};

/* One reference, to a buffer of size bytes; the caller fills it. */
struct buf *buf_new(struct pool *pool, size_t size);
void buf_drop(struct pool *pool, struct buf *buf);

static inline struct buf *buf_share(struct buf *buf)
{
    buf->refs++;
    return buf;
}

#endif
