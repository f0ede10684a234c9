/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What most likely has no equal, though that is not certain: each side has a packet that the other has not sent, where one
 * would do for the other.
 *
 * A guest that opens a connection, or asks a name server, does so from a port and with an identifier that are random: so
 * the PVM's packet and the SVM's have nothing to do with each other.  Two datagrams of one length in one flow may just as well
 * have come in another order.  So either is looked at again a little later, long before the time-out.
 */
#include "stream.h"

#define PATIENCE 10 /* in so many parts of the time-out */

/* From the same address to the same one and its port; from which port is left open. */
static bool same_peer(const struct flow_key *one, const struct flow_key *other)
{
    struct flow_key key = *one;

    key.sport = other->sport;
    return same_key(&key, other);
}

/* One side has said in this flow what the other has not.  size: of a datagram, with what is compared before its content. */
static bool alone(struct colo *c, const struct flow_key *key, bool primary, uint32_t size)
{
    uint64_t hash;
    const struct flow *flow = flow_find(c, key, &hash);
    const struct conn *conn;

    if (!flow || flow->epoch != c->number)
        return false;
    if (flow->kind == KIND_UDP)
        return datagram_waits(flow->state, primary, size);
    conn = primary ? flow->state->primary : flow->state->secondary;
    return primary ? conn->has_isn && !conn->has_secondary_isn : conn->has_secondary_isn && !conn->has_isn;
}

static void note(struct colo *c, int64_t now_ns, const struct flow_key *primary, const struct flow_key *secondary, uint32_t size)
{
    c->doubt = (struct doubt){*primary, *secondary, now_ns, size, c->number, true};
}

static bool pending(const struct colo *c)
{
    return c->doubt.pending && c->doubt.number == c->number;
}

/* A packet that has no equal yet; of TCP, one that opens a connection.  begins: it is the first one of its flow. */
void doubt_note(struct colo *c, int64_t now_ns, const struct flow *flow, const struct packet *p, bool primary, bool begins)
{
    uint32_t size = flow->kind == KIND_UDP ? p->prefixed + p->size : 0;
    struct opening *others = c->openings[!primary], *mine = c->openings[primary];

    if (pending(c) || (flow->kind != KIND_TCP && flow->kind != KIND_UDP) || p->lacks)
        return;
    if (flow->kind == KIND_UDP && datagram_waits(flow->state, !primary, size)) {
        note(c, now_ns, &flow->key, &flow->key, size);
        return;
    }
    if (flow->kind == KIND_UDP && !begins)
        return;
    for (int i = 0; i < OPENINGS_KEPT; i++) {
        if (others[i].number == c->number && others[i].size == size && same_peer(&others[i].key, &flow->key) &&
            alone(c, &others[i].key, !primary, size)) {
            note(c, now_ns, primary ? &flow->key : &others[i].key, primary ? &others[i].key : &flow->key, size);
            return;
        }
    }
    mine[c->openings_at[primary]++ % OPENINGS_KEPT] = (struct opening){flow->key, size, c->number};
}

int64_t doubt_due(const struct colo *c)
{
    if (!pending(c))
        return COLO_NEVER;
    return later(c->doubt.since_ns, c->resumed_ns) + c->config.compare_timeout_ns / PATIENCE;
}

/* At its time: ask if it is so still. */
void doubt_settle(struct colo *c, int64_t now_ns)
{
    const struct doubt *doubt = &c->doubt;
    bool tcp = doubt->primary.protocol == PROTO_TCP;
    struct request *request;

    if (now_ns < doubt_due(c))
        return;
    c->doubt.pending = false;
    if (!alone(c, &doubt->primary, true, doubt->size) || !alone(c, &doubt->secondary, false, doubt->size))
        return;
    c->counters.diverged++;
    request = ask(c, tcp ? COLO_TCP_PORTS : COLO_UDP_PAYLOAD, ASK_WAITS);
    if (!request)
        return;
    request->has_key = true;
    request->key = doubt->primary;
    words_doubt(doubt, request->waits, sizeof(request->waits));
}
