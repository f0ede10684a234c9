/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Doubly linked lists whose links lie in what they link: entering and leaving cost the same however long they are. */
#ifndef COLO_LIST_H
#define COLO_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct link {
    struct link *prev, *next; /* of a head: the list's ends; NULL in what is in no list */
};

#define CONTAINER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

static inline void list_init(struct link *head)
{
    head->prev = head->next = head;
}

static inline bool list_empty(const struct link *head)
{
    return head->next == head;
}

static inline bool linked(const struct link *link)
{
    return link->next != NULL;
}

static inline void list_append(struct link *head, struct link *link)
{
    link->prev = head->prev;
    link->next = head;
    head->prev->next = link;
    head->prev = link;
}

static inline void list_remove(struct link *link)
{
    link->prev->next = link->next;
    link->next->prev = link->prev;
    link->prev = link->next = NULL;
}

static inline struct link *list_pop(struct link *head)
{
    struct link *link = head->next;

    if (link == head)
        return NULL;
    list_remove(link);
    return link;
}

/* Put all of from behind what into has. */
static inline void list_join(struct link *into, struct link *from)
{
    if (list_empty(from))
        return;
    from->next->prev = into->prev;
    into->prev->next = from->next;
    from->prev->next = into;
    into->prev = from->prev;
    list_init(from);
}

#endif
