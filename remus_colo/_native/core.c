/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <xencall.h>
#include <xenctrl.h>
#include <xendevicemodel.h>
#include <xenforeignmemory.h>
#include <xenguest.h>
#include <xen/domctl.h>
#include <xen/grant_table.h>
#include <xen/memory.h>
#include <xen/vcpu.h>
#include <xen/xen.h>

/* How many gfns of a chunk are tried to find out whether it holds RAM: see probe_chunks(). */
#define PROBES_PER_CHUNK 8u
/* The last MiBs below 4 GiB hold the special pages of HVM and PVH guests, too few for probes to find. */
#define SPECIAL_FIRST_GFN 0xfe000u
#define SPECIAL_LAST_GFN 0xfffffu

struct rc_guest {
    xc_interface *xch;
    xenforeignmemory_handle *fmem;
    xendevicemodel_handle *dmod;
    uint32_t domid;
    int prot;
    uint64_t nr_gfns, nr_chunks;
    uint8_t **chunk;  /* base of each chunk's mapping, NULL where nothing of it is mapped */
    uint8_t *present; /* bitmap of gfns that mapped */
    xenforeignmemory_resource_handle *grant_handle;
    void *grants;
    uint32_t grant_frames;
};

static int bit_get(const uint8_t *bitmap, uint64_t n)
{
    return bitmap[n >> 3] >> (n & 7) & 1;
}

static void bit_put(uint8_t *bitmap, uint64_t n, int value)
{
    if (value)
        bitmap[n >> 3] |= (uint8_t)(1u << (n & 7));
    else
        bitmap[n >> 3] &= (uint8_t)~(1u << (n & 7));
}

/* Bits of a word of the bitmap, in gfn order; bitmaps are little-endian bytes, as Xen's. */
static uint64_t word_get(const uint8_t *bitmap, uint64_t word)
{
    uint64_t value;
    memcpy(&value, bitmap + word * 8, 8);
    return value;
}

struct rc_guest *rc_guest_open(uint32_t domid, int writable)
{
    struct rc_guest *g = calloc(1, sizeof *g);
    int saved;

    if (!g)
        return NULL;
    g->domid = domid;
    g->prot = PROT_READ | (writable ? PROT_WRITE : 0);
    g->xch = xc_interface_open(NULL, NULL, 0);
    if (g->xch)
        g->fmem = xenforeignmemory_open(NULL, 0);
    if (g->fmem)
        g->dmod = xendevicemodel_open(NULL, 0);
    if (g->dmod)
        return g;
    saved = errno;
    rc_guest_close(g);
    errno = saved;
    return NULL;
}

static void unmap_all(struct rc_guest *g)
{
    for (uint64_t c = 0; c < g->nr_chunks; c++)
        if (g->chunk[c])
            xenforeignmemory_unmap(g->fmem, g->chunk[c], RC_CHUNK_GFNS);
    free(g->chunk);
    free(g->present);
    g->chunk = NULL;
    g->present = NULL;
    g->nr_chunks = g->nr_gfns = 0;
}

void rc_guest_close(struct rc_guest *g)
{
    if (!g)
        return;
    rc_grants_unmap(g);
    unmap_all(g);
    if (g->dmod)
        xendevicemodel_close(g->dmod);
    if (g->fmem)
        xenforeignmemory_close(g->fmem);
    if (g->xch)
        xc_interface_close(g->xch);
    free(g);
}

