/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a comparator knows.
 *
 * A flow has a state: what both sides have said in it within one epoch.  A cut costs the same however many flows there
 * are, because the guest is paused: it sets the epoch aside and advances its number, and a flow steps into the new epoch
 * when it is next touched.  Until the commit its old state is kept for an abort.
 *
 * TCP positions are unwrapped: 64-bit numbers congruent to the 32-bit number on the wire.
 */
#ifndef COLO_STATE_H
#define COLO_STATE_H

#include "../compare.h"
#include "hash.h"
#include "list.h"
#include "packet.h"
#include "pool.h"

#define NOWHERE INT64_MIN /* as a position */

#define DATAGRAM_OVERHEAD_BYTES 200 /* what keeping one costs beside its payload; bounds empty ones, too */
#define RUN_OVERHEAD_BYTES 64
#define RUNS_MAX 16384 /* of one side: more pieces are a limit reached */
#define RUNS_FIRST 4   /* runs that an array begins with room for */
#define FRAGMENTS_MAX 2048 /* of one datagram: more than 64 KiB at the smallest MTU have */
#define URGENT_KEPT 8   /* marks of one side that are remembered */
#define REFUSED_KEPT 8  /* refused connection attempts of the SVM that are */
#define AHEAD_MAX 16    /* connections that the SVM may be ahead of the PVM in one flow */

/* -- TCP -- */

/* Bytes of one side above the watermark. */
struct run {
    int64_t start;
    const uint8_t *data; /* in buf */
    struct buf *buf;
    uint32_t size;
};

/* Disjoint, in ascending order. */
struct runs {
    struct run *array; /* count runs from first on; NULL if there are none */
    uint32_t first, count, room;
    uint64_t bytes; /* with overhead */
};

enum space { SPACE_UNDECIDED, SPACE_MAPPED, SPACE_OWN };

/* One connection of a flow, which has several if its ports are used again. */
struct conn {
    int64_t watermark; /* the PVM's stream is known to be good below it */
    int64_t origin;    /* where the PVM's stream began for us */
    int64_t reference; /* what to unwrap by while there is no watermark */
    int64_t primary_high; /* behind the highest unit that the PVM has sent */
    int64_t primary_fin, secondary_fin; /* position of the FIN itself */
    int64_t primary_ack, secondary_ack; /* highest */
    struct runs primary, secondary;
    uint64_t counted;            /* its part of the state's kept_bytes */
    uint64_t history;            /* one behind where its newest record was written; 0 for none */
    uint32_t held;               /* packets that refer to it */
    uint32_t index;
    uint32_t isn, secondary_isn; /* as on the wire */
    uint32_t shift;              /* SVM's own sequence space to the PVM's */
    bool primary_seen, secondary_seen, has_isn, has_secondary_isn;
    bool primary_rst, secondary_rst, secondary_rst_has_ack, primary_rst_has_ack;
    bool assumed;   /* the SVM's initial sequence number is what a checkpoint has made it, not one that was seen */
    bool answers;   /* it was begun by a SYN with an acknowledgement: answered */
    bool midstream; /* began without a SYN or a cut: what is below origin is not known to be good */
    bool urgent;    /* one of them has marked urgent data */
    bool extra;     /* there may be more of the SVM's than secondary: low, syn_payload */
    uint8_t space;  /* which one the SVM's segments are in */
    /* rare */
    struct conn *next; /* newer */
    struct runs low; /* the SVM's bytes below the origin, if midstream */
    int64_t secondary_rst_at;
    uint32_t answered; /* what the SYN-ACK acknowledges: tells one attempt of the client from another */
    uint32_t secondary_rst_ack, primary_rst_ack;
    uint32_t refused[REFUSED_KEPT]; /* what the SVM's refusals acknowledge, newest first */
    uint32_t refusals;
    struct buf *rst_payload; /* of the SVM's RST */
    struct buf *syn_payload; /* of an SVM's SYN that came before the PVM's (TCP fast open, RFC 7413) */
    int64_t primary_urgent[URGENT_KEPT], secondary_urgent[URGENT_KEPT]; /* urgent positions, newest first */
};

