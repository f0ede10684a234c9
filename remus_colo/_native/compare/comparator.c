/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the VMs send: colo_primary() and colo_secondary(). */
#include "state.h"

#define AGE_EVERY_PACKETS 1024u /* idle flows are looked for that often even if no time-out is due */

/* SVM output over the limit: drop the oldest datagrams, then the latest bytes of the stream that just grew. */
static void shrink(struct colo *c, struct state *s)
{
    struct epoch *epoch = c->epoch;
    uint64_t limit = c->config.secondary_bytes;

    ask_limit(c, COLO_LIMIT_SECONDARY, epoch->kept_bytes, limit, "bytes of the SVM kept because it is ahead");
    while (epoch->kept_bytes > limit && !list_empty(&epoch->early)) {
        struct early *early = CONTAINER(epoch->early.next, struct early, in_epoch);

        epoch->kept_bytes -= early->buf->size + DATAGRAM_OVERHEAD_BYTES;
        datagram_drop(c, early);
    }
    if (epoch->kept_bytes > limit && s->flow->kind == KIND_TCP) {
        uint64_t before = s->kept_bytes;

        stream_shrink(c, s, epoch->kept_bytes - limit);
        epoch->kept_bytes -= before - s->kept_bytes;
        c->counters.secondary_dropped++;
    }
}

/* -- one flow -- */

/* Whether the SVM leads in it, and since when it does so without progress. */
static void note_lead(struct colo *c, int64_t now_ns, struct state *s)
{
    bool leads = stream_leads(s);

    if (linked(&s->leading)) {
        if (leads && !s->progressed)
            return;
        list_remove(&s->leading);
    }
    if (leads) {
        s->leading_ns = now_ns;
        list_append(&c->epoch->leading, &s->leading);
    }
    s->progressed = false;
}

static bool ready(struct colo *c, struct flow *flow, struct held *h)
{
    return flow->kind == KIND_TCP ? stream_ready(c, flow->state, h) : h->matched;
}

/* Its packets need not leave in order: a datagram that has its equal is not held up by one that is lost. */
static bool unordered(const struct flow *flow)
{
    return flow->kind == KIND_UDP || flow->kind == KIND_ICMP;
}

static void leave(struct colo *c, struct held *h)
{
    epoch_leave(c->epoch, h);
    out_held(c, h, COLO_EQUAL);
    held_free(c, h);
}

/* Release what may leave at the head of the flow; nothing while an older epoch is not committed. */
static void drain(struct colo *c, struct flow *flow)
{
    if (c->cut)
        return;
    while (!list_empty(&flow->held)) {
        struct held *h = CONTAINER(flow->held.next, struct held, in_flow);

        if (!ready(c, flow, h))
            return;
        leave(c, h);
    }
}

/* After a commit: what has become ready meanwhile. */
void compare_drain_all(struct colo *c, struct flow *flow)
{
    struct link *link, *next;

    if (!unordered(flow)) {
        drain(c, flow);
        return;
    }
    for (link = flow->held.next; link != &flow->held; link = next) {
        struct held *h = CONTAINER(link, struct held, in_flow);

        next = link->next;
        if (h->matched)
            leave(c, h);
    }
}

static void contradicts(struct colo *c, struct state *s, const struct packet *p, bool waiting)
{
    if (!s->diverged && datagram_contradicts(s, p, waiting)) {
        s->diverged = true;
        ask_difference(c, s, (struct difference){.kind = DIFF_ECHO});
    }
}

/* The guest opens a connection by it. */
static bool opens(const struct packet *p)
{
    return (p->flags & (TH_SYN | TH_ACK | TH_RST)) == TH_SYN;
}

