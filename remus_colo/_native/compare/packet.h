/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Packets: which flow, and which part of them a client can tell apart.  Formats: RFC 791 (IPv4), RFC 9293 (TCP), RFC
 * 768 (UDP), RFC 792 (ICMP), RFC 8200 (IPv6), RFC 4443, 4861 and 3810 (ICMPv6), IEEE 802.1Q.
 *
 * Not read, because two healthy replicas may differ in it: identification, TTL and hop limit, DSCP, ECN and flow label,
 * IPv4 options and IPv6 extension headers, all checksums (a vif leaves them to offloading, too), TCP window and options.
 */
#ifndef COLO_PACKET_H
#define COLO_PACKET_H

#include <stdbool.h>
#include <stdint.h>

#include "../compare.h"

enum { TH_FIN = 0x01, TH_SYN = 0x02, TH_RST = 0x04, TH_ACK = 0x10, TH_URG = 0x20 };
enum { PROTO_ICMP = 1, PROTO_IGMP = 2, PROTO_TCP = 6, PROTO_UDP = 17, PROTO_ICMPV6 = 58 };

enum kind { KIND_TCP, KIND_UDP, KIND_ICMP, KIND_OTHER };

#define VLANS_MAX 3
#define FRAMES 1     /* protocol of family 0: frames that are not IP, of the type in sport */
#define QUERY_PORT 1 /* dport of ICMP flows by identifier, which is their sport */
#define PREFIX_MAX 8
#define QUOTED_MAX 2048 /* an ICMP error quotes less: 576 bytes (RFC 1812), 1280 (RFC 4443) */

/* No padding: it is hashed and compared as bytes. */
struct flow_key {
    uint8_t source[16], destination[16]; /* IPv4 in the first four */
    uint16_t sport, dport;               /* as on the wire; of fragments: the identification */
    uint32_t vlan;                       /* innermost VLAN id, the one around it in the bits above */
    uint8_t family;                      /* 4, 6, or 0 for what could not be parsed or is not IP */
    uint8_t protocol;
    uint16_t outer_vlan; /* around those two */
};

struct packet {
    struct flow_key key;
    enum kind kind;
    bool malformed;
    bool fragment;
    uint8_t flags;    /* TCP */
    uint8_t prefixed; /* bytes of prefix */
    uint32_t seq, ack;
    uint32_t urgent;        /* TCP with URG: the urgent pointer */
    uint32_t lacks;         /* bytes of payload that the reader cut off */
    const uint8_t *payload; /* compared behind prefix; of TCP the segment's data */
    uint32_t size;
    uint8_t prefix[PREFIX_MAX]; /* compared first: header fields that are not in payload */
    /* of a fragment */
    uint32_t offset;
    bool more;
    uint8_t upper; /* protocol of what was fragmented */
    /* what payload points to if it had to be changed */
    uint8_t masked[QUOTED_MAX];
};

enum verdict { PACKET_PASSES, PACKET_COMPARED };

/* Sort one packet.  Any content is allowed. */
enum verdict packet_parse(struct packet *out, const struct colo_frame *frame);

/* The flow of a plain TCP or UDP packet, in a hurry: false for any other, right or wrong. */
bool packet_peek(struct flow_key *key, const struct colo_frame *frame);

/* Sort what the fragments of key were cut from. */
void packet_parse_joined(struct packet *out, const struct flow_key *key, uint8_t upper, const uint8_t *data,
                         uint32_t size);

#endif
