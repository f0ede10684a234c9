/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * offset = PVM's ISN - SVM's ISN is added to the sequence numbers that the SVM sends, and taken from acknowledgements
 * and SACK blocks that the client sends.
 *
 * The SVM's ISN comes from its SYN-ACK, or its SYN if the guest opens the connection.  The SVM is trusted: only what it
 * sends starts, restarts or (with a reset) ends a mapping.
 *
 * The PVM's ISN comes from what the client acknowledges.  A client's packet is trusted with that only if its sequence
 * number is exactly the one that the SVM's SYN-ACK acknowledges (client's ISN + 1): older duplicates on a reused 4-tuple
 * have another one.  Output commit makes that acknowledgement the PVM's ISN + 1: nothing after the PVM's SYN-ACK leaves
 * before the SVM sent the same, which it cannot before it saw that packet.
 */
#include "mappings.h"

#include <stdlib.h>
#include <string.h>

/* A client's RST this far above the SVM's last acknowledgement may be one that the SVM accepts. */
#define RST_WINDOW_BYTES 65535u

static const struct maybe UNKNOWN;

static struct maybe known(uint32_t value)
{
    return (struct maybe){true, value};
}

static bool is(struct maybe one, uint32_t value)
{
    return one.known && one.value == value;
}

static void no_longer_than(struct mapping *flow, double until_s)
{
    if (until_s < flow->deadline_s)
        flow->deadline_s = until_s;
}

static void forget_syn(struct rewriter *r, struct mapping *flow)
{
    flow->syn_next = UNKNOWN;
    held_discard(r, flow);
}

/* -- the connection's end -- */

static void finish(struct rewriter *r, double now_s, struct mapping *flow, uint8_t side)
{
    if (flow->finished == FINISHED_BOTH)
        return;
    flow->finished |= side;
    if (flow->finished == FINISHED_BOTH)
        flow->deadline_s = now_s + r->limits.linger_s;
}

/* Follow the client's side of it. */
static void client_segment(struct rewriter *r, double now_s, const struct segment *s, struct mapping *flow)
{
    struct maybe expected = flow->guest_ack.known ? flow->guest_ack : flow->peer_next;

    if (!mapped(flow))
        return;
    if (s->flags & FLAG_RST) {
        if (!expected.known || s->seq - expected.value <= RST_WINDOW_BYTES) {
            flow->reset = true;
            no_longer_than(flow, now_s + r->limits.linger_s);
        }
        return;
    }
    if (s->flags & FLAG_FIN && expected.known && at_or_after(s->seq, expected.value))
        flow->client_fin = known(s->seq + s->payload + 1);
    if (s->flags & FLAG_ACK && flow->guest_fin.known &&
        at_or_after(s->ack - flow->offset.value, flow->guest_fin.value))
        finish(r, now_s, flow, FINISHED_GUEST);
    if (flow->finished != FINISHED_BOTH && !flow->reset)
        flow->deadline_s = now_s + r->limits.idle_s;
}

/* -- shifting -- */

static enum rewrite_verdict shift_guest(struct rewriter *r, struct segment *s, const struct mapping *flow)
{
    segment_put_seq(s, s->seq + flow->offset.value);
    r->counters.from_guest_rewritten++;
    return REWRITE_CHANGED;
}

static enum rewrite_verdict shift_client(struct rewriter *r, struct segment *s, const struct mapping *flow)
{
    uint32_t ack = s->ack - flow->offset.value;
    struct maybe echo = UNKNOWN;

    /* Linux checks that what ends a handshake echoes a timestamp that it sent itself (tcp_input.c,
     * tcp_rcv_synsent_state_process; tcp_minisocks.c, tcp_check_req); this one echoes the PVM's. */
    if (flow->svm_isn.known && ack == flow->svm_isn.value + 1 && (s->flags & FLAG_SYN || is(flow->peer_next, s->seq)))
        echo = flow->svm_tsval;
    segment_put_ack(s, ack);
    if (echo.known || !segment_plain_options(s))
        segment_shift_options(s, flow->offset.value, echo);
    r->counters.to_guest_rewritten++;
    return REWRITE_CHANGED;
}

