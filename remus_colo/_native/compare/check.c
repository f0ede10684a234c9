/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What must always hold, for tests and fuzzing: costs time in proportion to everything that is known. */
#include "state.h"

#define MUST(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return #condition;                                                                                         \
    } while (0)

static const char *check_runs(const struct runs *runs, int64_t from)
{
    uint64_t bytes = 0;
    const struct run *last = NULL;

    MUST(runs->count ? runs->first + runs->count <= runs->room : !runs->array && !runs->room);
    MUST(runs->count <= RUNS_MAX);
    for (uint32_t i = 0; i < runs->count; last = runs_at(runs, i), i++) {
        const struct run *run = runs_at(runs, i);

        MUST(run->size);
        MUST(run->start >= from);
        MUST(run->data >= run->buf->bytes && run->data + run->size <= run->buf->bytes + run->buf->size);
        MUST(!last || run->start >= last->start + last->size);
        bytes += run->size + RUN_OVERHEAD_BYTES;
    }
    MUST(runs->bytes == bytes);
    return NULL;
}

static const char *check_stream(const struct state *s)
{
    uint64_t kept = 0;
    const char *wrong;
    bool primary = false, secondary = false;

    MUST(s->secondary->index <= s->primary->index + AHEAD_MAX);
    for (const struct conn *conn = s->oldest; conn; conn = conn->next) {
        MUST(!conn->next || conn->next->index == conn->index + 1);
        primary |= conn == s->primary;
        secondary |= conn == s->secondary;
        if ((wrong = check_runs(&conn->primary, conn->watermark)) ||
            (wrong = check_runs(&conn->secondary, conn->watermark)) || (wrong = check_runs(&conn->low, NOWHERE)))
            return wrong;
        kept += conn->counted;
        MUST(conn->counted == conn->secondary.bytes + conn->low.bytes + (conn->syn_payload ? conn->syn_payload->size : 0));
        if (conn->watermark == NOWHERE || s->diverged)
            continue;
        MUST(conn->primary_high != NOWHERE && conn->watermark <= conn->primary_high);
        MUST(runs_start(&conn->primary) != conn->watermark || runs_start(&conn->secondary) != conn->watermark);
    }
    MUST(primary && secondary);
    MUST(kept == s->kept_bytes);
    return NULL;
}

static const char *check_datagrams(const struct state *s)
{
    uint64_t kept = 0;

    for (struct link *link = s->contents.next; link != &s->contents; link = link->next) {
        const struct content *content = CONTAINER(link, struct content, in_state);

        MUST(content->state == s);
        MUST(!list_empty(&content->entries));
        for (struct link *entry = content->entries.next; entry != &content->entries; entry = entry->next) {
            if (content->waiting) {
                MUST(CONTAINER(entry, struct held, in_content)->content == content);
                MUST(!CONTAINER(entry, struct held, in_content)->matched);
            } else {
                MUST(CONTAINER(entry, struct early, in_content)->content == content);
                kept += CONTAINER(entry, struct early, in_content)->buf->size + DATAGRAM_OVERHEAD_BYTES;
            }
        }
    }
    MUST(kept == s->kept_bytes);
    return NULL;
}

static const char *check_state(const struct state *s)
{
    return s->flow->kind == KIND_TCP ? check_stream(s) : check_datagrams(s);
}

static const char *check_epoch(const struct epoch *epoch, uint64_t *in_flows)
{
    uint64_t bytes = 0, packets = 0, order = 0;
    bool first = true;

    for (struct link *link = epoch->held.next; link != &epoch->held; link = link->next) {
        const struct held *h = CONTAINER(link, struct held, in_epoch);
        uint64_t parts = 1;

        for (const struct part *part = h->parts; part; part = part->next)
            parts++;
        MUST(parts == h->packets);
        MUST(first || h->order > order);
        first = false;
        order = h->order;
        bytes += h->bytes;
        packets += h->packets;
        MUST(linked(&h->in_flow) == (h->flow != NULL));
        *in_flows += h->flow != NULL;
    }
    MUST(bytes == epoch->held_bytes && packets == epoch->held_packets);
    return NULL;
}

static const char *check_flow(struct colo *c, struct flow *flow, uint64_t *held)
{
    uint64_t hash, order = 0;
    const char *wrong;

    MUST(flow_find(c, &flow->key, &hash) == flow);
    MUST(flow->epoch <= c->number);
    MUST(flow->state->flow == flow);
    MUST(!flow->saved || c->cut);
    if ((wrong = check_state(flow->state)) || (flow->saved && (wrong = check_state(flow->saved))))
        return wrong;
    for (struct link *link = flow->held.next; link != &flow->held; link = link->next) {
        const struct held *h = CONTAINER(link, struct held, in_flow);

        MUST(h->flow == flow);
        MUST(h->last_order >= order);
        MUST(c->cut || !h->matched || (flow->kind != KIND_UDP && flow->kind != KIND_ICMP));
        order = h->last_order;
        (*held)++;
    }
    if (flow->epoch == c->number) {
        MUST(!flow->state->kept_bytes || linked(&flow->state->buffered));
        if (!c->cut && !list_empty(&flow->held)) {
            struct held *h = CONTAINER(flow->held.next, struct held, in_flow);

            MUST(!(flow->kind == KIND_TCP ? stream_ready(c, flow->state, h) : h->matched));
        }
    } else {
        MUST(!flow->saved && (c->cut || list_empty(&flow->held)));
    }
    return NULL;
}

const char *colo_check(struct colo *c)
{
    uint64_t held_in_epochs = 0, held_in_flows = 0, kept = 0, flows = 0, assemblies = 0;
    const char *wrong;

    if ((wrong = check_epoch(c->epoch, &held_in_epochs)) || (c->cut && (wrong = check_epoch(c->cut->epoch, &held_in_epochs))))
        return wrong;
    for (struct link *link = c->flow_list.next; link != &c->flow_list; link = link->next, flows++) {
        struct flow *flow = CONTAINER(link, struct flow, in_flows);

        if ((wrong = check_flow(c, flow, &held_in_flows)))
            return wrong;
        if (flow->epoch == c->number)
            kept += flow->state->kept_bytes;
    }
    MUST(flows == c->flow_count);
    MUST(held_in_epochs == held_in_flows);
    MUST(kept == c->epoch->kept_bytes && kept <= c->config.secondary_bytes);
    for (struct link *link = c->epoch->secondary_assemblies.next; link != &c->epoch->secondary_assemblies; link = link->next)
        assemblies += assembly_cost(CONTAINER(link, struct assembly, in_epoch));
    MUST(assemblies == c->epoch->assembly_bytes && assemblies <= c->config.secondary_bytes);
    for (struct link *link = c->epoch->assemblies.next; link != &c->epoch->assemblies; link = link->next)
        MUST(CONTAINER(link, struct assembly, in_epoch)->held->flow == NULL);
    MUST(c->protecting || (!flows && list_empty(&c->epoch->held)));
    return NULL;
}
