/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The keyed hash of flows and datagrams: words folded by 64 x 64 -> 128 bit multiplication with a secret.  Who does
 * not know the secret cannot choose flows that fall into one bucket.  Equal hashes are never taken for equal content.
 */
#ifndef COLO_HASH_H
#define COLO_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct hash_seed {
    uint64_t word[2];
};

static inline uint64_t hash_fold(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 uint128;
    uint128 product = (uint128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t hash_word(const uint8_t *bytes, size_t count)
{
    uint64_t word = 0;

    if (count)
        memcpy(&word, bytes, count);
    return word;
}

static inline uint64_t hash_bytes(const struct hash_seed *seed, uint64_t state, const uint8_t *bytes, size_t size)
{
    uint64_t a = seed->word[0] ^ state, b = seed->word[1];
    size_t left = size;

    for (; left > 16; left -= 16, bytes += 16)
        a = hash_fold(a ^ hash_word(bytes, 8), b ^ hash_word(bytes + 8, 8)) ^ b;
    if (left > 8) {
        a = hash_fold(a ^ hash_word(bytes, 8), b ^ hash_word(bytes + 8, left - 8));
    } else {
        a = hash_fold(a ^ hash_word(bytes, left), b);
    }
    return hash_fold(a ^ size, b ^ 0x9e3779b97f4a7c15u);
}

#endif
