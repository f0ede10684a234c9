/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "zeros.h"

#define WORD sizeof(uint64_t)
/* A run of literal words goes on over fewer zero words than a new run's header takes. */
#define GAP_WORDS 2
#define RUN_WORDS_MAX 0xffffffffu

static uint64_t load(const uint8_t *at)
{
    uint64_t word;

    memcpy(&word, at, WORD);
    return word;
}

static void store_word(uint8_t *at, uint64_t word)
{
    memcpy(at, &word, WORD);
}

/* Both ways but for what the slot keeps: of what goes out the page, of what comes in the result. */
static void delta(uint8_t *stream, const uint64_t *offsets, uint8_t *store, const uint32_t *slots, size_t count,
                  size_t page_size, int out)
{
    for (size_t n = 0; n < count; n++) {
        uint8_t *page = stream + offsets[n];
        uint8_t *stored = store + (size_t)(slots[n] & ~RC_SLOT_FRESH) * page_size;

        if (slots[n] & RC_SLOT_FRESH) {
            memcpy(stored, page, page_size); /* either way the page stays as it is */
            continue;
        }
        for (size_t i = 0; i < page_size; i += WORD) {
            uint64_t given = load(page + i), made = given ^ load(stored + i);

            store_word(page + i, made);
            store_word(stored + i, out ? given : made);
        }
    }
}

void rc_delta_out(uint8_t *stream, const uint64_t *offsets, uint8_t *store, const uint32_t *slots, size_t count,
                  size_t page_size)
{
    delta(stream, offsets, store, slots, count, page_size, 1);
}

void rc_delta_in(uint8_t *stream, const uint64_t *offsets, uint8_t *store, const uint32_t *slots, size_t count,
                 size_t page_size)
{
    delta(stream, offsets, store, slots, count, page_size, 0);
}

static size_t zero_words(const uint8_t *in, size_t from, size_t words)
{
    size_t i = from;

    while (i < words && load(in + i * WORD) == 0 && i - from < RUN_WORDS_MAX)
        i++;
    return i - from;
}

int64_t rc_zeros_pack(const uint8_t *in, size_t size, uint8_t *out, size_t room)
{
    size_t words = size / WORD, at = 0, used = 0;

    while (at < words) {
        size_t zeros = zero_words(in, at, words), first = at + zeros, end = first;
        uint32_t header[2];

        while (end < words && end - first < RUN_WORDS_MAX) {
            size_t gap = zero_words(in, end, words < end + GAP_WORDS ? words : end + GAP_WORDS);

            if (gap == GAP_WORDS || (gap && end + gap == words))
                break;
            end += gap ? gap : 1;
        }
        if (end - first > RUN_WORDS_MAX)
            end = first + RUN_WORDS_MAX;
        if (room - used < sizeof header + (end - first) * WORD)
            return -1;
        header[0] = (uint32_t)zeros;
        header[1] = (uint32_t)(end - first);
        memcpy(out + used, header, sizeof header);
        used += sizeof header;
        memcpy(out + used, in + first * WORD, (end - first) * WORD);
        used += (end - first) * WORD;
        at = end;
    }
    return (int64_t)used;
}

int rc_zeros_unpack(const uint8_t *in, size_t in_size, uint8_t *out, size_t size)
{
    size_t at = 0, made = 0;

    while (at < in_size) {
        uint32_t header[2];
        uint64_t zeros, literal;

        if (in_size - at < sizeof header)
            return -1;
        memcpy(header, in + at, sizeof header);
        at += sizeof header;
        zeros = (uint64_t)header[0] * WORD;
        literal = (uint64_t)header[1] * WORD;
        if (zeros + literal == 0 || zeros > size - made)
            return -1;
        memset(out + made, 0, zeros);
        made += zeros;
        if (literal > size - made || literal > in_size - at)
            return -1;
        memcpy(out + made, in + at, literal);
        made += literal;
        at += literal;
    }
    return made == size ? 0 : -1;
}

uint64_t rc_pages_differ(const uint8_t *one, const uint8_t *other, size_t count, size_t page_size, uint8_t *differ)
{
    uint64_t found = 0;

    for (size_t i = 0; i < count; i++) {
        differ[i] = memcmp(one + i * page_size, other + i * page_size, page_size) != 0;
        found += differ[i];
    }
    return found;
}