/* An ICMP error about a segment of the guest: Linux ignores it if the quoted number is none of its own. */
static enum rewrite_verdict shift_quoted(struct rewriter *r, uint8_t *packet, size_t size)
{
    struct flow_key key;
    uint8_t *checksum, *at = segment_quoted(&key, packet, size, &checksum);
    struct mapping *flow = at ? mapping_find(r, &key) : NULL;

    if (!flow || !mapped(flow))
        return REWRITE_AS_IS;
    put_quoted(at, get32(at) - flow->offset.value, checksum);
    r->counters.to_guest_rewritten++;
    return REWRITE_CHANGED;
}

/* -- the SVM's SYN or SYN-ACK -- */

static void settle(struct rewriter *r, double now_s, struct mapping *flow, uint32_t pvm_isn)
{
    mapping_set_offset(r, flow, known(pvm_isn - flow->svm_isn.value));
    /* Without a mapping, the entry only keeps a late SYN-ACK from being taken for a new connection's. */
    flow->deadline_s = now_s + (flow->offset.value ? r->limits.idle_s : r->limits.linger_s);
    r->counters.learned_flows++;
}

/* The packets that waited may go to the SVM now; the first of them told the offset. */
static void release_held(struct rewriter *r, double now_s, struct mapping *flow)
{
    struct link *link;

    while ((link = list_pop(&flow->held))) {
        struct waiting *waiting = CONTAINER(link, struct waiting, link);
        struct segment s;
        struct flow_key key;

        segment_parse(&s, &key, false, waiting->packet, waiting->size); /* as it was before it was held */
        client_segment(r, now_s, &s, flow);
        shift_client(r, &s, flow);
        list_append(&r->ready, link);
    }
    r->held_packets -= flow->held_packets;
    flow->held_packets = 0;
}

/* Begin a connection with the number that this SYN or SYN-ACK has. */
static void begin(struct rewriter *r, double now_s, struct mapping *flow, const struct segment *s, bool opens)
{
    struct maybe pvm_isn = UNKNOWN;
    bool answers;

    if (flow->svm_isn.known) {
        r->counters.restarted_flows++;
        /* The same handshake with another number (SYN cookies): the client's view of it stands. */
        if (!opens && is(flow->peer_next, s->ack) && flow->offset.known)
            pvm_isn = known(flow->svm_isn.value + flow->offset.value);
    }
    mapping_set_offset(r, flow, UNKNOWN);
    mapping_start(flow, known(s->seq), opens ? UNKNOWN : known(s->ack), segment_timestamp(s), opens);
    flow->deadline_s = now_s + r->limits.handshake_s;
    if (opens) {
        forget_syn(r, flow);
        return;
    }
    answers = is(flow->syn_next, s->ack);
    /* More than the SYN acknowledged: TCP fast open, the SVM may send data before the handshake's end. */
    flow->fast_open = flow->syn_next.known && !answers;
    flow->syn_next = UNKNOWN;
    if (answers && !list_empty(&flow->held)) {
        struct waiting *first = CONTAINER(flow->held.next, struct waiting, link);
        struct segment told;
        struct flow_key key;

        segment_parse(&told, &key, false, first->packet, first->size);
        pvm_isn = known(told.ack - 1);
    }
    if (pvm_isn.known) {
        settle(r, now_s, flow, pvm_isn.value);
        if (answers)
            release_held(r, now_s, flow);
    }
    held_discard(r, flow);
}

static struct mapping *guest_syn(struct rewriter *r, double now_s, const struct segment *s, const struct flow_key *key,
                              struct mapping *flow)
{
    bool opens = !(s->flags & FLAG_ACK);
    struct mapping *inherited = r->inherited ? mapping_find(r->inherited, key) : NULL;