enum difference_kind {
    DIFF_BYTE,
    DIFF_PRIMARY_REPEAT,
    DIFF_SECONDARY_REPEAT,
    DIFF_PRIMARY_FIN,
    DIFF_SECONDARY_FIN,
    DIFF_PRIMARY_BEHIND_FIN,
    DIFF_SECONDARY_BEHIND_FIN,
    DIFF_FIN_DATA,
    DIFF_DATA_FIN,
    DIFF_URGENT,
    DIFF_PIECES,
    DIFF_RESET_DATA,
    DIFF_RESET_ACK,
    DIFF_RESET_SYN,
    DIFF_SYN_RESET,
    DIFF_ECHO,
};

struct difference {
    int64_t offset; /* bytes from the start of the connection, or from where it was first seen */
    uint32_t sequence; /* the PVM's there */
    uint8_t kind, primary, secondary;
};

/* -- datagrams -- */

/* Equal datagrams of one flow and epoch: either the PVM's that wait, or the SVM's that came early. */
struct content {
    struct content *chain; /* in its bucket */
    struct state *state;
    uint64_t hash;
    struct link in_state;
    struct link entries; /* struct held or struct early, oldest first */
    bool waiting;
};

struct early {
    struct link in_epoch, in_content;
    struct content *content;
    struct buf *buf;
    int64_t seen_ns;
};

/* -- flows -- */

struct state {
    struct flow *flow;
    uint64_t kept_bytes; /* of the SVM, with overhead */
    struct conn *primary, *secondary; /* TCP: where each side is */
    bool diverged;
    bool progressed; /* the watermark has moved since somebody last looked */
    struct link leading;  /* in its epoch's list if the SVM has said what the PVM has not */
    int64_t leading_ns;   /* since when without progress */
    struct link buffered; /* in its epoch's list if the SVM's output is kept */
    struct conn first;    /* TCP: the first connection of this epoch */
    /* rare, or not TCP */
    struct conn *oldest; /* of those that are remembered */
    struct link contents;
    struct difference difference;
};

/* What every packet looks at comes first and fills whole cache lines: with many flows, these are what takes time. */
struct flow {
    struct flow *chain; /* in its bucket */
    uint64_t hash;
    struct flow_key key;
    uint8_t kind;
    uint32_t epoch; /* of state */
    struct state *state, *saved; /* saved: from before an uncommitted cut */
    int64_t last_ns; /* of its last packet */
    struct link held;
    struct state own;
    /* rare */
    struct link in_flows, touched;
    int64_t queued_ns; /* when it was put where it is in the list of flows */
    uint32_t saved_epoch;
};

/* A PVM packet, or the fragments of one datagram, waiting for leave. */
struct held {
    struct link in_epoch, in_flow, in_content;
    struct flow *flow; /* NULL while fragments are missing */
    struct conn *conn;
    struct content *content;
    struct part *parts; /* further fragments, newest first */
    struct buf *buf;    /* what is compared, prefix included; NULL as long as it lies in the frame at hand */
    const uint8_t *data; /* TCP: the segment's data, in buf or in the frame */
    uint32_t size;
    uint64_t id, order, last_order;
    int64_t arrived_ns;
    int64_t start, end; /* TCP: its data's beginning, and behind its last unit; NOWHERE if it has none */
    int64_t ack;  /* TCP: the position that it acknowledges, or NOWHERE */
    int64_t low;  /* TCP: where it begins below the origin of a stream that began midstream, or NOWHERE */
    uint32_t bytes, packets;
    uint32_t seq, wire_ack, urgent, lacks;
    uint8_t flags, prefixed, kind;
    bool matched, malformed;
};

struct part {
    struct part *next;
    uint64_t id, order;
};

/* -- fragments -- */

