/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "packet.h"

#include <string.h>

enum { TYPE_IPV4 = 0x0800, TYPE_IPV6 = 0x86dd, TYPE_8021Q = 0x8100, TYPE_8021AD = 0x88a8, TYPE_QINQ = 0x9100 };
enum { NEXT_HOP_BY_HOP = 0, NEXT_ROUTING = 43, NEXT_FRAGMENT = 44, NEXT_NONE = 59, NEXT_DESTINATION = 60 };
enum { NEXT_MOBILITY = 135, NEXT_HIP = 139, NEXT_SHIM6 = 140 };
enum { ICMP_ROUTER_ADVERTISEMENT = 9, ICMP_ROUTER_SOLICITATION = 10 };
enum { DHCP_SERVER = 67, DHCP_CLIENT = 68, DHCPV6_CLIENT = 546, DHCPV6_SERVER = 547 };

#define EXTENSIONS_MAX 16 /* no packet of use has as many; bounds the walk */

/* Bytes still to be read; what a packet says of its own length was checked against size before. */
struct view {
    const uint8_t *data;
    uint32_t size;  /* there */
    uint32_t lacks; /* further ones that the reader cut off */
};

static uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t get32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

/* Compared whole, as bytes. */
static void as_malformed(struct packet *p, struct view whole)
{
    memset(&p->key, 0, sizeof(p->key));
    p->kind = KIND_OTHER;
    p->malformed = true;
    p->fragment = false;
    p->prefixed = 0;
    p->payload = whole.data;
    p->size = whole.size;
    p->lacks = whole.lacks;
}

/* What frames of these types carry is for somebody beyond the link: IP in a tunnel, or storage (IEEE's EtherType list). */
static bool carries_content(uint16_t ethertype)
{
    switch (ethertype) {
    case 0x8847: /* MPLS */
    case 0x8848:
    case 0x8864: /* PPPoE session */
    case 0x88a2: /* ATA over Ethernet */
    case 0x88e5: /* MACsec */
    case 0x88e7: /* provider backbone bridges */
    case 0x8906: /* Fibre Channel over Ethernet */
    case 0x8915: /* RDMA over Converged Ethernet */
    case 0x894f: /* network service header */
        return true;
    default:
        return false;
    }
}

static void as_content(struct packet *p, enum kind kind, struct view content)
{
    p->kind = kind;
    p->payload = content.data;
    p->size = content.size;
    p->lacks = content.lacks;
}

static struct view behind(struct view view, uint32_t bytes)
{
    return (struct view){view.data + bytes, view.size - bytes, view.lacks};
}

static bool parse_tcp(struct packet *p, struct view body)
{
    const uint8_t *at = body.data;
    uint32_t header;

    if (body.size < 20)
        return false;
    header = (uint32_t)(at[12] >> 4) * 4;
    if (header < 20 || header > body.size)
        return false;
    memcpy(&p->key.sport, at, 2);
    memcpy(&p->key.dport, at + 2, 2);
    p->seq = get32(at + 4);
    p->ack = get32(at + 8);
    p->flags = at[13];
    p->urgent = get16(at + 18);
    as_content(p, KIND_TCP, behind(body, header));
    return true;
}

/* What follows the length that UDP states belongs to the datagram, too (RFC 9868); so the length is compared. */
static bool parse_udp(struct packet *p, struct view body)
{
    uint32_t length;

    if (body.size < 8)
        return false;
    length = get16(body.data + 4);
    if (length == 0 && body.size + body.lacks > 0xffff)
        length = 8; /* RFC 2675: a jumbogram's length is that of its IP packet */
    if (length < 8 || length > body.size + body.lacks)
        return false;
    memcpy(&p->key.sport, body.data, 2);
    memcpy(&p->key.dport, body.data + 2, 2);
    memcpy(p->prefix, body.data + 4, 2);
    p->prefixed = 2;
    as_content(p, KIND_UDP, behind(body, 8));
    return true;
}

/*
 * Step over the extension headers in front of body.  Returns the header that is no such one; what body does not hold
 * whole makes it NEXT_NONE with an empty body, *bad set.
 */
static uint8_t skip_extensions(uint8_t next, struct view *body, bool *bad)
{
    for (unsigned count = 0;; count++) {
        uint32_t length;

        switch (next) {
        case NEXT_HOP_BY_HOP:
        case NEXT_ROUTING:
        case NEXT_DESTINATION:
        case NEXT_MOBILITY:
        case NEXT_HIP:
        case NEXT_SHIM6:
            break;
        default:
            return next;
        }
        if (count == EXTENSIONS_MAX || body->size < 8)
            break;
        length = ((uint32_t)body->data[1] + 1) * 8;
        if (length > body->size)
            break;
        next = body->data[0];
        *body = behind(*body, length);
    }
    *bad = true;
    return NEXT_NONE;
}