    if (inherited) /* that one has ended: its ports are used again */
        mapping_forget(r->inherited, inherited);
    if (flow && is(flow->svm_isn, s->seq) &&
        (opens || !flow->peer_next.known ? flow->guest_opened : is(flow->peer_next, s->ack))) {
        /* Sent again, or the SYN-ACK of a simultaneous open, which has the SYN's number. */
        flow->svm_tsval = segment_timestamp(s);
        forget_syn(r, flow);
        if (!opens)
            flow->peer_next = known(s->ack);
        if (!flow->offset.known)
            flow->deadline_s = now_s + r->limits.handshake_s;
        return flow;
    }
    /* A SYN from before the failover: its sender may have the PVM's answer. */
    if (!r->learning && !(flow && !opens && is(flow->syn_next, s->ack) && now_s < flow->syn_until_s)) {
        if (flow)
            mapping_forget(r, flow);
        return NULL;
    }
    if (!flow)
        flow = mapping_add(r, now_s, key);
    if (flow)
        begin(r, now_s, flow, s, opens);
    return flow;
}

/* -- what the SVM sends on -- */

static enum rewrite_verdict guest_segment(struct rewriter *r, double now_s, struct segment *s, struct mapping *flow)
{
    if (flow->syn_next.known) {
        /* The SVM's answer to the client's SYN was no SYN-ACK. */
        forget_syn(r, flow);
        if (!flow->svm_isn.known) {
            mapping_forget(r, flow);
            return REWRITE_AS_IS;
        }
    }
    if (!flow->offset.known) {
        /* The SVM's handshake ended without a packet that we saw: it passed before the SYN-ACK (sent again after a
         * checkpoint) did.  So the SVM is a copy of the PVM in this connection. */
        bool ended = flow->peer_next.known && !flow->fast_open && !(s->flags & FLAG_RST) && flow->svm_isn.known;

        if (ended && (s->flags & FLAG_FIN || s->payload || (s->flags & FLAG_ACK && !is(flow->peer_next, s->ack))))
            settle(r, now_s, flow, flow->svm_isn.value);
        return REWRITE_AS_IS;
    }
    if (!flow->offset.value)
        return REWRITE_AS_IS;
    if (s->flags & FLAG_RST) {
        flow->reset = true;
        no_longer_than(flow, now_s + r->limits.linger_s);
        /* The answer of a closed port to a segment without ACK: its 0 is no sequence number (RFC 9293, 3.5.2). */
        return s->flags & FLAG_ACK && !s->seq ? REWRITE_AS_IS : shift_guest(r, s, flow);
    }
    flow->reset = false; /* the SVM goes on: that reset did not end the connection */
    if (s->flags & FLAG_ACK) {
        flow->guest_ack = known(s->ack);
        if (flow->client_fin.known && at_or_after(s->ack, flow->client_fin.value))
            finish(r, now_s, flow, FINISHED_CLIENT);
    }
    if (s->flags & FLAG_FIN)
        flow->guest_fin = known(s->seq + s->payload + 1);
    if (flow->finished != FINISHED_BOTH)
        flow->deadline_s = now_s + r->limits.idle_s;
    return shift_guest(r, s, flow);
}

enum rewrite_verdict rewriter_from_guest(struct rewriter *r, double now_s, uint8_t *packet, size_t size)
{
    struct segment s;
    struct flow_key key;
    struct mapping *flow;

    if (!segment_parse(&s, &key, true, packet, size))
        return REWRITE_AS_IS;
    flow = mapping_find(r, &key);
    if (s.flags & FLAG_SYN) {
        if (s.flags & (FLAG_RST | FLAG_FIN))
            return REWRITE_AS_IS;
        flow = guest_syn(r, now_s, &s, &key, flow);
        return flow && mapped(flow) ? shift_guest(r, &s, flow) : REWRITE_AS_IS;
    }
    return flow ? guest_segment(r, now_s, &s, flow) : REWRITE_AS_IS;
}

/* -- what the client sends -- */

