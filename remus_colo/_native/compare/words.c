/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sentences for people: what differs, what is waited for. */
#include "state.h"

#include <arpa/inet.h>
#include <inttypes.h>
#include <stdio.h>

void words_flow(const struct flow_key *key, char *out, size_t size)
{
    char source[INET6_ADDRSTRLEN] = "", destination[INET6_ADDRSTRLEN] = "", name[24], tag[32] = "";
    int family = key->family == 6 ? AF_INET6 : AF_INET;
    bool brackets = key->family == 6;

    if (!key->family) {
        if (key->protocol == FRAMES)
            snprintf(out, size, "frames of type 0x%04x", key->sport);
        else
            snprintf(out, size, "malformed packets");
        return;
    }
    inet_ntop(family, key->source, source, sizeof(source));
    inet_ntop(family, key->destination, destination, sizeof(destination));
    if (key->vlan)
        snprintf(tag, sizeof(tag), " in VLAN %" PRIu32, key->vlan & 0xfff);
    if (key->protocol == PROTO_TCP || key->protocol == PROTO_UDP) {
        snprintf(out, size, "%s %s%s%s:%u > %s%s%s:%u%s", key->protocol == PROTO_TCP ? "TCP" : "UDP",
                 brackets ? "[" : "", source, brackets ? "]" : "", ntohs(key->sport), brackets ? "[" : "", destination,
                 brackets ? "]" : "", ntohs(key->dport), tag);
        return;
    }
    if (key->protocol == PROTO_ICMP && key->family == 4)
        snprintf(name, sizeof(name), "ICMP");
    else if (key->protocol == PROTO_ICMPV6 && key->family == 6)
        snprintf(name, sizeof(name), "ICMPv6");
    else
        snprintf(name, sizeof(name), "IP protocol %u", key->protocol);
    if (key->dport == QUERY_PORT)
        snprintf(out, size, "%s %s > %s id %u%s", name, source, destination, ntohs(key->sport), tag);
    else
        snprintf(out, size, "%s %s > %s%s", name, source, destination, tag);
}

static const char *difference_text(int kind)
{
    switch (kind) {
    case DIFF_PRIMARY_REPEAT:
        return "the PVM repeated it with another value";
    case DIFF_SECONDARY_REPEAT:
        return "the SVM repeated it with another value";
    case DIFF_PRIMARY_FIN:
        return "the PVM's FIN contradicts what it sent before";
    case DIFF_SECONDARY_FIN:
        return "the SVM's FIN contradicts what it sent before";
    case DIFF_PRIMARY_BEHIND_FIN:
        return "the PVM sent data behind its own FIN";
    case DIFF_SECONDARY_BEHIND_FIN:
        return "the SVM sent data behind its own FIN";
    case DIFF_FIN_DATA:
        return "PVM FIN, SVM data";
    case DIFF_DATA_FIN:
        return "PVM data, SVM FIN";
    case DIFF_URGENT:
        return "only one side marks it as urgent";
    case DIFF_PIECES:
        return "the PVM's data lie in too many pieces";
    case DIFF_RESET_DATA:
        return "the PVM goes on, the SVM has reset the connection";
    case DIFF_RESET_ACK:
        return "the PVM acknowledges more, the SVM has reset the connection";
    case DIFF_RESET_SYN:
        return "the PVM refused the connection, the SVM accepted it";
    case DIFF_SYN_RESET:
        return "the PVM accepted the connection, the SVM refused it";
    default:
        return "they differ";
    }
}

static void words_difference(const struct difference *d, char *out, size_t size)
{
    switch (d->kind) {
    case DIFF_BYTE:
        snprintf(out, size, "byte %" PRId64 " (sequence %" PRIu32 "): PVM 0x%02x, SVM 0x%02x", d->offset, d->sequence,
                 d->primary, d->secondary);
        break;
    case DIFF_ECHO:
        snprintf(out, size, "the same echo request was answered with other data");
        break;
    case DIFF_RESET_ACK:
    case DIFF_RESET_SYN:
    case DIFF_SYN_RESET:
        snprintf(out, size, "%s", difference_text(d->kind));
        break;
    default:
        snprintf(out, size, "byte %" PRId64 " (sequence %" PRIu32 "): %s", d->offset, d->sequence,
                 difference_text(d->kind));
    }
}

