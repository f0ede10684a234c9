/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * From the sockets to the comparator and back: what one vif does per packet, without Python.
 *
 * A wake-up is one rp_turn(): read what the SVM sent and what the PVM sent, have it compared, let go what may leave.
 */
#ifndef REMUS_COLO_PUMP_H
#define REMUS_COLO_PUMP_H

#include "compare.h"
#include "frames.h"
#include "queue.h"

/* What rp_turn() reads. */
#define RP_PRIMARY 1
#define RP_SECONDARY 2

/* What of it calls for attention. */
#define RP_REQUEST 1          /* colo_request() has something to tell */
#define RP_DEADLINE 2         /* deadline_ns is earlier than armed_ns */
#define RP_MISSING 4          /* missing has grown */
#define RP_PRIMARY_FAILED 8   /* the queue cannot be read; error tells why (negative errno) */
#define RP_SECONDARY_FAILED 16 /* nor the frames */
#define RP_RELEASE_FAILED 32  /* verdicts cannot be sent, or were for packets that are not held (-ENOENT) */

struct rp_pump {
    struct rq_queue *queue;    /* what the PVM sends */
    struct rf_reader *frames;  /* what the SVM sends; NULL if it cannot be heard */
    struct colo *comparator;
    int32_t ignore_tags;       /* the queue does not tell VLAN ids, so they are not compared */
    int64_t armed_ns;          /* when the caller will come by anyway */
    int64_t spin_ns;           /* how long to wait awake for the next packet, if they come that close; 0 for never */
    uint32_t spin_misses, spin_skip; /* the pump's own: waits in vain in a row, and turns without waiting still to come */
    int64_t deadline_ns;       /* colo_deadline(), as of the last turn */
    uint64_t missing;          /* packets of the PVM that did not fit into the queue's socket, since it was opened */
    int32_t primary_error, secondary_error, release_error;
};

int rp_turn(struct rp_pump *p, unsigned what, uint32_t most);

#endif
