/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Checkpoints: closing an epoch, and what becomes of it.  docs/comparison.rst has the order of the calls. */
#include "state.h"

#include <stdlib.h>

int64_t colo_cut(struct colo *c, int64_t now_ns)
{
    struct cut *cut = &c->cut_storage;

    (void)now_ns;
    if (!c->protecting)
        return 0;
    if (c->cut)
        return -1;
    memset(cut, 0, sizeof(*cut));
    cut->epoch = c->epoch;
    cut->running = c->running;
    cut->stash_end = &cut->stash;
    list_init(&cut->touched);
    c->cut = cut;
    c->epoch = c->epoch == &c->epochs[0] ? &c->epochs[1] : &c->epochs[0];
    epoch_init(c->epoch);
    c->number++;
    c->running = false;
    c->requested = false;
    c->request.reason = COLO_NO_REQUEST; /* settled by this cut */
    return (int64_t)cut->epoch->held_packets;
}

static void drop_stash(struct colo *c, struct cut *cut)
{
    struct stashed *stashed;

    c->counters.secondary_dropped += cut->stash_count;
    while ((stashed = cut->stash)) {
        cut->stash = stashed->next;
        buf_drop(&c->pool, stashed->buf);
        pool_give(&c->pool, stashed, sizeof(*stashed));
    }
    cut->stash_end = &cut->stash;
    cut->stash_count = 0;
    cut->stash_bytes = 0;
}

static void free_assemblies(struct colo *c, struct link *list)
{
    while (!list_empty(list))
        assembly_free(c, CONTAINER(list->next, struct assembly, in_epoch));
}

/* What the closing epoch's flows said is of no more use; those that stay silent must not keep it. */
static void free_epoch(struct colo *c, struct epoch *closing)
{
    struct link *link;
    struct held *h;

    /* First all packets, which refer to connections; then the states that those are in. */
    while ((link = list_pop(&closing->held))) {
        h = CONTAINER(link, struct held, in_epoch);
        if (h->flow && h->flow->epoch != c->number && !linked(&h->flow->state->buffered))
            list_append(&closing->buffered, &h->flow->state->buffered);
        held_free(c, h);
    }
    free_assemblies(c, &closing->assemblies);
    free_assemblies(c, &closing->secondary_assemblies);
    while ((link = list_pop(&closing->leading)))
        ;
    while ((link = list_pop(&closing->buffered))) {
        struct state *s = CONTAINER(link, struct state, buffered);

        if (s == s->flow->state && s->flow->epoch != c->number)
            flow_rebase(c, s->flow);
    }
}

int colo_commit(struct colo *c, int64_t now_ns)
{
    struct cut *cut = c->cut;
    struct link *link;

    (void)now_ns;
    if (!c->protecting)
        return 0;
    if (!cut)
        return -1;
    c->cut = NULL;
    out_all(c, &cut->epoch, 1, COLO_COMMITTED);
    free_epoch(c, cut->epoch);
    drop_stash(c, cut);
    while ((link = list_pop(&cut->touched))) {
        struct flow *flow = CONTAINER(link, struct flow, touched);

        flow_forget_saved(c, flow);
        compare_drain_all(c, flow);
    }
    if (c->flow_count >= c->config.flows)
        flow_forget_to(c, c->config.flows / 2);
    return 0;
}

void colo_secondary_resumed(struct colo *c, int64_t now_ns)
{
    if (!c->protecting || c->running)
        return;
    c->running = true;
    c->resumed_ns = now_ns;
    if (c->cut)
        drop_stash(c, c->cut);
}

/* A packet to be compared again after an abort, or a datagram that the abort made whole. */
struct again {
    uint64_t order; /* a datagram's place in its flow is where its last fragment came */
    struct held *held;
    struct assembly *whole;
};

static int by_last_order(const void *one, const void *other)
{
    uint64_t a = ((const struct again *)one)->order, b = ((const struct again *)other)->order;

    return (a > b) - (a < b);
}

