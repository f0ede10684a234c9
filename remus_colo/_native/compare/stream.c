/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One TCP flow, guest to client, as two byte streams that must be one: the PVM's and the SVM's.
 *
 * Everything below the watermark is good: it was equal on both sides, or was sent by the PVM before the cut that this epoch
 * began with.  What lies above it is kept for whichever side is ahead, and compared as soon as both have it; how it was cut
 * into segments plays no part.  At no time do both sides have the byte at the watermark.  Bytes behind a gap
 * are compared, too, and leave if the SVM has sent them: a client has no use for them before the gap is filled.
 *
 * A flow is a series of connections, because its ports are used again.  Both sides go through the same series, each at its
 * own pace: each begins with a SYN that has a new initial sequence number of that side.
 *
 * RFC 9293 says what takes up sequence space: each byte of data, SYN and FIN.
 */
#include "stream.h"

/* Compare size bytes at the watermark with what the other side has there; take it from there and return how many. */
static uint32_t agree(struct colo *c, struct state *s, struct conn *conn, bool primary, const uint8_t *data, uint32_t size)
{
    struct runs *others = primary ? &conn->secondary : &conn->primary;
    uint32_t done = 0;

    while (done < size && others->count && runs_at(others, 0)->start == conn->watermark) {
        const struct run *first = runs_at(others, 0);
        const uint8_t *theirs = first->data, *mine = data + done;
        uint32_t count = first->size < size - done ? first->size : size - done;

        if (memcmp(mine, theirs, count)) {
            uint32_t at = first_difference(mine, theirs, count);

            stream_differ(c, s, conn, conn->watermark + at, DIFF_BYTE, primary ? mine[at] : theirs[at],
                   primary ? theirs[at] : mine[at]);
            return done;
        }
        history_add(&c->history, conn, conn->watermark, mine, count);
        runs_consume(c, others, count);
        conn->watermark += count;
        done += count;
    }
    return done;
}

/* Move the watermark over all that both sides have and that is equal. */
static void advance(struct colo *c, struct state *s, struct conn *conn)
{
    while (!s->diverged && conn->primary.count && runs_start(&conn->primary) == conn->watermark) {
        const struct run *first = runs_at(&conn->primary, 0);
        uint32_t done = agree(c, s, conn, true, first->data, first->size);

        if (!done)
            break;
        runs_consume(c, &conn->primary, done);
    }
}

/* Bytes behind a gap: what the other side has of them must be the same, whatever becomes of the gap. */
static void check_apart(struct colo *c, struct state *s, struct conn *conn, bool primary, int64_t start, const uint8_t *data,
                        uint32_t size)
{
    const struct runs *others = primary ? &conn->secondary : &conn->primary;
    int64_t at = runs_contradict(others, start, data, size);
    uint8_t mine, theirs;

    if (at == NOWHERE)
        return;
    mine = data[at - start];
    theirs = runs_byte(others, at);
    stream_differ(c, s, conn, at, DIFF_BYTE, primary ? mine : theirs, primary ? theirs : mine);
}

static void drop_piece(struct colo *c)
{
    c->counters.secondary_dropped++;
    ask_limit(c, COLO_LIMIT_SECONDARY, RUNS_MAX, RUNS_MAX, "pieces of one stream of the SVM kept");
}

/* New bytes of one side, at or above the watermark. */
static void take(struct colo *c, struct state *s, struct conn *conn, bool primary, int64_t start, const uint8_t *data,
                 uint32_t size, struct source *source)
{
    struct runs *runs = primary ? &conn->primary : &conn->secondary;
    int64_t conflict;

    if (!runs->count && start == conn->watermark) { /* in order: nothing need be kept of what the other side has */
        uint32_t done = agree(c, s, conn, primary, data, size);

        start += done;
        data += done;
        size -= done;
    }
    if (s->diverged || !size)
        return;
    switch (runs_insert(c, runs, start, data, size, source, &conflict)) {
    case RUNS_OK:
        break;
    case RUNS_CONFLICT:
        stream_differ(c, s, conn, conflict, primary ? DIFF_PRIMARY_REPEAT : DIFF_SECONDARY_REPEAT, 0, 0);
        return;
    case RUNS_FULL:
        if (primary)
            stream_differ(c, s, conn, start, DIFF_PIECES, 0, 0);
        else
            drop_piece(c);
        return;
    }
    if (conn->watermark == NOWHERE)
        return; /* nothing is known yet of where the PVM's stream lies */
    check_apart(c, s, conn, primary, start, data, size);
    advance(c, s, conn);
}

