/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Datagrams put together from fragments: RFC 791, 3.2 and RFC 8200, 4.5.
 *
 * Fragments that overlap and are not plain repeats have no one meaning (RFC 5722 discards them for IPv6): such a datagram is
 * never whole.
 */
#include "state.h"

/* The datagram that a fragment with this key belongs to in the running epoch; made if there is none. */
struct assembly *assembly_of(struct colo *c, const struct flow_key *key, bool secondary, int64_t now_ns)
{
    uint64_t hash = hash_bytes(&c->seed, (uint64_t)c->number << 1 | secondary, (const uint8_t *)key, sizeof(*key));
    struct assembly **bucket = &c->assemblies[hash % ASSEMBLY_BUCKETS], *a;

    for (a = *bucket; a; a = a->chain) {
        if (a->hash == hash && a->epoch == c->number && a->secondary == secondary && same_key(&a->key, key))
            return a;
    }
    a = pool_take(&c->pool, sizeof(*a));
    memset(a, 0, sizeof(*a));
    a->key = *key;
    a->hash = hash;
    a->epoch = c->number;
    a->secondary = secondary;
    a->total = -1;
    a->seen_ns = now_ns;
    a->chain = *bucket;
    *bucket = a;
    list_append(secondary ? &c->epoch->secondary_assemblies : &c->epoch->assemblies, &a->in_epoch);
    return a;
}

uint64_t assembly_cost(const struct assembly *a)
{
    return a->bytes + (uint64_t)a->count * DATAGRAM_OVERHEAD_BYTES;
}

void assembly_free(struct colo *c, struct assembly *a)
{
    struct assembly **at = &c->assemblies[a->hash % ASSEMBLY_BUCKETS];

    while (*at != a)
        at = &(*at)->chain;
    *at = a->chain;
    list_remove(&a->in_epoch);
    for (struct fragment *f = a->first, *next; f; f = next) {
        next = f->next;
        buf_drop(&c->pool, f->buf);
        pool_give(&c->pool, f, sizeof(*f));
    }
    pool_give(&c->pool, a, sizeof(*a));
}

/* Where it belongs: behind *before, which may be NULL. */
static void find_place(const struct assembly *a, uint32_t offset, struct fragment **before, struct fragment **after)
{
    if (a->last && a->last->offset < offset) { /* in order */
        *before = a->last;
        *after = NULL;
        return;
    }
    *before = NULL;
    for (*after = a->first; *after && (*after)->offset < offset; *after = (*after)->next)
        *before = *after;
}

/* Take a fragment, its data in buf (which is kept); true if nothing is missing now. */
static bool add(struct colo *c, struct assembly *a, uint32_t offset, bool more, uint8_t upper, struct buf *buf)
{
    struct fragment *before, *after, *f;
    uint32_t end = offset + buf->size;

    find_place(a, offset, &before, &after);
    if (after && after->offset == offset) {
        a->broken |= after->more != more || after->buf->size != buf->size ||
                     memcmp(after->buf->bytes, buf->bytes, buf->size);
        buf_drop(&c->pool, buf);
        return false;
    }
    if ((before && before->offset + before->buf->size > offset) || (after && after->offset < end) ||
        (!more && (a->total >= 0 || after)) || (a->total >= 0 && end > a->total) || a->count >= FRAGMENTS_MAX)
        a->broken = true;
    if (a->count >= FRAGMENTS_MAX) {
        buf_drop(&c->pool, buf);
        return false;
    }
    f = pool_take(&c->pool, sizeof(*f));
    *f = (struct fragment){after, offset, more, buf};
    if (before)
        before->next = f;
    else
        a->first = f;
    if (!after)
        a->last = f;
    a->count++;
    a->bytes += buf->size;
    if (offset == 0)
        a->upper = upper;
    if (!more)
        a->total = end;
    /* Without overlaps the sizes add up to the total only where nothing is missing. */
    return !a->broken && a->total >= 0 && a->bytes == (uint64_t)a->total;
}

bool assembly_add(struct colo *c, struct assembly *a, const struct packet *p)
{
    struct buf *buf = buf_new(&c->pool, p->size);

    memcpy(buf->bytes, p->payload, p->size);
    return add(c, a, p->offset, p->more, p->upper, buf);
}

/* Put the fragments of one datagram that came in two epochs together; from stays, empty. */
bool assembly_absorb(struct colo *c, struct assembly *into, struct assembly *from)
{
    bool whole = false;

    into->broken |= from->broken;
    while (from->first) {
        struct fragment *f = from->first;

        from->first = f->next;
        whole = add(c, into, f->offset, f->more, from->upper, f->buf) || whole;
        pool_give(&c->pool, f, sizeof(*f));
    }
    from->last = NULL;
    from->count = 0;
    from->bytes = 0;
    return whole;
}

struct buf *assembly_join(struct colo *c, const struct assembly *a)
{
    struct buf *whole = buf_new(&c->pool, (size_t)a->total);
    uint8_t *at = whole->bytes;

    for (const struct fragment *f = a->first; f; f = f->next) {
        memcpy(at, f->buf->bytes, f->buf->size);
        at += f->buf->size;
    }
    return whole;
}
