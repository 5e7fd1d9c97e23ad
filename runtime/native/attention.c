/* From attention to pieces of work: rotations, blocks of queries over segments of slots, and how these are joined. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define UNROLLED _Pragma("GCC unroll 16")
#define AHEAD 1536 /* Numbers that are asked for before they are read: hardware stops asking at the end of a page. */
#define BLOCK 16   /* Slots whose values are mixed at a time: a core's first cache holds them and the next ones. */

static int always(void) { return 1; }
#define TARGET
#define SUFFIX(name) name##_portable
#define MULTIPLY_ADD(x, y, sum) ((x) * (y) + (sum))
#define BROADCAST(number) ((number) + (Vector){0})
#define KEPT_IN_REGISTER(sum)
#include "attend.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define SUFFIX(name) name##_avx512
#define MULTIPLY_ADD(x, y, sum) ((Vector)_mm512_fmadd_ps((__m512)(x), (__m512)(y), (__m512)(sum)))
#define BROADCAST(number) ((Vector)_mm512_set1_ps(number))
#define KEPT_IN_REGISTER(sum) __asm__("" : "+v"(sum))
#include "attend.h"

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
#endif

static const AttentionKernels all_kernels[] = {
#if defined(__x86_64__)
    {"avx512-vnni", has_avx512, attend_avx512, join_avx512},
#endif
    {"portable", always, attend_portable, join_portable},
};

const AttentionKernels *chosen_attention(void) {
    const char *wanted = getenv("GEMMA_EXPORT_KERNELS");
    const size_t count = sizeof all_kernels / sizeof *all_kernels;
    for (size_t i = 0; i < count; i++) {
        const int fits = wanted ? strcmp(wanted, all_kernels[i].name) == 0 : i + 1 < count;
        if (fits && all_kernels[i].is_supported()) return &all_kernels[i];
    }
    return NULL;
}

/* Queries of one key head, of all tokens: row t · G + g is token t's head g of the G that share it. */
typedef struct {
    const Attention *a;
    const AttentionKernels *kernels;
    float *queries; /* [B, K, blocks, QUERIES, D], rotated and scaled; rows that there are not are zero */
    Partial *partials; /* [B, K, blocks, segments]; NULL where a block's segments are joined one after the other */
    size_t blocks, segments;
} Work;

static size_t sharing(const Attention *a) { return a->query_heads / a->key_heads; }
static size_t before(const Attention *a, size_t row) { return (size_t)a->last[row] + 1 - a->tokens; }

static void rotate(const Attention *a, const float *in, size_t position, float scale, float *out) {
    const size_t half = a->head / 2;
    const float *cosine = a->cosines + position * half, *sine = a->sines + position * half;
    for (size_t i = 0; i < half; i++) {
        const float x = in[i], y = in[half + i];
        out[i] = scale * (x * cosine[i] - y * sine[i]);
        out[half + i] = scale * (y * cosine[i] + x * sine[i]);
    }
}

/* A token of a row: its keys and values to their slot, its queries to their rows. */
static void take_token(void *data, size_t index) {
    const Work *work = data;
    const Attention *a = work->a;
    const size_t row = index / a->tokens, token = index % a->tokens, heads = a->query_heads + 2 * a->key_heads;
    const size_t position = before(a, row) + token;
    const float *qkv = a->qkv + index * heads * a->head;
    for (size_t h = 0; h < a->query_heads; h++) {
        const size_t key_head = row * a->key_heads + h / sharing(a), at = token * sharing(a) + h % sharing(a);
        rotate(a, qkv + h * a->head, position, a->scale,
               work->queries + (key_head * work->blocks * QUERIES + at) * a->head);
    }
    for (size_t h = 0; h < a->key_heads; h++) {
        const size_t slot = ((row * a->key_heads + h) * a->slots + position) * a->head;
        rotate(a, qkv + (a->query_heads + h) * a->head, position, 1.0f, a->keys + slot);
        memcpy(a->values + slot, qkv + (a->query_heads + a->key_heads + h) * a->head, a->head * sizeof(float));
    }
}

/* What the queries of a block see: slots [from, to) each, and all of them together. Queries that there are not see what
 * the last one does. */
typedef struct {
    size_t from[QUERIES], to[QUERIES], first, last;
} Seen;

