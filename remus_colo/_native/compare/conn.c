/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The connections of a TCP flow: where each begins, and in which numbers the SVM speaks of it. */
#include "stream.h"

void conn_init(struct conn *conn, uint32_t index)
{
    memset(conn, 0, sizeof(*conn));
    conn->index = index;
    conn->watermark = conn->origin = conn->reference = conn->primary_high = NOWHERE;
    conn->primary_fin = conn->secondary_fin = conn->primary_ack = conn->secondary_ack = NOWHERE;
    conn->secondary_rst_at = NOWHERE;
    for (int i = 0; i < URGENT_KEPT; i++)
        conn->primary_urgent[i] = conn->secondary_urgent[i] = NOWHERE;
}

void conn_clear(struct colo *c, struct conn *conn)
{
    runs_clear(c, &conn->primary);
    runs_clear(c, &conn->secondary);
    runs_clear(c, &conn->low);
    buf_drop(&c->pool, conn->rst_payload);
    buf_drop(&c->pool, conn->syn_payload);
    conn->rst_payload = conn->syn_payload = NULL;
}

uint64_t conn_kept(const struct conn *conn)
{
    if (!conn->extra)
        return conn->secondary.bytes;
    return conn->secondary.bytes + conn->low.bytes + (conn->syn_payload ? conn->syn_payload->size : 0);
}

void conn_recount(struct state *s, struct conn *conn)
{
    uint64_t kept = conn_kept(conn);

    s->kept_bytes += kept - conn->counted;
    conn->counted = kept;
}

int64_t conn_unwrap(struct conn *conn, uint32_t seq)
{
    int64_t reference = conn->watermark;

    if (reference == NOWHERE) {
        if (conn->reference == NOWHERE)
            conn->reference = (int64_t)seq + ((int64_t)1 << 32);
        reference = conn->reference;
    }
    return reference + (int32_t)(seq - (uint32_t)reference);
}

int64_t conn_unwrap_ack(const struct conn *conn, uint32_t ack)
{
    int64_t reference = conn->secondary_ack != NOWHERE ? conn->secondary_ack : conn->primary_ack;

    if (reference == NOWHERE)
        return (int64_t)ack + ((int64_t)1 << 32);
    return reference + (int32_t)(ack - (uint32_t)reference);
}

static uint32_t distance(uint32_t a, uint32_t b)
{
    return a - b < b - a ? a - b : b - a;
}

/*
 * Which space the SVM's segments are in, if there is no rewriter or nobody knows.  Initial sequence numbers are random,
 * so the first segment lies near one of the two and far from the other.  It does not lie before the stream's beginning.
 */
static void decide_space(struct conn *conn, uint32_t seq)
{
    uint32_t expected = conn->watermark != NOWHERE ? (uint32_t)conn->watermark : conn->isn + 1;
    bool own = distance(seq + conn->shift, expected) < distance(seq, expected);

    if (conn->space != SPACE_UNDECIDED)
        return;
    if (conn->has_isn && conn->origin != NOWHERE) {
        int64_t back = conn->origin - conn->watermark;
        bool can_own = (int32_t)(seq + conn->shift - expected) >= back, can_be_mapped = (int32_t)(seq - expected) >= back;

        if (can_own != can_be_mapped)
            own = can_own;
    }
    conn->space = own ? SPACE_OWN : SPACE_MAPPED;
}

uint32_t conn_mapped(const struct colo *c, struct conn *conn, uint32_t seq)
{
    if (!c->config.own_sequence || !conn->shift)
        return seq;
    decide_space(conn, seq);
    return conn->space == SPACE_OWN ? seq + conn->shift : seq;
}

static void learn_shift(struct conn *conn)
{
    if (conn->has_isn && conn->has_secondary_isn)
        conn->shift = conn->isn - conn->secondary_isn;
}

/* What the SVM said before its space could be decided is where it sent it: put it where the PVM's stream begins. */
static void move_early(struct conn *conn, int64_t position)
{
    int64_t first = conn->secondary.count ? runs_start(&conn->secondary) : conn->secondary_fin, move;

    if (first == NOWHERE)
        return;
    decide_space(conn, (uint32_t)first);
    if (conn->space != SPACE_OWN)
        return;
    /* Unwrapped again: either number may have wrapped. */
    move = position + (int32_t)((uint32_t)first + conn->shift - (uint32_t)position) - first;
    for (uint32_t i = 0; i < conn->secondary.count; i++)
        runs_at(&conn->secondary, i)->start += move;
    if (conn->secondary_fin != NOWHERE)
        conn->secondary_fin += move;
    for (int i = 0; i < URGENT_KEPT; i++) {
        if (conn->secondary_urgent[i] != NOWHERE)
            conn->secondary_urgent[i] += move;
    }
}

/* The PVM's stream begins at position for us. */
void conn_start(struct colo *c, struct state *s, struct conn *conn, int64_t position, bool midstream)
{
    int64_t conflict;

    if (c->config.own_sequence && conn->shift)
        move_early(conn, position);
    conn->watermark = conn->origin = position;
    conn->history = 0;
    conn->midstream = conn->extra = midstream;
    if (midstream)
        runs_move_below(c, &conn->secondary, &conn->low, position);
    else
        runs_forget_below(c, &conn->secondary, position);
    if (conn->syn_payload) {
        struct buf *buf = conn->syn_payload;
        struct source source = {buf->bytes, buf->size, buf};

        conn->syn_payload = NULL;
        if (runs_insert(c, &conn->secondary, position, buf->bytes, buf->size, &source, &conflict) == RUNS_CONFLICT)
            stream_differ(c, s, conn, conflict, DIFF_SECONDARY_REPEAT, 0, 0);
        buf_drop(&c->pool, buf);
    }
}

