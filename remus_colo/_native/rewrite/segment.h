/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One TCP segment in an IP packet, read and changed in place.  RFC 791, RFC 8200, RFC 9293; options of RFC 2018 (SACK)
 * and RFC 7323 (timestamps).
 */
#ifndef REWRITE_SEGMENT_H
#define REWRITE_SEGMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FLAG_FIN = 1, FLAG_SYN = 2, FLAG_RST = 4, FLAG_ACK = 16 };

/* The connection as the guest's packets name it: addresses of 16 bytes, IPv4's in the first 4. */
struct flow_key {
    uint8_t guest[16], client[16];
    uint8_t ports[4]; /* the guest's, the client's */
    uint8_t version[4];
};

struct segment {
    uint8_t *packet;
    uint8_t *tcp;
    uint8_t *options; /* between the fixed header and @options_end */
    uint8_t *options_end;
    uint32_t payload; /* bytes */
    uint32_t seq, ack;
    uint8_t flags;
};

/* A number that may be unknown. */
struct maybe {
    bool known;
    uint32_t value;
};

static inline uint32_t get32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

/* Whether sequence number a is b or follows it (RFC 9293, 3.4: modulo 2^32). */
static inline bool at_or_after(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b) >= 0;
}

/* False: no TCP segment with a whole fixed header, or a fragment. */
bool segment_parse(struct segment *s, struct flow_key *key, bool from_guest, uint8_t *packet, size_t size);

/* An ICMP error (RFC 792) about a segment that the guest sent: where its sequence number is; NULL if it is none.
 * @checksum: where the error's own is. */
uint8_t *segment_quoted(struct flow_key *key, uint8_t *packet, size_t size, uint8_t **checksum);

struct maybe segment_timestamp(const struct segment *s);
bool segment_plain_options(const struct segment *s);

/* Changes; the checksum follows each (RFC 1624). */
void segment_put_seq(struct segment *s, uint32_t value);
void segment_put_ack(struct segment *s, uint32_t value);
void segment_shift_options(struct segment *s, uint32_t offset, struct maybe echo);
void put_quoted(uint8_t *at, uint32_t value, uint8_t *checksum);

#endif