struct fragment {
    struct fragment *next;
    uint32_t offset;
    bool more;
    struct buf *buf;
};

struct assembly {
    struct assembly *chain;
    struct link in_epoch;
    struct flow_key key;
    uint64_t hash;
    uint32_t epoch;
    bool secondary, broken;
    uint8_t upper; /* of the first fragment */
    struct fragment *first, *last;
    uint32_t count;
    uint64_t bytes;
    int64_t total, seen_ns; /* total: -1 while unknown */
    struct held *held;      /* of the PVM's */
};

/* -- epochs -- */

struct epoch {
    struct link held;  /* by arrival, so by deadline, too */
    struct link early; /* by age */
    struct link buffered, leading;
    struct link assemblies, secondary_assemblies;
    uint64_t held_bytes, held_packets;
    uint64_t kept_bytes;     /* of the SVM, in flows */
    uint64_t assembly_bytes; /* of the SVM */
};

struct stashed {
    struct stashed *next;
    struct colo_frame frame;
    struct buf *buf;
};

/* An uncommitted cut. */
struct cut {
    struct epoch *epoch; /* the closing one */
    bool running;        /* the SVM ran before the cut */
    struct link touched; /* flows that have stepped into the new epoch */
    struct stashed *stash, **stash_end; /* SVM output since, for the case of an abort */
    uint64_t stash_bytes, stash_count;
};

enum request_kind { ASK_DIFFERENCE, ASK_WAITS, ASK_LIMIT, ASK_CUT_OFF };

/* What a request's sentence is made from, when somebody wants to read it. */
struct request {
    int reason;
    enum request_kind kind;
    struct flow_key key;
    struct difference difference;
    char waits[128];
    bool has_key;
    uint64_t amount, limit;
    const char *unit;
};

#define OPENINGS_KEPT 16u /* of one side */

/* The first packet of a flow that the guest has begun, as it seems. */
struct opening {
    struct flow_key key;
    uint32_t size;   /* of a datagram, with its prefix */
    uint32_t number; /* of its epoch */
};

/* A packet of each side that the other will hardly send: see doubt.c. */
struct doubt {
    struct flow_key primary, secondary;
    int64_t since_ns;
    uint32_t size, number; /* as of an opening */
    bool pending;
};

/* How many packets ahead a flow itself is fetched, behind its bucket. */
#define COMING (COLO_AHEAD / 2u)

/* What the PVM has sent of late, oldest overwritten first. */
struct history {
    uint8_t *ring;
    uint64_t end; /* bytes written since the beginning */
};

struct colo {
    struct colo_config config;
    struct hash_seed seed;
    struct pool pool;
    struct colo_counters counters;
    bool protecting, running, requested;
    bool restoring; /* an abort is putting held packets back: no limits until all are */
    int64_t resumed_ns;
    uint64_t order;
    uint32_t number; /* of the running epoch */
    struct epoch *epoch;
    struct epoch epochs[2]; /* the running one, and one to be set aside at a cut */
    struct cut *cut;        /* the uncommitted one, or NULL */
    struct cut cut_storage;
    struct flow **flows;
    struct link flow_list; /* oldest check for idleness first */
    uint64_t flow_count;
    uint64_t conn_count; /* connections that lie outside their flow */
    uint64_t flow_mask, content_mask;
    struct content **contents;
    struct assembly **assemblies;
    struct history history;
    struct opening openings[2][OPENINGS_KEPT]; /* of the SVM, of the PVM; oldest overwritten first */
    uint32_t openings_at[2];
    struct doubt doubt;
    struct slab *slabs;          /* memory of flows */
    struct flow *free_flows;     /* by chain */
    uint64_t coming[COMING];     /* hashes of the packets that colo_prefetch() was told of */
    uint32_t coming_at;
    struct colo_release *out;
    size_t out_count, out_room;
    struct request request;
    struct packet packet, joined; /* the one at hand; what its fragments make */
};

#define ASSEMBLY_BUCKETS 4096u

