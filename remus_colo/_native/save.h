/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libxenguest's save (xc_domain_save of xenguest.h), its callbacks as functions of one argument that Python
 * can offer.
 */
#ifndef REMUS_COLO_SAVE_H
#define REMUS_COLO_SAVE_H

#include <stddef.h>
#include <stdint.h>

/* All are called in the thread that called rc_save_checkpoints, with @data as given there. */
struct rc_save_hooks {
    /* before a live round: 1 to go on; 0 to suspend now and send the rest; -1 to give up */
    int (*round)(void *data, uint32_t number, int64_t dirty);
    int (*suspend)(void *data);    /* 1 once the guest has suspended */
    int (*resume)(void *data);     /* the state is written: resume the guest, then 1 */
    int (*checkpoint)(void *data); /* 1 for another checkpoint, 0 to end */
    int (*log_dirty)(void *data, int enable); /* the device model's writes, of an HVM guest; 0 if done */
};

/* Which hooks are called, and which stream that makes. */
#define RC_SAVE_ONCE 0        /* all memory, with the guest suspended: suspend */
#define RC_SAVE_LIVE 1        /* memory while the guest runs, then what has changed: round, suspend */
#define RC_SAVE_CHECKPOINTS 2 /* as that, and then checkpoints (XC_STREAM_REMUS) until a hook ends it: all */

/* Returns 0, or -1 with errno set and a sentence in @message. */
int rc_save_stream(uint32_t domid, int fd, int mode, const struct rc_save_hooks *hooks, void *data,
                   char *message, size_t message_size);

#endif