/*
 * Blank what may differ in the header that an ICMP error quotes.  The quoted packet is the client's, as each VM got it:
 * DSCP/ECN, identification, TTL and checksum belong to its way here; in TCP the acknowledgement and the SACK blocks (and
 * so the checksum) lie in the sequence space of the VM that it was sent to, and the rewriter may not have mapped them.
 */
static void mask_quoted(struct packet *p, struct view quoted)
{
    struct view body = {p->masked, 0, 0};
    uint32_t inner = 0, header;
    uint8_t protocol = 0, *at = p->masked;
    bool bad = false;

    if (quoted.size > QUOTED_MAX)
        return; /* is compared as it is */
    if (quoted.size)
        memcpy(at, quoted.data, quoted.size);
    p->payload = at;
    if (quoted.size >= 20 && at[0] >> 4 == 4) {
        at[1] = 0;
        memset(at + 4, 0, 2);
        at[8] = 0;
        memset(at + 10, 0, 2);
        inner = (uint32_t)(at[0] & 15) * 4;
        protocol = at[9];
    } else if (quoted.size >= 40 && at[0] >> 4 == 6) {
        at[0] = 0x60;
        memset(at + 1, 0, 3);
        at[7] = 0;
        body = (struct view){at + 40, quoted.size - 40, 0};
        protocol = skip_extensions(at[6], &body, &bad);
        inner = (uint32_t)(body.data - at);
    }
    if (inner < 20 || protocol != PROTO_TCP)
        return;
    if (inner + 12 <= quoted.size)
        memset(at + inner + 8, 0, 4);
    if (inner + 18 <= quoted.size)
        memset(at + inner + 16, 0, 2);
    if (inner + 20 > quoted.size)
        return;
    header = (uint32_t)(at[inner + 12] >> 4) * 4;
    if (header > quoted.size - inner)
        header = quoted.size - inner;
    if (header > 20)
        memset(at + inner + 20, 0, header - 20);
}

static bool parse_icmp(struct packet *p, struct view body, bool v6)
{
    const uint8_t *at = body.data;
    bool query, error;

    if (body.size < 8)
        return false;
    if (v6) {
        query = at[0] == 128 || at[0] == 129;
        error = at[0] < 128;
    } else { /* echo, timestamp, information, address mask; unreachable, quench, redirect, exceeded, parameter */
        query = at[0] == 0 || at[0] == 8 || (at[0] >= 13 && at[0] <= 18);
        error = at[0] == 3 || at[0] == 4 || at[0] == 5 || at[0] == 11 || at[0] == 12;
    }
    memcpy(p->prefix, at, 2);
    as_content(p, KIND_ICMP, behind(body, 8));
    if (query) {
        memcpy(&p->key.sport, at + 4, 2);
        p->key.dport = QUERY_PORT;
        memcpy(p->prefix + 2, at + 6, 2);
        p->prefixed = 4;
        return true;
    }
    memcpy(p->prefix + 2, at + 4, 4);
    p->prefixed = 6;
    if (error)
        mask_quoted(p, behind(body, 8));
    return true;
}

static bool parse_upper(struct packet *p, uint8_t protocol, struct view body)
{
    p->key.protocol = protocol;
    switch (protocol) {
    case PROTO_TCP:
        return parse_tcp(p, body);
    case PROTO_UDP:
        return parse_udp(p, body);
    case PROTO_ICMP:
    case PROTO_ICMPV6:
        if ((protocol == PROTO_ICMP) == (p->key.family == 4))
            return parse_icmp(p, body, protocol == PROTO_ICMPV6);
        break;
    }
    as_content(p, KIND_OTHER, body);
    return true;
}

static enum kind kind_of(uint8_t protocol)
{
    switch (protocol) {
    case PROTO_TCP:
        return KIND_TCP;
    case PROTO_UDP:
        return KIND_UDP;
    case PROTO_ICMP:
    case PROTO_ICMPV6:
        return KIND_ICMP;
    default:
        return KIND_OTHER;
    }
}

/* offset: as in the header, in units of eight bytes; limit: of the datagram's bytes. */
static bool as_fragment(struct packet *p, uint8_t upper, uint32_t offset, bool more, struct view data, uint32_t limit)
{
    if (!data.size || data.lacks || (more && data.size % 8) || offset * 8 + data.size > limit)
        return false;
    p->fragment = true;
    p->kind = kind_of(upper);
    p->upper = upper;
    p->offset = offset * 8;
    p->more = more;
    p->payload = data.data;
    p->size = data.size;
    p->lacks = 0;
    return true;
}

