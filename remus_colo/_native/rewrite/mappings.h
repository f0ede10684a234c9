/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The flows of one SVM: a keyed hash table, bounded, and the packets that wait in them. */
#ifndef REWRITE_MAPPINGS_H
#define REWRITE_MAPPINGS_H

#include "../compare/hash.h"
#include "../compare/list.h"
#include "../rewrite.h"
#include "segment.h"

/* A client's packet that waits for the SVM's answer. */
struct waiting {
    struct link link;
    uint32_t size;
    uint8_t packet[];
};

enum { FINISHED_GUEST = 1, FINISHED_CLIENT = 2, FINISHED_BOTH = 3 };

/* One 4-tuple.  Sequence numbers of the guest are in the SVM's space. */
struct mapping {
    struct mapping *next; /* in its bucket */
    struct link link;  /* among all */
    struct flow_key key;
    double deadline_s;
    struct link held;
    uint32_t held_packets;
    double syn_until_s;
    struct maybe syn_next;  /* ISN + 1 of a client's SYN that the SVM has not answered */
    struct maybe offset;    /* PVM's ISN - SVM's ISN */
    struct maybe svm_isn;
    struct maybe peer_next; /* what the SVM's SYN-ACK acknowledged */
    struct maybe svm_tsval; /* of the SVM's latest SYN or SYN-ACK */
    struct maybe guest_ack;
    struct maybe guest_fin; /* sequence number after the FIN */
    struct maybe client_fin;
    uint8_t finished; /* whose FIN was acknowledged */
    bool guest_opened, fast_open, reset;
};

struct rewriter {
    struct rewrite_limits limits;
    struct rewrite_counters counters;
    struct hash_seed seed;
    struct mapping **buckets;
    uint32_t bucket_mask;
    struct link flows;
    uint64_t nr_flows, nr_rewritten;
    uint32_t held_packets;
    struct link ready;
    struct rewriter *inherited; /* or NULL: flows of it are mapped by the PVM's own host, as long as there is one */
    bool learning;
};

static inline bool mapped(const struct mapping *flow)
{
    return flow->offset.known && flow->offset.value;
}

struct mapping *mapping_find(struct rewriter *r, const struct flow_key *key);

/* NULL if there is no memory. */
struct mapping *mapping_add(struct rewriter *r, double now_s, const struct flow_key *key);
void mapping_forget(struct rewriter *r, struct mapping *flow);
void mapping_forget_all(struct rewriter *r);
void mapping_set_offset(struct rewriter *r, struct mapping *flow, struct maybe offset);

/* A connection begins on this 4-tuple; what waits in the flow, and its offset, stay. */
void mapping_start(struct mapping *flow, struct maybe isn, struct maybe peer_next, struct maybe tsval, bool guest_opened);

/* False: too many wait, or there is no memory. */
bool held_keep(struct rewriter *r, struct mapping *flow, const uint8_t *packet, size_t size);
void held_discard(struct rewriter *r, struct mapping *flow);
void held_clear(struct link *list);

#endif