/*
 * Where the urgent byte is, counted from the segment's sequence number.  The pointer leads behind it; 0 and 1 are one to
 * receivers that take it so (Linux: tcp_input.c, tcp_check_urg()).
 */
static uint32_t urgent_byte(uint32_t pointer)
{
    return pointer ? pointer - 1 : 0;
}

/* What follows from new units of either side: FINs, urgent marks. */
static void settle(struct colo *c, struct state *s, struct conn *conn, int64_t before)
{
    int64_t at = conn->watermark, mine = conn->primary_fin, theirs = conn->secondary_fin;

    if (s->diverged || at == NOWHERE)
        return;
    if (mine != NOWHERE && later(runs_end(&conn->secondary), theirs) > mine)
        stream_differ(c, s, conn, mine, DIFF_FIN_DATA, 0, 0);
    else if (theirs != NOWHERE && later(runs_end(&conn->primary), mine) > theirs)
        stream_differ(c, s, conn, theirs, DIFF_DATA_FIN, 0, 0);
    else if (mine == at && theirs == at)
        conn->watermark = ++at;
    if (at != before) {
        s->progressed = true;
        if (conn->urgent)
            stream_check_urgent(c, s, conn, before);
    }
    if (conn->secondary_rst)
        stream_check_reset(c, s, conn);
}

/*
 * What lies below the watermark was sent before, and must be the same.  But a keepalive may have a byte of no meaning, where the
 * last one was (RFC 1122, 4.2.3.6).
 */
static void check_repetition(struct colo *c, struct state *s, const struct conn *conn, const struct held *h, int64_t start,
                             int64_t high)
{
    uint32_t size = start + h->size > conn->watermark ? (uint32_t)(conn->watermark - start) : h->size;
    uint8_t before;
    int64_t at;

    if (h->size == 1 && start + 1 == high)
        return;
    at = history_contradicts(&c->history, conn, start, h->data, size, &before);
    if (at != NOWHERE)
        stream_differ(c, s, conn, at, DIFF_PRIMARY_REPEAT, h->data[at - start], before);
}

/* New bytes that leave by a checkpoint, without having been compared. */
static void remember(struct colo *c, struct conn *conn, const struct held *h, int64_t start, int64_t from)
{
    if (from < start + h->size)
        history_add(&c->history, conn, from, h->data + (from - start), (uint32_t)(start + h->size - from));
}

static void primary_segment(struct colo *c, struct state *s, struct held *h)
{
    bool fin = h->flags & TH_FIN, syn = h->flags & TH_SYN;
    struct conn *conn = (h->flags & (TH_SYN | TH_RST)) == TH_SYN
                            ? conn_primary_syn(c, s, h->seq, h->flags & TH_ACK, h->wire_ack)
                            : s->primary;
    int64_t start, data_end, end, high, before;
    struct source source;

    conn->primary_seen = true;
    h->conn = conn;
    h->start = h->end = h->ack = h->low = NOWHERE;
    if (h->flags & TH_ACK) {
        h->ack = conn_unwrap_ack(conn, h->wire_ack);
        conn->primary_ack = later(conn->primary_ack, h->ack);
    }
    if (h->flags & TH_RST) {
        conn->primary_rst = true;
        conn->primary_rst_has_ack = h->flags & TH_ACK;
        conn->primary_rst_ack = h->wire_ack;
        stream_check_reset(c, s, conn);
        return;
    }
    if (!h->size && !h->lacks && !syn && !fin) {
        if (conn->secondary_rst)
            stream_check_reset(c, s, conn);
        return; /* takes up no sequence space: pure ACK, window update, keepalive, probe */
    }

    start = conn_unwrap(conn, h->seq) + syn;
    if (conn->watermark == NOWHERE)
        conn_start(c, s, conn, start, !syn);
    before = conn->watermark;
    data_end = start + h->size + h->lacks;
    end = data_end + fin;
    if (end > start) { /* the SYN itself is no unit of the stream: its number is each side's own */
        h->start = start;
        h->end = end;
    }
    if (conn->midstream && start < conn->origin)
        h->low = start;
    high = conn->primary_high;
    conn->primary_high = later(high, end);
    if (fin && conn->primary_fin != data_end) {
        if (conn->primary_fin == NOWHERE && data_end >= high)
            conn->primary_fin = data_end;
        else
            stream_differ(c, s, conn, data_end, DIFF_PRIMARY_FIN, 0, 0);
    }
    if (h->flags & TH_URG)
        stream_note_urgent(conn, conn->primary_urgent, conn_unwrap(conn, h->seq) + urgent_byte(h->urgent));
    if (h->size && start < before)
        check_repetition(c, s, conn, h, start, high);
    if (s->diverged) {
        remember(c, conn, h, start, later(start, high));
        return;
    }
    if (h->size && start + h->size > before) {
        uint32_t skip = start < before ? (uint32_t)(before - start) : 0;

        if (conn->primary_fin != NOWHERE && data_end > conn->primary_fin) {
            stream_differ(c, s, conn, conn->primary_fin, DIFF_PRIMARY_BEHIND_FIN, 0, 0);
            return;
        }
        source = (struct source){h->data, h->size, h->buf};
        take(c, s, conn, true, start + skip, h->data + skip, h->size - skip, &source);
        if (!h->buf && source.buf) {
            h->buf = source.buf;
            h->data = h->buf->bytes;
        }
    } else {
        advance(c, s, conn); /* with a SYN, SVM bytes may have waited for this start */
    }
    settle(c, s, conn, before);
}

