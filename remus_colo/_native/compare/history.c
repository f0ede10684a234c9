/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the PVM has sent and a client may have seen, of all TCP connections together: the latest of it, in a ring.  A segment
 * that is sent again with other bytes shows in it.
 *
 * Records of one connection are chained from the newest to the oldest, by where they were written since the beginning.  A link to
 * what has been overwritten ends the chain.
 */
#include "stream.h"

#include <stdlib.h>

#define RING_BYTES ((uint64_t)1 << 18)
#define LARGEST (RING_BYTES / 4) /* of a record's data: more is cut into several */
#define LOOKED_AT_MAX 256        /* records that one segment looks at */

struct record {
    uint64_t previous; /* as in struct conn */
    int64_t start;
    uint32_t size;
    uint8_t data[];
};

bool history_init(struct history *history)
{
    history->ring = malloc(RING_BYTES);
    return history->ring != NULL;
}

void history_free(struct history *history)
{
    free(history->ring);
}

static uint64_t aligned(uint64_t size)
{
    return (size + 7) / 8 * 8;
}

static struct record *record_at(const struct history *history, uint64_t place)
{
    return (struct record *)(history->ring + place % RING_BYTES);
}

static void add(struct history *history, struct conn *conn, int64_t start, const uint8_t *data, uint32_t size)
{
    uint64_t needed = aligned(sizeof(struct record) + size), left = RING_BYTES - history->end % RING_BYTES;
    struct record *record;

    if (needed > left)
        history->end += left; /* a record lies in one piece */
    record = record_at(history, history->end);
    record->previous = conn->history;
    record->start = start;
    record->size = size;
    memcpy(record->data, data, size);
    conn->history = history->end + 1;
    history->end += needed;
}

/* The PVM's bytes at start, behind all that were added before. */
void history_add(struct history *history, struct conn *conn, int64_t start, const uint8_t *data, uint32_t size)
{
    while (size) {
        uint32_t count = size < LARGEST ? size : (uint32_t)LARGEST;

        add(history, conn, start, data, count);
        start += count;
        data += count;
        size -= count;
    }
}

/* Where the PVM's bytes differ from what it has sent there before, and that byte; NOWHERE if they do not, or it is too long ago. */
int64_t history_contradicts(const struct history *history, const struct conn *conn, int64_t start, const uint8_t *data, uint32_t size,
                            uint8_t *before)
{
    int64_t end = start + size;
    uint64_t place = conn->history;

    for (unsigned looked = 0; place && looked < LOOKED_AT_MAX; looked++) {
        const struct record *record;
        int64_t low, high;

        if (history->end - (place - 1) > RING_BYTES)
            break; /* overwritten */
        record = record_at(history, place - 1);
        place = record->previous;
        low = later(record->start, start);
        high = record->start + record->size < end ? record->start + record->size : end;
        if (low < high && memcmp(record->data + (low - record->start), data + (low - start), (size_t)(high - low))) {
            low += first_difference(record->data + (low - record->start), data + (low - start), (uint32_t)(high - low));
            *before = record->data[low - record->start];
            return low;
        }
        if (record->start <= start && record->start + record->size > start)
            break; /* what is older lies below */
    }
    return NOWHERE;
}