static Seen seen_by(const Attention *a, size_t row, size_t block) {
    Seen seen = {.first = SIZE_MAX, .last = 0};
    const size_t rows = a->tokens * sharing(a);
    for (size_t i = 0; i < QUERIES; i++) {
        const size_t at = block * QUERIES + i < rows ? block * QUERIES + i : rows - 1;
        const size_t position = before(a, row) + at / sharing(a);
        seen.to[i] = position + 1;
        seen.from[i] = a->window && position + 1 > a->window ? position + 1 - a->window : 0;
        if (seen.from[i] < seen.first) seen.first = seen.from[i];
        if (seen.to[i] > seen.last) seen.last = seen.to[i];
    }
    return seen;
}

/* Whether the segment has slots that the block sees; if so, what it leaves. */
static int attend_segment(const Work *work, size_t block, size_t segment, Partial *out) {
    const Attention *a = work->a;
    const size_t key_head = block / work->blocks;
    const Seen seen = seen_by(a, key_head / a->key_heads, block % work->blocks);
    /* Segments begin where they always do; before what is seen, nothing is read. */
    size_t first = segment * SEGMENT, last = first + SEGMENT;
    if (last > seen.last) last = seen.last;
    if (first >= last || last <= seen.first) return 0;
    if (first < seen.first) first = seen.first;
    const size_t cache = key_head * a->slots * a->head;
    work->kernels->attend(a, work->queries + block * QUERIES * a->head, a->keys + cache, a->values + cache, first, last,
                          seen.from, seen.to, out);
    return 1;
}

static void attend_piece(void *data, size_t index) {
    const Work *work = data;
    Partial *out = work->partials + index;
    if (!attend_segment(work, index / work->segments, index % work->segments, out))
        memset(out->total, 0, sizeof out->total);
}

/* The segments of a block, joined, to y. */
static void finish_block(void *data, size_t block) {
    const Work *work = data;
    const Attention *a = work->a;
    Partial sum, own;
    memset(sum.total, 0, sizeof sum.total);
    for (size_t segment = 0, found = 0; segment < work->segments; segment++) {
        if (work->partials)
            work->kernels->join(a, &sum, work->partials + block * work->segments + segment);
        else if (!found)
            found = attend_segment(work, block, segment, &sum);
        else if (attend_segment(work, block, segment, &own))
            work->kernels->join(a, &sum, &own);
    }
    const size_t key_head = block / work->blocks, row = key_head / a->key_heads, group = sharing(a);
    for (size_t q = 0; q < QUERIES; q++) {
        const size_t at = block % work->blocks * QUERIES + q, token = at / group;
        if (token >= a->tokens) break;
        const size_t head = key_head % a->key_heads * group + at % group;
        float *y = a->y + ((row * a->tokens + token) * a->query_heads + head) * a->head;
        for (size_t d = 0; d < a->head; d++) y[d] = sum.values[q][d] / sum.total[q];
    }
}

#define ENOUGH 32 /* Pieces of work, for any number of threads that share a small machine. */

int attend(const AttentionKernels *kernels, const Attention *a, const Pool *pool) {
    Work work = {.a = a, .kernels = kernels};
    work.blocks = (a->tokens * sharing(a) + QUERIES - 1) / QUERIES;
    size_t longest = 0;
    for (size_t row = 0; row < a->batch; row++)
        if ((size_t)a->last[row] + 1 > longest) longest = (size_t)a->last[row] + 1;
    work.segments = (longest + SEGMENT - 1) / SEGMENT;
    const size_t blocks = a->batch * a->key_heads * work.blocks, numbers = blocks * QUERIES * a->head;
    const int apart = blocks < ENOUGH && work.segments > 1;
    /* From a cache line on: a vector that lies in two takes twice as long to read. */
    work.queries = aligned_alloc(64, numbers * sizeof(float));
    if (apart) work.partials = aligned_alloc(64, blocks * work.segments * sizeof(Partial));
    if (!work.queries || (apart && !work.partials)) {
        free(work.queries);
        free(work.partials);
        return -1;
    }
    memset(work.queries, 0, numbers * sizeof(float));
    const size_t tokens = a->batch * a->tokens;
    if (tokens < QUERIES)
        for (size_t i = 0; i < tokens; i++) take_token(&work, i);
    else
        pool->parallel_for(pool->context, take_token, tokens, &work);
    if (apart) {
        pool->parallel_for(pool->context, attend_piece, blocks * work.segments, &work);
        for (size_t block = 0; block < blocks; block++) finish_block(&work, block);
    } else {
        pool->parallel_for(pool->context, finish_block, blocks, &work);
    }
    free(work.queries);
    free(work.partials);
    return 0;
}
