/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Bytes of one side of a TCP stream that the other side has not sent yet: pieces in an array, in order of their place.
 *
 * A stream in order is appended to and consumed from the front, at no cost that grows with it; what comes out of order is
 * found by bisection, and moves what lies behind it.
 */
#include "state.h"

uint32_t first_difference(const uint8_t *one, const uint8_t *other, uint32_t size)
{
    uint32_t at = 0;

    while (at + 64 <= size && !memcmp(one + at, other + at, 64))
        at += 64;
    while (at < size && one[at] == other[at])
        at++;
    return at;
}

static const uint8_t *keep(struct colo *c, struct source *source, const uint8_t *data)
{
    if (!source->buf) {
        source->buf = buf_new(&c->pool, source->size);
        memcpy(source->buf->bytes, source->base, source->size);
    }
    return source->buf->bytes + (data - source->base);
}

/* Index of the first run that ends behind position; runs->count if none does. */
static uint32_t find(const struct runs *runs, int64_t position)
{
    uint32_t low = 0, high = runs->count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (runs_at(runs, middle)->start + runs_at(runs, middle)->size > position)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Have room for more runs behind the last one. */
static void make_room(struct colo *c, struct runs *runs, uint32_t more)
{
    struct run *old = runs->array;
    uint32_t room = runs->room, needed = runs->count + more;

    if (runs->first + needed <= room)
        return;
    if (needed <= room / 2) { /* so this is rare, too */
        memmove(old, old + runs->first, runs->count * sizeof(*old));
        runs->first = 0;
        return;
    }
    for (room = room ? room : RUNS_FIRST; room < needed; room *= 2)
        ;
    if (room == runs->room)
        room *= 2;
    runs->array = pool_take(&c->pool, room * sizeof(*old));
    if (old) {
        memcpy(runs->array, old + runs->first, runs->count * sizeof(*old));
        pool_give(&c->pool, old, runs->room * sizeof(*old));
    }
    runs->first = 0;
    runs->room = room;
}

/* The array goes back with the last run, so that an idle connection has none. */
static void shrunk(struct colo *c, struct runs *runs)
{
    if (runs->count)
        return;
    pool_give(&c->pool, runs->array, runs->room * sizeof(*runs->array));
    memset(runs, 0, sizeof(*runs));
}

static void run_make(struct colo *c, struct runs *runs, struct run *run, int64_t start, const uint8_t *data, uint32_t size,
                     struct source *source)
{
    run->start = start;
    run->data = keep(c, source, data);
    run->buf = buf_share(source->buf);
    run->size = size;
    runs->bytes += size + RUN_OVERHEAD_BYTES;
}

static void run_drop(struct colo *c, struct runs *runs, struct run *run)
{
    runs->bytes -= run->size + RUN_OVERHEAD_BYTES;
    buf_drop(&c->pool, run->buf);
}

int64_t runs_contradict(const struct runs *runs, int64_t start, const uint8_t *data, uint32_t size)
{
    int64_t end = start + size;

    for (uint32_t i = find(runs, start); i < runs->count && runs_at(runs, i)->start < end; i++) {
        const struct run *run = runs_at(runs, i);
        int64_t low = run->start > start ? run->start : start;
        int64_t high = run->start + run->size < end ? run->start + run->size : end;
        const uint8_t *one = run->data + (low - run->start), *other = data + (low - start);

        if (memcmp(one, other, (size_t)(high - low)))
            return low + first_difference(one, other, (uint32_t)(high - low));
    }
    return NOWHERE;
}

/* How many pieces of start to end lie between the runs from index low to high. */
static uint32_t gaps(const struct runs *runs, uint32_t low, uint32_t high, int64_t start, int64_t end)
{
    uint32_t count = 0;

    for (uint32_t i = low; i < high; i++) {
        count += runs_at(runs, i)->start > start;
        start = runs_at(runs, i)->start + runs_at(runs, i)->size;
    }
    return count + (start < end);
}

/* Keep what is new of data. */
enum runs_result runs_insert(struct colo *c, struct runs *runs, int64_t start, const uint8_t *data, uint32_t size,
                             struct source *source, int64_t *conflict)
{
    int64_t end = start + size;
    uint32_t low, high, pieces, to;

    if (!runs->count || start >= runs_end(runs)) {
        if (runs->count >= RUNS_MAX)
            return RUNS_FULL;
        make_room(c, runs, 1);
        run_make(c, runs, runs->array + runs->first + runs->count, start, data, size, source);
        runs->count++;
        return RUNS_OK;
    }
    *conflict = runs_contradict(runs, start, data, size);
    if (*conflict != NOWHERE)
        return RUNS_CONFLICT;
    low = find(runs, start);
    for (high = low; high < runs->count && runs_at(runs, high)->start < end; high++)
        ;
    pieces = gaps(runs, low, high, start, end);
    if (!pieces)
        return RUNS_OK;
    if (runs->count + pieces > RUNS_MAX)
        return RUNS_FULL;
    make_room(c, runs, pieces);
    memmove(runs_at(runs, high) + pieces, runs_at(runs, high), (runs->count - high) * sizeof(struct run));
    runs->count += pieces;
    /* From the back: the runs move up, and a piece is put wherever there is a gap behind one. */
    for (to = high + pieces; pieces;) {
        const struct run *below = high > low ? runs_at(runs, high - 1) : NULL;
        int64_t from = below && below->start + below->size > start ? below->start + below->size : start;

        if (from < end) {
            run_make(c, runs, runs_at(runs, --to), from, data + (from - start), (uint32_t)(end - from), source);
            pieces--;
        }
        if (below) {
            end = below->start;
            *runs_at(runs, --to) = *below;
            high--;
        }
    }
    return RUNS_OK;
}

/* Take count bytes, which are not more than it has, off the first run. */
void runs_consume(struct colo *c, struct runs *runs, uint32_t count)
{
    struct run *run = runs_at(runs, 0);

    if (count == run->size) {
        run_drop(c, runs, run);
        runs->first++;
        runs->count--;
        shrunk(c, runs);
        return;
    }
    run->start += count;
    run->data += count;
    run->size -= count;
    runs->bytes -= count;
}

void runs_forget_below(struct colo *c, struct runs *runs, int64_t position)
{
    while (runs->count && runs_at(runs, 0)->start < position) {
        int64_t count = position - runs_at(runs, 0)->start;

        runs_consume(c, runs, count < runs_at(runs, 0)->size ? (uint32_t)count : runs_at(runs, 0)->size);
    }
}

/* to is empty. */
void runs_move_below(struct colo *c, struct runs *from, struct runs *to, int64_t position)
{
    while (from->count && runs_at(from, 0)->start < position) {
        struct run *run = runs_at(from, 0);
        int64_t count = position - run->start, conflict;
        uint32_t size = count < run->size ? (uint32_t)count : run->size;
        struct source source = {run->buf->bytes, run->buf->size, run->buf};

        runs_insert(c, to, run->start, run->data, size, &source, &conflict);
        runs_consume(c, from, size);
    }
}

void runs_clear(struct colo *c, struct runs *runs)
{
    if (!runs->count)
        return;
    for (uint32_t i = 0; i < runs->count; i++)
        run_drop(c, runs, runs_at(runs, i));
    runs->count = 0;
    shrunk(c, runs);
}

void runs_drop_last(struct colo *c, struct runs *runs)
{
    run_drop(c, runs, runs_at(runs, runs->count - 1));
    runs->count--;
    shrunk(c, runs);
}

uint8_t runs_byte(const struct runs *runs, int64_t position)
{
    const struct run *run = runs_at(runs, find(runs, position));

    return run->data[position - run->start];
}

int64_t runs_reach(const struct runs *runs, int64_t start, int64_t end)
{
    for (uint32_t i = find(runs, start); i < runs->count && start < end && runs_at(runs, i)->start <= start; i++)
        start = runs_at(runs, i)->start + runs_at(runs, i)->size;
    return start;
}

enum cover runs_cover(const struct runs *runs, int64_t start, const uint8_t *data, uint32_t size, int64_t *where)
{
    *where = runs_contradict(runs, start, data, size);
    if (*where != NOWHERE)
        return COVER_DIFFERS;
    *where = runs_reach(runs, start, start + size);
    return *where >= start + size ? COVER_EQUAL : COVER_MISSING;
}