/* Flows per slab; a flow begins on a cache line. */
#define SLAB_FLOWS 64u
#define CACHE_LINE 64u

static inline bool same_key(const struct flow_key *a, const struct flow_key *b)
{
    return memcmp(a, b, sizeof(*a)) == 0;
}

/* stream.c: TCP */
void stream_init(struct state *s);
void stream_clear(struct colo *c, struct state *s);
/* to becomes what from is in the next epoch, whose SVM begins as a copy of the PVM as it is now; they may be one. */
void stream_rebase(struct colo *c, struct state *to, struct state *from);
void stream_primary(struct colo *c, struct state *s, struct held *h);
void stream_secondary(struct colo *c, struct state *s, const struct packet *p);
bool stream_ready(struct colo *c, struct state *s, struct held *h);
bool stream_leads(const struct state *s);
bool stream_is_over(const struct state *s);
void stream_shrink(struct colo *c, struct state *s, uint64_t excess);

/* runs.c: bytes of one side */

/* Where bytes lie, and the buffer that they have been copied to, made when something must be kept. */
struct source {
    const uint8_t *base;
    uint32_t size;
    struct buf *buf;
};

enum runs_result { RUNS_OK, RUNS_CONFLICT, RUNS_FULL };

enum runs_result runs_insert(struct colo *c, struct runs *runs, int64_t start, const uint8_t *data, uint32_t size,
                             struct source *source, int64_t *conflict);
void runs_consume(struct colo *c, struct runs *runs, uint32_t count);
void runs_forget_below(struct colo *c, struct runs *runs, int64_t position);
void runs_move_below(struct colo *c, struct runs *from, struct runs *to, int64_t position);
void runs_clear(struct colo *c, struct runs *runs);
void runs_drop_last(struct colo *c, struct runs *runs);

enum cover { COVER_EQUAL, COVER_MISSING, COVER_DIFFERS };

/* The first position where runs contradict these bytes, or NOWHERE. */
int64_t runs_contradict(const struct runs *runs, int64_t start, const uint8_t *data, uint32_t size);

/* The byte at a position that runs hold. */
uint8_t runs_byte(const struct runs *runs, int64_t position);

/* The first position from start on that runs do not hold, as far as it lies before end; otherwise end, or one behind it. */
int64_t runs_reach(const struct runs *runs, int64_t start, int64_t end);

/* Whether runs hold these bytes; *where is the first position that is missing or differs. */
enum cover runs_cover(const struct runs *runs, int64_t start, const uint8_t *data, uint32_t size, int64_t *where);

/* Index of the first differing byte of two that differ. */
uint32_t first_difference(const uint8_t *one, const uint8_t *other, uint32_t size);

static inline struct run *runs_at(const struct runs *runs, uint32_t index)
{
    return runs->array + runs->first + index;
}

static inline int64_t runs_start(const struct runs *runs)
{
    return runs->count ? runs_at(runs, 0)->start : NOWHERE;
}

static inline int64_t runs_end(const struct runs *runs)
{
    const struct run *last;

    if (!runs->count)
        return NOWHERE;
    last = runs_at(runs, runs->count - 1);
    return last->start + last->size;
}

/* history.c */
bool history_init(struct history *history);
void history_free(struct history *history);
void history_add(struct history *history, struct conn *conn, int64_t start, const uint8_t *data, uint32_t size);
int64_t history_contradicts(const struct history *history, const struct conn *conn, int64_t start, const uint8_t *data,
                            uint32_t size, uint8_t *before);

/* datagram.c */
void datagram_init(struct state *s);
void datagram_clear(struct colo *c, struct state *s);
void datagram_primary(struct colo *c, struct state *s, struct held *h, const struct packet *p);
struct held *datagram_secondary(struct colo *c, struct state *s, struct epoch *epoch, const struct packet *p, int64_t now_ns);
void datagram_drop(struct colo *c, struct early *early);
void datagram_let_go(struct colo *c, struct held *h);
bool datagram_contradicts(const struct state *s, const struct packet *p, bool waiting);
bool datagram_waits(const struct state *s, bool primary, uint32_t size);