/* What configures the link, or is for the hosts on it alone, promises nothing to a client. */
static bool passes_ipv4(const uint8_t *header, struct view body)
{
    const uint8_t *to = header + 16;

    if (header[9] == PROTO_IGMP)
        return true;
    if (to[0] == 224 && to[1] == 0 && to[2] == 0) /* RFC 5771, 4: Local Network Control Block */
        return true;
    if (get16(header + 6) & 0x3fff)
        return false;
    if (header[9] == PROTO_ICMP && body.size)
        return body.data[0] == ICMP_ROUTER_ADVERTISEMENT || body.data[0] == ICMP_ROUTER_SOLICITATION;
    /* RFC 2131: a lease is asked for with a random number, which differs between the VMs */
    return header[9] == PROTO_UDP && body.size >= 4 && get16(body.data) == DHCP_CLIENT &&
           get16(body.data + 2) == DHCP_SERVER;
}

static enum verdict parse_ipv4(struct packet *p, struct view whole)
{
    const uint8_t *at = whole.data;
    uint64_t there = (uint64_t)whole.size + whole.lacks;
    uint32_t header, total, fragment;
    struct view body;

    if (whole.size < 20)
        goto malformed;
    header = (uint32_t)(at[0] & 15) * 4;
    total = get16(at + 2);
    fragment = get16(at + 6);
    if (total == 0 && there > 0xffff)
        total = (uint32_t)there; /* a superpacket beyond 64 KiB ("BIG TCP") carries no length */
    if (at[0] >> 4 != 4 || header < 20 || total < header || total > there || header > whole.size)
        goto malformed;
    /* Bytes beyond the IP length are Ethernet's padding. */
    body.data = at + header;
    body.size = (total < whole.size ? total : whole.size) - header;
    body.lacks = total - header - body.size;
    if (passes_ipv4(at, body))
        return PACKET_PASSES;
    p->key.family = 4;
    memcpy(p->key.source, at + 12, 4);
    memcpy(p->key.destination, at + 16, 4);
    if (fragment & 0x3fff) {
        memcpy(&p->key.sport, at + 4, 2);
        p->key.protocol = at[9];
        if (!as_fragment(p, at[9], fragment & 0x1fff, fragment & 0x2000, body, 0xffff - 20))
            goto malformed;
    } else if (!parse_upper(p, at[9], body)) {
        goto malformed;
    }
    return PACKET_COMPARED;

malformed:
    as_malformed(p, whole);
    return PACKET_COMPARED;
}

static bool passes_ipv6(const uint8_t *header, uint8_t upper, struct view body)
{
    if (header[24] == 0xff && header[25] == 0x02) /* RFC 4291, 2.7: assigned by IANA, link-local scope */
        return true;
    if (upper == PROTO_UDP && body.size >= 4 && get16(body.data) == DHCPV6_CLIENT &&
        get16(body.data + 2) == DHCPV6_SERVER) /* as in passes_ipv4() */
        return true;
    /* Multicast listener discovery (RFC 3810, 2710) and neighbour discovery (RFC 4861). */
    if (upper == PROTO_ICMPV6 && body.size)
        return (body.data[0] >= 130 && body.data[0] <= 137) || body.data[0] == 143;
    return false;
}

static enum verdict parse_ipv6(struct packet *p, struct view whole)
{
    const uint8_t *at = whole.data;
    uint64_t there = (uint64_t)whole.size + whole.lacks;
    uint64_t end;
    struct view body;
    bool bad = false;
    uint8_t next;

    if (whole.size < 40 || at[0] >> 4 != 6)
        goto malformed;
    end = 40 + (uint64_t)get16(at + 4);
    next = at[6];
    if (end == 40 && (next == NEXT_HOP_BY_HOP || there > 0xffff + 40))
        end = there; /* RFC 2675: a jumbogram's length is in its hop-by-hop option, a superpacket's nowhere */
    if (end > there)
        goto malformed;
    body.data = at + 40;
    body.size = (uint32_t)(end < whole.size ? end : whole.size) - 40;
    body.lacks = (uint32_t)(end - 40 - body.size);
    next = skip_extensions(next, &body, &bad);
    if (bad)
        goto malformed;
    if (passes_ipv6(at, next, body))
        return PACKET_PASSES;
    p->key.family = 6;
    memcpy(p->key.source, at + 8, 16);
    memcpy(p->key.destination, at + 24, 16);
    if (next == NEXT_FRAGMENT) { /* RFC 8200, 4.5 */
        uint32_t offset;
        bool more;

        if (body.size < 8)
            goto malformed;
        offset = get16(body.data + 2);
        more = offset & 1;
        next = body.data[0];
        if (offset & 0xfff9) {
            memcpy(&p->key.sport, body.data + 4, 4);
            if (!as_fragment(p, next, offset >> 3, more, behind(body, 8), 0xffff))
                goto malformed;
            return PACKET_COMPARED;
        }
        body = behind(body, 8); /* RFC 6946: an atomic fragment is whole */
        next = skip_extensions(next, &body, &bad);
        if (bad || next == NEXT_FRAGMENT)
            goto malformed;
    }
    if (!parse_upper(p, next, body))
        goto malformed;
    return PACKET_COMPARED;

malformed:
    as_malformed(p, whole);
    return PACKET_COMPARED;
}