/* A PVM segment: set what it waits for, and compare what can be compared. */
void stream_primary(struct colo *c, struct state *s, struct held *h)
{
    primary_segment(c, s, h);
    conn_recount(s, h->conn);
}

static bool has_refused(const struct conn *conn, uint32_t ack)
{
    for (uint32_t i = 0; i < conn->refusals; i++) {
        if (conn->refused[i] == ack)
            return true;
    }
    return false;
}

static void secondary_reset(struct colo *c, struct state *s, struct conn *conn, const struct packet *p)
{
    conn->secondary_rst = true;
    conn->secondary_rst_has_ack = p->flags & TH_ACK;
    conn->secondary_rst_ack = p->ack;
    if (p->flags & TH_ACK && !has_refused(conn, p->ack)) {
        memmove(conn->refused + 1, conn->refused, (REFUSED_KEPT - 1) * sizeof(*conn->refused));
        conn->refused[0] = p->ack;
        conn->refusals += conn->refusals < REFUSED_KEPT;
    }
    /* The reset of a closed port has sequence number 0 and an ACK, and says nothing of the stream. */
    if (conn->watermark != NOWHERE && !(p->seq == 0 && p->flags & TH_ACK))
        conn->secondary_rst_at = conn_unwrap(conn, conn_mapped(c, conn, p->seq));
    buf_drop(&c->pool, conn->rst_payload);
    conn->rst_payload = NULL;
    if (p->size) {
        conn->rst_payload = buf_new(&c->pool, p->size);
        memcpy(conn->rst_payload->bytes, p->payload, p->size);
    }
    stream_check_reset(c, s, conn);
}

/* The SVM's bytes below where the PVM's stream began for us. */
static void take_low(struct colo *c, struct state *s, struct conn *conn, int64_t start, const uint8_t *data, uint32_t size,
                     struct source *source)
{
    int64_t conflict;

    if (start + size > conn->origin)
        size = (uint32_t)(conn->origin - start);
    switch (runs_insert(c, &conn->low, start, data, size, source, &conflict)) {
    case RUNS_OK:
        break;
    case RUNS_CONFLICT:
        stream_differ(c, s, conn, conflict, DIFF_SECONDARY_REPEAT, 0, 0);
        break;
    case RUNS_FULL:
        drop_piece(c);
    }
}