int rc_guest_info(struct rc_guest *g, struct rc_domain_info *info)
{
    xc_domaininfo_t di;
    int n = xc_domain_getinfolist(g->xch, g->domid, 1, &di);

    if (n < 0)
        return -1;
    if (n != 1 || di.domain != g->domid) { /* the list starts at the next domain that exists */
        errno = ESRCH;
        return -1;
    }
    memset(info, 0, sizeof *info);
    info->tot_pages = di.tot_pages;
    info->shared_info_gfn = di.shared_info_frame;
    info->max_vcpu_id = di.max_vcpu_id;
    info->hvm = !!(di.flags & XEN_DOMINF_hvm_guest);
    info->hap = !!(di.flags & XEN_DOMINF_hap);
    info->dying = !!(di.flags & XEN_DOMINF_dying);
    info->shutdown = !!(di.flags & XEN_DOMINF_shutdown);
    info->paused = !!(di.flags & XEN_DOMINF_paused);
    info->blocked = !!(di.flags & XEN_DOMINF_blocked);
    info->shutdown_reason = di.flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask;
    return 0;
}

/* Map chunk @c anew. Returns the number of its gfns that map. */
static int map_chunk(struct rc_guest *g, uint64_t c)
{
    xen_pfn_t gfns[RC_CHUNK_GFNS];
    int err[RC_CHUNK_GFNS], mapped = 0;
    uint8_t *base;

    if (g->chunk[c]) {
        xenforeignmemory_unmap(g->fmem, g->chunk[c], RC_CHUNK_GFNS);
        g->chunk[c] = NULL;
    }
    for (unsigned int i = 0; i < RC_CHUNK_GFNS; i++)
        gfns[i] = c * RC_CHUNK_GFNS + i;
    base = xenforeignmemory_map(g->fmem, g->domid, g->prot, RC_CHUNK_GFNS, gfns, err);
    for (unsigned int i = 0; i < RC_CHUNK_GFNS; i++) {
        int ok = base && !err[i];
        bit_put(g->present, gfns[i], ok);
        mapped += ok;
    }
    if (base && !mapped)
        xenforeignmemory_unmap(g->fmem, base, RC_CHUNK_GFNS);
    else
        g->chunk[c] = base;
    return mapped;
}

static int special_chunk(uint64_t c)
{
    return c >= SPECIAL_FIRST_GFN / RC_CHUNK_GFNS && c <= SPECIAL_LAST_GFN / RC_CHUNK_GFNS;
}

/* Which chunks hold RAM: try some gfns of each, as a failed map costs as much as one that works and
 * most of the space below 4 GiB is a hole. */
static void probe_chunks(struct rc_guest *g, uint8_t *wanted)
{
    enum { BATCH = 512 };
    xen_pfn_t gfns[BATCH];
    int err[BATCH];
    uint64_t per_batch = BATCH / PROBES_PER_CHUNK;

    for (uint64_t first = 0; first < g->nr_chunks; first += per_batch) {
        unsigned int n = 0;
        uint64_t last = first + per_batch < g->nr_chunks ? first + per_batch : g->nr_chunks;

        for (uint64_t c = first; c < last; c++)
            for (unsigned int p = 0; p < PROBES_PER_CHUNK; p++)
                gfns[n++] = c * RC_CHUNK_GFNS + p * (RC_CHUNK_GFNS / PROBES_PER_CHUNK) + (p ? 0 : 1);
        void *base = xenforeignmemory_map(g->fmem, g->domid, PROT_READ, n, gfns, err);
        if (!base)
            continue;
        for (unsigned int i = 0; i < n; i++)
            if (!err[i])
                wanted[first + i / PROBES_PER_CHUNK] = 1;
        xenforeignmemory_unmap(g->fmem, base, n);
    }
}

/* Map all of the guest's memory. Returns the number of pages mapped. */
int64_t rc_guest_map(struct rc_guest *g)
{
    xen_pfn_t nr;
    int64_t total = 0;
    uint8_t *wanted;

    unmap_all(g);
    if (xc_domain_nr_gpfns(g->xch, g->domid, &nr))
        return -1;
    g->nr_chunks = (nr + RC_CHUNK_GFNS - 1) / RC_CHUNK_GFNS;
    g->nr_gfns = g->nr_chunks * RC_CHUNK_GFNS;
    g->chunk = calloc(g->nr_chunks, sizeof *g->chunk);
    g->present = calloc(1, g->nr_gfns / 8);
    wanted = calloc(1, g->nr_chunks);
    if (!g->chunk || !g->present || !wanted) {
        free(wanted);
        unmap_all(g);
        errno = ENOMEM;
        return -1;
    }
    probe_chunks(g, wanted);
    for (uint64_t c = 0; c < g->nr_chunks; c++)
        if (wanted[c] || special_chunk(c))
            total += map_chunk(g, c);
    free(wanted);
    return total;
}