/* A SYN alone changes no mapping: it may be old or forged.  The SVM's answer tells. */
static void client_syn(struct rewriter *r, double now_s, const struct segment *s, const struct flow_key *key,
                       struct mapping *flow)
{
    uint32_t syn_next = s->seq + 1;

    if (!r->learning)
        return;
    if (!flow) {
        flow = mapping_add(r, now_s, key);
        if (!flow)
            return;
        flow->deadline_s = now_s + r->limits.answer_s;
    } else if (flow->svm_isn.known && is(flow->peer_next, syn_next)) {
        return; /* sent again */
    }
    if (!is(flow->syn_next, syn_next)) {
        held_discard(r, flow);
        flow->syn_next = known(syn_next);
    }
    flow->syn_until_s = now_s + r->limits.answer_s;
    if (flow->deadline_s < flow->syn_until_s)
        flow->deadline_s = flow->syn_until_s;
}

/* Hold what belongs to a handshake that the SVM has not answered.  False: no such packet. */
static bool await_answer(struct rewriter *r, double now_s, const struct segment *s, size_t size, struct mapping *flow)
{
    if (now_s >= flow->syn_until_s) {
        forget_syn(r, flow);
        return false;
    }
    if (s->flags & FLAG_RST) {
        if (is(flow->syn_next, s->seq))
            forget_syn(r, flow);
        return false;
    }
    if (!(s->flags & FLAG_ACK) || s->flags & FLAG_SYN)
        return false;
    /* The first one must be the one that may teach; segments of the same flight follow it. */
    if (!is(flow->syn_next, s->seq) &&
        (list_empty(&flow->held) || s->seq - flow->syn_next.value > RST_WINDOW_BYTES))
        return false;
    if (held_keep(r, flow, s->packet, size))
        r->counters.held++;
    else
        r->counters.dropped++;
    return true;
}

/* A client's packet of a flow whose offset is unknown. */
static enum rewrite_verdict learn(struct rewriter *r, double now_s, struct segment *s, struct mapping *flow)
{
    if (!flow->svm_isn.known || !(s->flags & FLAG_ACK))
        return REWRITE_AS_IS;
    if (!flow->peer_next.known) {
        /* SYN-SENT: only a SYN-ACK, or the RST of a closed port, answers the SYN.  Anything else the SVM answers with
         * a reset, and so does the PVM. */
        if (!(s->flags & (FLAG_SYN | FLAG_RST)))
            return REWRITE_AS_IS;
    } else if (s->flags & FLAG_RST) {
        return REWRITE_AS_IS; /* judged by its sequence number alone */
    } else if (s->flags & FLAG_SYN) {
        if (!flow->guest_opened || !is(flow->peer_next, s->seq + 1))
            return REWRITE_AS_IS;
    } else if (!is(flow->peer_next, s->seq)) {
        r->counters.dropped++; /* as it is, it would make the SVM reset the connection */
        return REWRITE_DROP;
    }
    settle(r, now_s, flow, s->ack - 1);
    if (s->flags & FLAG_SYN)
        flow->peer_next = known(s->seq + 1);
    client_segment(r, now_s, s, flow);
    return shift_client(r, s, flow);
}

enum rewrite_verdict rewriter_to_guest(struct rewriter *r, double now_s, uint8_t *packet, size_t size)
{
    struct segment s;
    struct flow_key key;
    struct mapping *flow;

    if (!segment_parse(&s, &key, false, packet, size))
        return r->nr_rewritten ? shift_quoted(r, packet, size) : REWRITE_AS_IS;
    flow = mapping_find(r, &key);
    if ((s.flags & (FLAG_SYN | FLAG_ACK | FLAG_RST | FLAG_FIN)) == FLAG_SYN) {
        client_syn(r, now_s, &s, &key, flow);
        return REWRITE_AS_IS;
    }
    if (!flow)
        return REWRITE_AS_IS;
    if (flow->syn_next.known && await_answer(r, now_s, &s, size, flow))
        return REWRITE_DROP;
    if (!flow->offset.known)
        return learn(r, now_s, &s, flow);
    if (!flow->offset.value)
        return REWRITE_AS_IS;
    client_segment(r, now_s, &s, flow);
    return s.flags & FLAG_ACK ? shift_client(r, &s, flow) : REWRITE_AS_IS;
}

