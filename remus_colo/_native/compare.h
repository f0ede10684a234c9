/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The comparator: decides when the PVM's output may leave.  docs/comparison.rst has the rules; this is how to call it.
 *
 * One struct colo compares one vif.  It does no I/O, reads no clock and starts no thread; one thread at a time may
 * call it.  Every call says when it happens: now_ns, CLOCK_MONOTONIC or any clock that does not go back.  Packets may
 * hold anything: no content makes a call fail or read beyond its buffer.
 *
 * What a call decides is added to the comparator's output: packets that leave, and at most one request for a
 * checkpoint.  The caller takes both after each call, or after as many as it likes:
 *
 *     colo_primary(c, now_ns, id, &frame);
 *     ...
 *     for (size_t i = 0, n = colo_released(c, &out); i < n; i++)
 *         accept(out[i].id);
 *     colo_drained(c);
 *     if (colo_requested(c))
 *         wake_the_session();       // it reads reason and detail with colo_request()
 *
 * The frame is read during the call only; what must be kept is copied.  Memory is bounded by the configured limits; if
 * the system still has none left the process ends (abort), because a packet that is not accounted for could leave.
 */
#ifndef REMUS_COLO_COMPARE_H
#define REMUS_COLO_COMPARE_H

#include <stddef.h>
#include <stdint.h>

#define COLO_NEVER INT64_MAX /* as a deadline */

struct colo; /* a comparator */

struct colo_config {
    int64_t compare_timeout_ns; /* a PVM packet that waits so long asks for a checkpoint */
    int64_t idle_flow_ns;       /* a flow without packets for so long is forgotten */
    uint64_t held_bytes;        /* of the PVM in the running epoch; more ask for a checkpoint */
    uint64_t secondary_bytes;   /* kept of the SVM because it is ahead; more ask for a checkpoint */
    uint32_t held_packets;      /* as held_bytes */
    uint32_t flows;             /* known at a time; more ask for a checkpoint */
    uint32_t own_sequence;      /* the SVM's TCP: 0 in the PVM's sequence space, 1 perhaps in its own (no rewriter in
                                   between), 2 in its own wherever its SYN has been seen */
    uint64_t seed[2];           /* secret of the hash tables: random, so that nobody can choose colliding flows */
};

/* A packet as it was on the wire, from behind the Ethernet header (and its type) on. */
struct colo_frame {
    const uint8_t *data;
    uint32_t size;      /* bytes at data */
    uint32_t wire_size; /* bytes of the packet; if more than size, the reader cut it off: never taken for equal */
    uint16_t ethertype; /* host byte order; for 0x8100, 0x88a8 and 0x9100 data begins with the tag (TCI) */
    uint16_t vlan;      /* VLAN id that the kernel took out of the frame (NFQA_VLAN); 0 for none */
};

/* How a packet leaves. */
enum colo_how {
    COLO_EQUAL,       /* the SVM has said the same */
    COLO_PASSED,      /* nothing that is compared: ARP, neighbour discovery, ... */
    COLO_COMMITTED,   /* its epoch is on the backup */
    COLO_UNPROTECTED, /* protection has ended */
};

struct colo_release {
    uint64_t id; /* as given to colo_primary() */
    uint32_t how; /* enum colo_how */
};

/* Why a checkpoint is asked for.  The order is that of comparator.py's table of names. */
enum colo_reason {
    COLO_NO_REQUEST,
    COLO_TCP_PAYLOAD,   /* bytes, FIN or urgent data differ */
    COLO_TCP_RESET,     /* one side refused or reset what the other goes on with */
    COLO_ICMP_PAYLOAD,  /* answers to one echo request differ */
    COLO_TCP_PORTS,     /* the guest opens a connection, from another port in each VM */
    COLO_UDP_PAYLOAD,   /* a datagram of each side that the other has not sent */
    COLO_TCP_TIMEOUT,   /* one side did not say in time what the other said */
    COLO_UDP_TIMEOUT,
    COLO_ICMP_TIMEOUT,
    COLO_OTHER_TIMEOUT,
    COLO_LIMIT_BYTES,
    COLO_LIMIT_PACKETS,
    COLO_LIMIT_FLOWS,
    COLO_LIMIT_SECONDARY,
    COLO_TRUNCATED,     /* a PVM packet came cut off, so it can only leave by a checkpoint */
};

