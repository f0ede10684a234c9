/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Asking for a checkpoint: once, until the next cut. */
#include "state.h"

struct request *ask(struct colo *c, int reason, enum request_kind kind)
{
    if (c->requested)
        return NULL;
    c->requested = true;
    memset(&c->request, 0, sizeof(c->request));
    c->request.reason = reason;
    c->request.kind = kind;
    return &c->request;
}

void ask_difference(struct colo *c, const struct state *s, struct difference difference)
{
    struct request *request;
    int reason = COLO_TCP_PAYLOAD;

    c->counters.diverged++;
    if (difference.kind == DIFF_PIECES)
        reason = COLO_LIMIT_PACKETS;
    else if (difference.kind == DIFF_ECHO)
        reason = COLO_ICMP_PAYLOAD;
    else if (difference.kind >= DIFF_RESET_DATA)
        reason = COLO_TCP_RESET;
    request = ask(c, reason, ASK_DIFFERENCE);
    if (request) {
        request->key = s->flow->key;
        request->difference = difference;
    }
}

void ask_limit(struct colo *c, int reason, uint64_t amount, uint64_t limit, const char *unit)
{
    struct request *request = ask(c, reason, ASK_LIMIT);

    if (request) {
        request->amount = amount;
        request->limit = limit;
        request->unit = unit;
    }
}

void ask_limits(struct colo *c)
{
    const struct epoch *epoch = c->epoch;

    if (c->restoring)
        return;
    if (epoch->held_bytes > c->config.held_bytes)
        ask_limit(c, COLO_LIMIT_BYTES, epoch->held_bytes, c->config.held_bytes, "bytes held");
    if (epoch->held_packets > c->config.held_packets)
        ask_limit(c, COLO_LIMIT_PACKETS, epoch->held_packets, c->config.held_packets, "packets held");
}
