/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "queue.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* Room for one message: the payload, and some hundred bytes of other attributes.  Not whole pages, so that the headers
 * of small packets do not all fall into the same lines of the processor's cache. */
#define SLOT_BYTES (65536 + 4096 + 320)
/*
 * A message to the kernel is copied into one buffer there: within a page it comes from the slab, beyond that from vmalloc
 * (netlink_alloc_large_skb).  So plain verdicts go in lots of less than a page, a payload by itself.
 */
#define LOT_BYTES 3584
#define OUT_BYTES (LOT_BYTES + RQ_MAX_PAYLOAD + 256)
#define GONE ((uint64_t)1 << 63) /* in ``held``: it has had its verdict */

struct verdict {
    struct nlmsghdr header;
    struct nfgenmsg generic;
    struct nlattr attribute;
    struct nfqnl_msg_verdict_hdr verdict;
};

struct rq_queue {
    int fd;
    uint16_t number;
    uint32_t max_packets;
    uint64_t last_id;
    struct rq_counters counters;
    /* Ids in order of arrival, and so in rising order, [first, end); those that have had their verdict are marked. */
    uint64_t *held;
    uint32_t first, end, capacity;
    uint32_t out_bytes;
    uint8_t *out;
    uint8_t *slots;
    struct mmsghdr messages[RQ_BATCH];
    struct iovec vectors[RQ_BATCH];
};

/* -- set-up -- */

static int send_all(struct rq_queue *q, const void *data, size_t size)
{
    for (;;) {
        ssize_t sent = send(q->fd, data, size, 0);

        if (sent >= 0)
            return 0; /* datagrams: all or nothing */
        if (errno != EINTR)
            return -errno;
    }
}

/* In the order in which they lie in the message; every part begins at a multiple of 4 (NLA_ALIGNTO). */
struct config {
    struct nlmsghdr header;
    struct nfgenmsg generic;
    struct nlattr command_attribute;
    struct nfqnl_msg_config_cmd command;
    struct nlattr params_attribute;
    struct nfqnl_msg_config_params params;
    uint8_t padding[3];
    struct nlattr max_packets_attribute;
    uint32_t max_packets;
    struct nlattr flags_attribute;
    uint32_t flags;
    struct nlattr mask_attribute;
    uint32_t mask;
};

#define ATTRIBUTE(type, value) {.nla_len = NLA_HDRLEN + sizeof(value), .nla_type = (type)}

/*
 * Everything in one request: between "bind" and "copy whole packets" of two requests the kernel would drop what comes.
 * Without NLM_F_ACK, because packets may stand before an acknowledgement.  A refusal is sent in any case, and before
 * there can be packets, since nfqnl_recv_config() looks at all of a request before it makes the queue.
 */
static int configure(struct rq_queue *q)
{
    struct config request = {
        .header = {.nlmsg_len = sizeof request,
                   .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG,
                   .nlmsg_flags = NLM_F_REQUEST},
        .generic = {.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0, .res_id = htons(q->number)},
        .command_attribute = ATTRIBUTE(NFQA_CFG_CMD, request.command),
        .command = {.command = NFQNL_CFG_CMD_BIND},
        .params_attribute = ATTRIBUTE(NFQA_CFG_PARAMS, request.params),
        .params = {.copy_range = htonl(RQ_MAX_PAYLOAD), .copy_mode = NFQNL_COPY_PACKET},
        .max_packets_attribute = ATTRIBUTE(NFQA_CFG_QUEUE_MAXLEN, request.max_packets),
        .max_packets = htonl(q->max_packets),
        /* Whole packets.  For the bridge family there is no choice: the kernel's own splitting loses the Ethernet
         * header (nf_bridge_adjust_skb_data() saves it for br_netfilter alone). */
        .flags_attribute = ATTRIBUTE(NFQA_CFG_FLAGS, request.flags),
        .flags = htonl(NFQA_CFG_F_GSO),
        .mask_attribute = ATTRIBUTE(NFQA_CFG_MASK, request.mask),
        .mask = htonl(NFQA_CFG_F_GSO),
    };
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
    } answer;
    int error = send_all(q, &request, sizeof request);

    if (error)
        return error;
    if (recv(q->fd, &answer, sizeof answer, MSG_PEEK | MSG_DONTWAIT) == sizeof answer &&
        answer.header.nlmsg_type == NLMSG_ERROR)
        return answer.error.error;
    return 0;
}