/* What the SVM said before the cut has not aged meanwhile. */
static void rejuvenate(struct epoch *epoch, int64_t now_ns)
{
    for (struct link *link = epoch->early.next; link != &epoch->early; link = link->next)
        CONTAINER(link, struct early, in_epoch)->seen_ns = now_ns;
    for (struct link *link = epoch->secondary_assemblies.next; link != &epoch->secondary_assemblies; link = link->next)
        CONTAINER(link, struct assembly, in_epoch)->seen_ns = now_ns;
}

/* Put the fragments that came since the cut to those that came before; returns what is whole now, or NULL. */
static struct assembly *rejoin(struct colo *c, int64_t now_ns, struct assembly *since)
{
    struct assembly *a = assembly_of(c, &since->key, false, now_ns);
    struct held *h = since->held;
    bool whole;

    if (!a->held) {
        a->held = h;
    } else {
        struct held *into = a->held;
        struct part *part = h->parts, *oldest = NULL;

        while (part) { /* newest first: turned round to be added in order */
            struct part *next = part->next;

            part->next = oldest;
            oldest = part;
            part = next;
        }
        h->parts = NULL;
        held_add_part(c, into, h->id, h->order, 0);
        for (part = oldest; part; part = oldest) {
            oldest = part->next;
            held_add_part(c, into, part->id, part->order, 0);
            pool_give(&c->pool, part, sizeof(*part));
        }
        into->bytes += h->bytes; /* the epoch has counted them */
        list_remove(&h->in_epoch);
        held_free(c, h);
    }
    whole = assembly_absorb(c, a, since);
    assembly_free(c, since);
    return whole ? a : NULL;
}

int colo_abort_cut(struct colo *c, int64_t now_ns)
{
    struct cut *cut = c->cut;
    struct epoch *since = c->epoch, *epoch;
    struct stashed *stashed;
    struct again *again;
    struct link *link;
    size_t count = 0, room;

    if (!c->protecting)
        return 0;
    if (!cut || c->running)
        return -1;
    c->cut = NULL;
    epoch = c->epoch = cut->epoch;
    c->number--;
    c->running = cut->running;
    c->resumed_ns = now_ns;
    c->requested = false;
    c->request.reason = COLO_NO_REQUEST;
    rejuvenate(epoch, now_ns);

    c->restoring = true;
    room = since->held_packets * sizeof(*again);
    again = pool_take(&c->pool, room);
    for (link = since->held.next; link != &since->held; link = link->next) {
        struct held *h = CONTAINER(link, struct held, in_epoch);

        held_let_go(c, h);
        if (h->flow)
            again[count++] = (struct again){h->last_order, h, NULL};
    }
    while ((link = list_pop(&cut->touched)))
        flow_restore(c, CONTAINER(link, struct flow, touched));
    list_join(&epoch->held, &since->held);
    epoch->held_bytes += since->held_bytes;
    epoch->held_packets += since->held_packets;
    while (!list_empty(&since->assemblies)) {
        struct assembly *whole = rejoin(c, now_ns, CONTAINER(since->assemblies.next, struct assembly, in_epoch));

        if (whole)
            again[count++] = (struct again){whole->held->last_order, NULL, whole};
    }
    qsort(again, count, sizeof(*again), by_last_order);
    for (size_t i = 0; i < count; i++) {
        if (again[i].held)
            compare_again(c, now_ns, again[i].held);
        else
            compare_joined(c, now_ns, again[i].whole);
    }
    pool_give(&c->pool, again, room);
    while ((stashed = cut->stash)) {
        cut->stash = stashed->next;
        if (c->running)
            compare_secondary(c, now_ns, &stashed->frame);
        buf_drop(&c->pool, stashed->buf);
        pool_give(&c->pool, stashed, sizeof(*stashed));
    }
    c->restoring = false;
    ask_limits(c);
    return 0;
}

