/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The frames of one link, read many to a system call from a packet socket that the caller owns (AF_PACKET, packet(7)).
 *
 * Read, not mapped (PACKET_RX_RING): a version 3 ring hands over a block when it is full or a timer of whole
 * milliseconds runs out, and a version 2 ring has slots of one size, which must hold 64 kB superpackets, so that
 * 16 MiB hold 128 packets of any size; a socket buffer of that size holds over ten thousand small ones.
 *
 * Functions return 0 or a count, or a negative errno.  One thread at a time.
 */
#ifndef REMUS_COLO_FRAMES_H
#define REMUS_COLO_FRAMES_H

#include "compare.h"

struct rf_reader;

struct rf_frame {
    const uint8_t *header;   /* the Ethernet header: destination, source, type */
    struct colo_frame frame; /* what follows it; both are valid until the next rf_read() */
};

struct rf_reader *rf_open(int fd);
void rf_close(struct rf_reader *r);
int rf_fd(const struct rf_reader *r);
int rf_read(struct rf_reader *r, struct rf_frame *frames, int max);

#define RF_BATCH 32 /* frames that one rf_read() gives at most */

#endif
