/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the kernel says of a queued packet: struct nlmsghdr, struct nfgenmsg, and attributes (NFQA_*). */
#define _GNU_SOURCE
#include "queue.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <string.h>

#define VLAN_VID_MASK 0x0fff /* IEEE 802.1Q; the rest is priority, which each hop may change */

static uint16_t get_be16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

struct span {
    const uint8_t *at;
    size_t size;
};

/* The next attribute, whose type is returned; -1 at the end, or where one does not fit. */
static int next_attribute(struct span *rest, struct span *value)
{
    struct nlattr attribute;
    size_t step;

    if (rest->size < NLA_HDRLEN)
        return -1;
    memcpy(&attribute, rest->at, sizeof attribute);
    if (attribute.nla_len < NLA_HDRLEN || attribute.nla_len > rest->size)
        return -1;
    value->at = rest->at + NLA_HDRLEN;
    value->size = attribute.nla_len - (size_t)NLA_HDRLEN;
    step = NLA_ALIGN((size_t)attribute.nla_len);
    if (step > rest->size)
        step = rest->size; /* the kernel does not pad the last one */
    rest->at += step;
    rest->size -= step;
    return attribute.nla_type & NLA_TYPE_MASK;
}

static uint16_t parse_vlan(struct span nested)
{
    struct span value;
    int type;

    while ((type = next_attribute(&nested, &value)) >= 0)
        if (type == NFQA_VLAN_TCI && value.size >= 2)
            return get_be16(value.at) & VLAN_VID_MASK;
    return 0;
}

static uint32_t parse_be32(struct span value)
{
    return value.size < 4 ? 0 : (uint32_t)get_be16(value.at) << 16 | get_be16(value.at + 2);
}

/*
 * Parse one NFQNL_MSG_PACKET; packet->id becomes the kernel's own.
 * -EPROTO if it is none, or lacks its id.
 */
int rq_parse(const uint8_t *message, size_t size, struct rq_packet *packet)
{
    struct colo_frame *frame = &packet->frame;
    struct nlmsghdr header;
    struct nfqnl_msg_packet_hdr about;
    struct span rest, value;
    int type, has_header = 0;

    if (size < NLMSG_LENGTH(sizeof(struct nfgenmsg)))
        return -EPROTO;
    memcpy(&header, message, sizeof header);
    if (header.nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET) || header.nlmsg_len > size ||
        header.nlmsg_len < NLMSG_LENGTH(sizeof(struct nfgenmsg)))
        return -EPROTO;
    memset(packet, 0, sizeof *packet);
    frame->data = message;
    rest.at = message + NLMSG_LENGTH(sizeof(struct nfgenmsg));
    rest.size = header.nlmsg_len - NLMSG_LENGTH(sizeof(struct nfgenmsg));
    while ((type = next_attribute(&rest, &value)) >= 0) {
        switch (type) {
        case NFQA_PACKET_HDR:
            if (value.size < sizeof about)
                return -EPROTO;
            memcpy(&about, value.at, sizeof about);
            packet->id = ntohl(about.packet_id);
            frame->ethertype = ntohs(about.hw_protocol);
            has_header = 1;
            break;
        case NFQA_VLAN:
            frame->vlan = parse_vlan(value);
            break;
        case NFQA_CAP_LEN: /* only there if the payload is shorter than the packet */
            frame->wire_size = parse_be32(value);
            break;
        case NFQA_SKB_INFO:
            packet->unsummed = (parse_be32(value) & NFQA_SKB_CSUMNOTREADY) != 0;
            break;
        case NFQA_PAYLOAD:
            frame->data = value.at;
            frame->size = (uint32_t)value.size;
            break;
        }
    }
    if (!has_header)
        return -EPROTO;
    /* Not what the IP header claims: where that is more than there is, the packet is malformed, not cut off. */
    if (frame->wire_size < frame->size)
        frame->wire_size = frame->size;
    return 0;
}
