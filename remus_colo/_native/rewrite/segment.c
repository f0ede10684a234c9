/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Checksums are one's complement sums, that is, sums modulo 0xffff.  RFC 1624's equation 3, HC' = ~(~HC + ~m + m'), is
 * then ~HC' = ~HC + (m' - m), and as 0x10000 is 1 modulo 0xffff, a 32-bit field may be added as it is.  A field at an
 * odd offset counts 256 times: its bytes lie in the other halves of the words.
 */
#include "segment.h"

#include "../rewrite.h"

#include <string.h>

enum { PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_ICMPV6 = 58 };
enum { NEXT_HOP_BY_HOP = 0, NEXT_ROUTING = 43, NEXT_DESTINATION = 60, EXTENSIONS_MAX = 16 };
enum { OPTION_END = 0, OPTION_NOP = 1, OPTION_SACK = 5, OPTION_TIMESTAMPS = 8, TIMESTAMPS_BYTES = 10 };
enum { TCP_BYTES = 20, IPV4_BYTES = 20, IPV6_BYTES = 40 };
enum { ANY_FRAGMENT = 0x3f, NOT_FIRST_FRAGMENT = 0x1f }; /* with, without "more fragments" */
enum { AT_SEQ = 4, AT_ACK = 8, AT_LENGTH = 12, AT_FLAGS = 13, AT_CHECKSUM = 16 };

/* -- reading -- */

/* Where the IP packet ends: padding may follow it, and packets of segmentation offload may claim 0. */
static size_t packet_end(const uint8_t *packet, size_t size)
{
    size_t total = packet[0] >> 4 == 4 ? get16(packet + 2) : (size_t)get16(packet + 4) + IPV6_BYTES;
    size_t least = packet[0] >> 4 == 4 ? IPV4_BYTES : IPV6_BYTES + 1;

    return total >= least && total <= size ? total : size;
}

/* The bytes of the IP header with its extensions; 0 for what is not looked into.
 * @fragment_bits: of IPv4, that tell a packet that does not begin here whole. */
static size_t ip_header(const uint8_t *packet, size_t size, uint8_t fragment_bits, uint8_t *protocol)
{
    size_t header = IPV6_BYTES;

    if (size < IPV4_BYTES)
        return 0;
    if (packet[0] >> 4 == 4) {
        header = (size_t)(packet[0] & 15) * 4;
        if (packet[6] & fragment_bits || packet[7] || header < IPV4_BYTES || header > size)
            return 0;
        *protocol = packet[9];
        return header;
    }
    if (packet[0] >> 4 != 6 || size < IPV6_BYTES)
        return 0;
    *protocol = packet[6];
    for (int n = 0; n < EXTENSIONS_MAX; n++) {
        if (*protocol != NEXT_HOP_BY_HOP && *protocol != NEXT_ROUTING && *protocol != NEXT_DESTINATION)
            return header <= size ? header : 0; /* a fragment's header is no protocol of interest either */
        if (header + 8 > size)
            return 0;
        *protocol = packet[header];
        header += ((size_t)packet[header + 1] + 1) * 8;
    }
    return 0;
}

static void set_key(struct flow_key *key, const uint8_t *packet, const uint8_t *ports, bool from_guest)
{
    size_t length = packet[0] >> 4 == 4 ? 4 : 16;
    const uint8_t *source = packet + (length == 4 ? 12 : 8), *target = source + length;

    memset(key, 0, sizeof(*key));
    memcpy(key->guest, from_guest ? source : target, length);
    memcpy(key->client, from_guest ? target : source, length);
    memcpy(key->ports, ports + (from_guest ? 0 : 2), 2);
    memcpy(key->ports + 2, ports + (from_guest ? 2 : 0), 2);
    key->version[0] = packet[0] >> 4;
}

bool segment_parse(struct segment *s, struct flow_key *key, bool from_guest, uint8_t *packet, size_t size)
{
    uint8_t protocol;
    size_t header = ip_header(packet, size, ANY_FRAGMENT, &protocol), end, length;

    if (!header || protocol != PROTOCOL_TCP || header + TCP_BYTES > size)
        return false;
    end = packet_end(packet, size);
    s->packet = packet;
    s->tcp = packet + header;
    s->seq = get32(s->tcp + AT_SEQ);
    s->ack = get32(s->tcp + AT_ACK);
    s->flags = s->tcp[AT_FLAGS];
    length = (size_t)(s->tcp[AT_LENGTH] >> 4) * 4;
    s->options = s->tcp + TCP_BYTES;
    s->options_end = header + length < end ? s->tcp + length : packet + end;
    if (length < TCP_BYTES)
        length = TCP_BYTES;
    s->payload = end > header + length ? (uint32_t)(end - header - length) : 0;
    set_key(key, packet, s->tcp, from_guest);
    return true;
}

/* Unreachable, source quench, redirect, time exceeded, parameter problem; of IPv6 unreachable, too big, time exceeded,
 * parameter problem (RFC 792, RFC 4443). */
static bool is_icmp_error(uint8_t version, uint8_t protocol, uint8_t type)
{
    if (version == 4)
        return protocol == PROTOCOL_ICMP && (type == 3 || type == 4 || type == 5 || type == 11 || type == 12);
    return protocol == PROTOCOL_ICMPV6 && type >= 1 && type <= 4;
}

