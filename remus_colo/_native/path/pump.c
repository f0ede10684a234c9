/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pump.h"

#include <errno.h>
#include <poll.h>
#include <time.h>

#define TURN_NS 1000000 /* a turn that finds ever more to do ends after so long: its caller has other duties */
#define MOST_SPIN_MISSES 10

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/*
 * Let go what the comparator has released, in its order, and send it.
 *
 * 0, or the negative errno of the queue: -ENOENT for a packet that is not held, which is a bug.  What could not be sent is
 * kept.
 */
static int release(struct rp_pump *p)
{
    const struct colo_release *out;
    size_t number = colo_released(p->comparator, &out);
    int error = 0, failed;

    for (size_t i = 0; i < number; i++) {
        failed = rq_accept(p->queue, out[i].id);
        if (failed && !error)
            error = failed;
    }
    colo_drained(p->comparator);
    failed = rq_flush(p->queue);
    return error ? error : failed;
}

/* One reading of the SVM's frames.  Their number, or a negative errno. */
static int read_secondary(struct rp_pump *p)
{
    struct rf_frame frames[RF_BATCH];
    int number = rf_read(p->frames, frames, RF_BATCH);
    int64_t now;

    if (number <= 0)
        return number;
    now = now_ns();
    for (int i = 0; p->ignore_tags && i < number; i++)
        frames[i].frame.vlan = 0;
    for (int i = 0, announced = 0; i < number; i++) {
        for (; announced <= i + COLO_AHEAD; announced++)
            colo_prefetch(p->comparator, announced < number ? &frames[announced].frame : NULL);
        colo_secondary(p->comparator, now, &frames[i].frame);
    }
    return number;
}

static int read_primary(struct rp_pump *p)
{
    struct rq_packet packets[RQ_BATCH];
    int number = rq_read(p->queue, packets, RQ_BATCH);
    int64_t now;

    if (number <= 0)
        return number;
    now = now_ns();
    for (int i = 0, announced = 0; i < number; i++) {
        for (; announced <= i + COLO_AHEAD; announced++)
            colo_prefetch(p->comparator, announced < number ? &packets[announced].frame : NULL);
        colo_primary(p->comparator, now, packets[i].id, &packets[i].frame);
    }
    return number;
}

/*
 * Wait awake for the next packet of either VM.  1 if there is one.
 *
 * Being woken costs more than dealing with a packet does.  Where packets come closer than that, waiting awake saves time
 * for them and for the processor; where they do not, it wastes it.  So after waits in vain, 1, 3, 7 ... up to 1023 turns go
 * by without one.  That also ends it where the sender shares our only processor.
 */
static int spin(struct rp_pump *p)
{
    struct pollfd files[2] = {
        {.fd = rq_fd(p->queue), .events = POLLIN},
        {.fd = p->frames ? rf_fd(p->frames) : -1, .events = POLLIN},
    };
    int64_t end;

    if (!p->spin_ns)
        return 0;
    if (p->spin_skip) {
        p->spin_skip--;
        return 0;
    }
    end = now_ns() + p->spin_ns;
    do {
        if (poll(files, 2, 0) > 0) {
            p->spin_misses = 0;
            return 1;
        }
    } while (now_ns() < end);
    if (p->spin_misses < MOST_SPIN_MISSES)
        p->spin_misses++;
    p->spin_skip = (1u << p->spin_misses) - 1;
    return 0;
}

/* One reading of what is to be read, and what that lets go.  The number of packets. */
static uint32_t read_once(struct rp_pump *p, unsigned *what, uint32_t count[2], int *attention)
{
    uint32_t before = count[0] + count[1];
    int got;

    if (*what & RP_SECONDARY) {
        got = read_secondary(p);
        if (got >= 0) {
            count[1] += (uint32_t)got;
        } else if (got != -EAGAIN) {
            p->secondary_error = got;
            *attention |= RP_SECONDARY_FAILED;
            *what &= ~(unsigned)RP_SECONDARY;
        }
    }
    if (*what & RP_PRIMARY) {
        got = read_primary(p);
        if (got >= 0) {
            count[0] += (uint32_t)got;
        } else if (got != -EAGAIN) {
            p->primary_error = got;
            *attention |= RP_PRIMARY_FAILED;
            *what &= ~(unsigned)RP_PRIMARY;
        }
    }
    p->release_error = release(p);
    if (p->release_error)
        *attention |= RP_RELEASE_FAILED;
    return count[0] + count[1] - before;
}

/*
 * Read both sockets, or one (what: RP_*), until they are empty or about ``most`` packets have been read, and let go what
 * may leave.  The SVM's first: what it said before the PVM lets the PVM's packet leave without being held.
 *
 * 0, or what calls for attention: RP_*.
 */
int rp_turn(struct rp_pump *p, unsigned what, uint32_t most)
{
    uint32_t count[2] = {0, 0}; /* of the PVM, of the SVM */
    int attention = 0, both;
    int64_t now = now_ns(), end = now + TURN_NS;
    uint64_t missing;

    if (!p->frames)
        what &= ~(unsigned)RP_SECONDARY;
    both = what == (RP_PRIMARY | RP_SECONDARY);
    for (;;) {
        uint32_t news = read_once(p, &what, count, &attention);

        now = now_ns();
        if (attention || count[0] + count[1] >= most || (both && now >= end))
            break;
        if (!news && !(both && count[0] + count[1] && spin(p)))
            break;
    }
    if (!p->release_error && now >= colo_deadline(p->comparator)) {
        colo_tick(p->comparator, now);
        p->release_error = release(p);
        if (p->release_error)
            attention |= RP_RELEASE_FAILED;
    }
    if (colo_requested(p->comparator))
        attention |= RP_REQUEST;
    p->deadline_ns = colo_deadline(p->comparator);
    if (p->deadline_ns < p->armed_ns)
        attention |= RP_DEADLINE;
    missing = rq_missing(p->queue);
    if (missing != p->missing)
        attention |= RP_MISSING;
    p->missing = missing;
    return attention;
}
