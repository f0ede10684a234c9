/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Tells libFuzzer, which atheris brings along, what the comparator's code does.
 *
 * GCC's -fsanitize-coverage=trace-pc calls a function at each edge; libFuzzer wants counters and a table of as many
 * addresses, as clang makes them (inline-8bit-counters).  GCC's trace-cmp has the functions that libFuzzer has, but
 * the sanitizers' library has empty ones by the same names in front of it.  So all are defined here, hidden, and passed on
 * to the library that LIBFUZZER names.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

#define COUNTERS 32768u
#define HIDDEN __attribute__((visibility("hidden")))

static uint8_t counters[COUNTERS];
static uintptr_t table[COUNTERS][2]; /* address, flags */

HIDDEN void __sanitizer_cov_trace_pc(void)
{
    uintptr_t pc = (uintptr_t)__builtin_return_address(0);

    counters[(pc ^ pc >> 15) % COUNTERS]++;
}

/* libFuzzer looks at its return address: these must be compiled to jumps (-O2). */
#define PASS_ON(name, type)                                                                                            \
    static void (*name##_on)(type, type);                                                                              \
    HIDDEN void __sanitizer_cov_trace_##name(type a, type b)                                                           \
    {                                                                                                                  \
        name##_on(a, b);                                                                                               \
    }
PASS_ON(cmp1, uint8_t)
PASS_ON(cmp2, uint16_t)
PASS_ON(cmp4, uint32_t)
PASS_ON(cmp8, uint64_t)
PASS_ON(const_cmp1, uint8_t)
PASS_ON(const_cmp2, uint16_t)
PASS_ON(const_cmp4, uint32_t)
PASS_ON(const_cmp8, uint64_t)
static void (*switch_on)(uint64_t, void *);
HIDDEN void __sanitizer_cov_trace_switch(uint64_t value, void *cases)
{
    switch_on(value, cases);
}

/* GCC's own, which libFuzzer does not know. */
HIDDEN void __sanitizer_cov_trace_cmpf(float a, float b)
{
    (void)a;
    (void)b;
}
HIDDEN void __sanitizer_cov_trace_cmpd(double a, double b)
{
    (void)a;
    (void)b;
}

static void *find(void *library, const char *name)
{
    void *found = dlsym(library, name);

    if (!found)
        abort();
    return found;
}

#define FIND(name) *(void **)&name##_on = find(library, "__sanitizer_cov_trace_" #name)

__attribute__((constructor)) static void tell(void)
{
    const char *path = getenv("LIBFUZZER");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    void (*announce)(void *start, void *end);

    if (!library)
        abort();
    FIND(cmp1);
    FIND(cmp2);
    FIND(cmp4);
    FIND(cmp8);
    FIND(const_cmp1);
    FIND(const_cmp2);
    FIND(const_cmp4);
    FIND(const_cmp8);
    FIND(switch);
    for (uintptr_t i = 0; i < COUNTERS; i++)
        table[i][0] = i + 1;
    *(void **)&announce = find(library, "__sanitizer_cov_8bit_counters_init");
    announce(counters, counters + COUNTERS);
    *(void **)&announce = find(library, "__sanitizer_cov_pcs_init");
    announce(table, table + COUNTERS);
}
