/* One token after the other, on as many threads as there are groups of them. */
#include "residual_norm.h"

#include <math.h>

#include "product.h"
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

typedef void Norm(const ResidualNorm *r, size_t token);

static void norm_portable(const ResidualNorm *r, size_t token) { norm_token(r, token); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) static void norm_avx2(const ResidualNorm *r, size_t token) { norm_token(r, token); }
__attribute__((target("avx512f"))) static void norm_avx512(const ResidualNorm *r, size_t token) {
    norm_token(r, token);
}
#endif

/* The processor's, unless GEMMA_EXPORT_KERNELS asks for less. */
static Norm *chosen(void) {
#if defined(__x86_64__)
    const Kernels *kernels = chosen_kernels();
    if (kernels == &avx512_vnni_kernels) return norm_avx512;
    if (kernels == &avx2_kernels) return norm_avx2;
#endif
    return norm_portable;
}

typedef struct {
    Norm *norm;
    const ResidualNorm *r;
    size_t tokens;
} Work;

static void work_on(void *data, size_t index) {
    const Work *work = data;
    for (size_t t = index * TOGETHER; t < at_most((index + 1) * TOGETHER, work->tokens); t++) work->norm(work->r, t);
}

void residual_norm(const ResidualNorm *r, size_t tokens, const Pool *pool) {
    Work work = {chosen(), r, tokens};
    pool->parallel_for(pool->context, work_on, ceiling(tokens, TOGETHER), &work);
}
