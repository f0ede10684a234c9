/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The compiled part of the checkpoint engine: bulk work on guest pages, and the libxenctrl calls
 * that the distribution's Python bindings lack.  No policy and no state beyond one guest's mappings.
 *
 * Functions return 0 or a count, or -1 with errno set, unless said otherwise.
 */
#ifndef REMUS_COLO_CORE_H
#define REMUS_COLO_CORE_H

#include <stddef.h>
#include <stdint.h>

#define RC_PAGE_SIZE 4096u
#define RC_CHUNK_GFNS 512u /* gfns of one foreign mapping: 2 MiB of guest memory */

struct rc_guest;

struct rc_domain_info {
    uint64_t tot_pages;
    uint64_t shared_info_gfn;
    uint32_t max_vcpu_id;
    uint32_t shutdown_reason; /* valid if shutdown */
    uint8_t hvm, hap, dying, shutdown, paused, blocked;
};

struct rc_evtchn_status {
    uint32_t status; /* EVTCHNSTAT_* of event_channel.h */
    uint32_t vcpu;
    uint32_t detail; /* virq number, or the remote port of an interdomain channel */
};

/* -- one guest and its memory -- */
struct rc_guest *rc_guest_open(uint32_t domid, int writable);
void rc_guest_close(struct rc_guest *g);
int rc_guest_info(struct rc_guest *g, struct rc_domain_info *info);
int64_t rc_guest_map(struct rc_guest *g);
int64_t rc_guest_nr_gfns(const struct rc_guest *g);
int rc_guest_remap(struct rc_guest *g, uint64_t gfn);
uint8_t *rc_guest_page(struct rc_guest *g, uint64_t gfn);
void rc_guest_present(const struct rc_guest *g, uint8_t *bitmap);
int64_t rc_guest_collect(struct rc_guest *g, const uint8_t *bitmap, uint64_t *gfns, uint8_t *pages,
                         uint64_t capacity);
int64_t rc_guest_apply(struct rc_guest *g, const uint64_t *gfns, const uint8_t *pages, uint64_t count,
                       uint64_t *missing);
int64_t rc_guest_hash(struct rc_guest *g, uint64_t *hashes);

/* -- dirty log -- */
int rc_logdirty_enable(struct rc_guest *g);
int rc_logdirty_disable(struct rc_guest *g);
int64_t rc_logdirty_clean(struct rc_guest *g, uint8_t *bitmap, uint64_t nr_gfns);

/* -- grant table (v1) -- */
int rc_grants_version(struct rc_guest *g);
int rc_grants_map(struct rc_guest *g);
void rc_grants_unmap(struct rc_guest *g);
int64_t rc_grants_read(struct rc_guest *g, uint8_t *out, size_t size);
int64_t rc_grants_mark_writable(struct rc_guest *g, uint8_t *bitmap, int granted);
int64_t rc_grants_write(struct rc_guest *g, const uint8_t *in, size_t size, uint32_t first);

/* -- vCPUs, event channels, resets -- */
int64_t rc_hvm_context_get(struct rc_guest *g, uint8_t *out, size_t size);
int rc_hvm_context_set(struct rc_guest *g, const uint8_t *in, size_t size);
int rc_evtchn_status(struct rc_guest *g, uint32_t port, struct rc_evtchn_status *out);
int rc_soft_reset(struct rc_guest *g);
int rc_inject_vector(struct rc_guest *g, uint32_t apic_id, uint8_t vector);

/* -- bulk helpers that need no guest -- */
uint64_t rc_bitmap_or(uint8_t *into, const uint8_t *from, size_t size);
uint64_t rc_bitmap_count(const uint8_t *bitmap, size_t size);
void rc_hash_pages(const uint64_t *gfns, const uint8_t *pages, uint64_t count, uint64_t *hashes);
int64_t rc_squeeze_zero_pages(uint64_t *gfns, uint8_t *pages, uint64_t count, uint64_t *zero_gfns);

/* -- this host -- */
int rc_runstate(uint32_t vcpu, uint64_t *entry_ns, uint64_t *sum_ns);

/* -- system time offset: a Xen with our patch (patches/README.rst); ENOSYS without it -- */
int rc_system_time_get(uint32_t domid, int64_t *offset_ns, uint64_t *now_ns);
int rc_system_time_set(uint32_t domid, int64_t offset_ns);

#endif