uint8_t *segment_quoted(struct flow_key *key, uint8_t *packet, size_t size, uint8_t **checksum)
{
    uint8_t protocol;
    size_t header = ip_header(packet, size, ANY_FRAGMENT, &protocol), quoted = header + 8, inner;

    if (!header || quoted >= size || packet[quoted] >> 4 != packet[0] >> 4 ||
        !is_icmp_error(packet[0] >> 4, protocol, packet[header]))
        return NULL;
    inner = ip_header(packet + quoted, size - quoted, NOT_FIRST_FRAGMENT, &protocol);
    if (!inner || protocol != PROTOCOL_TCP || quoted + inner + 8 > size)
        return NULL;
    set_key(key, packet + quoted, packet + quoted + inner, true);
    *checksum = packet + header + 2;
    return packet + quoted + inner + AT_SEQ;
}

/* The next option, from @at on: its kind, and where the one after it begins; NULL at the end or what is malformed. */
static uint8_t *option_next(const struct segment *s, uint8_t *at, uint8_t *kind, uint8_t **found)
{
    while (at < s->options_end && *at == OPTION_NOP)
        at++;
    if (at >= s->options_end || *at == OPTION_END || at + 2 > s->options_end || at[1] < 2 ||
        at + at[1] > s->options_end)
        return NULL;
    *kind = at[0];
    *found = at;
    return at + at[1];
}

struct maybe segment_timestamp(const struct segment *s)
{
    uint8_t kind, *at = s->options, *option;

    while ((at = option_next(s, at, &kind, &option)))
        if (kind == OPTION_TIMESTAMPS && option[1] == TIMESTAMPS_BYTES)
            return (struct maybe){true, get32(option + 2)};
    return (struct maybe){false, 0};
}

/* No options but timestamps, as most segments have them: nothing to look for. */
bool segment_plain_options(const struct segment *s)
{
    static const uint8_t plain[4] = {OPTION_NOP, OPTION_NOP, OPTION_TIMESTAMPS, TIMESTAMPS_BYTES};
    long length = s->options_end - s->options;

    return length <= 0 || (length == 12 && !memcmp(s->options, plain, sizeof(plain)));
}

/* -- changing -- */

/* Add @difference, not reduced, to a checksum.  The sum of a real packet is never 0, as the pseudo-header has the
 * protocol's number and an ICMP error its type: so 0 stands for its other spelling, 0xffff. */
static void update_checksum(uint8_t *at, int64_t difference)
{
    int64_t total = (0xffff - get16(at) + difference) % 0xffff;

    if (total <= 0)
        total += 0xffff;
    total = 0xffff - total;
    at[0] = (uint8_t)(total >> 8);
    at[1] = (uint8_t)total;
}

static int64_t put32(const uint8_t *start, uint8_t *at, uint32_t value)
{
    int64_t difference = (int64_t)value - get32(at);

    at[0] = (uint8_t)(value >> 24);
    at[1] = (uint8_t)(value >> 16);
    at[2] = (uint8_t)(value >> 8);
    at[3] = (uint8_t)value;
    return (at - start) & 1 ? difference * 256 : difference;
}

void segment_put_seq(struct segment *s, uint32_t value)
{
    update_checksum(s->tcp + AT_CHECKSUM, put32(s->tcp, s->tcp + AT_SEQ, value));
}

void segment_put_ack(struct segment *s, uint32_t value)
{
    update_checksum(s->tcp + AT_CHECKSUM, put32(s->tcp, s->tcp + AT_ACK, value));
}

/* Take @offset from SACK blocks, and put @echo into TSecr. */
void segment_shift_options(struct segment *s, uint32_t offset, struct maybe echo)
{
    uint8_t kind, *at = s->options, *option;
    int64_t difference = 0;

    while ((at = option_next(s, at, &kind, &option))) {
        if (kind == OPTION_SACK && option[1] % 8 == 2) {
            for (uint8_t *edge = option + 2; edge < at; edge += 4)
                difference += put32(s->tcp, edge, get32(edge) - offset);
        } else if (kind == OPTION_TIMESTAMPS && option[1] == TIMESTAMPS_BYTES && echo.known) {
            difference += put32(s->tcp, option + 6, echo.value);
        }
    }
    update_checksum(s->tcp + AT_CHECKSUM, difference);
}

void put_quoted(uint8_t *at, uint32_t value, uint8_t *checksum)
{
    update_checksum(checksum, put32(checksum - 2, at, value));
}

/* -- a whole checksum -- */

static uint64_t sum_words(const uint8_t *at, size_t size)
{
    uint64_t sum = 0;

    for (; size >= 2; size -= 2, at += 2)
        sum += get16(at);
    return size ? sum + ((uint64_t)at[0] << 8) : sum;
}

void rewriter_finish_checksum(uint8_t *packet, size_t size)
{
    uint8_t protocol;
    size_t header = ip_header(packet, size, ANY_FRAGMENT, &protocol), end, addresses;
    uint64_t sum;

    if (!header || protocol != PROTOCOL_TCP || header + TCP_BYTES > size)
        return;
    end = packet_end(packet, size);
    if (end < header + TCP_BYTES)
        return;
    memset(packet + header + AT_CHECKSUM, 0, 2);
    addresses = packet[0] >> 4 == 4 ? 8 : 32;
    sum = sum_words(packet + (addresses == 8 ? 12 : 8), addresses) + PROTOCOL_TCP + ((end - header) & 0xffff) +
          sum_words(packet + header, end - header);
    sum = sum % 0xffff ? sum % 0xffff : 0xffff;
    packet[header + AT_CHECKSUM] = (uint8_t)((0xffff - sum) >> 8);
    packet[header + AT_CHECKSUM + 1] = (uint8_t)(0xffff - sum);
}
