/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * From one packet queue of the SVM through the rewriter and back, without Python per packet.
 *
 * Python is shown what it may learn addresses from: ARP, ICMPv6, and the first packet in a second of each source.
 */
#ifndef REMUS_COLO_REWRITING_H
#define REMUS_COLO_REWRITING_H

#include "queue.h"
#include "rewrite.h"

/* What of a turn calls for attention. */
#define RW_LOOKS 1  /* there are looks to be taken */
#define RW_HELD 2   /* rewriter_held_size() is not 0 */
#define RW_FAILED 4 /* the queue cannot be read, or verdicts not sent; error tells why (negative errno) */

#define RW_LOOK_BYTES 128 /* of a packet, enough for headers and addresses */
#define RW_SOURCES 64

struct rw_look {
    uint32_t size;
    uint16_t ethertype;
    uint8_t data[128];
};

struct rw_source {
    uint8_t address[16];
    double seen_s;
};

struct rw_turns {
    struct rq_queue *queue;
    struct rewriter *rewriter;
    int32_t from_guest; /* the queue holds what the guest sends; otherwise what goes to it */
    int32_t muted;      /* all packets are dropped */
    int32_t error;
    uint32_t nr_looks;
    struct rw_look looks[32];     /* as many as one reading brings packets */
    struct rw_source sources[64]; /* by a hash of the address: whom Python has seen lately */
};

int rw_turn(struct rw_turns *t, uint32_t most);

#endif
