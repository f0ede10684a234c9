/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Watches the guest's own clocks, and tells what it saw: did one go back, how far did one jump, did a timer get
 * lost. An HTTP/1.0 server behind nginx (/clock), in one process without threads.
 *
 *   guest_clock SOCKET
 *
 * SOCKET is the path of the Unix socket that nginx passes requests to. The first request starts a timer of 10 ms, or
 * of N ms for /clock?period_ms=N, and from then on all clocks are read whenever it expires; until then the program
 * sleeps. Each answer is one JSON object, about all the time since (nanoseconds unless said otherwise):
 *
 *   now          monotonic, realtime and boottime, at the answer
 *   backward     per clock, how often a reading was below the one before it
 *   skew         realtime and boottime, each less monotonic: [at first, least, most]; together: how many readings that
 *                is known from
 *   expirations  of the timer, as the kernel counted them; expected: as many as the clock says there should be
 *   miscounted   the largest difference of those two, in expirations, at any wake-up
 *   gaps         the largest times between two readings of monotonic: [when the second was made, how long,
 *                how late the timer was]
 *   steal_ticks  of /proc/stat
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { GAPS = 64, DEFAULT_PERIOD_MS = 10, MAX_PERIOD_MS = 999, REQUEST_BYTES = 4096, REPLY_BYTES = 16384 };
/* The clocks are read one after the other: what was interrupted for longer than this says nothing of their distance. */
enum { TOGETHER_NS = 1000000 };

enum { MONOTONIC, REALTIME, BOOTTIME, CLOCKS };
static const clockid_t ids[CLOCKS] = { CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME };

struct gap { int64_t at, length, late; };

static int timer = -1;
static int64_t period, started, last[CLOCKS];
static int64_t least[CLOCKS], most[CLOCKS], first[CLOCKS]; /* less monotonic */
static uint64_t together; /* readings that say something of the clocks' distance */
static uint64_t expirations, samples, backward[CLOCKS];
static int64_t miscounted;
static struct gap gaps[GAPS]; /* the longest, in no order */

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(clockid_t id)
{
    struct timespec t;

    clock_gettime(id, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void read_clocks(int64_t reading[CLOCKS])
{
    int64_t after;

    for (int i = 0; i < CLOCKS; i++)
        reading[i] = now(ids[i]);
    after = now(CLOCK_MONOTONIC);
    if (after - reading[MONOTONIC] > TOGETHER_NS)
        return;
    for (int i = REALTIME; i < CLOCKS; i++) {
        int64_t skew = reading[i] - reading[MONOTONIC];

        if (!together)
            first[i] = least[i] = most[i] = skew;
        if (skew < least[i])
            least[i] = skew;
        if (skew > most[i])
            most[i] = skew;
    }
    together++;
}

static void start(const char *request)
{
    static const char question[] = "GET /clock?period_ms=";
    struct itimerspec spec = { 0 };
    long period_ms = DEFAULT_PERIOD_MS;
    int64_t at;

    if (!strncmp(request, question, sizeof question - 1))
        period_ms = strtol(request + sizeof question - 1, NULL, 10);
    if (period_ms < 1 || period_ms > MAX_PERIOD_MS)
        period_ms = DEFAULT_PERIOD_MS;
    period = period_ms * 1000000;
    spec.it_interval.tv_nsec = period;

    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer < 0)
        die("timerfd_create");
    read_clocks(last);
    started = last[MONOTONIC];
    at = started + period; /* the first of the expirations */
    spec.it_value.tv_sec = at / 1000000000;
    spec.it_value.tv_nsec = at % 1000000000;
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &spec, NULL) < 0)
        die("timerfd_settime");
}

static void keep_gap(struct gap gap)
{
    struct gap *shortest = gaps;

    for (int i = 1; i < GAPS; i++)
        if (gaps[i].length < shortest->length)
            shortest = &gaps[i];
    if (gap.length > shortest->length)
        *shortest = gap;
}

/* How many times the timer should have expired by @at. */
static int64_t expected(int64_t at)
{
    return (at - started) / period;
}

