/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sends datagrams on some sockets and receives them on another, and says how many came through, or how long each took.
 *
 *     traffic rate     BYTES SECONDS WINDOW  RECEIVER SENDER...
 *     traffic latency  BYTES SECONDS PER_SECOND  RECEIVER SENDER...
 *
 * BYTES of payload, 16 at least.  RECEIVER and SENDER are open descriptors of UDP sockets, senders connected.
 *
 * rate: as fast as they come through, with at most WINDOW datagrams on their way.
 * latency: PER_SECOND datagrams a second, one at a time; the time of each runs from before send() to the kernel's own
 * time stamp when the datagram reaches the receiver's end (SO_TIMESTAMPNS), so this program's own wake-ups do not count.
 *
 * Prints one JSON object; times in ns.  Exits with 1 and a sentence if something does not work.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 32
#define MOST_BYTES 65000
#define STALL_NS 200000000ll /* what has not come by then is lost */
#define SECOND_NS 1000000000ll

struct stamp { /* begins each payload */
    uint64_t number;
    int64_t sent_ns;
};

static int receiver, senders[1024], nr_senders;
static size_t bytes;
static uint8_t in[BATCH][MOST_BYTES], out[BATCH][MOST_BYTES];

static void fail(const char *what)
{
    fprintf(stderr, "traffic: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return t.tv_sec * SECOND_NS + t.tv_nsec;
}

/* -- rate -- */

static int receive_some(void)
{
    struct mmsghdr messages[BATCH];
    struct iovec vectors[BATCH];
    int got;

    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) {
        vectors[i] = (struct iovec){.iov_base = in[i], .iov_len = MOST_BYTES};
        messages[i].msg_hdr.msg_iov = &vectors[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    got = recvmmsg(receiver, messages, BATCH, MSG_DONTWAIT, NULL);
    if (got < 0 && errno != EAGAIN)
        fail("cannot receive");
    return got < 0 ? 0 : got;
}

static int send_some(uint64_t number, int most)
{
    struct mmsghdr messages[BATCH];
    struct iovec vectors[BATCH];
    int sent;

    memset(messages, 0, sizeof messages);
    for (int i = 0; i < most; i++) {
        struct stamp stamp = {.number = number + (uint64_t)i};

        memcpy(out[i], &stamp, sizeof stamp);
        vectors[i] = (struct iovec){.iov_base = out[i], .iov_len = bytes};
        messages[i].msg_hdr.msg_iov = &vectors[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    sent = sendmmsg(senders[number / BATCH % (uint64_t)nr_senders], messages, (unsigned)most, MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN && errno != ENOBUFS)
        fail("cannot send");
    return sent < 0 ? 0 : sent;
}

static void measure_rate(double seconds, uint64_t window)
{
    int64_t start = now_ns(CLOCK_MONOTONIC), end = start + (int64_t)(seconds * SECOND_NS), now = start, progress = start;
    uint64_t sent = 0, received = 0, lost = 0;

    while (now < end) {
        uint64_t room = window - (sent - received - lost);
        int got;

        /* A lot, then a look at what has come, so that neither direction waits for the other. */
        if (room >= BATCH)
            sent += (uint64_t)send_some(sent, BATCH);
        got = receive_some();
        now = now_ns(CLOCK_MONOTONIC);
        if (got) {
            received += (uint64_t)got;
            progress = now;
        } else if (now - progress > STALL_NS && sent > received + lost) {
            lost = sent - received;
            progress = now;
        }
    }
    printf("{\"received\": %llu, \"lost\": %llu, \"ns\": %lld}\n", (unsigned long long)received,
           (unsigned long long)lost, (long long)(now - start));
}

/* -- latency -- */

static int compare_times(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static uint64_t note_arrivals(int64_t *times, uint64_t most, uint64_t known)
{
    union {
        struct cmsghdr header;
        uint8_t room[CMSG_SPACE(sizeof(struct timespec))];
    } control;
    struct iovec vector = {.iov_base = in[0], .iov_len = MOST_BYTES};

    for (;;) {
        struct msghdr message = {
            .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
        ssize_t size = recvmsg(receiver, &message, MSG_DONTWAIT);
        struct cmsghdr *c;
        struct timespec arrived;
        struct stamp stamp;

        if (size < 0) {
            if (errno != EAGAIN)
                fail("cannot receive");
            return known;
        }
        c = CMSG_FIRSTHDR(&message);
        if ((size_t)size < sizeof stamp || !c || c->cmsg_type != SCM_TIMESTAMPNS) {
            errno = EPROTO;
            fail("no time stamp");
        }
        memcpy(&stamp, in[0], sizeof stamp);
        memcpy(&arrived, CMSG_DATA(c), sizeof arrived);
        if (known < most)
            times[known++] = arrived.tv_sec * SECOND_NS + arrived.tv_nsec - stamp.sent_ns;
    }
}

static void measure_latency(double seconds, double per_second)
{
    uint64_t most = (uint64_t)(seconds * per_second), sent = 0, known = 0;
    int64_t *times = malloc((most + 1) * sizeof *times);
    int64_t start = now_ns(CLOCK_MONOTONIC), now = start, last = start;
    int one = 1;

    if (!times)
        fail("no memory");
    if (setsockopt(receiver, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one) < 0)
        fail("no time stamps");
    while (known < most && now - last < STALL_NS) {
        now = now_ns(CLOCK_MONOTONIC);
        if (sent < most) {
            last = now;
            if (now - start >= (int64_t)(sent * (SECOND_NS / per_second))) {
                struct stamp stamp = {.number = sent, .sent_ns = now_ns(CLOCK_REALTIME)};

                memcpy(out[0], &stamp, sizeof stamp);
                if (send(senders[sent % (uint64_t)nr_senders], out[0], bytes, 0) < 0)
                    fail("cannot send");
                sent++;
            }
        }
        known = note_arrivals(times, most, known);
    }
    if (!known) {
        errno = ETIMEDOUT;
        fail("nothing came through");
    }
    qsort(times, known, sizeof *times, compare_times);
    printf("{\"sent\": %llu, \"received\": %llu, \"min\": %lld, \"p50\": %lld, \"p90\": %lld, \"p99\": %lld, "
           "\"max\": %lld, \"ns\": %lld}\n",
           (unsigned long long)sent, (unsigned long long)known, (long long)times[0], (long long)times[known / 2],
           (long long)times[known * 90 / 100], (long long)times[known * 99 / 100], (long long)times[known - 1],
           (long long)(now - start));
    free(times);
}

int main(int argc, char **argv)
{
    if (argc < 7) {
        fprintf(stderr, "traffic: rate|latency BYTES SECONDS WINDOW|PER_SECOND RECEIVER SENDER...\n");
        return 2;
    }
    bytes = (size_t)atol(argv[2]);
    receiver = atoi(argv[5]);
    for (int i = 6; i < argc && nr_senders < 1024; i++)
        senders[nr_senders++] = atoi(argv[i]);
    if (bytes < sizeof(struct stamp) || bytes > MOST_BYTES) {
        errno = EINVAL;
        fail("BYTES");
    }
    if (!strcmp(argv[1], "rate"))
        measure_rate(atof(argv[3]), (uint64_t)atol(argv[4]));
    else
        measure_latency(atof(argv[3]), atof(argv[4]));
    return 0;
}
