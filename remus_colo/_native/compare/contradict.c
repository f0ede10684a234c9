/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How two TCP streams can contradict each other beside their bytes: urgent marks, resets, refusals. */
#include "stream.h"

void stream_differ(struct colo *c, struct state *s, const struct conn *conn, int64_t position, int kind, uint8_t primary,
                   uint8_t secondary)
{
    int64_t origin = conn->origin == NOWHERE ? position : conn->origin;

    if (s->diverged)
        return;
    s->diverged = true;
    s->difference = (struct difference){position - origin, (uint32_t)position, (uint8_t)kind, primary, secondary};
    ask_difference(c, s, s->difference);
}

static bool noted(const int64_t *marks, int64_t mark)
{
    for (int i = 0; i < URGENT_KEPT; i++) {
        if (marks[i] == mark)
            return true;
    }
    return false;
}

void stream_note_urgent(struct conn *conn, int64_t *marks, int64_t mark)
{
    conn->urgent = true;
    if (noted(marks, mark))
        return;
    memmove(marks + 1, marks, (URGENT_KEPT - 1) * sizeof(*marks));
    marks[0] = mark;
}

/* A segment with the urgent byte says so (RFC 9293, 3.8.5): when both have sent that byte, both must have marked it. */
void stream_check_urgent(struct colo *c, struct state *s, const struct conn *conn, int64_t from)
{
    for (int i = 0; i < URGENT_KEPT; i++) {
        int64_t mine = conn->primary_urgent[i], theirs = conn->secondary_urgent[i];

        if (mine >= from && mine < conn->watermark && !noted(conn->secondary_urgent, mine))
            stream_differ(c, s, conn, mine, DIFF_URGENT, 1, 0);
        if (theirs >= from && theirs < conn->watermark && !noted(conn->primary_urgent, theirs))
            stream_differ(c, s, conn, theirs, DIFF_URGENT, 0, 1);
    }
}

/* Once one side has refused or reset the connection, what the other says beyond that can have no equal any more. */
void stream_check_reset(struct colo *c, struct state *s, struct conn *conn)
{
    if (conn->secondary_rst && !conn->primary_rst && conn == s->secondary) {
        int64_t missing = runs_start(&conn->primary);

        if (conn->has_isn && !conn->has_secondary_isn && conn->secondary_rst_has_ack && conn->primary_ack != NOWHERE &&
            conn->secondary_rst_ack == (uint32_t)conn->primary_ack)
            stream_differ(c, s, conn, conn->origin, DIFF_SYN_RESET, 0, 0);
        else if (missing != NOWHERE && conn->secondary_rst_at != NOWHERE && missing >= conn->secondary_rst_at)
            stream_differ(c, s, conn, missing, DIFF_RESET_DATA, 0, 0);
        else if (conn->primary_fin != NOWHERE && conn->primary_fin >= conn->watermark && conn->secondary_fin == NOWHERE &&
                 conn->secondary_rst_at != NOWHERE && conn->primary_fin >= conn->secondary_rst_at)
            stream_differ(c, s, conn, conn->primary_fin, DIFF_RESET_DATA, 0, 0);
        else if (conn->secondary_ack != NOWHERE && conn->primary_ack > conn->secondary_ack)
            stream_differ(c, s, conn, later(conn->watermark, 0), DIFF_RESET_ACK, 0, 0);
    }
    if (conn->primary_rst && conn->primary_rst_has_ack && !conn->has_isn && conn->has_secondary_isn &&
        conn->secondary_ack != NOWHERE && (uint32_t)conn->secondary_ack == conn->primary_rst_ack)
        stream_differ(c, s, conn, 0, DIFF_RESET_SYN, 0, 0);
}
