/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The comparator between three sockets, as QEMU's colo-compare is: frames of the PVM and of the SVM come in, frames that
 * leave go out, each behind its length as a 32-bit number in network byte order.  For benchmarks: it holds the frames
 * itself, where a packet queue's stay in the kernel, and does not take checkpoints.
 *
 *     bridge PRIMARY SECONDARY OUT      paths of stream sockets to connect to
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../_native/compare.h"

#define LENGTH_BYTES 4
#define ETHERNET_BYTES 14
#define ROOM ((size_t)1 << 18)

struct input {
    int fd;
    size_t have;
    uint8_t *bytes;
};

struct slot {
    uint32_t size, next_free;
    uint8_t *frame; /* with its length in front */
};

static struct slot *slots;
static uint32_t slot_count, first_free = UINT32_MAX;
static uint8_t out[ROOM];
static size_t out_have;

static void die(const char *what)
{
    fprintf(stderr, "bridge: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    if (fd < 0 || strlen(path) >= sizeof(address.sun_path))
        die(path);
    strcpy(address.sun_path, path);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
        die(path);
    return fd;
}

static void flush(int fd)
{
    for (size_t done = 0; done < out_have;) {
        ssize_t count = write(fd, out + done, out_have - done);

        if (count < 0)
            die("write");
        done += (size_t)count;
    }
    out_have = 0;
}

static void append(int fd, const uint8_t *frame, size_t size)
{
    if (out_have + size > ROOM)
        flush(fd);
    memcpy(out + out_have, frame, size);
    out_have += size;
}

/* Keep a frame that waits; its id is that of the slot. */
static void keep(uint32_t id, const uint8_t *frame, uint32_t size)
{
    struct slot *slot = &slots[id];

    if (!slot->frame || slot->size < size)
        slot->frame = realloc(slot->frame, size);
    if (!slot->frame)
        die("malloc");
    slot->size = size;
    memcpy(slot->frame, frame, size);
}

static uint32_t take_slot(void)
{
    uint32_t id = first_free;

    if (id != UINT32_MAX) {
        first_free = slots[id].next_free;
        return id;
    }
    if (slot_count % 4096 == 0) {
        slots = realloc(slots, (slot_count + 4096) * sizeof(*slots));
        if (!slots)
            die("malloc");
    }
    memset(&slots[slot_count], 0, sizeof(*slots));
    return slot_count++;
}

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* What leaves: frame is the one with id, if it was not kept. */
static void release(struct colo *c, int fd, uint32_t id, const uint8_t *frame, uint32_t size, int *gone)
{
    const struct colo_release *released;
    size_t count = colo_released(c, &released);

    for (size_t i = 0; i < count; i++) {
        uint32_t leaving = (uint32_t)released[i].id;

        if (frame && leaving == id) {
            append(fd, frame, size);
            *gone = 1;
        } else {
            append(fd, slots[leaving].frame, LENGTH_BYTES + (size_t)ntohl(*(uint32_t *)slots[leaving].frame));
        }
        slots[leaving].next_free = first_free;
        first_free = leaving;
    }
    if (count)
        colo_drained(c);
}

static struct colo_frame frame_of(const uint8_t *whole, uint32_t size)
{
    const uint8_t *ethernet = whole + LENGTH_BYTES;

    return (struct colo_frame){ethernet + ETHERNET_BYTES, size - ETHERNET_BYTES, 0,
                               (uint16_t)(ethernet[12] << 8 | ethernet[13]), 0};
}

static void handle(struct colo *c, int fd, int primary, int64_t now, const uint8_t *whole, uint32_t size)
{
    struct colo_frame frame = frame_of(whole, size);
    int gone = 0;

    if (primary) {
        uint32_t id = take_slot();

        colo_primary(c, now, id, &frame);
        release(c, fd, id, whole, LENGTH_BYTES + size, &gone);
        if (!gone)
            keep(id, whole, LENGTH_BYTES + size);
    } else {
        colo_secondary(c, now, &frame);
        release(c, fd, 0, NULL, 0, &gone);
    }
}

/* Bytes of the whole frame at at, its length included; 0 if it has not come whole. */
static size_t whole_frame(const struct input *input, size_t at)
{
    uint32_t size;

    if (input->have - at < LENGTH_BYTES)
        return 0;
    memcpy(&size, input->bytes + at, sizeof(size));
    size = ntohl(size);
    if (size < ETHERNET_BYTES || size > ROOM - LENGTH_BYTES) {
        fprintf(stderr, "bridge: a frame of %u bytes\n", size);
        exit(1);
    }
    return input->have - at < LENGTH_BYTES + size ? 0 : LENGTH_BYTES + size;
}

/* The bytes of the whole frame at at, which is compared soon; 0 if there is none. */
static size_t announce(struct colo *c, const struct input *input, size_t at)
{
    size_t size = whole_frame(input, at);
    struct colo_frame frame;

    if (size)
        frame = frame_of(input->bytes + at, (uint32_t)size - LENGTH_BYTES);
    colo_prefetch(c, size ? &frame : NULL);
    return size;
}

/* Returns 0 at the end of the stream. */
static int drain(struct colo *c, int fd, struct input *input, int primary)
{
    ssize_t count = read(input->fd, input->bytes + input->have, ROOM - input->have);
    int64_t now = now_ns();
    size_t at = 0, ahead = 0, size;
    unsigned announced = 0; /* behind the one at hand */

    if (count < 0)
        die("read");
    input->have += (size_t)count;
    for (; (size = whole_frame(input, at)); at += size, announced--) {
        for (; announced <= COLO_AHEAD; announced++)
            ahead += announce(c, input, ahead);
        handle(c, fd, primary, now, input->bytes + at, (uint32_t)size - LENGTH_BYTES);
    }
    memmove(input->bytes, input->bytes + at, input->have - at);
    input->have -= at;
    return count > 0;
}

int main(int argc, char **argv)
{
    struct colo_config config = {
        .compare_timeout_ns = 3000000000, .idle_flow_ns = 300000000000, .held_bytes = 256 << 20,
        .secondary_bytes = 256 << 20, .held_packets = 1 << 20, .flows = 65536, .seed = {0x8a5cd789635d2dffu, 0x121fd2155c472f96u},
    };
    struct input inputs[2];
    int fds[3];
    struct colo *c;

    if (argc != 4) {
        fprintf(stderr, "usage: bridge PRIMARY SECONDARY OUT\n");
        return 2;
    }
    for (int i = 0; i < 3; i++)
        fds[i] = connect_to(argv[i + 1]);
    c = colo_new(&config, now_ns());
    for (int i = 0; i < 2; i++) {
        inputs[i] = (struct input){fds[i], 0, malloc(ROOM)};
        if (!c || !inputs[i].bytes)
            die("malloc");
    }
    for (;;) {
        struct pollfd polled[2] = {{fds[0], POLLIN, 0}, {fds[1], POLLIN, 0}};

        if (poll(polled, 2, -1) < 0)
            die("poll");
        for (int i = 0; i < 2; i++) {
            if (polled[i].revents && !drain(c, fds[2], &inputs[i], i == 0))
                return 0;
        }
        flush(fds[2]);
    }
}
