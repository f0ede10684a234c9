/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Work on the bytes of checkpoints, for compression: see remus_colo/checkpoint/delta.py.  No allocation, no state.
 */
#ifndef REMUS_COLO_ZEROS_H
#define REMUS_COLO_ZEROS_H

#include <stddef.h>
#include <stdint.h>

/*
 * For each of @count pages of @stream, which lie at @offsets and are known by @slots of @store: the slot gets what the
 * page has, the page the exclusive or of both.  A slot with RC_SLOT_FRESH set counts as zeros before.  In that order,
 * as one slot may serve several of them.  @page_size is a multiple of 8.
 */
#define RC_SLOT_FRESH 0x80000000u
void rc_delta_out(uint8_t *stream, const uint64_t *offsets, uint8_t *store, const uint32_t *slots, size_t count,
                  size_t page_size);

/* The way back: each page, an exclusive or, becomes what it was made of, and so does its slot. */
void rc_delta_in(uint8_t *stream, const uint64_t *offsets, uint8_t *store, const uint32_t *slots, size_t count,
                 size_t page_size);

/*
 * Runs of words of 8 bytes: each a u32 with the number of zero words, a u32 with that of the words that follow it
 * literally, and those.  @size is a multiple of 8.  Returns the bytes written, or -1 if @room is too small.
 */
int64_t rc_zeros_pack(const uint8_t *in, size_t size, uint8_t *out, size_t room);

/* The way back. Returns 0, or -1 if @in is malformed or does not make exactly @size bytes. */
int rc_zeros_unpack(const uint8_t *in, size_t in_size, uint8_t *out, size_t size);

/* For each of @count pages whether they differ, 1 or 0. Returns how many do. */
uint64_t rc_pages_differ(const uint8_t *one, const uint8_t *other, size_t count, size_t page_size, uint8_t *differ);

#endif
