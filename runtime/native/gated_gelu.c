/* From x to pieces of work, and the numbers of one. */
#include "gated_gelu.h"

#include <string.h>

#include "variants.h"
#include "vectors.h"

#define PIECE 4096 /* Columns of a token that a thread takes at a time: it takes longer than to wake a thread. */

/* 0.5 · x · (1 + tanh(z / 2)) is x / (1 + e⁻ᶻ), which here has no exponential but of numbers up to 0. */
static inline __attribute__((always_inline)) Vector gelu(Vector x) {
    const Vector z = x * (x * x * 0.0713548162726f + 1.59576912161f); /* 2 · √(2 / π) · (x + 0.044715 · x³) */
    const Integers positive = z > 0.0f;
    const Vector smaller = exponential((Vector)((Integers)z | INT32_MIN)); /* e to the power of -|z| */
    const Vector one = (Vector){0} + 1.0f;
    const Vector numerator = (Vector)(((Integers)one & positive) | ((Integers)smaller & ~positive));
    return x * (numerator / (1.0f + smaller));
}

static inline __attribute__((always_inline)) void multiply_piece(const float *gates, const float *ups, size_t count,
                                                                 float *y) {
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) STORE(y + i, gelu(LOAD(gates + i)) * LOAD(ups + i));
    if (i < count) {
        float gate[LANES] = {0}, up[LANES] = {0}, result[LANES];
        memcpy(gate, gates + i, (count - i) * sizeof *gate);
        memcpy(up, ups + i, (count - i) * sizeof *up);
        STORE(result, gelu(LOAD(gate)) * LOAD(up));
        memcpy(y + i, result, (count - i) * sizeof *y);
    }
}

VARIANTS(multiply_piece, (const float *gates, const float *ups, size_t count, float *y), (gates, ups, count, y))

typedef struct {
    void (*multiply)(const float *gates, const float *ups, size_t count, float *y);
    const float *x;
    float *y;
    size_t columns, pieces; /* F, and pieces of a token */
} Work;

static void work_on(void *data, size_t index) {
    const Work *work = data;
    const size_t token = index / work->pieces, first = index % work->pieces * PIECE;
    const float *gates = work->x + 2 * token * work->columns + first;
    const size_t left = work->columns - first;
    work->multiply(gates, gates + work->columns, left < PIECE ? left : PIECE, work->y + token * work->columns + first);
}

void gated_gelu(const float *x, size_t tokens, size_t columns, float *y, const Pool *pool) {
    Work work = {multiply_piece_chosen(), x, y, columns, ceiling(columns, PIECE)};
    pool->parallel_for(pool->context, work_on, tokens * work.pieces, &work);
}
