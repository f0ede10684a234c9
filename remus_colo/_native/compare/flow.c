/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The flows: finding them, taking them through the epochs, forgetting them. */
#include "state.h"

#include <stdlib.h>

#define LOOKED_AT_MAX 16 /* flows that one packet, or 64 times that one tick, looks at */

static void state_init(struct state *s, struct flow *flow)
{
    s->flow = flow;
    s->kept_bytes = 0;
    s->buffered = s->leading = (struct link){NULL, NULL};
    s->leading_ns = 0;
    s->diverged = s->progressed = false;
    if (flow->kind == KIND_TCP)
        stream_init(s);
    else
        datagram_init(s);
}

/* Forget what is in it; it leaves its epoch's lists. */
static void state_clear(struct colo *c, struct state *s)
{
    if (linked(&s->buffered))
        list_remove(&s->buffered);
    if (linked(&s->leading))
        list_remove(&s->leading);
    if (s->flow->kind == KIND_TCP)
        stream_clear(c, s);
    else
        datagram_clear(c, s);
    s->diverged = s->progressed = false;
}

static struct state *state_new(struct colo *c, struct flow *flow)
{
    struct state *s = flow->state != &flow->own && flow->saved != &flow->own ? &flow->own
                                                                             : pool_take(&c->pool, sizeof(*s));

    state_init(s, flow);
    return s;
}

static void state_free(struct colo *c, struct state *s)
{
    state_clear(c, s);
    if (s != &s->flow->own)
        pool_give(&c->pool, s, sizeof(*s));
}

/* -- memory: flows lie in slabs, each on cache lines of its own -- */

struct slab {
    struct slab *next;
    struct flow *flows;
};

#define FLOW_BYTES ((sizeof(struct flow) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE)

static struct flow *flow_take(struct colo *c)
{
    struct flow *flow = c->free_flows;

    if (!flow) {
        struct slab *slab = pool_take(&c->pool, sizeof(*slab));
        uint8_t *at = pool_take_aligned(CACHE_LINE, SLAB_FLOWS * FLOW_BYTES);

        slab->flows = (struct flow *)at;
        slab->next = c->slabs;
        c->slabs = slab;
        for (unsigned i = 0; i < SLAB_FLOWS; i++, at += FLOW_BYTES) {
            flow = (struct flow *)at;
            flow->chain = c->free_flows;
            c->free_flows = flow;
        }
    }
    c->free_flows = flow->chain;
    return flow;
}

static void flow_give(struct colo *c, struct flow *flow)
{
    flow->chain = c->free_flows;
    c->free_flows = flow;
}

void flow_free_slabs(struct colo *c)
{
    struct slab *slab;

    while ((slab = c->slabs)) {
        c->slabs = slab->next;
        free(slab->flows);
        pool_give(&c->pool, slab, sizeof(*slab));
    }
    c->free_flows = NULL;
}

/* -- finding -- */

struct flow *flow_find(struct colo *c, const struct flow_key *key, uint64_t *hash)
{
    struct flow *flow;

    *hash = hash_bytes(&c->seed, 0, (const uint8_t *)key, sizeof(*key));
    flow = c->flows[*hash & c->flow_mask];
    while (flow && !(flow->hash == *hash && same_key(&flow->key, key)))
        flow = flow->chain;
    return flow;
}

/*
 * The bucket is fetched at once, the flow that it leads to when the packets before it have given it time to come.
 */
void colo_prefetch(struct colo *c, const struct colo_frame *frame)
{
    struct flow_key key;
    uint64_t *slot = &c->coming[c->coming_at++ % COMING], hash = *slot;
    const struct flow *flow = hash ? c->flows[hash & c->flow_mask] : NULL;

    if (flow) {
        for (size_t at = 0; at < offsetof(struct flow, own.first.low); at += CACHE_LINE)
            __builtin_prefetch((const uint8_t *)flow + at, 1);
    }
    *slot = 0;
    if (frame && packet_peek(&key, frame)) {
        *slot = hash_bytes(&c->seed, 0, (const uint8_t *)&key, sizeof(key));
        __builtin_prefetch(&c->flows[*slot & c->flow_mask]);
    }
}

struct flow *flow_new(struct colo *c, const struct packet *p, uint64_t hash, int64_t now_ns)
{
    struct flow *flow = flow_take(c), **bucket = &c->flows[hash & c->flow_mask];

    flow->hash = hash;
    flow->key = p->key;
    flow->kind = (uint8_t)p->kind;
    flow->epoch = c->number;
    flow->state = flow->saved = NULL;
    flow->last_ns = flow->queued_ns = now_ns;
    list_init(&flow->held);
    flow->touched = (struct link){NULL, NULL};
    flow->state = state_new(c, flow);
    if (c->cut) { /* an abort must find it as it would have been */
        flow->saved = state_new(c, flow);
        flow->saved_epoch = c->number - 1;
        list_append(&c->cut->touched, &flow->touched);
    }
    flow->chain = *bucket;
    *bucket = flow;
    list_append(&c->flow_list, &flow->in_flows);
    c->flow_count++;
    return flow;
}

