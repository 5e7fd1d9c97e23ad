/* The stretches that are left lie one in each thread's slot: [first, last), both in one number, so that whoever takes
 * a part changes both at once. A stretch never comes to have rows again that were taken from it. */
#include "stretches.h"

#include <stdatomic.h>
#include <stdint.h>

#define MOST_THREADS 64

typedef struct {
    _Alignas(64) _Atomic uint64_t stretch;
} Slot;

typedef struct {
    void (*function)(void *data, size_t first, size_t last);
    void *data;
    size_t piece;
    atomic_int all_taken; /* There is nothing left for a thread that comes now. */
    Slot slots[MOST_THREADS];
} Work;

static uint64_t stretch(size_t first, size_t last) { return (uint64_t)first << 32 | last; }
static size_t first_of(uint64_t stretch) { return (size_t)(stretch >> 32); }
static size_t last_of(uint64_t stretch) { return (size_t)(uint32_t)stretch; }

/* Calls the function for what is in a slot, until it is empty. */
static void work_off(Work *work, Slot *own) {
    for (;;) {
        uint64_t now = atomic_load(&own->stretch);
        size_t first, end;
        do {
            first = first_of(now);
            if (first == last_of(now)) return;
            end = last_of(now) - first < work->piece ? last_of(now) : first + work->piece;
        } while (!atomic_compare_exchange_weak(&own->stretch, &now, stretch(end, last_of(now))));
        work->function(work->data, first, end);
    }
}

/* Fills an empty slot with the second half of the longest stretch. Returns 0 if all are empty. */
static int take_half(Work *work, Slot *own) {
    for (;;) {
        Slot *longest = own;
        uint64_t most = 0;
        for (size_t i = 0; i < MOST_THREADS; i++) {
            const uint64_t there = atomic_load_explicit(&work->slots[i].stretch, memory_order_relaxed);
            if (last_of(there) - first_of(there) > last_of(most) - first_of(most)) {
                longest = &work->slots[i];
                most = there;
            }
        }
        const size_t first = first_of(most), last = last_of(most), rows = last - first;
        if (rows == 0) return 0;
        const size_t middle = rows > work->piece ? first + (rows / 2 + work->piece - 1) / work->piece * work->piece : first;
        if (atomic_compare_exchange_strong(&longest->stretch, &most, stretch(first, middle))) {
            atomic_store(&own->stretch, stretch(middle, last));
            return 1;
        }
    }
}

static void be_a_thread(void *data, size_t index) {
    Work *work = data;
    if (atomic_load_explicit(&work->all_taken, memory_order_relaxed)) return;
    do work_off(work, &work->slots[index]);
    while (take_half(work, &work->slots[index]));
    atomic_store_explicit(&work->all_taken, 1, memory_order_relaxed);
}

void in_stretches(const Pool *pool, void (*function)(void *data, size_t first, size_t last), size_t rows, size_t piece,
                  void *data) {
    const size_t pieces = (rows + piece - 1) / piece;
    Work work = {.function = function, .data = data, .piece = piece};
    atomic_store(&work.slots[0].stretch, stretch(0, rows));
    pool->parallel_for(pool->context, be_a_thread, pieces < MOST_THREADS ? pieces : MOST_THREADS, &work);
}