/* assembly.c: fragments */
struct assembly *assembly_of(struct colo *c, const struct flow_key *key, bool secondary, int64_t now_ns);
bool assembly_add(struct colo *c, struct assembly *a, const struct packet *p);
bool assembly_absorb(struct colo *c, struct assembly *into, struct assembly *from);
struct buf *assembly_join(struct colo *c, const struct assembly *a);
uint64_t assembly_cost(const struct assembly *a);
void assembly_free(struct colo *c, struct assembly *a);

/* flow.c */
struct flow *flow_find(struct colo *c, const struct flow_key *key, uint64_t *hash);
struct flow *flow_new(struct colo *c, const struct packet *p, uint64_t hash, int64_t now_ns);
struct state *flow_step(struct colo *c, struct flow *flow);
void flow_rebase(struct colo *c, struct flow *flow);
void flow_restore(struct colo *c, struct flow *flow);
void flow_forget_saved(struct colo *c, struct flow *flow);
void flow_forget(struct colo *c, struct flow *flow);
bool flow_make_room(struct colo *c);
void flow_age(struct colo *c, int64_t now_ns);
void flow_forget_to(struct colo *c, uint64_t count);
void flow_free_slabs(struct colo *c);

/* hold.c: the PVM's packets that wait */
struct held *held_new(struct colo *c, int64_t now_ns, uint64_t id, uint32_t bytes);
void held_describes(struct held *h, const struct packet *p);
void held_add_part(struct colo *c, struct held *h, uint64_t id, uint64_t order, uint32_t bytes);
void held_wait(struct colo *c, struct flow *flow, struct held *h, const struct packet *p);
void held_let_go(struct colo *c, struct held *h);
void held_free(struct colo *c, struct held *h);
void epoch_init(struct epoch *epoch);
void epoch_enter(struct epoch *epoch, struct held *h);
void epoch_leave(struct epoch *epoch, struct held *h);
void out_id(struct colo *c, uint64_t id, enum colo_how how);
void out_held(struct colo *c, const struct held *h, enum colo_how how);
void out_all(struct colo *c, struct epoch *const *epochs, size_t count, enum colo_how how);

/* comparator.c */
void compare_primary(struct colo *c, int64_t now_ns, struct held *h, const struct packet *p, bool entered);
void compare_drain_all(struct colo *c, struct flow *flow);
void compare_secondary(struct colo *c, int64_t now_ns, const struct colo_frame *frame);
void compare_again(struct colo *c, int64_t now_ns, struct held *h);
void compare_joined(struct colo *c, int64_t now_ns, struct assembly *a);

/* ask.c */

/* The request to be filled in; NULL if one has been made since the last cut. */
struct request *ask(struct colo *c, int reason, enum request_kind kind);
void ask_difference(struct colo *c, const struct state *s, struct difference difference);
void ask_limit(struct colo *c, int reason, uint64_t amount, uint64_t limit, const char *unit);
void ask_limits(struct colo *c);

/* doubt.c */
void doubt_note(struct colo *c, int64_t now_ns, const struct flow *flow, const struct packet *p, bool primary, bool begins);
int64_t doubt_due(const struct colo *c);
void doubt_settle(struct colo *c, int64_t now_ns);

/* due.c */
void age_early(struct colo *c, int64_t now_ns);
void age_assemblies(struct colo *c, int64_t now_ns);
void drop_assembly(struct colo *c, struct assembly *a);
struct assembly *oldest_secondary_assembly(const struct colo *c);

/* words.c: sentences for people */
void words_flow(const struct flow_key *key, char *out, size_t size);
void words_waits(const struct held *h, char *out, size_t size);
void words_doubt(const struct doubt *doubt, char *out, size_t size);
void words_leads(const struct state *s, char *out, size_t size);
void words_request(const struct request *request, char *out, size_t size);

#endif
