/* From a product to pieces of work: which kernels, in what order, on how many threads. */
#include "product.h"

#include <stdlib.h>
#include <string.h>

#include "stretches.h"

#define PIECE (64 * 1024) /* Bytes of codes that a thread takes at a time. */
#define PANELS 16         /* At least so many, where a strip allows it. */
#define ALONE (1 << 16)   /* Numbers that are rounded in less time than it takes to wake a thread. */

static const Kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &avx512_vnni_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

const Kernels *chosen_kernels(void) {
    const char *wanted = getenv("GEMMA_EXPORT_KERNELS");
    for (size_t i = 0; i < sizeof all_kernels / sizeof *all_kernels; i++) {
        const Kernels *kernels = all_kernels[i];
        /* Portable code has to be asked for: onnxruntime's own kernels are faster. */
        const int fits = wanted ? strcmp(wanted, kernels->name) == 0 : kernels != &portable_kernels;
        if (fits && kernels->is_supported()) return kernels;
    }
    return NULL;
}

typedef struct {
    const Kernels *kernels;
    const Weight *w;
    const float *x;
    float *y;
    size_t tokens;
    size_t panel; /* Rows of one. */
    FewTokens few;
    ManyTokens many;
} Work;

static void quantize_token(void *data, size_t token) {
    const Work *work = data;
    const Weight *w = work->w;
    const FewTokens *few = &work->few;
    work->kernels->quantize(w, work->x + token * w->columns, (int8_t *)few->codes + token * few->stride,
                            (float *)few->scales + token * w->blocks,
                            (int32_t *)few->corrections + token * w->blocks);
}

static void multiply_few_rows(void *data, size_t first, size_t last) {
    const Work *work = data;
    work->kernels->multiply_few(work->w, &work->few, first, last, work->y);
}

static void pack_tile(void *data, size_t tile) {
    const Work *work = data;
    const Weight *w = work->w;
    const Kernels *kernels = work->kernels;
    const size_t width = kernels->tile_tokens, first = tile * width;
    kernels->pack(w, work->x + first * w->columns, at_most(width, work->many.tokens - first),
                  (char *)work->many.codes + tile * w->columns * width * kernels->code_bytes,
                  work->many.scales + tile * w->blocks * width, work->many.corrections + tile * w->blocks * width);
}

static void multiply_panel(void *data, size_t index) {
    const Work *work = data;
    const size_t first = index * work->panel;
    work->kernels->multiply_many(work->w, &work->many, first, at_most(first + work->panel, work->w->rows), work->y);
}

/* Memory for activations: codes, scales and corrections, each from a cache line on. */
static void *allocate(size_t codes, size_t numbers, void **scales, void **corrections) {
    const size_t code_bytes = ceiling(codes, 64) * 64, number_bytes = ceiling(numbers * 4, 64) * 64;
    char *memory = aligned_alloc(64, code_bytes + 2 * number_bytes);
    if (memory) {
        *scales = memory + code_bytes;
        *corrections = memory + code_bytes + number_bytes;
    }
    return memory;
}

static int multiply_few(Work *work, const Pool *pool) {
    const Weight *w = work->w;
    const size_t unit = w->bits == 4 ? 2 * CHUNK : CHUNK, stride = ceiling(w->columns, unit) * unit;
    void *scales, *corrections;
    void *memory = allocate(work->tokens * stride, work->tokens * w->blocks, &scales, &corrections);
    if (!memory) return -1;
    work->few = (FewTokens){work->tokens, stride, memory, scales, corrections};
    if (work->tokens * w->columns < ALONE)
        for (size_t token = 0; token < work->tokens; token++) quantize_token(work, token);
    else
        pool->parallel_for(pool->context, quantize_token, work->tokens, work);
    in_stretches(pool, multiply_few_rows, w->rows, ceiling(ceiling(PIECE, row_bytes(w)), ABREAST) * ABREAST, work);
    free(memory);
    return 0;
}

static int multiply_many(Work *work, const Pool *pool) {
    const Weight *w = work->w;
    const Kernels *kernels = work->kernels;
    const size_t width = kernels->tile_tokens, tiles = ceiling(work->tokens, width);
    void *scales, *corrections;
    void *memory = allocate(tiles * width * w->columns * kernels->code_bytes, tiles * width * w->blocks, &scales,
                            &corrections);
    if (!memory) return -1;
    work->many = (ManyTokens){work->tokens, tiles, memory, scales, corrections};
    pool->parallel_for(pool->context, pack_tile, tiles, work);
    /* Small weights in smaller panels, so that there is work for every thread. */
    const size_t wanted = ceiling(w->rows, PANELS * kernels->strip_rows) * kernels->strip_rows;
    work->panel = at_most(wanted, PANEL_ROWS / kernels->strip_rows * kernels->strip_rows);
    pool->parallel_for(pool->context, multiply_panel, ceiling(w->rows, work->panel), work);
    free(memory);
    return 0;
}

int multiply(const Kernels *kernels, const Weight *w, const float *x, size_t tokens, float *y, const Pool *pool) {
    while (tokens > 0) {
        const int few = tokens <= kernels->few || kernels->tile_tokens == 0;
        Work work = {.kernels = kernels, .w = w, .x = x, .y = y};
        work.tokens = few ? tokens : at_most(tokens, MANY_AT_ONCE);
        if ((few ? multiply_few : multiply_many)(&work, pool)) return -1;
        tokens -= work.tokens;
        x += work.tokens * w->columns;
        y += work.tokens * w->rows;
    }
    return 0;
}
