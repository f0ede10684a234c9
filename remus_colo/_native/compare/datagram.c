/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Flows whose packets are compared whole: UDP, ICMP, other protocols.  A datagram has no position in its flow, so it is
 * matched by content, wherever in the flow the other side sent it.  Equal datagrams count: two of the PVM need two of the
 * SVM.
 *
 * The datagrams that wait for an equal lie in one hash table, by content; equal ones share an entry.
 */
#include "state.h"

#define LOOKED_AT_MAX 16

static uint64_t content_hash(const struct colo *c, const struct state *s, const struct packet *p)
{
    uint64_t hash = hash_bytes(&c->seed, (uintptr_t)s, p->prefix, p->prefixed);

    return hash_bytes(&c->seed, hash, p->payload, p->size);
}

static const struct buf *content_buf(const struct content *content)
{
    struct link *oldest = content->entries.next;

    return content->waiting ? CONTAINER(oldest, struct held, in_content)->buf
                            : CONTAINER(oldest, struct early, in_content)->buf;
}

static bool same_content(const struct content *content, const struct packet *p)
{
    const struct buf *buf = content_buf(content);

    return buf->size == p->prefixed + p->size && !memcmp(buf->bytes, p->prefix, p->prefixed) &&
           (!p->size || !memcmp(buf->bytes + p->prefixed, p->payload, p->size));
}

static struct content *content_find(struct colo *c, const struct state *s, const struct packet *p, uint64_t hash)
{
    struct content *content = c->contents[hash & c->content_mask];

    while (content && !(content->hash == hash && content->state == s && same_content(content, p)))
        content = content->chain;
    return content;
}

static struct content *content_new(struct colo *c, struct state *s, uint64_t hash, bool waiting)
{
    struct content *content = pool_take(&c->pool, sizeof(*content)), **bucket = &c->contents[hash & c->content_mask];

    content->state = s;
    content->hash = hash;
    content->waiting = waiting;
    list_init(&content->entries);
    list_append(&s->contents, &content->in_state);
    content->chain = *bucket;
    *bucket = content;
    return content;
}

static void content_free(struct colo *c, struct content *content)
{
    struct content **at = &c->contents[content->hash & c->content_mask];

    while (*at != content)
        at = &(*at)->chain;
    *at = content->chain;
    list_remove(&content->in_state);
    pool_give(&c->pool, content, sizeof(*content));
}

static struct buf *content_copy(struct colo *c, const struct packet *p)
{
    struct buf *buf = buf_new(&c->pool, (size_t)p->prefixed + p->size);

    memcpy(buf->bytes, p->prefix, p->prefixed);
    if (p->size)
        memcpy(buf->bytes + p->prefixed, p->payload, p->size);
    return buf;
}

/* Take out an SVM datagram. */
static void early_free(struct colo *c, struct early *early)
{
    struct content *content = early->content;

    content->state->kept_bytes -= early->buf->size + DATAGRAM_OVERHEAD_BYTES;
    list_remove(&early->in_epoch);
    list_remove(&early->in_content);
    if (list_empty(&content->entries))
        content_free(c, content);
    buf_drop(&c->pool, early->buf);
    pool_give(&c->pool, early, sizeof(*early));
}

void datagram_drop(struct colo *c, struct early *early)
{
    early_free(c, early);
    c->counters.secondary_dropped++;
}

/* Take h out of those that wait for an equal. */
void datagram_let_go(struct colo *c, struct held *h)
{
    struct content *content = h->content;

    if (!content)
        return;
    h->content = NULL;
    list_remove(&h->in_content);
    if (list_empty(&content->entries))
        content_free(c, content);
}

/* A PVM datagram: sets matched; otherwise, and if it is whole, it waits for its equal. */
void datagram_primary(struct colo *c, struct state *s, struct held *h, const struct packet *p)
{
    uint64_t hash;
    struct content *content;

    h->conn = NULL;
    h->content = NULL;
    h->matched = false;
    if (p->lacks) {
        if (!h->buf)
            h->buf = content_copy(c, p);
        return;
    }
    hash = content_hash(c, s, p);
    content = content_find(c, s, p, hash);
    if (content && !content->waiting) {
        early_free(c, CONTAINER(content->entries.next, struct early, in_content));
        h->matched = true;
    }
    if (!h->buf)
        h->buf = h->matched ? NULL : content_copy(c, p);
    if (h->matched)
        return;
    if (!content)
        content = content_new(c, s, hash, true);
    h->content = content;
    list_append(&content->entries, &h->in_content);
}

/* An SVM datagram: returns its equal, which waited for it; NULL if there is none, and it is kept. */
struct held *datagram_secondary(struct colo *c, struct state *s, struct epoch *epoch, const struct packet *p, int64_t now_ns)
{
    uint64_t hash = content_hash(c, s, p);
    struct content *content = content_find(c, s, p, hash);
    struct early *early;

    if (content && content->waiting) {
        struct held *h = CONTAINER(content->entries.next, struct held, in_content);

        datagram_let_go(c, h);
        h->matched = true;
        return h;
    }
    if (!content)
        content = content_new(c, s, hash, false);
    early = pool_take(&c->pool, sizeof(*early));
    early->content = content;
    early->buf = content_copy(c, p);
    early->seen_ns = now_ns;
    list_append(&content->entries, &early->in_content);
    list_append(&epoch->early, &early->in_epoch);
    s->kept_bytes += early->buf->size + DATAGRAM_OVERHEAD_BYTES;
    return NULL;
}

/*
 * The other side answered the same echo request (type, identifier, sequence number) with other data.  Of waiting: look
 * among the PVM's.
 */
bool datagram_contradicts(const struct state *s, const struct packet *p, bool waiting)
{
    unsigned looked = 0;

    if (p->kind != KIND_ICMP || p->prefixed != 4)
        return false;
    for (struct link *link = s->contents.next; link != &s->contents && looked < LOOKED_AT_MAX; link = link->next, looked++) {
        const struct content *content = CONTAINER(link, struct content, in_state);
        const struct buf *buf = content_buf(content);

        if (content->waiting == waiting && buf->size >= 4 && !memcmp(buf->bytes, p->prefix, 4) &&
            (buf->size != 4 + p->size || memcmp(buf->bytes + 4, p->payload, p->size)))
            return true;
    }
    return false;
}

/* Whether a datagram of this size (with its prefix) of that side has no equal yet. */
bool datagram_waits(const struct state *s, bool primary, uint32_t size)
{
    unsigned looked = 0;

    for (struct link *link = s->contents.next; link != &s->contents && looked < LOOKED_AT_MAX; link = link->next, looked++) {
        const struct content *content = CONTAINER(link, struct content, in_state);

        if (content->waiting == primary && content_buf(content)->size == size)
            return true;
    }
    return false;
}

void datagram_init(struct state *s)
{
    list_init(&s->contents);
}

/* Forget all; the PVM's packets that wait stay held without an equal. */
void datagram_clear(struct colo *c, struct state *s)
{
    struct link *link;

    while ((link = s->contents.next) != &s->contents) {
        struct content *content = CONTAINER(link, struct content, in_state);

        if (content->waiting)
            datagram_let_go(c, CONTAINER(content->entries.next, struct held, in_content));
        else
            early_free(c, CONTAINER(content->entries.next, struct early, in_content));
    }
}
