/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The guest's small services in one process without threads: TCP and UDP echo, and the answers that two
 * clones of a VM can never give alike (/random and /time), as an HTTP/1.0 server behind nginx.
 *
 *   guest_services ECHO_PORT SOCKET
 *   guest_services seed UUID
 *
 * ECHO_PORT is the TCP and the UDP port of the echo; SOCKET is the path of the Unix socket that nginx
 * passes /random and /time to. The program sleeps in epoll_wait without a time-out, so it costs nothing
 * while no client asks. With "seed" it only fills the kernel's random pool, and ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FDS = 4096, BUFFER_BYTES = 16384, EVENTS = 64, BACKLOG = 512 };

enum role { ECHO_LISTENER = 1, ECHO_STREAM, ECHO_DATAGRAMS, HTTP_LISTENER, HTTP_REQUEST };

/* One open descriptor. An echo stream holds data[sent..held) still to be sent, and reads nothing more until
 * all of it has left: the client's own window then throttles the client. A request holds data[0..held). */
struct endpoint {
    enum role role;
    int fd;
    size_t sent, held;
    char data[BUFFER_BYTES];
};

static int epoll_fd;
static struct endpoint *endpoints[MAX_FDS];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(struct endpoint *e, uint32_t events, int operation)
{
    struct epoll_event event = { .events = events, .data.fd = e->fd };

    if (epoll_ctl(epoll_fd, operation, e->fd, &event) < 0)
        die("epoll_ctl");
}

static void forget(struct endpoint *e)
{
    endpoints[e->fd] = NULL;
    close(e->fd); /* leaves the epoll set by itself: no descriptor is ever duplicated */
    free(e);
}

static struct endpoint *adopt(int fd, enum role role)
{
    struct endpoint *e;

    if (fd < 0 || fd >= MAX_FDS || !(e = malloc(sizeof *e))) {
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    e->role = role;
    e->fd = fd;
    e->sent = e->held = 0;
    endpoints[fd] = e;
    watch(e, EPOLLIN, EPOLL_CTL_ADD);
    return e;
}

static void accept_all(struct endpoint *listener)
{
    int fd, one = 1;

    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (listener->role == ECHO_LISTENER)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        adopt(fd, listener->role == ECHO_LISTENER ? ECHO_STREAM : HTTP_REQUEST);
    }
}

static void echo_stream(struct endpoint *e)
{
    ssize_t n;

    if (e->sent == e->held) {
        n = read(e->fd, e->data, sizeof e->data);
        if (n <= 0) {
            if (n == 0 || (errno != EAGAIN && errno != EINTR))
                forget(e);
            return;
        }
        e->sent = 0;
        e->held = (size_t)n;
    }
    n = send(e->fd, e->data + e->sent, e->held - e->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
        forget(e);
        return;
    }
    if (n > 0)
        e->sent += (size_t)n;
    watch(e, e->sent == e->held ? EPOLLIN : EPOLLOUT, EPOLL_CTL_MOD);
}

static void echo_datagrams(struct endpoint *e)
{
    static char datagram[65536];
    struct sockaddr_storage peer;
    socklen_t peer_bytes;
    ssize_t n;

    for (;;) {
        peer_bytes = sizeof peer;
        n = recvfrom(e->fd, datagram, sizeof datagram, 0, (struct sockaddr *)&peer, &peer_bytes);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n >= 0) /* a full send buffer loses the datagram, as UDP may */
            sendto(e->fd, datagram, (size_t)n, 0, (struct sockaddr *)&peer, peer_bytes);
    }
}

static uint64_t stir(uint64_t x) /* the finalizer of SplitMix64: every input bit changes every output bit */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Two clones hold the same random pool, in the kernel too, and would answer alike. The time stamp counter
 * and the clock at the moment of the request cannot be the same on two machines, so they are mixed in. */
