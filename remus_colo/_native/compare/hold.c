/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The PVM's packets that wait for leave, and the list of those that have got it. */
#include "state.h"

#include <stdlib.h>

struct held *held_new(struct colo *c, int64_t now_ns, uint64_t id, uint32_t bytes)
{
    struct held *h = pool_take(&c->pool, sizeof(*h));

    h->in_epoch = h->in_flow = h->in_content = (struct link){NULL, NULL};
    h->flow = NULL;
    h->conn = NULL;
    h->content = NULL;
    h->parts = NULL;
    h->buf = NULL;
    h->data = NULL;
    h->size = 0;
    h->id = id;
    h->order = h->last_order = c->order++;
    h->arrived_ns = now_ns;
    h->bytes = bytes;
    h->packets = 1;
    h->lacks = 0;
    h->flags = 0;
    h->matched = h->malformed = false;
    return h;
}

/* What the packet says of itself; its content stays in the frame until held_wait(). */
void held_describes(struct held *h, const struct packet *p)
{
    h->kind = (uint8_t)p->kind;
    h->malformed = p->malformed;
    h->flags = p->flags;
    h->prefixed = p->prefixed;
    h->seq = p->seq;
    h->wire_ack = p->ack;
    h->urgent = p->urgent;
    h->lacks = p->lacks;
    h->data = p->payload;
    h->size = p->size;
}

void held_add_part(struct colo *c, struct held *h, uint64_t id, uint64_t order, uint32_t bytes)
{
    struct part *part = pool_take(&c->pool, sizeof(*part));

    *part = (struct part){h->parts, id, order};
    h->parts = part;
    h->last_order = order;
    h->bytes += bytes;
    h->packets++;
}

/* It must wait in its flow: keep what it says. */
void held_wait(struct colo *c, struct flow *flow, struct held *h, const struct packet *p)
{
    if (!h->buf && h->prefixed + h->size) {
        h->buf = buf_new(&c->pool, (size_t)h->prefixed + h->size);
        memcpy(h->buf->bytes, p->prefix, h->prefixed);
        if (h->size)
            memcpy(h->buf->bytes + h->prefixed, p->payload, h->size);
    }
    h->data = h->buf ? h->buf->bytes + h->prefixed : NULL;
    if (h->conn)
        h->conn->held++;
    list_append(&flow->held, &h->in_flow);
}

/* It waits no more in its flow. */
void held_let_go(struct colo *c, struct held *h)
{
    if (linked(&h->in_flow)) {
        list_remove(&h->in_flow);
        if (h->conn)
            h->conn->held--;
    }
    h->conn = NULL;
    datagram_let_go(c, h);
}

void held_free(struct colo *c, struct held *h)
{
    held_let_go(c, h);
    for (struct part *part = h->parts, *next; part; part = next) {
        next = part->next;
        pool_give(&c->pool, part, sizeof(*part));
    }
    buf_drop(&c->pool, h->buf);
    pool_give(&c->pool, h, sizeof(*h));
}

void epoch_init(struct epoch *epoch)
{
    memset(epoch, 0, sizeof(*epoch));
    list_init(&epoch->held);
    list_init(&epoch->early);
    list_init(&epoch->buffered);
    list_init(&epoch->leading);
    list_init(&epoch->assemblies);
    list_init(&epoch->secondary_assemblies);
}

void epoch_enter(struct epoch *epoch, struct held *h)
{
    list_append(&epoch->held, &h->in_epoch);
    epoch->held_bytes += h->bytes;
    epoch->held_packets += h->packets;
}

void epoch_leave(struct epoch *epoch, struct held *h)
{
    list_remove(&h->in_epoch);
    epoch->held_bytes -= h->bytes;
    epoch->held_packets -= h->packets;
}

/* -- what leaves -- */

void out_id(struct colo *c, uint64_t id, enum colo_how how)
{
    if (c->out_count == c->out_room) {
        c->out_room = c->out_room ? 2 * c->out_room : 256;
        c->out = realloc(c->out, c->out_room * sizeof(*c->out));
        if (!c->out)
            out_of_memory();
    }
    c->out[c->out_count++] = (struct colo_release){id, how};
    if (how == COLO_EQUAL)
        c->counters.released_equal++;
    else if (how == COLO_COMMITTED)
        c->counters.released_commit++;
    else
        c->counters.released_passed++;
}

static void out_parts(struct colo *c, const struct part *newest, enum colo_how how)
{
    if (newest) {
        out_parts(c, newest->next, how);
        out_id(c, newest->id, how);
    }
}

void out_held(struct colo *c, const struct held *h, enum colo_how how)
{
    out_id(c, h->id, how);
    out_parts(c, h->parts, how);
}

static int by_order(const void *one, const void *other)
{
    uint64_t a = ((const struct part *)one)->order, b = ((const struct part *)other)->order;

    return (a > b) - (a < b);
}

/* All that epochs, of which the older comes first, hold, in order of arrival. */
void out_all(struct colo *c, struct epoch *const *epochs, size_t count, enum colo_how how)
{
    size_t total = 0, at = 0;
    struct part *all;
    bool sorted = true;

    for (size_t i = 0; i < count; i++)
        total += epochs[i]->held_packets;
    if (!total)
        return;
    all = pool_take(&c->pool, total * sizeof(*all));
    for (size_t i = 0; i < count; i++) {
        for (struct link *link = epochs[i]->held.next; link != &epochs[i]->held; link = link->next) {
            const struct held *h = CONTAINER(link, struct held, in_epoch);

            all[at++] = (struct part){NULL, h->id, h->order};
            for (const struct part *part = h->parts; part; part = part->next) {
                all[at++] = *part;
                sorted = false;
            }
        }
    }
    if (!sorted) /* only fragments of one datagram are not in order already */
        qsort(all, total, sizeof(*all), by_order);
    for (at = 0; at < total; at++)
        out_id(c, all[at].id, how);
    pool_give(&c->pool, all, total * sizeof(*all));
}
