/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "mappings.h"

#include <stdlib.h>
#include <sys/random.h>

#define BUCKETS_FIRST 64u
#define EVICTED_SHARE 16u /* of the limit, at once, so that a flood of SYNs does not search the table for each */

static struct mapping **bucket_of(struct rewriter *r, const struct flow_key *key)
{
    return &r->buckets[hash_bytes(&r->seed, 0, (const uint8_t *)key, sizeof(*key)) & r->bucket_mask];
}

struct mapping *mapping_find(struct rewriter *r, const struct flow_key *key)
{
    struct mapping *flow = *bucket_of(r, key);

    while (flow && memcmp(&flow->key, key, sizeof(*key)))
        flow = flow->next;
    return flow;
}

/* Twice as many buckets; the table as it is if there is no memory for them. */
static void grow(struct rewriter *r)
{
    uint32_t count = (r->bucket_mask + 1) * 2;
    struct mapping **buckets = calloc(count, sizeof(*buckets));

    if (!buckets)
        return;
    free(r->buckets);
    r->buckets = buckets;
    r->bucket_mask = count - 1;
    for (struct link *link = r->flows.next; link != &r->flows; link = link->next) {
        struct mapping *flow = CONTAINER(link, struct mapping, link);
        struct mapping **bucket = bucket_of(r, &flow->key);

        flow->next = *bucket;
        *bucket = flow;
    }
}

/* -- forgetting -- */

void mapping_set_offset(struct rewriter *r, struct mapping *flow, struct maybe offset)
{
    r->nr_rewritten -= mapped(flow);
    flow->offset = offset;
    r->nr_rewritten += mapped(flow);
}

void mapping_forget(struct rewriter *r, struct mapping *flow)
{
    struct mapping **at = bucket_of(r, &flow->key);

    while (*at != flow)
        at = &(*at)->next;
    *at = flow->next;
    mapping_set_offset(r, flow, (struct maybe){false, 0});
    held_discard(r, flow);
    list_remove(&flow->link);
    r->nr_flows--;
    free(flow);
}

void mapping_forget_all(struct rewriter *r)
{
    while (!list_empty(&r->flows))
        mapping_forget(r, CONTAINER(r->flows.next, struct mapping, link));
    held_clear(&r->ready);
}

void rewriter_expire(struct rewriter *r, double now_s)
{
    for (struct link *link = r->flows.next, *next; link != &r->flows; link = next) {
        struct mapping *flow = CONTAINER(link, struct mapping, link);

        next = link->next;
        if (flow->deadline_s <= now_s)
            mapping_forget(r, flow);
    }
}

static int sooner(const void *one, const void *other)
{
    const struct mapping *a = *(struct mapping *const *)one, *b = *(struct mapping *const *)other;

    if (mapped(a) != mapped(b))
        return mapped(a) - mapped(b);
    return (a->deadline_s > b->deadline_s) - (a->deadline_s < b->deadline_s);
}

/* The limit is reached: what is over goes, else flows without a mapping, those whose time is next first. */
static void make_room(struct rewriter *r, double now_s)
{
    struct mapping **all;
    uint64_t count = 0, victims = r->limits.flows / EVICTED_SHARE;

    rewriter_expire(r, now_s);
    if (r->nr_flows < r->limits.flows)
        return;
    all = malloc(r->nr_flows * sizeof(*all));
    if (!all) {
        mapping_forget(r, CONTAINER(r->flows.next, struct mapping, link));
        r->counters.evicted_flows++;
        return;
    }
    for (struct link *link = r->flows.next; link != &r->flows; link = link->next)
        all[count++] = CONTAINER(link, struct mapping, link);
    qsort(all, count, sizeof(*all), sooner);
    if (!victims)
        victims = 1;
    /* The first goes whatever it is; of the others, none with a mapping. */
    for (uint64_t i = 0; i < victims && i < count && (!i || !mapped(all[i])); i++) {
        mapping_forget(r, all[i]);
        r->counters.evicted_flows++;
    }
    free(all);
}

struct mapping *mapping_add(struct rewriter *r, double now_s, const struct flow_key *key)
{
    struct mapping *flow, **bucket;

    if (r->nr_flows >= r->limits.flows)
        make_room(r, now_s);
    if (r->nr_flows > r->bucket_mask)
        grow(r);
    flow = calloc(1, sizeof(*flow));
    if (!flow)
        return NULL;
    flow->key = *key;
    list_init(&flow->held);
    bucket = bucket_of(r, key);
    flow->next = *bucket;
    *bucket = flow;
    list_append(&r->flows, &flow->link);
    r->nr_flows++;
    return flow;
}

void mapping_start(struct mapping *flow, struct maybe isn, struct maybe peer_next, struct maybe tsval, bool guest_opened)
{
    static const struct maybe unknown;

    flow->svm_isn = isn;
    flow->peer_next = peer_next;
    flow->svm_tsval = tsval;
    flow->guest_opened = guest_opened;
    flow->fast_open = false;
    flow->guest_ack = flow->guest_fin = flow->client_fin = unknown;
    flow->finished = 0;
    flow->reset = false;
}

/* -- packets that wait -- */

bool held_keep(struct rewriter *r, struct mapping *flow, const uint8_t *packet, size_t size)
{
    struct waiting *waiting;

    if (flow->held_packets >= r->limits.held_per_flow || r->held_packets >= r->limits.held)
        return false;
    waiting = malloc(sizeof(*waiting) + size);
    if (!waiting)
        return false;
    waiting->size = (uint32_t)size;
    memcpy(waiting->packet, packet, size);
    list_append(&flow->held, &waiting->link);
    flow->held_packets++;
    r->held_packets++;
    return true;
}

void held_clear(struct link *list)
{
    struct link *link;

    while ((link = list_pop(list)))
        free(CONTAINER(link, struct waiting, link));
}

void held_discard(struct rewriter *r, struct mapping *flow)
{
    r->held_packets -= flow->held_packets;
    flow->held_packets = 0;
    held_clear(&flow->held);
}

/* -- one SVM's -- */

struct rewriter *rewriter_new(const struct rewrite_limits *limits)
{
    struct rewriter *r = calloc(1, sizeof(*r));

    if (!r)
        return NULL;
    r->limits = *limits;
    if (!r->limits.flows)
        r->limits.flows = 1;
    r->learning = true;
    list_init(&r->flows);
    list_init(&r->ready);
    r->bucket_mask = BUCKETS_FIRST - 1;
    r->buckets = calloc(BUCKETS_FIRST, sizeof(*r->buckets));
    if (!r->buckets || getrandom(&r->seed, sizeof(r->seed), 0) != sizeof(r->seed)) {
        rewriter_free(r);
        return NULL;
    }
    return r;
}

void rewriter_free(struct rewriter *r)
{
    if (!r)
        return;
    if (r->buckets)
        mapping_forget_all(r);
    rewriter_free(r->inherited);
    free(r->buckets);
    free(r);
}

const struct rewrite_counters *rewriter_counters(const struct rewriter *r)
{
    return &r->counters;
}

uint64_t rewriter_flows(const struct rewriter *r)
{
    return r->nr_flows;
}

uint64_t rewriter_rewritten_flows(const struct rewriter *r)
{
    return r->nr_rewritten;
}
