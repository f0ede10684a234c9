/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Maps the SVM's TCP sequence space onto the PVM's, which is the one that the client knows.  No I/O and no clock.
 *
 * Packets start at the IP header, must have finished checksums, and are changed in place; their length never changes.
 * IPv4, and IPv6 without extension headers; fragments and whatever is no TCP (nor an ICMP error about it) stay as they
 * are.  docs/rewriter.rst says why each decision is as it is.
 */
#ifndef COLO_REWRITE_H
#define COLO_REWRITE_H

#include <stddef.h>
#include <stdint.h>

struct rewriter;

enum rewrite_verdict {
    REWRITE_AS_IS,
    REWRITE_CHANGED,
    REWRITE_DROP, /* it is dropped, or held until the SVM has answered */
};

/* Times are in seconds of one clock that never goes back. */
struct rewrite_limits {
    double idle_s;          /* a mapped connection without a packet for so long is forgotten */
    double linger_s;        /* and one that has ended after this */
    double handshake_s;     /* and one whose offset never became known after this */
    double answer_s;        /* how long a client's packet waits for an SVM that lags with its SYN-ACK */
    uint32_t flows;         /* at the limit, those without a mapping go first */
    uint32_t held_per_flow; /* packets that wait */
    uint32_t held;
};

/* What happened since the rewriter was made; packets unless said otherwise. */
struct rewrite_counters {
    uint64_t from_guest_rewritten;
    uint64_t to_guest_rewritten;
    uint64_t held;
    uint64_t dropped;
    uint64_t learned_flows;
    uint64_t restarted_flows;
    uint64_t evicted_flows;
    uint64_t resets; /* checkpoints */
};

/* A connection that goes on with a mapping: how it is handed to the next backup host. */
struct rewrite_connection {
    uint8_t guest[16], client[16]; /* addresses; IPv4's in the first 4 */
    uint16_t guest_port, client_port;
    uint8_t version; /* of IP */
    uint32_t offset; /* added to what the guest sends */
};

/* NULL if there is no memory. */
struct rewriter *rewriter_new(const struct rewrite_limits *limits);
void rewriter_free(struct rewriter *r);

enum rewrite_verdict rewriter_from_guest(struct rewriter *r, double now_s, uint8_t *packet, size_t size);
enum rewrite_verdict rewriter_to_guest(struct rewriter *r, double now_s, uint8_t *packet, size_t size);

/* After rewriter_from_guest(): whether client's packets that waited for the SVM may go to it now; the size of the next
 * one, 0 for none; and take it out into @packet, which has room for it. */
size_t rewriter_held_size(const struct rewriter *r);
void rewriter_take_held(struct rewriter *r, uint8_t *packet);

void rewriter_reset(struct rewriter *r);
void rewriter_stop_learning(struct rewriter *r);
void rewriter_expire(struct rewriter *r, double now_s);

/* The connections with a mapping that have not ended, at most @room of them; their number. */
size_t rewriter_connections(const struct rewriter *r, struct rewrite_connection *out, size_t room);
/* One that the PVM's own host maps: after rewriter_stop_learning() this one does, unless the SVM begins another with its
 * addresses and ports. */
void rewriter_inherit(struct rewriter *r, double now_s, const struct rewrite_connection *connection);

const struct rewrite_counters *rewriter_counters(const struct rewriter *r);
uint64_t rewriter_flows(const struct rewriter *r);
uint64_t rewriter_rewritten_flows(const struct rewriter *r);

/* Compute the TCP checksum of a whole packet anew, for one that a guest left to its device. */
void rewriter_finish_checksum(uint8_t *packet, size_t size);

#endif