int64_t rc_guest_nr_gfns(const struct rc_guest *g)
{
    return (int64_t)g->nr_gfns;
}

/* The page behind @gfn was replaced (soft reset, XENMEM_add_to_physmap): map its chunk again. */
int rc_guest_remap(struct rc_guest *g, uint64_t gfn)
{
    if (gfn >= g->nr_gfns) {
        errno = ERANGE;
        return -1;
    }
    return map_chunk(g, gfn / RC_CHUNK_GFNS) ? 0 : -1;
}

uint8_t *rc_guest_page(struct rc_guest *g, uint64_t gfn)
{
    if (gfn >= g->nr_gfns || !bit_get(g->present, gfn))
        return NULL;
    return g->chunk[gfn / RC_CHUNK_GFNS] + gfn % RC_CHUNK_GFNS * RC_PAGE_SIZE;
}

void rc_guest_present(const struct rc_guest *g, uint8_t *bitmap)
{
    memcpy(bitmap, g->present, g->nr_gfns / 8);
}

/* Copy the pages set in @bitmap (nr_gfns bits) that map, in gfn order. Returns how many; -1 with
 * ENOSPC if there are more than @capacity (nothing is lost: the caller grows its buffer and repeats). */
int64_t rc_guest_collect(struct rc_guest *g, const uint8_t *bitmap, uint64_t *gfns, uint8_t *pages,
                         uint64_t capacity)
{
    uint64_t n = 0;

    for (uint64_t w = 0; w < g->nr_gfns / 64; w++) {
        uint64_t bits = word_get(bitmap, w) & word_get(g->present, w);

        for (; bits; bits &= bits - 1) {
            uint64_t gfn = w * 64 + (unsigned int)__builtin_ctzll(bits);

            if (n == capacity) {
                errno = ENOSPC;
                return -1;
            }
            gfns[n] = gfn;
            memcpy(pages + n * RC_PAGE_SIZE, rc_guest_page(g, gfn), RC_PAGE_SIZE);
            n++;
        }
    }
    return (int64_t)n;
}

/* Write @count pages; @pages NULL means pages of zeros. Gfns that do not map here are passed over, counted
 * and the last of them told in @missing. Returns their number. */
int64_t rc_guest_apply(struct rc_guest *g, const uint64_t *gfns, const uint8_t *pages, uint64_t count,
                       uint64_t *missing)
{
    int64_t absent = 0;

    for (uint64_t i = 0; i < count; i++) {
        uint8_t *to = rc_guest_page(g, gfns[i]);

        if (!to) {
            *missing = gfns[i];
            absent++;
        } else if (pages) {
            memcpy(to, pages + i * RC_PAGE_SIZE, RC_PAGE_SIZE);
        } else {
            memset(to, 0, RC_PAGE_SIZE);
        }
    }
    return absent;
}

