/* Attention of new tokens to a cache, as com.microsoft.GroupQueryAttention computes it: keys are rotated and written to
 * their slots, then each query sees the slots up to its own.
 *
 * Sums over slots are made in segments of SEGMENT slots, from the first on, and the segments' results are joined in that
 * order: so the numbers do not depend on the threads, nor on how many tokens come at once.
 *
 * Symbols: B rows, T new tokens, H query heads, K key heads, D numbers of a head, S slots.
 */
#ifndef GEMMA_EXPORT_ATTENTION_H
#define GEMMA_EXPORT_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#include "pool.h"

#define LARGEST_HEAD 256
#define SEGMENT 256
#define QUERIES 8 /* That share a read of a key. */

typedef struct {
    size_t batch, tokens, query_heads, key_heads, head, slots;
    float scale, softcap;      /* softcap 0: none */
    size_t window;             /* Slots that a query sees, its own included; 0: all. */
    const float *qkv;          /* [B, T, H + 2K, D] */
    const float *past_keys, *past_values; /* [B, K, S, D]; may be the same memory as keys and values. */
    float *keys, *values;      /* [B, K, S, D] */
    const int32_t *last;       /* [B]: the slot of each row's last token */
    const float *cosines, *sines; /* [positions, D / 2] */
    float *y;                  /* [B, T, H, D] */
} Attention;

/* What a segment leaves of a query: its largest score, the sum of the exponentials, and the sum of values with them. */
typedef struct {
    float largest[QUERIES], total[QUERIES];
    _Alignas(64) float values[QUERIES][LARGEST_HEAD];
} Partial;

/* One set of instructions. */
typedef struct {
    const char *name;
    int (*is_supported)(void);
    /* A block of queries of one key head [QUERIES, D], rotated and scaled, over slots [first, last) of keys and values
     * [S, D]; query i sees those in [from[i], to[i]). */
    void (*attend)(const Attention *a, const float *queries, const float *keys, const float *values, size_t first,
                   size_t last, const size_t *from, const size_t *to, Partial *out);
    /* What two segments leave, to `sum`; of either there may be queries that saw no slot. */
    void (*join)(const Attention *a, Partial *sum, const Partial *next);
} AttentionKernels;

/* The kernels that GEMMA_EXPORT_KERNELS names, or else the fastest that the processor has; NULL where onnxruntime's own
 * are to run. */
const AttentionKernels *chosen_attention(void);

/* Returns 0, or -1 if memory ran out. */
int attend(const AttentionKernels *kernels, const Attention *a, const Pool *pool);

#endif