static void secondary_units(struct colo *c, struct state *s, struct conn *conn, uint32_t seq, const struct packet *p)
{
    int64_t start = conn_unwrap(conn, seq), end = start + p->size, fin_at = end + p->lacks, before = conn->watermark;
    struct source source = {p->payload, p->size, NULL};

    if (p->flags & TH_URG)
        stream_note_urgent(conn, conn->secondary_urgent, start + urgent_byte(p->urgent));
    if (p->flags & TH_FIN && (before == NOWHERE || fin_at >= before)) {
        if ((conn->secondary_fin != NOWHERE && conn->secondary_fin != fin_at) || runs_end(&conn->secondary) > fin_at) {
            stream_differ(c, s, conn, fin_at, DIFF_SECONDARY_FIN, 0, 0);
            return;
        }
        conn->secondary_fin = fin_at;
    }
    if (p->size && conn->secondary_fin != NOWHERE && end > conn->secondary_fin) {
        stream_differ(c, s, conn, conn->secondary_fin, DIFF_SECONDARY_BEHIND_FIN, 0, 0);
        return;
    }
    if (p->size && conn->midstream && start < conn->origin)
        take_low(c, s, conn, start, p->payload, p->size, &source);
    if (p->size && (before == NOWHERE || end > before)) {
        uint32_t skip = before != NOWHERE && start < before ? (uint32_t)(before - start) : 0;

        /* Only what is kept need be copied. */
        if (!source.buf)
            source = (struct source){p->payload + skip, p->size - skip, NULL};
        take(c, s, conn, false, start + skip, p->payload + skip, p->size - skip, &source);
    }
    buf_drop(&c->pool, source.buf);
    settle(c, s, conn, before);
}

/* An SVM segment, in the PVM's sequence space except for a SYN: compare what can be compared. */
void stream_secondary(struct colo *c, struct state *s, const struct packet *p)
{
    struct conn *conn = (p->flags & (TH_SYN | TH_RST)) == TH_SYN
                            ? conn_secondary_syn(c, s, p->seq, p->flags & TH_ACK, p->ack)
                            : s->secondary;

    conn->secondary_seen = true;
    if (p->flags & TH_ACK)
        conn->secondary_ack = later(conn->secondary_ack, conn_unwrap_ack(conn, p->ack));
    if (p->flags & TH_RST) {
        secondary_reset(c, s, conn, p);
    } else if (s->diverged) {
        /* nothing more can be made of it */
    } else if (p->flags & TH_SYN) {
        stream_check_reset(c, s, conn);
        if (p->size && conn->has_isn) {
            secondary_units(c, s, conn, conn->isn + 1, p);
        } else if (p->size && !conn->syn_payload) {
            conn->extra = true;
            conn->syn_payload = buf_new(&c->pool, p->size);
            memcpy(conn->syn_payload->bytes, p->payload, p->size);
        }
    } else if (p->size || p->flags & TH_FIN) {
        secondary_units(c, s, conn, conn_mapped(c, conn, p->seq), p);
    }
    conn_recount(s, conn);
}

/* The SVM has said what the packet carries, though one side has left out something before it. */
static bool said(const struct conn *conn, const struct held *h)
{
    int64_t from = later(h->start, conn->watermark), data_end = h->start + h->size;

    if (conn->urgent) /* marks are compared in order */
        return false;
    if (data_end > from && runs_reach(&conn->secondary, from, data_end) < data_end)
        return false;
    return !(h->flags & TH_FIN) || conn->secondary_fin == data_end;
}

/* This packet may leave, as far as it is itself concerned (those before it come first). */
bool stream_ready(struct colo *c, struct state *s, struct held *h)
{
    struct conn *conn = h->conn;

    if (s->diverged || h->lacks)
        return false;
    if (h->ack != NOWHERE && h->ack > conn->secondary_ack)
        return false;
    if (h->end != NOWHERE && h->end > conn->watermark && !said(conn, h))
        return false;
    if (h->flags & TH_RST) {
        const struct buf *theirs = conn->rst_payload;

        /* A refused connection attempt is known by what it acknowledges: a later one may be accepted. */
        if (h->seq == 0 && h->flags & TH_ACK && !has_refused(conn, h->wire_ack))
            return false;
        return conn->secondary_rst && h->size == (theirs ? theirs->size : 0) &&
               (!h->size || !memcmp(h->data, theirs->bytes, h->size));
    }
    if (h->flags & TH_SYN && !conn->has_secondary_isn)
        return false;
    if (h->low != NOWHERE && h->size) {
        int64_t where, end = h->low + h->size < conn->origin ? h->low + h->size : conn->origin;

        switch (runs_cover(&conn->low, h->low, h->data, (uint32_t)(end - h->low), &where)) {
        case COVER_EQUAL:
            break;
        case COVER_DIFFERS:
            stream_differ(c, s, conn, where, DIFF_PRIMARY_REPEAT, 0, 0);
            return false;
        case COVER_MISSING:
            return false;
        }
    }
    return true;
}