static void sample(void)
{
    int64_t reading[CLOCKS], before, due, wrong = 0;
    uint64_t count;

    before = now(CLOCK_MONOTONIC);
    if (read(timer, &count, sizeof count) != (ssize_t)sizeof count)
        return;
    read_clocks(reading);
    due = started + (int64_t)(expirations + 1) * period; /* when the first of these was to come */
    expirations += count;
    samples++;
    /* The kernel counted at some moment between the two readings. */
    if ((int64_t)expirations < expected(before))
        wrong = expected(before) - (int64_t)expirations;
    else if ((int64_t)expirations > expected(reading[MONOTONIC]))
        wrong = (int64_t)expirations - expected(reading[MONOTONIC]);
    if (wrong > miscounted)
        miscounted = wrong;
    for (int i = 0; i < CLOCKS; i++)
        if (reading[i] < last[i])
            backward[i]++;
    keep_gap((struct gap){ reading[MONOTONIC], reading[MONOTONIC] - last[MONOTONIC], reading[MONOTONIC] - due });
    memcpy(last, reading, sizeof last);
}

static long long steal_ticks(void)
{
    long long value = -1;
    FILE *stat = fopen("/proc/stat", "re");

    if (stat) {
        if (fscanf(stat, "cpu %*d %*d %*d %*d %*d %*d %*d %lld", &value) != 1)
            value = -1;
        fclose(stat);
    }
    return value;
}

static int report(char *out, size_t size)
{
    int64_t reading[CLOCKS];
    int n;

    read_clocks(reading);
    n = snprintf(out, size,
                 "{\"period_ns\": %lld, \"started\": %lld, \"samples\": %llu, "
                 "\"now\": {\"monotonic\": %lld, \"realtime\": %lld, \"boottime\": %lld}, "
                 "\"backward\": {\"monotonic\": %llu, \"realtime\": %llu, \"boottime\": %llu}, "
                 "\"together\": %llu, \"skew\": {\"realtime\": [%lld, %lld, %lld], \"boottime\": [%lld, %lld, %lld]}, "
                 "\"expirations\": %llu, \"expected\": %lld, \"miscounted\": %lld, \"steal_ticks\": %lld, \"gaps\": [",
                 (long long)period, (long long)started, (unsigned long long)samples, (long long)reading[MONOTONIC],
                 (long long)reading[REALTIME], (long long)reading[BOOTTIME], (unsigned long long)backward[MONOTONIC],
                 (unsigned long long)backward[REALTIME], (unsigned long long)backward[BOOTTIME],
                 (unsigned long long)together,
                 (long long)first[REALTIME], (long long)least[REALTIME], (long long)most[REALTIME],
                 (long long)first[BOOTTIME], (long long)least[BOOTTIME], (long long)most[BOOTTIME],
                 (unsigned long long)expirations, (long long)expected(last[MONOTONIC]), (long long)miscounted,
                 steal_ticks());
    for (int i = 0, some = 0; i < GAPS; i++)
        if (gaps[i].length) {
            n += snprintf(out + n, size - (size_t)n, "%s[%lld, %lld, %lld]", some ? ", " : "", (long long)gaps[i].at,
                          (long long)gaps[i].length, (long long)gaps[i].late);
            some = 1;
        }
    return n + snprintf(out + n, size - (size_t)n, "]}\n");
}

static void answer(int client)
{
    static char body[REPLY_BYTES];
    char request[REQUEST_BYTES], head[256];
    /* nginx has all of a request before it passes it on; whoever is slow is not nginx. */
    struct timeval patience = { .tv_sec = 1 };
    size_t held = 0;
    int head_bytes, body_bytes;
    ssize_t n;

    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    do {
        n = read(client, request + held, sizeof request - 1 - held);
        if (n <= 0)
            return;
        held += (size_t)n;
        request[held] = '\0';
    } while (!strstr(request, "\r\n\r\n") && held < sizeof request - 1);
    if (timer < 0)
        start(request);
    body_bytes = report(body, sizeof body);
    head_bytes = snprintf(head, sizeof head,
                          "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                          "Cache-Control: no-store\r\n\r\n", body_bytes);
    if (send(client, head, (size_t)head_bytes, MSG_NOSIGNAL | MSG_MORE) == head_bytes)
        send(client, body, (size_t)body_bytes, MSG_NOSIGNAL);
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: guest_clock SOCKET\n");
        return 2;
    }
    strcpy(address.sun_path, argv[1]);
    unlink(argv[1]);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 16) < 0)
        die(argv[1]);
    chmod(argv[1], 0666); /* nginx's worker runs as another user */
    for (;;) {
        struct pollfd ready[] = { { .fd = timer, .events = POLLIN }, { .fd = listener, .events = POLLIN } };

        if (poll(ready, 2, -1) < 0 && errno != EINTR)
            die("poll");
        if (ready[0].revents)
            sample();
        if (ready[1].revents) {
            int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

            if (client >= 0) {
                answer(client);
                close(client);
            }
        }
    }
}