/* What happened so far; held and held_bytes are as of now. */
struct colo_counters {
    uint64_t released_equal, released_commit, released_passed;
    uint64_t diverged; /* differences found: contents that differ, and time-outs */
    uint64_t held, held_bytes;
    uint64_t secondary_seen, secondary_dropped;
    uint64_t malformed; /* packets of either side that could not be parsed */
    uint64_t truncated; /* packets of either side that came cut off */
    uint64_t flows;     /* known now */
};

struct colo *colo_new(const struct colo_config *config, int64_t now_ns);
void colo_free(struct colo *c);

/* -- what the VMs send -- */

/* A packet that the PVM sent: it is held until its id comes out.  Ids must be unique among the held ones. */
void colo_primary(struct colo *c, int64_t now_ns, uint64_t id, const struct colo_frame *frame);

/* A packet that the SVM sent, its TCP in the PVM's sequence space (see docs/rewriter.rst). */
void colo_secondary(struct colo *c, int64_t now_ns, const struct colo_frame *frame);

/*
 * For who has several packets at hand: the one that will be handed over COLO_AHEAD packets from now, or NULL behind the
 * last one.  What is known of its flow comes into the cache meanwhile.  Changes nothing; the packet need not come.
 */
#define COLO_AHEAD 8
void colo_prefetch(struct colo *c, const struct colo_frame *frame);

/* Have time-outs found and old state forgotten; to be called at colo_deadline(), or more often. */
void colo_tick(struct colo *c, int64_t now_ns);

/* When colo_tick() has something to ask for next if nothing else happens; COLO_NEVER for not at all. */
int64_t colo_deadline(const struct colo *c);

/* When the oldest of the PVM's packets that wait for leave came; COLO_NEVER if none waits. */
int64_t colo_oldest(const struct colo *c);

/* -- what comes out -- */

/* The packets that leave, in the order in which they must leave; valid until the next call. */
size_t colo_released(const struct colo *c, const struct colo_release **out);

/* What colo_released() showed has been dealt with. */
void colo_drained(struct colo *c);

/* The reason of a request that has not been fetched yet, or COLO_NO_REQUEST. */
int colo_requested(const struct colo *c);

/* Fetch the request: its reason, or COLO_NO_REQUEST; detail gets a sentence for people, cut off at size. */
int colo_request(struct colo *c, char *detail, size_t size);

/* What the held packet id waits for, in words; 0, or -1 if it is not held.  Looks at all held packets: for people. */
int colo_waits_for(const struct colo *c, uint64_t id, char *out, size_t size);

/* The flow of a packet in words, or what passes uncompared; returns 1 if it is compared, 0 if it passes. */
int colo_describe(const struct colo_frame *frame, char *out, size_t size);

void colo_counters(const struct colo *c, struct colo_counters *out);

/* -- checkpoints: order and meaning in docs/comparison.rst; 0, or -1 if called out of order -- */

/* Close the epoch.  Costs the same however much is held.  Returns the packets held for it, or -1. */
int64_t colo_cut(struct colo *c, int64_t now_ns);
int colo_commit(struct colo *c, int64_t now_ns);
void colo_secondary_resumed(struct colo *c, int64_t now_ns);
int colo_abort_cut(struct colo *c, int64_t now_ns);
void colo_release_all(struct colo *c, int64_t now_ns);

/* NULL, or an invariant that does not hold.  For tests: costs time in proportion to everything that is known. */
const char *colo_check(struct colo *c);

#endif
