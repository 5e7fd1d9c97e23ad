/* One token after the other, on as many threads as there are groups of them. */
#include "residual_norm.h"

#include <math.h>

#include "variants.h"
#include "vectors.h"

#define TOGETHER 8 /* Tokens that a thread takes at a time. */

static inline __attribute__((always_inline)) void norm_token(const ResidualNorm *r, size_t token) {
    const size_t d = r->channels, whole = d / LANES * LANES;
    const float *stream = r->stream + token * d, *added = r->added + token * d;
    float *sum = r->sum + token * d, *normed = r->normed + token * d;
    Vector squares = {0};
    float total = 0;
    for (size_t i = 0; i < whole; i += LANES) {
        const Vector x = LOAD(stream + i) + LOAD(added + i);
        STORE(sum + i, x);
        squares += x * x;
    }
    for (size_t i = whole; i < d; i++) sum[i] = stream[i] + added[i], total += sum[i] * sum[i];
    for (int i = 0; i < LANES; i++) total += squares[i];
    const float scale = 1.0f / sqrtf(total / (float)d + r->epsilon);
    for (size_t i = 0; i < whole; i += LANES) STORE(normed + i, LOAD(sum + i) * scale * LOAD(r->gain + i));
    for (size_t i = whole; i < d; i++) normed[i] = sum[i] * scale * r->gain[i];
}

VARIANTS(norm_token, (const ResidualNorm *r, size_t token), (r, token))

typedef struct {
    void (*norm)(const ResidualNorm *r, size_t token);
    const ResidualNorm *r;
    size_t tokens;
} Work;

static void work_on(void *data, size_t index) {
    const Work *work = data;
    for (size_t t = index * TOGETHER; t < at_most((index + 1) * TOGETHER, work->tokens); t++) work->norm(work->r, t);
}

void residual_norm(const ResidualNorm *r, size_t tokens, const Pool *pool) {
    Work work = {norm_token_chosen(), r, tokens};
    pool->parallel_for(pool->context, work_on, ceiling(tokens, TOGETHER), &work);
}