/* For comparing two guests, not for security; never 0. */
static uint64_t hash_page(const uint8_t *page)
{
    uint64_t h = 0x9e3779b97f4a7c15ull;

    for (unsigned int i = 0; i < RC_PAGE_SIZE; i += 8) {
        uint64_t v;
        memcpy(&v, page + i, 8);
        h = (h ^ v) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    return h | 1;
}

/* One hash a gfn, 0 where nothing maps.  Returns how many map. */
int64_t rc_guest_hash(struct rc_guest *g, uint64_t *hashes)
{
    int64_t n = 0;

    for (uint64_t gfn = 0; gfn < g->nr_gfns; gfn++) {
        const uint8_t *page = rc_guest_page(g, gfn);

        hashes[gfn] = page ? hash_page(page) : 0;
        n += page != NULL;
    }
    return n;
}

/* The hashes of copies of pages, each put at its gfn in @hashes. */
void rc_hash_pages(const uint64_t *gfns, const uint8_t *pages, uint64_t count, uint64_t *hashes)
{
    for (uint64_t i = 0; i < count; i++)
        hashes[gfns[i]] = hash_page(pages + i * RC_PAGE_SIZE);
}

int rc_logdirty_enable(struct rc_guest *g)
{
    return xc_shadow_control(g->xch, g->domid, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0) < 0 ? -1 : 0;
}

int rc_logdirty_disable(struct rc_guest *g)
{
    return xc_shadow_control(g->xch, g->domid, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0) < 0 ? -1 : 0;
}

/* OR the gfns dirtied since the last call into @bitmap and start a new period. Returns Xen's count. */
int64_t rc_logdirty_clean(struct rc_guest *g, uint8_t *bitmap, uint64_t nr_gfns)
{
    xc_shadow_op_stats_t stats = {0, 0};
    DECLARE_HYPERCALL_BUFFER(uint8_t, buffer);
    size_t pages = (nr_gfns / 8 + RC_PAGE_SIZE - 1) / RC_PAGE_SIZE;
    long long rc;

    buffer = xc_hypercall_buffer_alloc_pages(g->xch, buffer, pages);
    if (!buffer)
        return -1;
    memset(buffer, 0, pages * RC_PAGE_SIZE);
    rc = xc_logdirty_control(g->xch, g->domid, XEN_DOMCTL_SHADOW_OP_CLEAN, HYPERCALL_BUFFER(buffer),
                             nr_gfns, 0, &stats);
    if (rc >= 0)
        rc_bitmap_or(bitmap, buffer, nr_gfns / 8);
    xc_hypercall_buffer_free_pages(g->xch, buffer, pages);
    return rc < 0 ? -1 : (int64_t)stats.dirty_count;
}

int rc_grants_version(struct rc_guest *g)
{
    return xc_gnttab_get_version(g->xch, g->domid);
}

/* Map all shared frames of the grant table. Returns the number of frames. */
int rc_grants_map(struct rc_guest *g)
{
    struct gnttab_query_size query = {.dom = (domid_t)g->domid};

    rc_grants_unmap(g);
    if (xc_gnttab_query_size(g->xch, &query))
        return -1;
    if (query.status != GNTST_okay) {
        errno = EINVAL;
        return -1;
    }
    g->grant_handle = xenforeignmemory_map_resource(
        g->fmem, (domid_t)g->domid, XENMEM_resource_grant_table, XENMEM_resource_grant_table_id_shared, 0,
        query.nr_frames, &g->grants, PROT_READ | PROT_WRITE, 0);
    if (!g->grant_handle)
        return -1;
    g->grant_frames = query.nr_frames;
    return (int)query.nr_frames;
}

void rc_grants_unmap(struct rc_guest *g)
{
    if (g->grant_handle)
        xenforeignmemory_unmap_resource(g->fmem, g->grant_handle);
    g->grant_handle = NULL;
    g->grants = NULL;
    g->grant_frames = 0;
}

int64_t rc_grants_read(struct rc_guest *g, uint8_t *out, size_t size)
{
    size_t have = g->grant_frames * (size_t)RC_PAGE_SIZE;

    if (!g->grants || size < have) {
        errno = ENOSPC;
        return -1;
    }
    memcpy(out, g->grants, have);
    return (int64_t)have;
}

/* Set in @bitmap the gfns that backends have mapped for writing: what they write there is not in the
 * dirty log until they unmap. With @granted also those that they may write to at any moment (grant copies,
 * which are in the log). Returns how many. */
int64_t rc_grants_mark_writable(struct rc_guest *g, uint8_t *bitmap, int granted)
{
    const grant_entry_v1_t *entry = g->grants;
    uint32_t have = g->grant_frames * (uint32_t)(RC_PAGE_SIZE / sizeof *entry);
    int64_t n = 0;

    for (uint32_t i = 0; i < have; i++) {
        uint16_t flags = entry[i].flags;
        int permits = (flags & GTF_type_mask) == GTF_permit_access && !(flags & GTF_readonly);

        if ((flags & GTF_writing || (granted && permits)) && entry[i].frame < g->nr_gfns) {
            bit_put(bitmap, entry[i].frame, 1);
            n++;
        }
    }
    return n;
}

/* Write v1 entries from reference @first up. GTF_reading and GTF_writing are Xen's record of what is
 * mapped on this host and mean nothing on another, so they are cleared. Entries beyond @size are zeroed.
 * Returns how many entries of the old table were still mapped: 0 if all backends had let go. */
int64_t rc_grants_write(struct rc_guest *g, const uint8_t *in, size_t size, uint32_t first)
{
    grant_entry_v1_t *to = g->grants, from;
    uint32_t have = g->grant_frames * (uint32_t)(RC_PAGE_SIZE / sizeof *to);
    int64_t busy = 0;

    if (!to || size / sizeof *to > have) {
        errno = ENOSPC;
        return -1;
    }
    for (uint32_t i = first; i < have; i++) {
        if (to[i].flags & (GTF_reading | GTF_writing))
            busy++;
        memset(&from, 0, sizeof from);
        if ((i + 1) * sizeof from <= size)
            memcpy(&from, in + i * sizeof from, sizeof from);
        from.flags &= (uint16_t)~(GTF_reading | GTF_writing);
        to[i] = from;
    }
    return busy;
}

/* With @size 0: the size needed. */
int64_t rc_hvm_context_get(struct rc_guest *g, uint8_t *out, size_t size)
{
    return xc_domain_hvm_getcontext(g->xch, g->domid, size ? out : NULL, (uint32_t)size);
}

int rc_hvm_context_set(struct rc_guest *g, const uint8_t *in, size_t size)
{
    return xc_domain_hvm_setcontext(g->xch, g->domid, (uint8_t *)(uintptr_t)in, (uint32_t)size);
}

int rc_evtchn_status(struct rc_guest *g, uint32_t port, struct rc_evtchn_status *out)
{
    xc_evtchn_status_t status = {.dom = (domid_t)g->domid, .port = port};

    if (xc_evtchn_status(g->xch, &status))
        return -1;
    out->status = status.status;
    out->vcpu = status.vcpu;
    out->detail = status.status == EVTCHNSTAT_virq          ? status.u.virq
                  : status.status == EVTCHNSTAT_interdomain ? status.u.interdomain.port
                                                            : 0;
    return 0;
}

int rc_soft_reset(struct rc_guest *g)
{
    return xc_domain_soft_reset(g->xch, g->domid);
}

/* Assert @vector at a local APIC, as an MSI with physical destination would (Intel SDM 3A, 10.11). */
int rc_inject_vector(struct rc_guest *g, uint32_t apic_id, uint8_t vector)
{
    return xendevicemodel_inject_msi(g->dmod, (domid_t)g->domid, 0xfee00000u | apic_id << 12, vector);
}

uint64_t rc_bitmap_or(uint8_t *into, const uint8_t *from, size_t size)
{
    uint64_t added = 0;

    for (size_t i = 0; i < size; i++) {
        added += (uint64_t)__builtin_popcount(from[i] & ~into[i] & 0xffu);
        into[i] |= from[i];
    }
    return added;
}

uint64_t rc_bitmap_count(const uint8_t *bitmap, size_t size)
{
    uint64_t n = 0;

    for (size_t i = 0; i < size; i++)
        n += (uint64_t)__builtin_popcount(bitmap[i]);
    return n;
}

static int is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, RC_PAGE_SIZE - 1) == 0;
}