/* The SVM has said something that the PVM has not. */
bool stream_leads(const struct state *s)
{
    const struct conn *conn = s->secondary;
    int64_t high;

    if (s->diverged)
        return false;
    if (conn->secondary_rst && !conn->primary_rst)
        return true;
    if (conn->index < s->primary->index)
        return false;
    if (conn->watermark == NOWHERE) /* in a connection in which the PVM has said nothing yet */
        return conn->secondary.count || conn->secondary_fin != NOWHERE || conn->syn_payload;
    high = conn->primary_high == NOWHERE ? conn->watermark : conn->primary_high;
    return runs_end(&conn->secondary) > high || conn->secondary_fin >= high;
}

/* Nothing of use is lost with this state: the connection has ended, or has not got beyond its handshake. */
bool stream_is_over(const struct state *s)
{
    const struct conn *conn = s->primary;

    if (s->diverged || conn != s->secondary || s->kept_bytes)
        return false;
    if (conn->primary_rst && conn->secondary_rst)
        return true;
    if (conn->primary_fin != NOWHERE)
        return conn->watermark > conn->primary_fin;
    return conn->has_isn && conn->has_secondary_isn && conn->watermark == conn->origin &&
           conn->primary_high == conn->watermark;
}

/* -- the state as a whole -- */

void stream_init(struct state *s)
{
    conn_init(&s->first, 0);
    s->oldest = s->primary = s->secondary = &s->first;
}

void stream_clear(struct colo *c, struct state *s)
{
    struct conn *next;

    for (struct conn *conn = s->oldest; conn; conn = next) {
        next = conn->next;
        conn_free(c, s, conn);
    }
    s->kept_bytes = 0;
    stream_init(s);
}

void stream_rebase(struct colo *c, struct state *to, struct state *from)
{
    struct conn old = *from->primary; /* its pointers are not used */
    struct conn *conn = &to->first;

    for (uint32_t i = 0; i < old.primary.count; i++) { /* what a client sees once the checkpoint is committed */
        const struct run *run = runs_at(&old.primary, i);

        history_add(&c->history, &old, run->start, run->data, run->size);
    }
    if (to == from)
        stream_clear(c, to);
    else
        stream_init(to);
    if (!old.primary_seen)
        return;
    conn->primary_seen = conn->secondary_seen = true;
    conn->isn = conn->secondary_isn = old.isn;
    conn->has_isn = conn->has_secondary_isn = conn->assumed = old.has_isn;
    conn->answers = old.answers;
    conn->answered = old.answered;
    conn->shift = old.shift;
    conn->history = old.history;
    conn->reference = old.reference;
    conn->origin = old.origin;
    conn->watermark = conn->primary_high = old.primary_high;
    conn->primary_fin = old.primary_fin;
    conn->primary_ack = conn->secondary_ack = old.primary_ack;
    conn->primary_rst = conn->secondary_rst = old.primary_rst;
    conn->primary_rst_has_ack = conn->secondary_rst_has_ack = old.primary_rst_has_ack;
    conn->primary_rst_ack = conn->secondary_rst_ack = old.primary_rst_ack;
    if (old.primary_rst && old.primary_rst_has_ack) {
        conn->refused[0] = old.primary_rst_ack;
        conn->refusals = 1;
    }
    conn->urgent = old.urgent;
    memcpy(conn->primary_urgent, old.primary_urgent, sizeof(old.primary_urgent));
    memcpy(conn->secondary_urgent, old.primary_urgent, sizeof(old.primary_urgent));
}

static uint64_t shrink(struct colo *c, struct state *s, struct conn *conn, uint64_t excess)
{
    uint64_t before = conn_kept(conn), gone;

    buf_drop(&c->pool, conn->syn_payload);
    conn->syn_payload = NULL;
    while (conn->secondary.count && before - conn_kept(conn) < excess)
        runs_drop_last(c, &conn->secondary);
    while (conn->low.count && before - conn_kept(conn) < excess)
        runs_drop_last(c, &conn->low);
    gone = before - conn_kept(conn);
    conn_recount(s, conn);
    return gone < excess ? excess - gone : 0;
}

/* Throw away the SVM's latest bytes, those of its latest connection first, until excess bytes are gone, as far as there are any. */
void stream_shrink(struct colo *c, struct state *s, uint64_t excess)
{
    excess = shrink(c, s, s->secondary, excess);
    for (struct conn *conn = s->oldest; conn && excess; conn = conn->next)
        excess = shrink(c, s, conn, excess);
}
