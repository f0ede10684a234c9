/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Between stream.c, conn.c and contradict.c. */
#ifndef COLO_STREAM_H
#define COLO_STREAM_H

#include "state.h"

static inline int64_t later(int64_t a, int64_t b)
{
    return a > b ? a : b; /* NOWHERE is the least */
}

/* conn.c */
void conn_init(struct conn *conn, uint32_t index);
void conn_clear(struct colo *c, struct conn *conn);
void conn_free(struct colo *c, struct state *s, struct conn *conn);
uint64_t conn_kept(const struct conn *conn);
void conn_recount(struct state *s, struct conn *conn);
int64_t conn_unwrap(struct conn *conn, uint32_t seq);
int64_t conn_unwrap_ack(const struct conn *conn, uint32_t ack);
uint32_t conn_mapped(const struct colo *c, struct conn *conn, uint32_t seq);
void conn_start(struct colo *c, struct state *s, struct conn *conn, int64_t position, bool midstream);
struct conn *conn_primary_syn(struct colo *c, struct state *s, uint32_t seq, bool has_ack, uint32_t ack);
struct conn *conn_secondary_syn(struct colo *c, struct state *s, uint32_t seq, bool has_ack, uint32_t ack);

/* contradict.c */
void stream_differ(struct colo *c, struct state *s, const struct conn *conn, int64_t position, int kind, uint8_t primary,
                   uint8_t secondary);
void stream_note_urgent(struct conn *conn, int64_t *marks, int64_t mark);
void stream_check_urgent(struct colo *c, struct state *s, const struct conn *conn, int64_t from);
void stream_check_reset(struct colo *c, struct state *s, struct conn *conn);

#endif
