/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bytes of one side of a TCP stream that the other side has not sent yet. */
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

static struct run *run_new(struct colo *c, struct runs *runs, int64_t start, const uint8_t *data, uint32_t size,
                           struct source *source)
{
    struct run *run = pool_take(&c->pool, sizeof(*run));

    run->start = start;
    run->data = keep(c, source, data);
    run->buf = buf_share(source->buf);
    run->size = size;
    run->next = NULL;
    runs->count++;
    runs->bytes += size + RUN_OVERHEAD_BYTES;
    return run;
}

static void run_free(struct colo *c, struct runs *runs, struct run *run)
{
    runs->count--;
    runs->bytes -= run->size + RUN_OVERHEAD_BYTES;
    buf_drop(&c->pool, run->buf);
    pool_give(&c->pool, run, sizeof(*run));
}

int64_t runs_contradict(const struct runs *runs, int64_t start, const uint8_t *data, uint32_t size)
{
    int64_t end = start + size;

    for (const struct run *run = runs->first; run && run->start < end; run = run->next) {
        int64_t low = run->start > start ? run->start : start;
        int64_t high = run->start + run->size < end ? run->start + run->size : end;
        const uint8_t *one, *other;

        if (low >= high)
            continue;
        one = run->data + (low - run->start);
        other = data + (low - start);
        if (memcmp(one, other, (size_t)(high - low)))
            return low + first_difference(one, other, (uint32_t)(high - low));
    }
    return NOWHERE;
}

/* Keep what is new of data. */
enum runs_result runs_insert(struct colo *c, struct runs *runs, int64_t start, const uint8_t *data, uint32_t size,
                             struct source *source, int64_t *conflict)
{
    int64_t end = start + size, position = start;
    struct run *before = NULL, *run;

    if (runs->count >= RUNS_MAX)
        return RUNS_FULL;
    if (!runs->last || start >= runs_end(runs)) {
        run = run_new(c, runs, start, data, size, source);
        if (runs->last)
            runs->last->next = run;
        else
            runs->first = run;
        runs->last = run;
        return RUNS_OK;
    }
    *conflict = runs_contradict(runs, start, data, size);
    if (*conflict != NOWHERE)
        return RUNS_CONFLICT;
    for (run = runs->first; position < end; before = run, run = run->next) {
        int64_t stop = run && run->start < end ? run->start : end;

        if (position < stop) {
            struct run *piece = run_new(c, runs, position, data + (position - start), (uint32_t)(stop - position),
                                        source);
            piece->next = run;
            if (before)
                before->next = piece;
            else
                runs->first = piece;
            if (!run)
                runs->last = piece;
        }
        if (!run)
            break;
        if (position < run->start + run->size)
            position = run->start + run->size;
    }
    return RUNS_OK;
}

static void drop_first(struct colo *c, struct runs *runs)
{
    struct run *run = runs->first;

    runs->first = run->next;
    if (!runs->first)
        runs->last = NULL;
    run_free(c, runs, run);
}

/* Take count bytes, which are not more than it has, off the first run. */
void runs_consume(struct colo *c, struct runs *runs, uint32_t count)
{
    struct run *run = runs->first;

    if (count == run->size) {
        drop_first(c, runs);
        return;
    }
    run->start += count;
    run->data += count;
    run->size -= count;
    runs->bytes -= count;
}

void runs_forget_below(struct colo *c, struct runs *runs, int64_t position)
{
    while (runs->first && runs->first->start < position) {
        int64_t count = position - runs->first->start;

        runs_consume(c, runs, count < runs->first->size ? (uint32_t)count : runs->first->size);
    }
}

/* to is empty. */
void runs_move_below(struct colo *c, struct runs *from, struct runs *to, int64_t position)
{
    struct run *run;

    while ((run = from->first) && run->start < position) {
        int64_t count = position - run->start, conflict;
        uint32_t size = count < run->size ? (uint32_t)count : run->size;
        struct source source = {run->buf->bytes, run->buf->size, run->buf};

        runs_insert(c, to, run->start, run->data, size, &source, &conflict);
        runs_consume(c, from, size);
    }
}

void runs_clear(struct colo *c, struct runs *runs)
{
    while (runs->first)
        drop_first(c, runs);
}

void runs_drop_last(struct colo *c, struct runs *runs)
{
    struct run **at = &runs->first, *before = NULL, *run = runs->last;

    while (*at != run) {
        before = *at;
        at = &before->next;
    }
    *at = NULL;
    runs->last = before;
    run_free(c, runs, run);
}

uint8_t runs_byte(const struct runs *runs, int64_t position)
{
    const struct run *run = runs->first;

    while (run->start + run->size <= position)
        run = run->next;
    return run->data[position - run->start];
}

int64_t runs_reach(const struct runs *runs, int64_t start)
{
    for (const struct run *run = runs->first; run && run->start <= start; run = run->next) {
        if (run->start + run->size > start)
            start = run->start + run->size;
    }
    return start;
}

enum cover runs_cover(const struct runs *runs, int64_t start, const uint8_t *data, uint32_t size, int64_t *where)
{
    *where = runs_contradict(runs, start, data, size);
    if (*where != NOWHERE)
        return COVER_DIFFERS;
    *where = runs_reach(runs, start);
    return *where >= start + size ? COVER_EQUAL : COVER_MISSING;
}
