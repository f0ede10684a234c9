/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "rewriting.h"

#include <errno.h>
#include <linux/if_ether.h>
#include <netinet/in.h>
#include <string.h>
#include <time.h>

#define LOOK_AGAIN_S 1.0

_Static_assert(sizeof(((struct rw_turns *)0)->looks) / sizeof(struct rw_look) == RQ_BATCH, "one look a packet");
_Static_assert(sizeof(((struct rw_look *)0)->data) == RW_LOOK_BYTES, "");
_Static_assert(sizeof(((struct rw_turns *)0)->sources) / sizeof(struct rw_source) == RW_SOURCES, "");

static double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Has Python seen a packet of this source within the last second? If not, it will now. */
static int known_source(struct rw_turns *t, const uint8_t *address, size_t size, double now)
{
    struct rw_source *source;
    uint8_t key[16] = {0};
    uint32_t hash = 2166136261u; /* FNV-1a */

    memcpy(key, address, size);
    for (size_t i = 0; i < sizeof key; i++)
        hash = (hash ^ key[i]) * 16777619u;
    source = &t->sources[hash % RW_SOURCES];
    if (source->seen_s > 0 && now - source->seen_s < LOOK_AGAIN_S && !memcmp(source->address, key, sizeof key))
        return 1;
    memcpy(source->address, key, sizeof key);
    source->seen_s = now;
    return 0;
}

static int worth_a_look(struct rw_turns *t, const struct colo_frame *frame, double now)
{
    switch (frame->ethertype) {
    case ETH_P_ARP:
        return t->from_guest;
    case ETH_P_IP:
        return frame->size >= 20 && !known_source(t, frame->data + 12, 4, now);
    case ETH_P_IPV6: /* of clients only those count that can be asked by ARP whether the LAN works */
        return t->from_guest && frame->size >= 40 &&
               (frame->data[6] == IPPROTO_ICMPV6 || !known_source(t, frame->data + 8, 16, now));
    }
    return 0;
}

static void take_look(struct rw_turns *t, const struct colo_frame *frame)
{
    struct rw_look *look = &t->looks[t->nr_looks++];

    look->ethertype = frame->ethertype;
    look->size = frame->size < RW_LOOK_BYTES ? frame->size : RW_LOOK_BYTES;
    memcpy(look->data, frame->data, look->size);
}

static int deal_with(struct rw_turns *t, const struct rq_packet *packet, double now)
{
    const struct colo_frame *frame = &packet->frame;
    uint8_t *data = (uint8_t *)frame->data; /* where rq_read() put it, and nobody else's */
    enum rewrite_verdict verdict = REWRITE_AS_IS;

    if (t->muted)
        return rq_drop(t->queue, packet->id);
    if (worth_a_look(t, frame, now))
        take_look(t, frame);
    /* The rewriter keeps some of the client's packets, and needs them whole. */
    if (packet->unsummed && !t->from_guest)
        rewriter_finish_checksum(data, frame->size);
    if (frame->ethertype == ETH_P_IP || frame->ethertype == ETH_P_IPV6)
        verdict = t->from_guest ? rewriter_from_guest(t->rewriter, now, data, frame->size)
                                : rewriter_to_guest(t->rewriter, now, data, frame->size);
    if (verdict == REWRITE_AS_IS)
        return rq_accept(t->queue, packet->id);
    /* What came cut off could only leave cut off: TCP sends it again. */
    if (verdict == REWRITE_DROP || frame->wire_size > frame->size)
        return rq_drop(t->queue, packet->id);
    /* The kernel takes a changed packet's as it is.  One that was there has followed the change, and stays wrong if it was. */
    if (packet->unsummed && t->from_guest)
        rewriter_finish_checksum(data, frame->size);
    return rq_accept_modified(t->queue, packet->id, data, frame->size);
}

/*
 * Read the queue until it is empty, about ``most`` packets have been read or there is something to look at, rewrite what
 * is to be rewritten, and let all go.
 *
 * 0, or what calls for attention: RW_*.
 */
int rw_turn(struct rw_turns *t, uint32_t most)
{
    struct rq_packet packets[RQ_BATCH];
    uint32_t count = 0;
    int got, failed, error = 0;

    t->nr_looks = 0;
    do {
        double now;

        got = rq_read(t->queue, packets, RQ_BATCH);
        if (got < 0) {
            error = got == -EAGAIN ? 0 : got;
            break;
        }
        now = now_s();
        for (int i = 0; i < got; i++) {
            failed = deal_with(t, &packets[i], now);
            if (failed)
                error = failed;
        }
        failed = rq_flush(t->queue);
        if (failed)
            error = failed;
        count += (uint32_t)got;
    } while (!error && !t->nr_looks && got == RQ_BATCH && count < most);
    t->error = error;
    return (error ? RW_FAILED : 0) | (t->nr_looks ? RW_LOOKS : 0) | (rewriter_held_size(t->rewriter) ? RW_HELD : 0);
}