static void forget_everything(struct colo *c)
{
    struct epoch *epochs[] = {c->cut ? c->cut->epoch : c->epoch, c->epoch};

    for (size_t i = 0; i < (c->cut ? 2 : 1); i++) {
        struct link *link;

        while ((link = list_pop(&epochs[i]->held)))
            held_free(c, CONTAINER(link, struct held, in_epoch));
        free_assemblies(c, &epochs[i]->assemblies);
        free_assemblies(c, &epochs[i]->secondary_assemblies);
    }
    if (c->cut) {
        struct link *link;

        drop_stash(c, c->cut);
        while ((link = list_pop(&c->cut->touched)))
            flow_forget_saved(c, CONTAINER(link, struct flow, touched));
        c->cut = NULL;
    }
    while (!list_empty(&c->flow_list))
        flow_forget(c, CONTAINER(c->flow_list.next, struct flow, in_flows));
    epoch_init(c->epoch);
}

void colo_release_all(struct colo *c, int64_t now_ns)
{
    struct epoch *epochs[] = {c->cut ? c->cut->epoch : c->epoch, c->epoch};

    (void)now_ns;
    out_all(c, epochs, c->cut ? 2 : 1, COLO_UNPROTECTED);
    forget_everything(c);
    c->protecting = c->running = c->requested = false;
    c->request.reason = COLO_NO_REQUEST;
}

/* -- a comparator's birth and end -- */

/* A power of two that is not less than count, within reason. */
static uint64_t buckets(uint64_t count)
{
    uint64_t size = 64;

    while (size < count && size < (uint64_t)1 << 20)
        size *= 2;
    return size;
}

struct colo *colo_new(const struct colo_config *config, int64_t now_ns)
{
    struct colo *c = calloc(1, sizeof(*c));
    uint64_t flows = buckets(config->flows);
    uint64_t contents = buckets(config->held_packets + config->secondary_bytes / (2 * DATAGRAM_OVERHEAD_BYTES));

    if (!c)
        return NULL;
    c->config = *config;
    c->seed = (struct hash_seed){{config->seed[0], config->seed[1]}};
    c->protecting = c->running = true;
    c->resumed_ns = now_ns;
    c->epoch = &c->epochs[0];
    epoch_init(c->epoch);
    list_init(&c->flow_list);
    c->flow_mask = flows - 1;
    c->content_mask = contents - 1;
    c->flows = calloc(flows, sizeof(struct flow *));
    c->contents = calloc(contents, sizeof(struct content *));
    c->assemblies = calloc(ASSEMBLY_BUCKETS, sizeof(struct assembly *));
    if (!history_init(&c->history) || !c->flows || !c->contents || !c->assemblies) {
        colo_free(c);
        return NULL;
    }
    return c;
}

void colo_free(struct colo *c)
{
    if (!c)
        return;
    if (c->flows && c->contents && c->assemblies)
        forget_everything(c);
    flow_free_slabs(c);
    pool_empty(&c->pool);
    free(c->flows);
    free(c->contents);
    free(c->assemblies);
    history_free(&c->history);
    free(c->out);
    free(c);
}

/* -- what comes out -- */

size_t colo_released(const struct colo *c, const struct colo_release **out)
{
    *out = c->out;
    return c->out_count;
}

void colo_drained(struct colo *c)
{
    c->out_count = 0;
}

int colo_requested(const struct colo *c)
{
    return c->request.reason;
}

int colo_request(struct colo *c, char *detail, size_t size)
{
    int reason = c->request.reason;

    if (size)
        detail[0] = '\0';
    if (reason != COLO_NO_REQUEST)
        words_request(&c->request, detail, size);
    c->request.reason = COLO_NO_REQUEST;
    return reason;
}

void colo_counters(const struct colo *c, struct colo_counters *out)
{
    *out = c->counters;
    out->held = c->epoch->held_packets;
    out->held_bytes = c->epoch->held_bytes;
    if (c->cut) {
        out->held += c->cut->epoch->held_packets;
        out->held_bytes += c->cut->epoch->held_bytes;
    }
    out->flows = c->flow_count;
}