/* Give h to its flow; entered: it is among its epoch's held packets already. */
void compare_primary(struct colo *c, int64_t now_ns, struct held *h, const struct packet *p, bool entered)
{
    uint64_t hash, kept;
    struct flow *flow = flow_find(c, &p->key, &hash);
    bool begins = !flow;
    struct state *s;

    if (!flow) {
        if (c->flow_count >= c->config.flows && !c->cut && !flow_make_room(c))
            ask_limit(c, COLO_LIMIT_FLOWS, c->flow_count, c->config.flows, "flows known");
        flow = flow_new(c, p, hash, now_ns);
    }
    flow->last_ns = now_ns;
    s = flow_step(c, flow);
    h->flow = flow;
    kept = s->kept_bytes;
    if (flow->kind == KIND_TCP) {
        stream_primary(c, s, h);
        note_lead(c, now_ns, s);
    } else {
        datagram_primary(c, s, h, p);
        if (!h->matched)
            contradicts(c, s, p, false);
    }
    if (flow->kind == KIND_TCP ? opens(p) && !h->conn->has_secondary_isn : !h->matched)
        doubt_note(c, now_ns, flow, p, true, begins);
    c->epoch->kept_bytes += s->kept_bytes - kept;
    if (c->epoch->kept_bytes > c->config.secondary_bytes && s->kept_bytes > kept)
        shrink(c, s); /* where the PVM's stream begins, what is kept of the SVM's can be cut in two, which costs */
    if (h->lacks) {
        struct request *request = ask(c, COLO_TRUNCATED, ASK_CUT_OFF);

        c->counters.truncated++;
        if (request) {
            request->key = flow->key;
            request->amount = h->lacks;
        }
    }
    if ((list_empty(&flow->held) || unordered(flow)) && !c->cut && !entered && ready(c, flow, h)) {
        out_held(c, h, COLO_EQUAL);
        held_free(c, h);
        return;
    }
    held_wait(c, flow, h, p);
    if (!entered)
        epoch_enter(c->epoch, h);
    if (unordered(flow) && h->matched && !c->cut)
        leave(c, h);
    else
        drain(c, flow); /* a PVM segment can complete what earlier ones of its flow wait for */
    ask_limits(c);
}

/* A packet that was held in an epoch that is none now. */
void compare_again(struct colo *c, int64_t now_ns, struct held *h)
{
    struct packet *p = &c->packet;

    p->key = h->flow->key;
    p->kind = h->kind;
    p->malformed = h->malformed;
    p->fragment = false;
    p->flags = h->flags;
    p->prefixed = h->prefixed;
    p->seq = h->seq;
    p->ack = h->wire_ack;
    p->urgent = h->urgent;
    p->lacks = h->lacks;
    p->size = h->size;
    p->payload = h->data;
    if (h->prefixed)
        memcpy(p->prefix, h->buf->bytes, h->prefixed);
    compare_primary(c, now_ns, h, p, true);
}

/* -- the PVM -- */

/* The PVM's fragments in a are whole. */
void compare_joined(struct colo *c, int64_t now_ns, struct assembly *a)
{
    struct buf *whole = assembly_join(c, a);
    struct held *h = a->held;

    packet_parse_joined(&c->joined, &a->key, a->upper, whole->bytes, whole->size);
    assembly_free(c, a);
    if (c->joined.malformed)
        c->counters.malformed++;
    held_describes(h, &c->joined);
    compare_primary(c, now_ns, h, &c->joined, true);
    buf_drop(&c->pool, whole);
}

static void primary_fragment(struct colo *c, int64_t now_ns, uint64_t id, uint32_t bytes, const struct packet *p)
{
    struct assembly *a = assembly_of(c, &p->key, false, now_ns);

    if (!a->held) {
        a->held = held_new(c, now_ns, id, bytes);
        a->held->kind = (uint8_t)p->kind;
        epoch_enter(c->epoch, a->held);
    } else {
        held_add_part(c, a->held, id, c->order++, bytes);
        c->epoch->held_bytes += bytes;
        c->epoch->held_packets++;
    }
    if (assembly_add(c, a, p))
        compare_joined(c, now_ns, a);
    else
        ask_limits(c);
}

void colo_primary(struct colo *c, int64_t now_ns, uint64_t id, const struct colo_frame *frame)
{
    struct packet *p = &c->packet;
    struct held *h;

    if (!c->protecting) {
        out_id(c, id, COLO_UNPROTECTED);
        return;
    }
    if (packet_parse(p, frame) == PACKET_PASSES) {
        out_id(c, id, COLO_PASSED);
        return;
    }
    if (!list_empty(&c->epoch->early))
        age_early(c, now_ns);
    if (c->order % AGE_EVERY_PACKETS == 0)
        flow_age(c, now_ns);
    if (p->malformed)
        c->counters.malformed++;
    if (p->fragment) {
        primary_fragment(c, now_ns, id, frame->size, p);
        return;
    }
    h = held_new(c, now_ns, id, frame->size);
    held_describes(h, p);
    compare_primary(c, now_ns, h, p, false);
}

/* -- the SVM -- */