static int open_socket(struct rq_queue *q, uint32_t buffer_bytes)
{
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    int size = buffer_bytes > INT32_MAX / 2 ? INT32_MAX / 2 : (int)buffer_bytes, one = 1;

    q->fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
    if (q->fd < 0)
        return -errno;
    /* Connected: messages of other processes are refused (netlink_getsockbyportid). */
    if (connect(q->fd, (struct sockaddr *)&kernel, sizeof kernel) < 0)
        return -errno;
    if (setsockopt(q->fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0)
        return -errno;
    /* A refusal shall not bring back the payload that it refuses. */
    if (setsockopt(q->fd, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof one) < 0)
        return -errno;
    return configure(q);
}

/*
 * Open a queue; packets that rules send there are held from now on.
 *
 * max_packets: what the kernel holds at most.  buffer_bytes: the socket's, for what rq_read() has not seen yet.
 * NULL and errno: EPERM is no permission or a number that is taken, EPROTONOSUPPORT or EINVAL a kernel without it.
 */
struct rq_queue *rq_open(uint16_t number, uint32_t max_packets, uint32_t buffer_bytes)
{
    struct rq_queue *q = calloc(1, sizeof *q);
    int error = ENOMEM;

    if (!q)
        return NULL;
    q->fd = -1;
    q->number = number;
    q->max_packets = max_packets;
    /* Twice what can be held, so that closing the gaps (remember()) costs a constant per packet. */
    q->capacity = 2 * (max_packets < UINT32_MAX / 32 ? max_packets : UINT32_MAX / 32) + RQ_BATCH;
    q->held = malloc(q->capacity * sizeof *q->held);
    q->out = malloc(OUT_BYTES);
    q->slots = mmap(NULL, (size_t)RQ_BATCH * SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (q->slots == MAP_FAILED)
        q->slots = NULL;
    if (q->held && q->out && q->slots) {
        for (int i = 0; i < RQ_BATCH; i++) {
            q->vectors[i].iov_base = q->slots + (size_t)i * SLOT_BYTES;
            q->vectors[i].iov_len = SLOT_BYTES;
            q->messages[i].msg_hdr.msg_iov = &q->vectors[i];
            q->messages[i].msg_hdr.msg_iovlen = 1;
        }
        error = -open_socket(q, buffer_bytes);
        if (!error)
            return q;
    }
    rq_close(q);
    errno = error;
    return NULL;
}

/* Close it.  The kernel drops what is still held. */
void rq_close(struct rq_queue *q)
{
    if (!q)
        return;
    if (q->fd >= 0)
        close(q->fd);
    if (q->slots)
        munmap(q->slots, (size_t)RQ_BATCH * SLOT_BYTES);
    free(q->held);
    free(q->out);
    free(q);
}

int rq_fd(const struct rq_queue *q)
{
    return q->fd;
}

/* As in struct rq_counters. */
uint64_t rq_missing(const struct rq_queue *q)
{
    return q->counters.missing;
}

void rq_get_counters(const struct rq_queue *q, struct rq_counters *counters)
{
    *counters = q->counters;
}

/* -- what is held -- */

static void remember(struct rq_queue *q, uint64_t id)
{
    if (q->first == q->end)
        q->first = q->end = 0;
    if (q->end == q->capacity) {
        uint32_t kept = 0;

        for (uint32_t i = q->first; i < q->end; i++)
            if (!(q->held[i] & GONE))
                q->held[kept++] = q->held[i];
        q->first = 0;
        q->end = kept;
    }
    q->held[q->end++] = id;
    q->counters.held++;
}

/* Take an id off.  The first is what most verdicts are for; others are found by halving. */
static int forget(struct rq_queue *q, uint64_t id)
{
    uint32_t low = q->first, high = q->end;

    if (low < high && q->held[low] == id)
        high = low + 1;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if ((q->held[middle] & ~GONE) <= id)
            low = middle;
        else
            high = middle;
    }
    if (low == high || q->held[low] != id) /* not there, or marked */
        return -ENOENT;
    q->held[low] |= GONE;
    q->counters.held--;
    while (q->first < q->end && q->held[q->first] & GONE)
        q->first++;
    return 0;
}

/* -- reading -- */

/* The kernel's 32-bit id, as the one of our 64-bit ids that follows the last one. */
static uint64_t whole_id(const struct rq_queue *q, uint32_t id)
{
    uint32_t step = id - (uint32_t)q->last_id;

    return q->last_id + step;
}

static void note_error(struct rq_queue *q, const uint8_t *message, size_t size)
{
    struct nlmsgerr error;

    if (size < NLMSG_LENGTH(sizeof error)) {
        q->counters.malformed++;
        return;
    }
    memcpy(&error, message + NLMSG_HDRLEN, sizeof error);
    if (error.error == -ENOENT) {
        q->counters.late++;
    } else if (error.error) {
        q->counters.refused++;
        q->counters.refusal = -error.error;
    }
}

static int take_message(struct rq_queue *q, const uint8_t *message, size_t size, int cut, struct rq_packet *packet)
{
    struct nlmsghdr header;
    uint64_t id;

    if (size >= sizeof header) {
        memcpy(&header, message, sizeof header);
        if (header.nlmsg_type == NLMSG_ERROR) {
            note_error(q, message, size);
            return 0;
        }
    }
    if (cut || rq_parse(message, size, packet) < 0) {
        q->counters.malformed++;
        return 0;
    }
    id = whole_id(q, (uint32_t)packet->id);
    /* The kernel counts up for each packet before it puts it on our socket: what is left out did not fit there. */
    q->counters.missing += id - q->last_id - 1;
    q->last_id = packet->id = id;
    q->counters.received++;
    q->counters.truncated += packet->frame.wire_size > packet->frame.size;
    remember(q, id);
    return 1;
}

/*
 * Read packets, at most ``max`` of them and RQ_BATCH, without blocking: one system call, more only if it brought
 * nothing but other messages.  They are held, and their payloads are valid, until the next call.
 *
 * -EAGAIN if there are none.  Other errors are the socket's.
 */
int rq_read(struct rq_queue *q, struct rq_packet *packets, int max)
{
    int count = 0;

    if (max > RQ_BATCH)
        max = RQ_BATCH;
    while (!count) {
        int got = recvmmsg(q->fd, q->messages, (unsigned)max, MSG_DONTWAIT, NULL);

        q->counters.reads++;
        if (got < 0) {
            if (errno == EINTR)
                continue;
            if (errno != ENOBUFS)
                return -errno;
            /* Said once after packets did not fit into the socket; then the kernel goes on where it was. */
            q->counters.overruns++;
            continue;
        }
        for (int i = 0; i < got; i++)
            count += take_message(q, q->vectors[i].iov_base, q->messages[i].msg_len,
                                  q->messages[i].msg_hdr.msg_flags & MSG_TRUNC, &packets[count]);
    }
    return count;
}

/* -- verdicts -- */

/* Send the verdicts that were given.  What cannot be sent now is kept for the next call. */
int rq_flush(struct rq_queue *q)
{
    int error;

    if (!q->out_bytes)
        return 0;
    error = send_all(q, q->out, q->out_bytes);
    q->counters.writes++;
    if (!error)
        q->out_bytes = 0;
    return error;
}

static int put_verdict(struct rq_queue *q, uint64_t id, uint32_t verdict, const uint8_t *payload, size_t size)
{
    struct verdict message = {
        .header = {.nlmsg_len = sizeof message, .nlmsg_flags = NLM_F_REQUEST},
        .generic = {.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0, .res_id = htons(q->number)},
        .attribute = {.nla_len = NLA_HDRLEN + sizeof message.verdict, .nla_type = NFQA_VERDICT_HDR},
        .verdict = {.verdict = htonl(verdict), .id = htonl((uint32_t)id)},
    };
    struct nlattr attribute = {.nla_len = (uint16_t)(NLA_HDRLEN + size), .nla_type = NFQA_PAYLOAD};
    size_t added = payload ? NLA_ALIGN(NLA_HDRLEN + size) : 0;
    uint8_t *at;
    int error;

    if (size > RQ_MAX_PAYLOAD)
        return -EMSGSIZE;
    if (q->out_bytes && q->out_bytes + sizeof message + added > LOT_BYTES) {
        error = rq_flush(q);
        if (error)
            return error;
    }
    error = forget(q, id);
    if (error)
        return error;
    message.header.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT;
    message.header.nlmsg_len += (uint32_t)added;
    at = q->out + q->out_bytes;
    memcpy(at, &message, sizeof message);
    if (payload) {
        memcpy(at + sizeof message, &attribute, sizeof attribute);
        memcpy(at + sizeof message + NLA_HDRLEN, payload, size);
        memset(at + sizeof message + NLA_HDRLEN + size, 0, added - NLA_HDRLEN - size);
    }
    q->out_bytes += (uint32_t)(sizeof message + added);
    return 0;
}

/* Let a packet go as it is.  -ENOENT if it is not held: it has had its verdict. */
int rq_accept(struct rq_queue *q, uint64_t id)
{
    return put_verdict(q, id, NF_ACCEPT, NULL, 0);
}

/* Let it go with another payload, from its network header on, checksums complete. */
int rq_accept_modified(struct rq_queue *q, uint64_t id, const uint8_t *payload, size_t size)
{
    return put_verdict(q, id, NF_ACCEPT, payload, size);
}

int rq_drop(struct rq_queue *q, uint64_t id)
{
    return put_verdict(q, id, NF_DROP, NULL, 0);
}

/* Let packets go, in this order, and send it.  An id that is not held is passed over: -ENOENT in the end. */
int rq_accept_each(struct rq_queue *q, const uint64_t *ids, size_t number)
{
    int result = 0, error;

    for (size_t i = 0; i < number; i++) {
        error = rq_accept(q, ids[i]);
        if (error == -ENOENT)
            result = error;
        else if (error)
            return error;
    }
    error = rq_flush(q);
    return error ? error : result;
}

/* Let all held packets go, in order of arrival, and send it.  Their number. */
int64_t rq_accept_all(struct rq_queue *q)
{
    int64_t number = 0;
    int error;

    while (q->first < q->end) {
        error = rq_accept(q, q->held[q->first]);
        if (error)
            return error;
        number++;
    }
    error = rq_flush(q);
    return error ? error : number;
}
