/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xenctrl.h>
#include <xenguest.h>
#include <xentoollog.h>

#include "save.h"

/* libxenguest's own rule, which it applies where there is no policy of the caller's. */
#define ROUNDS_MAX 5
#define DIRTY_FEW 50

struct save {
    const struct rc_save_hooks *hooks;
    void *data;
};

static int on_round(struct precopy_stats stats, void *user)
{
    const struct save *s = user;
    int answer = s->hooks->round(s->data, stats.iteration, stats.dirty_count);

    if (answer < 0)
        return XGS_POLICY_ABORT;
    if (answer == 0 || stats.iteration >= ROUNDS_MAX || (stats.dirty_count >= 0 && stats.dirty_count < DIRTY_FEW))
        return XGS_POLICY_STOP_AND_COPY;
    return XGS_POLICY_CONTINUE_PRECOPY;
}

static int on_suspend(void *user)
{
    const struct save *s = user;

    return s->hooks->suspend(s->data);
}

static int on_resume(void *user)
{
    const struct save *s = user;

    return s->hooks->resume(s->data);
}

static int on_checkpoint(void *user)
{
    const struct save *s = user;

    return s->hooks->checkpoint(s->data);
}

static int on_log_dirty(uint32_t domid, unsigned int enable, void *user)
{
    const struct save *s = user;

    (void)domid;
    return s->hooks->log_dirty(s->data, (int)enable);
}

/* What libxenguest has logged, its first sentence without "xc: error: " in front: the last is always "Save failed". */
static void first_sentence(const char *said, char *message, size_t size)
{
    const char *start = strstr(said, "error: ");
    size_t length;

    start = start ? start + strlen("error: ") : said;
    length = strcspn(start, "\n");
    snprintf(message, size, "%.*s", (int)(length < size ? length : size), start);
}

int rc_save_stream(uint32_t domid, int fd, int mode, const struct rc_save_hooks *hooks, void *data,
                   char *message, size_t message_size)
{
    struct save s = { hooks, data };
    struct save_callbacks callbacks;
    xentoollog_logger_stdiostream *logger = NULL;
    xc_interface *xch = NULL;
    char *said = NULL;
    size_t said_size = 0;
    FILE *log;
    int rc = -1, saved;

    snprintf(message, message_size, "%s", "");
    /* It calls each end that a hook asks for an error: what it says is kept for the caller to decide. */
    log = open_memstream(&said, &said_size);
    if (!log)
        return -1;
    logger = xtl_createlogger_stdiostream(log, XTL_ERROR, XTL_STDIOSTREAM_HIDE_PROGRESS);
    if (logger)
        xch = xc_interface_open((xentoollog_logger *)logger, (xentoollog_logger *)logger, 0);
    if (xch) {
        memset(&callbacks, 0, sizeof callbacks);
        callbacks.precopy_policy = on_round;
        callbacks.suspend = on_suspend;
        callbacks.postcopy = on_resume;
        callbacks.checkpoint = on_checkpoint;
        callbacks.switch_qemu_logdirty = on_log_dirty;
        callbacks.data = &s;
        rc = xc_domain_save(xch, fd, domid, mode == RC_SAVE_ONCE ? 0 : XCFLAGS_LIVE, &callbacks,
                            mode == RC_SAVE_CHECKPOINTS ? XC_STREAM_REMUS : XC_STREAM_PLAIN, -1);
    }
    saved = errno;
    if (xch)
        xc_interface_close(xch);
    if (logger)
        xtl_logger_destroy((xentoollog_logger *)logger);
    fclose(log);
    if (rc && said)
        first_sentence(said, message, message_size);
    free(said);
    errno = saved;
    return rc;
}
