/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One netfilter queue: its socket, what is held on it, and verdicts on their way to the kernel.
 *
 * Packets are read many to a system call, whole (up to 64 kB, not split to the MTU), and looked at where they were
 * read to.  Verdicts gather in one buffer and go to the kernel together, in the order in which they were given.
 *
 * A packet's id is ours: 64 bits, from 1 up, never used again.  Its lower half is the kernel's own id.
 *
 * Functions return 0 or a count, or a negative errno.  One thread at a time.
 * Formats: <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nfnetlink_queue.h>.
 */
#ifndef REMUS_COLO_QUEUE_H
#define REMUS_COLO_QUEUE_H

#include <stddef.h>
#include <stdint.h>

#include "compare.h"

struct rq_queue;

struct rq_packet {
    uint64_t id;
    struct colo_frame frame; /* its data are valid until the next rq_read() */
    int unsummed;            /* its transport checksum is left to a device to fill in (NFQA_SKB_CSUMNOTREADY) */
};

struct rq_counters {
    uint64_t received;
    uint64_t truncated; /* packets that came cut off */
    uint64_t missing;   /* ids that never came: packets that the kernel dropped, our socket being full */
    uint64_t overruns;  /* ENOBUFS seen, which says so at once */
    uint64_t late;      /* verdicts for packets that the kernel no longer had */
    uint64_t refused;   /* requests that the kernel refused for another reason */
    uint64_t malformed; /* messages that could not be understood */
    uint64_t reads, writes; /* system calls */
    uint32_t held;
    int32_t refusal;    /* errno of the last one refused */
};

struct rq_queue *rq_open(uint16_t number, uint32_t max_packets, uint32_t buffer_bytes);
void rq_close(struct rq_queue *q);
int rq_fd(const struct rq_queue *q);
int rq_read(struct rq_queue *q, struct rq_packet *packets, int max);
int rq_accept(struct rq_queue *q, uint64_t id);
int rq_accept_modified(struct rq_queue *q, uint64_t id, const uint8_t *payload, size_t size);
int rq_drop(struct rq_queue *q, uint64_t id);
int rq_accept_each(struct rq_queue *q, const uint64_t *ids, size_t number);
int64_t rq_accept_all(struct rq_queue *q);
int rq_flush(struct rq_queue *q);
uint64_t rq_missing(const struct rq_queue *q);
void rq_get_counters(const struct rq_queue *q, struct rq_counters *counters);
int rq_parse(const uint8_t *message, size_t size, struct rq_packet *packet);

#define RQ_BATCH 32 /* packets that one rq_read() gives at most */
#define RQ_MAX_PAYLOAD 65531 /* NFQNL_MAX_COPY_RANGE: nla_len has 16 bits, 4 of its bytes are the header */

#endif