/* Move the gfns of all-zero pages to @zero_gfns and close the gaps, order kept. Returns how many pages
 * remain in @gfns and @pages. */
int64_t rc_squeeze_zero_pages(uint64_t *gfns, uint8_t *pages, uint64_t count, uint64_t *zero_gfns)
{
    uint64_t kept = 0, zeros = 0;

    for (uint64_t i = 0; i < count; i++) {
        uint8_t *page = pages + i * RC_PAGE_SIZE;

        if (is_zero(page)) {
            zero_gfns[zeros++] = gfns[i];
            continue;
        }
        if (kept != i) {
            gfns[kept] = gfns[i];
            memcpy(pages + kept * RC_PAGE_SIZE, page, RC_PAGE_SIZE);
        }
        kept++;
    }
    return (int64_t)kept;
}

/* Runstate of one of this domain's own vCPUs, in Xen system time (public/vcpu.h). */
int rc_runstate(uint32_t vcpu, uint64_t *entry_ns, uint64_t *sum_ns)
{
    xencall_handle *call = xencall_open(NULL, 0);
    struct vcpu_runstate_info *info;
    int rc = -1, saved;

    if (!call)
        return -1;
    info = xencall_alloc_buffer(call, sizeof *info);
    if (info) {
        rc = xencall3(call, __HYPERVISOR_vcpu_op, VCPUOP_get_runstate_info, vcpu, (uintptr_t)info);
        if (rc == 0) {
            *entry_ns = info->state_entry_time;
            *sum_ns = info->time[0] + info->time[1] + info->time[2] + info->time[3];
        }
        saved = errno;
        xencall_free_buffer(call, info);
        errno = saved;
    }
    saved = errno;
    xencall_close(call);
    errno = saved;
    return rc;
}

