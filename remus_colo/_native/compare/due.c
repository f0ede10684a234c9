/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What time brings: packets that have waited too long, old state to be forgotten. */
#include "state.h"

void age_early(struct colo *c, int64_t now_ns)
{
    while (!list_empty(&c->epoch->early)) {
        struct early *early = CONTAINER(c->epoch->early.next, struct early, in_epoch);

        if (early->seen_ns + c->config.compare_timeout_ns > now_ns)
            return;
        c->epoch->kept_bytes -= early->buf->size + DATAGRAM_OVERHEAD_BYTES;
        datagram_drop(c, early);
    }
}

void drop_assembly(struct colo *c, struct assembly *a)
{
    c->epoch->assembly_bytes -= assembly_cost(a);
    c->counters.secondary_dropped += a->count;
    assembly_free(c, a);
}

struct assembly *oldest_secondary_assembly(const struct colo *c)
{
    return CONTAINER(c->epoch->secondary_assemblies.next, struct assembly, in_epoch);
}

void age_assemblies(struct colo *c, int64_t now_ns)
{
    while (!list_empty(&c->epoch->secondary_assemblies) &&
           oldest_secondary_assembly(c)->seen_ns + c->config.compare_timeout_ns <= now_ns)
        drop_assembly(c, oldest_secondary_assembly(c));
}

static int64_t due(const struct colo *c, int64_t since_ns)
{
    return (since_ns > c->resumed_ns ? since_ns : c->resumed_ns) + c->config.compare_timeout_ns;
}

static const struct held *oldest_held(const struct epoch *epoch)
{
    return list_empty(&epoch->held) ? NULL : CONTAINER(epoch->held.next, struct held, in_epoch);
}

static const struct state *oldest_lead(const struct colo *c)
{
    return list_empty(&c->epoch->leading) ? NULL : CONTAINER(c->epoch->leading.next, struct state, leading);
}

static void time_out(struct colo *c, const struct held *h)
{
    static const int reasons[] = {COLO_TCP_TIMEOUT, COLO_UDP_TIMEOUT, COLO_ICMP_TIMEOUT, COLO_OTHER_TIMEOUT};
    struct request *request;

    if (h->flow && h->flow->state->diverged) { /* asked for before, in vain: that checkpoint did not take place */
        ask_difference(c, h->flow->state, h->flow->state->difference);
        return;
    }
    c->counters.diverged++;
    request = ask(c, h->lacks ? COLO_TRUNCATED : reasons[h->kind], ASK_WAITS);
    if (!request)
        return;
    request->has_key = h->flow != NULL;
    if (h->flow)
        request->key = h->flow->key;
    words_waits(h, request->waits, sizeof(request->waits));
}

void colo_tick(struct colo *c, int64_t now_ns)
{
    const struct held *h;
    const struct state *lead;

    if (!c->protecting)
        return;
    age_early(c, now_ns);
    age_assemblies(c, now_ns);
    flow_age(c, now_ns);
    if (c->requested || !c->running)
        return;
    doubt_settle(c, now_ns);
    if (c->requested)
        return;
    h = oldest_held(c->epoch);
    lead = oldest_lead(c);
    if (h && now_ns >= due(c, h->arrived_ns)) {
        time_out(c, h);
    } else if (lead && now_ns >= due(c, lead->leading_ns)) {
        struct request *request = ask(c, COLO_TCP_TIMEOUT, ASK_WAITS);

        c->counters.diverged++;
        if (request) {
            request->has_key = true;
            request->key = lead->flow->key;
            words_leads(lead, request->waits, sizeof(request->waits));
        }
    }
}

int64_t colo_deadline(const struct colo *c)
{
    const struct held *h = oldest_held(c->epoch);
    const struct state *lead = oldest_lead(c);
    int64_t deadline = doubt_due(c);

    if (c->requested || !c->running)
        return COLO_NEVER;
    if (h && due(c, h->arrived_ns) < deadline)
        deadline = due(c, h->arrived_ns);
    if (lead && due(c, lead->leading_ns) < deadline)
        deadline = due(c, lead->leading_ns);
    return deadline;
}

int64_t colo_oldest(const struct colo *c)
{
    const struct held *closing = c->cut ? oldest_held(c->cut->epoch) : NULL;
    const struct held *h = closing ? closing : oldest_held(c->epoch);

    return h ? h->arrived_ns : COLO_NEVER;
}