static struct conn *following(struct colo *c, struct conn *conn)
{
    if (!conn->next) {
        conn->next = pool_take(&c->pool, sizeof(*conn));
        conn_init(conn->next, conn->index + 1);
        c->conn_count++;
    }
    return conn->next;
}

void conn_free(struct colo *c, struct state *s, struct conn *conn)
{
    conn_clear(c, conn);
    if (conn != &s->first) {
        pool_give(&c->pool, conn, sizeof(*conn));
        c->conn_count--;
    }
}

/* Free the connections that both sides have left. */
static void prune(struct colo *c, struct state *s)
{
    struct conn *conn;

    while ((conn = s->oldest) != s->primary && conn != s->secondary && conn->held == 0) {
        s->oldest = conn->next;
        s->kept_bytes -= conn->counted;
        conn_free(c, s, conn);
    }
}

/* All that the other side has said is that it refuses what this SYN accepts: the same attempt, not an older connection. */
static bool refused(bool rst, bool has_ack, uint32_t rst_ack, bool syn_has_ack, uint32_t ack)
{
    return rst && has_ack && syn_has_ack && rst_ack == ack;
}

/* This SYN-ACK answers what the connection began with, be it with another number (SYN cookies, a full queue). */
static bool answers_again(const struct conn *conn, bool has_ack, uint32_t ack)
{
    return has_ack && conn->answers && conn->answered == ack;
}

/* The connection has ended, and this SYN-ACK answers another attempt, be its number the same or not. */
static bool answers_another(const struct conn *conn, bool has_ack, uint32_t ack)
{
    return (conn->primary_fin != NOWHERE || conn->secondary_fin != NOWHERE) && has_ack && conn->answers && conn->answered != ack;
}

static void note_answer(struct conn *conn, bool has_ack, uint32_t ack)
{
    conn->answers = has_ack;
    conn->answered = ack;
}

struct conn *conn_primary_syn(struct colo *c, struct state *s, uint32_t seq, bool has_ack, uint32_t ack)
{
    struct conn *conn = s->primary;

    if (conn->has_isn && conn->isn == seq && !answers_another(conn, has_ack, ack))
        return conn;
    if (conn->has_isn && answers_again(conn, has_ack, ack) && conn->primary_high == conn->origin) {
        conn->primary_high = NOWHERE; /* it has said nothing yet: begin anew */
    } else if (conn->primary_seen ||
               (conn->secondary_seen && !conn->has_secondary_isn &&
                !refused(conn->secondary_rst, conn->secondary_rst_has_ack, conn->secondary_rst_ack, has_ack, ack))) {
        conn = s->primary = following(c, conn);
        prune(c, s);
    }
    conn->isn = seq;
    conn->has_isn = true;
    note_answer(conn, has_ack, ack);
    learn_shift(conn);
    conn_start(c, s, conn, conn_unwrap(conn, seq) + 1, false);
    return conn;
}

/* The SVM has not got beyond its SYN. */
static bool only_opened(const struct conn *conn)
{
    return !conn->secondary.count && conn->secondary_fin == NOWHERE && !conn->secondary_rst &&
           conn->watermark == conn->origin;
}

/*
 * After a checkpoint the SVM begins as a copy of the PVM, its numbers included.  A capture of an SVM that was none, as replay
 * may be given, shows its own SYN late: it belongs to the connection at hand if the PVM has not ended that one.
 */
static bool belated(const struct colo *c, const struct conn *conn, bool has_ack, uint32_t ack)
{
    return c->config.own_sequence && conn->assumed && !conn->primary_rst && conn->primary_fin == NOWHERE &&
           (has_ack ? answers_again(conn, has_ack, ack) : !conn->answers);
}

struct conn *conn_secondary_syn(struct colo *c, struct state *s, uint32_t seq, bool has_ack, uint32_t ack)
{
    struct conn *conn = s->secondary;

    /* A rewriter that has learned the offset in the meantime gives a repeated SYN the PVM's number. */
    if (conn->has_secondary_isn && (seq == conn->secondary_isn || (conn->has_isn && seq == conn->isn)) &&
        !answers_another(conn, has_ack, ack))
        return conn;
    if ((conn->secondary_seen && !(answers_again(conn, has_ack, ack) && only_opened(conn)) && !belated(c, conn, has_ack, ack)) ||
        (!conn->secondary_seen && conn->primary_seen && !conn->has_isn &&
         !refused(conn->primary_rst, conn->primary_rst_has_ack, conn->primary_rst_ack, has_ack, ack))) {
        if (conn->index >= s->primary->index + AHEAD_MAX || (conn->index > s->primary->index && c->conn_count >= c->config.flows)) {
            /* Too far ahead already: the newest connection takes the place of the last. */
            uint64_t counted = conn->counted;

            conn_clear(c, conn);
            conn_init(conn, conn->index);
            conn->counted = counted;
        } else {
            conn = s->secondary = following(c, conn);
            prune(c, s);
        }
    }
    conn->secondary_isn = seq;
    conn->has_secondary_isn = true;
    conn->assumed = false;
    if (!conn->has_isn)
        note_answer(conn, has_ack, ack);
    conn->space = c->config.own_sequence == 2 ? SPACE_OWN : SPACE_UNDECIDED;
    learn_shift(conn);
    return conn;
}