/*
 * Instead of a type a frame may have its length and a SNAP header (RFC 1042), whose type counts; IEEE 802.3 gives types
 * from 0x600 on.  The kernel tells of such frames by numbers of its own (ETH_P_802_3 and the like), which are below that, too.
 */
static void unwrap_snap(uint16_t *ethertype, struct view *frame)
{
    static const uint8_t header[] = {0xaa, 0xaa, 3, 0, 0, 0};

    if (*ethertype >= 0x600 || frame->size < 8 || memcmp(frame->data, header, sizeof(header)))
        return;
    *ethertype = get16(frame->data + 6);
    *frame = behind(*frame, 8);
}

static bool is_vlan(uint16_t ethertype)
{
    return ethertype == TYPE_8021Q || ethertype == TYPE_8021AD || ethertype == TYPE_QINQ;
}

enum verdict packet_parse(struct packet *p, const struct colo_frame *frame)
{
    struct view whole = {frame->data, frame->size, 0}, untagged;
    uint16_t ethertype = frame->ethertype;
    uint64_t vlan = frame->vlan & 0xfff;
    enum verdict verdict;

    if (frame->wire_size > frame->size)
        whole.lacks = frame->wire_size - frame->size;
    memset(&p->key, 0, sizeof(p->key));
    p->malformed = p->fragment = false;
    p->flags = p->prefixed = 0;
    p->lacks = 0;
    untagged = whole;
    for (unsigned tags = vlan != 0; is_vlan(ethertype); tags++) {
        if (tags == VLANS_MAX || untagged.size < 4) {
            as_malformed(p, whole);
            p->key.vlan = frame->vlan & 0xfff;
            return PACKET_COMPARED;
        }
        vlan = vlan << 12 | (get16(untagged.data) & 0xfffu); /* not the priority: it is like DSCP */
        ethertype = get16(untagged.data + 2);
        untagged = behind(untagged, 4);
    }
    unwrap_snap(&ethertype, &untagged);
    if (ethertype == TYPE_IPV4) {
        verdict = parse_ipv4(p, untagged);
    } else if (ethertype == TYPE_IPV6) {
        verdict = parse_ipv6(p, untagged);
    } else if (carries_content(ethertype)) {
        as_content(p, KIND_OTHER, untagged);
        p->key.protocol = FRAMES;
        p->key.sport = ethertype;
        verdict = PACKET_COMPARED;
    } else {
        return PACKET_PASSES;
    }
    p->key.vlan = (uint32_t)vlan & 0xffffff;
    p->key.outer_vlan = (uint16_t)(vlan >> 24);
    return verdict;
}

void packet_parse_joined(struct packet *p, const struct flow_key *key, uint8_t upper, const uint8_t *data, uint32_t size)
{
    struct view whole = {data, size, 0}, body = whole;
    bool bad = false;

    p->key = *key;
    p->key.sport = p->key.dport = 0;
    p->malformed = p->fragment = false;
    p->flags = p->prefixed = 0;
    p->lacks = 0;
    if (key->family == 6)
        upper = skip_extensions(upper, &body, &bad);
    if (bad || (key->family == 6 && upper == NEXT_FRAGMENT) || !parse_upper(p, upper, body))
        as_malformed(p, whole);
}

bool packet_peek(struct flow_key *key, const struct colo_frame *frame)
{
    const uint8_t *at = frame->data;

    memset(key, 0, sizeof(*key));
    key->vlan = frame->vlan & 0xfff;
    if (frame->ethertype == TYPE_IPV4 && frame->size >= 28 && at[0] == 0x45 && !(get16(at + 6) & 0x3fff)) {
        key->family = 4;
        key->protocol = at[9];
        memcpy(key->source, at + 12, 4);
        memcpy(key->destination, at + 16, 4);
        at += 20;
    } else if (frame->ethertype == TYPE_IPV6 && frame->size >= 48 && at[0] >> 4 == 6) {
        key->family = 6;
        key->protocol = at[6];
        memcpy(key->source, at + 8, 16);
        memcpy(key->destination, at + 24, 16);
        at += 40;
    } else {
        return false;
    }
    memcpy(&key->sport, at, 2);
    memcpy(&key->dport, at + 2, 2);
    return key->protocol == PROTO_TCP || key->protocol == PROTO_UDP;
}