/* -- events -- */

size_t rewriter_held_size(const struct rewriter *r)
{
    return list_empty(&r->ready) ? 0 : CONTAINER(r->ready.next, struct waiting, link)->size;
}

void rewriter_take_held(struct rewriter *r, uint8_t *packet)
{
    struct link *link = list_pop(&r->ready);
    struct waiting *waiting;

    if (!link)
        return;
    waiting = CONTAINER(link, struct waiting, link);
    memcpy(packet, waiting->packet, waiting->size);
    free(waiting);
}

/* A checkpoint was applied: the SVM is a copy of the PVM, and every offset is zero.  What the SVM sent before must not
 * come to rewriter_from_guest() any more. */
void rewriter_reset(struct rewriter *r)
{
    mapping_forget_all(r);
    r->counters.resets++;
}

/* Failover: there is no PVM any more, connections from now on have the SVM's own numbers.  Flows that are known, also
 * those in a handshake, stay.  Final.  Otherwise a sender with a forged source address could finish a handshake with the
 * SVM without having seen its SYN-ACK. */
void rewriter_stop_learning(struct rewriter *r)
{
    r->learning = false;
    while (r->inherited && !list_empty(&r->inherited->flows)) {
        struct mapping *heir = CONTAINER(r->inherited->flows.next, struct mapping, link);
        struct mapping *flow = mapping_find(r, &heir->key);

        if (!flow)
            flow = mapping_add(r, 0, &heir->key);
        if (flow && !flow->svm_isn.known) { /* otherwise the SVM has begun another one, as it seems */
            forget_syn(r, flow);
            mapping_set_offset(r, flow, heir->offset);
            flow->deadline_s = heir->deadline_s;
        }
        mapping_forget(r->inherited, heir);
    }
}

/* -- the next failover -- */

void rewriter_inherit(struct rewriter *r, double now_s, const struct rewrite_connection *connection)
{
    struct flow_key key = {.version = {connection->version}};
    struct mapping *flow;

    if (!r->learning)
        return;
    if (!r->inherited)
        r->inherited = rewriter_new(&r->limits);
    if (!r->inherited)
        return; /* of memory there will be less for the guest, too */
    memcpy(key.guest, connection->guest, sizeof(key.guest));
    memcpy(key.client, connection->client, sizeof(key.client));
    key.ports[0] = (uint8_t)(connection->guest_port >> 8);
    key.ports[1] = (uint8_t)connection->guest_port;
    key.ports[2] = (uint8_t)(connection->client_port >> 8);
    key.ports[3] = (uint8_t)connection->client_port;
    flow = mapping_find(r->inherited, &key);
    if (!flow)
        flow = mapping_add(r->inherited, now_s, &key);
    if (!flow)
        return;
    mapping_set_offset(r->inherited, flow, known(connection->offset));
    flow->deadline_s = now_s + r->limits.idle_s;
}

size_t rewriter_connections(const struct rewriter *r, struct rewrite_connection *out, size_t room)
{
    size_t count = 0;

    for (const struct link *link = r->flows.next; link != &r->flows && count < room; link = link->next) {
        const struct mapping *flow = CONTAINER(link, struct mapping, link);

        if (!mapped(flow) || flow->reset || flow->finished == FINISHED_BOTH)
            continue;
        out[count] = (struct rewrite_connection){.guest_port = get16(flow->key.ports),
                                                 .client_port = get16(flow->key.ports + 2),
                                                 .version = flow->key.version[0],
                                                 .offset = flow->offset.value};
        memcpy(out[count].guest, flow->key.guest, sizeof(flow->key.guest));
        memcpy(out[count].client, flow->key.client, sizeof(flow->key.client));
        count++;
    }
    return count;
}
