/* How work is spread over threads. */
#ifndef GEMMA_EXPORT_POOL_H
#define GEMMA_EXPORT_POOL_H

#include <stddef.h>

/* `function` is to be called once for each index below `total`. */
typedef struct {
    void *context;
    void (*parallel_for)(void *context, void (*function)(void *data, size_t index), size_t total, void *data);
} Pool;

#endif