static void rebase(struct colo *c, struct flow *flow, struct state *to, struct state *from)
{
    if (flow->kind == KIND_TCP)
        stream_rebase(c, to, from);
}

/* The flow's state in the running epoch, which it may have to step into. */
struct state *flow_step(struct colo *c, struct flow *flow)
{
    if (flow->epoch == c->number)
        return flow->state;
    if (c->cut) {
        struct state *next = state_new(c, flow);

        rebase(c, flow, next, flow->state);
        flow->saved = flow->state;
        flow->saved_epoch = flow->epoch;
        flow->state = next;
        flow->epoch = c->number;
        list_append(&c->cut->touched, &flow->touched);
    } else {
        flow_rebase(c, flow);
    }
    return flow->state;
}

/* Into the running epoch, without a way back. */
void flow_rebase(struct colo *c, struct flow *flow)
{
    struct state *s = flow->state;

    if (linked(&s->buffered))
        list_remove(&s->buffered);
    if (linked(&s->leading))
        list_remove(&s->leading);
    if (flow->kind == KIND_TCP)
        stream_rebase(c, s, s);
    else
        datagram_clear(c, s);
    s->diverged = s->progressed = false;
    flow->epoch = c->number;
}

/* After an abort: as it was before the cut. */
void flow_restore(struct colo *c, struct flow *flow)
{
    state_free(c, flow->state);
    flow->state = flow->saved;
    flow->epoch = flow->saved_epoch;
    flow->saved = NULL;
}

void flow_forget_saved(struct colo *c, struct flow *flow)
{
    state_free(c, flow->saved);
    flow->saved = NULL;
}

void flow_forget(struct colo *c, struct flow *flow)
{
    struct flow **at = &c->flows[flow->hash & c->flow_mask];

    while (*at != flow)
        at = &(*at)->chain;
    *at = flow->chain;
    list_remove(&flow->in_flows);
    if (flow->epoch == c->number)
        c->epoch->kept_bytes -= flow->state->kept_bytes;
    state_free(c, flow->state);
    flow_give(c, flow);
    c->flow_count--;
}

/* It holds packets, or SVM datagrams that the ageing will come back for. */
static bool in_use(const struct flow *flow)
{
    return !list_empty(&flow->held) || (flow->kind != KIND_TCP && flow->state->kept_bytes);
}

/* Nothing at all is lost with it. */
static bool is_over(const struct flow *flow)
{
    return !in_use(flow) && (flow->kind != KIND_TCP || stream_is_over(flow->state));
}

static void requeue(struct colo *c, struct flow *flow)
{
    list_remove(&flow->in_flows);
    list_append(&c->flow_list, &flow->in_flows);
}

/* Find a flow among the oldest that may be forgotten without loss. */
bool flow_make_room(struct colo *c)
{
    if (c->cut)
        return false;
    for (unsigned looked = 0; looked < LOOKED_AT_MAX && !list_empty(&c->flow_list); looked++) {
        struct flow *flow = CONTAINER(c->flow_list.next, struct flow, in_flows);

        if (is_over(flow)) {
            flow_forget(c, flow);
            return true;
        }
        requeue(c, flow);
    }
    return false;
}

/*
 * Forget what is idle.  A packet does not move its flow in the list, which would touch its neighbours' memory, too: a
 * flow that was used since it was queued is queued again when its turn comes.
 */
void flow_age(struct colo *c, int64_t now_ns)
{
    if (c->cut)
        return;
    for (unsigned looked = 0; looked < 64 * LOOKED_AT_MAX && !list_empty(&c->flow_list); looked++) {
        struct flow *flow = CONTAINER(c->flow_list.next, struct flow, in_flows);

        if (flow->queued_ns + c->config.idle_flow_ns > now_ns)
            return;
        if (!in_use(flow) && flow->last_ns + c->config.idle_flow_ns <= now_ns) {
            flow_forget(c, flow);
        } else {
            flow->queued_ns = now_ns;
            requeue(c, flow);
        }
    }
}

/* Forget the least recently used until count are left, as far as they can be forgotten. */
void flow_forget_to(struct colo *c, uint64_t count)
{
    for (uint64_t looked = c->flow_count; looked && c->flow_count > count; looked--) {
        struct flow *flow = CONTAINER(c->flow_list.next, struct flow, in_flows);

        if (in_use(flow))
            requeue(c, flow);
        else
            flow_forget(c, flow);
    }
}