/* What patches/ adds to public/domctl.h. The distribution's header does not have it, and libxenctrl lets no
 * domctl through that it does not know. */
#define RC_DOMCTL_SET_SYSTEM_TIME_OFFSET 1010u
#define RC_DOMCTL_GET_SYSTEM_TIME_OFFSET 1011u

struct rc_domctl_system_time_offset {
    int64_t offset;       /* IN (set), OUT: ns */
    uint64_t system_time; /* OUT: ns */
    uint64_t pad;         /* IN (set): zero */
};

static int system_time_domctl(uint32_t cmd, uint32_t domid, struct rc_domctl_system_time_offset *arg)
{
    xencall_handle *call = xencall_open(NULL, 0);
    struct xen_domctl *op;
    int rc = -1, saved;

    if (!call)
        return -1;
    op = xencall_alloc_buffer(call, sizeof *op);
    if (op) {
        memset(op, 0, sizeof *op);
        op->cmd = cmd;
        op->interface_version = XEN_DOMCTL_INTERFACE_VERSION;
        op->domain = (domid_t)domid;
        memcpy(&op->u, arg, sizeof *arg);
        rc = xencall1(call, __HYPERVISOR_domctl, (uintptr_t)op);
        if (rc == 0)
            memcpy(arg, &op->u, sizeof *arg);
        saved = errno;
        xencall_free_buffer(call, op);
        errno = saved;
    }
    saved = errno;
    xencall_close(call);
    errno = saved;
    return rc < 0 ? -1 : 0;
}

/* How far the domain's system time is from Xen's, and what it is now. */
int rc_system_time_get(uint32_t domid, int64_t *offset_ns, uint64_t *now_ns)
{
    struct rc_domctl_system_time_offset arg = {0, 0, 0};

    if (system_time_domctl(RC_DOMCTL_GET_SYSTEM_TIME_OFFSET, domid, &arg))
        return -1;
    *offset_ns = arg.offset;
    *now_ns = arg.system_time;
    return 0;
}

int rc_system_time_set(uint32_t domid, int64_t offset_ns)
{
    struct rc_domctl_system_time_offset arg = {offset_ns, 0, 0};

    return system_time_domctl(RC_DOMCTL_SET_SYSTEM_TIME_OFFSET, domid, &arg);
}