static int random_body(char *body, size_t size)
{
    uint64_t pool[4], state;
    struct timespec now;

    if (getrandom(pool, sizeof pool, 0) != (ssize_t)sizeof pool)
        memset(pool, 0, sizeof pool);
    clock_gettime(CLOCK_REALTIME, &now);
    state = stir((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
    for (int i = 0; i < 4; i++) {
        state = stir(state + __builtin_ia32_rdtsc());
        pool[i] ^= state;
    }
    return snprintf(body, size, "%016lx%016lx%016lx%016lx\n", pool[0], pool[1], pool[2], pool[3]);
}

/* A VM has no source of entropy, and its first getrandom waits for seconds until the kernel has made some from
 * its timer. A guest for tests keeps no secrets: the domain's UUID, clock and counter will do as a seed. */
static int seed(const char *uuid)
{
    struct {
        struct rand_pool_info info;
        uint64_t data[8];
    } pool = { .info = { .entropy_count = 256, .buf_size = sizeof pool.data } };
    struct timespec now;
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        die("/dev/urandom");
    clock_gettime(CLOCK_REALTIME, &now);
    pool.data[0] = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    pool.data[1] = __builtin_ia32_rdtsc();
    memcpy(&pool.data[2], uuid, strnlen(uuid, sizeof pool.data - 2 * sizeof pool.data[0]));
    if (ioctl(fd, RNDADDENTROPY, &pool) < 0)
        die("RNDADDENTROPY");
    return 0;
}

static int time_body(char *body, size_t size)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return snprintf(body, size, "%010ld.%09ld\n", (long)now.tv_sec, now.tv_nsec);
}

static void answer(struct endpoint *e)
{
    char body[128], reply[512];
    const char *status = "200 OK";
    int body_bytes, reply_bytes;

    if (!strncmp(e->data, "GET /random ", 12)) {
        body_bytes = random_body(body, sizeof body);
    } else if (!strncmp(e->data, "GET /time ", 10)) {
        body_bytes = time_body(body, sizeof body);
    } else {
        status = "404 Not Found";
        body_bytes = snprintf(body, sizeof body, "no such answer\n");
    }
    reply_bytes = snprintf(reply, sizeof reply,
                           "HTTP/1.0 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
                           "Cache-Control: no-store\r\n\r\n%s", status, body_bytes, body);
    /* The whole reply fits into a fresh socket's buffer; a peer that has gone needs none. */
    if (send(e->fd, reply, (size_t)reply_bytes, MSG_NOSIGNAL) < 0 && errno != EPIPE)
        perror("send");
    forget(e);
}

static void http_request(struct endpoint *e)
{
    ssize_t n = read(e->fd, e->data + e->held, sizeof e->data - 1 - e->held);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        forget(e);
        return;
    }
    e->held += (size_t)n;
    e->data[e->held] = '\0';
    if (strstr(e->data, "\r\n\r\n"))
        answer(e);
    else if (e->held == sizeof e->data - 1)
        forget(e);
}

static int inet_socket(int family, int type, int port)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
    struct sockaddr_in6 address6 = { .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port) };
    int fd = socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;

    if (fd < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (family == AF_INET ? bind(fd, (struct sockaddr *)&address, sizeof address)
                          : bind(fd, (struct sockaddr *)&address6, sizeof address6))
        die("bind");
    if (type == SOCK_STREAM && listen(fd, BACKLOG) < 0)
        die("listen");
    return fd;
}

static int unix_listener(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0 || strlen(path) >= sizeof address.sun_path)
        die(path);
    strcpy(address.sun_path, path);
    unlink(path);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, BACKLOG) < 0)
        die(path);
    chmod(path, 0666); /* nginx's worker runs as another user */
    return fd;
}

int main(int argc, char **argv)
{
    static void (*const handlers[])(struct endpoint *) = {
        [ECHO_LISTENER] = accept_all, [ECHO_STREAM] = echo_stream, [ECHO_DATAGRAMS] = echo_datagrams,
        [HTTP_LISTENER] = accept_all, [HTTP_REQUEST] = http_request,
    };
    struct epoll_event events[EVENTS];

    if (argc != 3) {
        fprintf(stderr, "usage: guest_services ECHO_PORT SOCKET | seed UUID\n");
        return 2;
    }
    if (!strcmp(argv[1], "seed"))
        return seed(argv[2]);
    signal(SIGPIPE, SIG_IGN);
    if ((epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die("epoll_create1");
    for (int i = 0; i < 2; i++) {
        int family = i ? AF_INET6 : AF_INET;

        adopt(inet_socket(family, SOCK_STREAM, atoi(argv[1])), ECHO_LISTENER);
        adopt(inet_socket(family, SOCK_DGRAM, atoi(argv[1])), ECHO_DATAGRAMS);
    }
    adopt(unix_listener(argv[2]), HTTP_LISTENER);
    for (;;) {
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);

        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            struct endpoint *e = endpoints[events[i].data.fd];

            if (e)
                handlers[e->role](e);
        }
    }
}
