/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "frames.h"

#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* A frame may come before it is split to the MTU: 64 kB of IP, its Ethernet header and a tag.  An odd number of cache
 * lines, so that the headers of small frames do not all fall into the same ones. */
#define SLOT_BYTES (65536 + 320)
#define VLAN_VID_MASK 0x0fff /* IEEE 802.1Q; the rest is priority, which each hop may change */

union control {
    struct cmsghdr header;
    uint8_t room[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
};

struct rf_reader {
    int fd;
    uint8_t *slots;
    struct mmsghdr messages[RF_BATCH];
    struct iovec vectors[RF_BATCH];
    union control controls[RF_BATCH];
};

/* fd: a packet socket of type SOCK_RAW, bound to a link; it stays the caller's.  NULL and errno. */
struct rf_reader *rf_open(int fd)
{
    struct rf_reader *r = calloc(1, sizeof *r);
    int one = 1, saved;

    if (!r)
        return NULL;
    r->fd = fd;
    r->slots = mmap(NULL, (size_t)RF_BATCH * SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (r->slots == MAP_FAILED)
        r->slots = NULL;
    /* The kernel takes the outermost VLAN tag off every frame that comes in, and tells it beside the frame. */
    if (r->slots && !setsockopt(fd, SOL_PACKET, PACKET_AUXDATA, &one, sizeof one)) {
        for (int i = 0; i < RF_BATCH; i++) {
            r->vectors[i].iov_base = r->slots + (size_t)i * SLOT_BYTES;
            r->vectors[i].iov_len = SLOT_BYTES;
            r->messages[i].msg_hdr.msg_iov = &r->vectors[i];
            r->messages[i].msg_hdr.msg_iovlen = 1;
            r->messages[i].msg_hdr.msg_control = &r->controls[i];
        }
        return r;
    }
    saved = errno;
    rf_close(r);
    errno = saved;
    return NULL;
}

void rf_close(struct rf_reader *r)
{
    if (!r)
        return;
    if (r->slots)
        munmap(r->slots, (size_t)RF_BATCH * SLOT_BYTES);
    free(r);
}

int rf_fd(const struct rf_reader *r)
{
    return r->fd;
}

static uint16_t vlan_of(struct msghdr *message)
{
    struct tpacket_auxdata about;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_PACKET || c->cmsg_type != PACKET_AUXDATA || c->cmsg_len < CMSG_LEN(sizeof about))
            continue;
        memcpy(&about, CMSG_DATA(c), sizeof about);
        return about.tp_status & TP_STATUS_VLAN_VALID ? about.tp_vlan_tci & VLAN_VID_MASK : 0;
    }
    return 0;
}

/*
 * Read frames, at most ``max`` of them and RF_BATCH, without blocking, in one system call.
 *
 * -EAGAIN if there are none.  -ENETDOWN is said once for a link that went down, and for one that went away.
 */
int rf_read(struct rf_reader *r, struct rf_frame *frames, int max)
{
    int got, count = 0;

    if (max > RF_BATCH)
        max = RF_BATCH;
    for (int i = 0; i < max; i++)
        r->messages[i].msg_hdr.msg_controllen = sizeof r->controls[i];
    do
        got = recvmmsg(r->fd, r->messages, (unsigned)max, MSG_DONTWAIT, NULL);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -errno;
    for (int i = 0; i < got; i++) {
        const uint8_t *header = r->vectors[i].iov_base;
        uint32_t size = r->messages[i].msg_len;
        struct rf_frame *out = &frames[count];

        if (size < ETH_HLEN)
            continue; /* no Ethernet frame */
        out->header = header;
        out->frame.data = header + ETH_HLEN;
        out->frame.size = size - ETH_HLEN;
        /* What does not fit is longer than any frame: cut off, and never equal to anything. */
        out->frame.wire_size = out->frame.size + (r->messages[i].msg_hdr.msg_flags & MSG_TRUNC ? 1 : 0);
        out->frame.ethertype = (uint16_t)(header[12] << 8 | header[13]);
        out->frame.vlan = vlan_of(&r->messages[i].msg_hdr);
        count++;
    }
    return count;
}