static void stream_waits(const struct held *h, char *out, size_t size)
{
    const struct conn *conn = h->conn;

    if (h->flags & TH_RST && !conn->secondary_rst) {
        snprintf(out, size, "the SVM has not reset the connection");
    } else if (h->flags & TH_SYN && !(h->flags & TH_RST) && !conn->has_secondary_isn) {
        snprintf(out, size, "the SVM has not sent its SYN");
    } else if (h->end != NOWHERE && h->end > conn->watermark) {
        snprintf(out, size, "byte %" PRId64 " (sequence %" PRIu32 "): one side has not sent it",
                 conn->watermark - conn->origin, (uint32_t)conn->watermark);
    } else if (h->ack != NOWHERE && h->ack > conn->secondary_ack) {
        if (conn->secondary_ack == NOWHERE)
            snprintf(out, size, "the PVM acknowledged %" PRIu32 ", the SVM nothing", (uint32_t)h->ack);
        else
            snprintf(out, size, "the PVM acknowledged %" PRIu32 ", the SVM %" PRIu32, (uint32_t)h->ack,
                     (uint32_t)conn->secondary_ack);
    } else if (h->low != NOWHERE) {
        snprintf(out, size, "the SVM has not repeated sequence %" PRIu32, (uint32_t)h->low);
    } else {
        snprintf(out, size, "packets before it wait");
    }
}

void words_waits(const struct held *h, char *out, size_t size)
{
    if (h->lacks)
        snprintf(out, size, "%" PRIu32 " bytes of it were cut off, so it cannot be compared", h->lacks);
    else if (!h->flow)
        snprintf(out, size, "a fragmented datagram of the PVM lacks fragments");
    else if (h->flow->state->diverged)
        words_difference(&h->flow->state->difference, out, size);
    else if (h->flow->kind == KIND_TCP)
        stream_waits(h, out, size);
    else if (h->matched)
        snprintf(out, size, "packets before it wait");
    else
        snprintf(out, size, "the SVM has sent no equal datagram");
}

void words_leads(const struct state *s, char *out, size_t size)
{
    const struct conn *conn = s->secondary;

    if (conn->secondary_rst && !conn->primary_rst)
        snprintf(out, size, "the SVM reset the connection, the PVM did not");
    else if (conn->watermark == NOWHERE)
        snprintf(out, size, "the SVM has sent data in a connection in which the PVM has sent none");
    else
        snprintf(out, size, "byte %" PRId64 " (sequence %" PRIu32 "): the SVM has sent %s, the PVM nothing",
                 conn->watermark - conn->origin, (uint32_t)conn->watermark,
                 conn->secondary_fin == conn->watermark ? "FIN" : "data");
}

void words_doubt(const struct doubt *doubt, char *out, size_t size)
{
    if (same_key(&doubt->primary, &doubt->secondary))
        snprintf(out, size, "either side has sent a datagram that the other has not");
    else
        snprintf(out, size, "the SVM has sent its own from port %u", ntohs(doubt->secondary.sport));
}

void words_request(const struct request *request, char *out, size_t size)
{
    char flow[2 * INET6_ADDRSTRLEN + 64] = "", what[128] = "";

    words_flow(&request->key, flow, sizeof(flow));
    switch (request->kind) {
    case ASK_DIFFERENCE:
        words_difference(&request->difference, what, sizeof(what));
        snprintf(out, size, "%s, %s", flow, what);
        break;
    case ASK_WAITS:
        if (request->has_key)
            snprintf(out, size, "%s, %s", flow, request->waits);
        else
            snprintf(out, size, "%s", request->waits);
        break;
    case ASK_LIMIT:
        snprintf(out, size, "%" PRIu64 " %s, the limit is %" PRIu64, request->amount, request->unit, request->limit);
        break;
    case ASK_CUT_OFF:
        snprintf(out, size, "%s, %" PRIu64 " bytes of a packet were cut off", flow, request->amount);
        break;
    }
}

static bool waits_in(const struct epoch *epoch, uint64_t id, char *out, size_t size)
{
    for (struct link *link = epoch->held.next; link != &epoch->held; link = link->next) {
        const struct held *h = CONTAINER(link, struct held, in_epoch);
        bool found = h->id == id;

        for (const struct part *part = h->parts; part; part = part->next)
            found |= part->id == id;
        if (found) {
            words_waits(h, out, size);
            return true;
        }
    }
    return false;
}

int colo_waits_for(const struct colo *c, uint64_t id, char *out, size_t size)
{
    if (waits_in(c->epoch, id, out, size))
        return 0;
    if (c->cut && waits_in(c->cut->epoch, id, out, size)) {
        snprintf(out, size, "the checkpoint that it belongs to is not complete");
        return 0;
    }
    return -1;
}

int colo_describe(const struct colo_frame *frame, char *out, size_t size)
{
    struct packet p;

    if (packet_parse(&p, frame) == PACKET_PASSES) {
        if (frame->ethertype == 0x0806)
            snprintf(out, size, "ARP");
        else if (frame->ethertype == 0x0800 || frame->ethertype == 0x86dd)
            snprintf(out, size, "IP that only configures the link");
        else
            snprintf(out, size, "ethertype 0x%04x", frame->ethertype);
        return 0;
    }
    words_flow(&p.key, out, size);
    return 1;
}