static void secondary_fragment(struct colo *c, int64_t now_ns, const struct packet *p, struct buf **whole)
{
    struct epoch *epoch = c->epoch;
    struct assembly *a;

    age_assemblies(c, now_ns);
    a = assembly_of(c, &p->key, true, now_ns);
    epoch->assembly_bytes -= assembly_cost(a);
    if (assembly_add(c, a, p)) {
        *whole = assembly_join(c, a);
        packet_parse_joined(&c->joined, &a->key, a->upper, (*whole)->bytes, (*whole)->size);
        assembly_free(c, a);
        return;
    }
    epoch->assembly_bytes += assembly_cost(a);
    if (epoch->assembly_bytes > c->config.secondary_bytes)
        ask_limit(c, COLO_LIMIT_SECONDARY, epoch->assembly_bytes, c->config.secondary_bytes,
                  "bytes of the SVM's fragments kept");
    while (epoch->assembly_bytes > c->config.secondary_bytes)
        drop_assembly(c, oldest_secondary_assembly(c));
}

static void secondary_whole(struct colo *c, int64_t now_ns, const struct packet *p)
{
    uint64_t hash, kept;
    struct held *equal = NULL;
    struct flow *flow;
    struct state *s;
    bool begins;

    if (p->malformed)
        c->counters.malformed++;
    if (p->lacks) {
        c->counters.truncated++;
        if (p->kind != KIND_TCP) { /* of a stream, the part that is there can be compared */
            c->counters.secondary_dropped++;
            return;
        }
    }
    flow = flow_find(c, &p->key, &hash);
    begins = !flow;
    if (!flow) {
        if (c->flow_count >= c->config.flows && !flow_make_room(c)) {
            ask_limit(c, COLO_LIMIT_FLOWS, c->flow_count, c->config.flows, "flows known");
            c->counters.secondary_dropped++;
            return;
        }
        flow = flow_new(c, p, hash, now_ns);
    }
    flow->last_ns = now_ns;
    s = flow_step(c, flow);
    kept = s->kept_bytes;
    if (flow->kind == KIND_TCP) {
        stream_secondary(c, s, p);
        note_lead(c, now_ns, s);
    } else {
        equal = datagram_secondary(c, s, c->epoch, p, now_ns);
        if (!equal)
            contradicts(c, s, p, true);
    }
    if (flow->kind == KIND_TCP ? opens(p) && !s->secondary->has_isn : !equal)
        doubt_note(c, now_ns, flow, p, false, begins);
    c->epoch->kept_bytes += s->kept_bytes - kept;
    if (s->kept_bytes && !linked(&s->buffered))
        list_append(&c->epoch->buffered, &s->buffered);
    if (c->epoch->kept_bytes > c->config.secondary_bytes && s->kept_bytes > kept)
        shrink(c, s);
    if (equal && unordered(flow) && !c->cut)
        leave(c, equal);
    else
        drain(c, flow);
}

void compare_secondary(struct colo *c, int64_t now_ns, const struct colo_frame *frame)
{
    struct buf *whole = NULL;
    struct packet *p = &c->packet;

    if (!list_empty(&c->epoch->early))
        age_early(c, now_ns);
    if (packet_parse(p, frame) == PACKET_PASSES) {
        c->counters.secondary_dropped++;
        return;
    }
    if (!p->fragment) {
        secondary_whole(c, now_ns, p);
        return;
    }
    secondary_fragment(c, now_ns, p, &whole);
    if (whole)
        secondary_whole(c, now_ns, &c->joined);
    buf_drop(&c->pool, whole);
}

static void stash(struct colo *c, const struct colo_frame *frame)
{
    struct cut *cut = c->cut;
    struct stashed *stashed;

    if (!cut || !cut->running || cut->stash_bytes + frame->size > c->config.secondary_bytes) {
        c->counters.secondary_dropped++;
        return;
    }
    stashed = pool_take(&c->pool, sizeof(*stashed));
    stashed->buf = buf_new(&c->pool, frame->size);
    if (frame->size)
        memcpy(stashed->buf->bytes, frame->data, frame->size);
    stashed->frame = *frame;
    stashed->frame.data = stashed->buf->bytes;
    stashed->next = NULL;
    *cut->stash_end = stashed;
    cut->stash_end = &stashed->next;
    cut->stash_count++;
    cut->stash_bytes += frame->size + DATAGRAM_OVERHEAD_BYTES;
}

void colo_secondary(struct colo *c, int64_t now_ns, const struct colo_frame *frame)
{
    c->counters.secondary_seen++;
    if (c->running)
        compare_secondary(c, now_ns, frame);
    else
        stash(c, frame);
}
