/* What lies between two layers' parts: a sum with the residual stream, and its RMSNorm.
 *
 * Source: Zhang and Sennrich, https://arxiv.org/abs/1910.07467, equation 4. Symbols: T tokens, d channels.
 */
#ifndef GEMMA_EXPORT_RESIDUAL_NORM_H
#define GEMMA_EXPORT_RESIDUAL_NORM_H

#include <stddef.h>

#include "pool.h"

typedef struct {
    const float *stream, *added, *gain; /* [T, d], [T, d], [d] */
    size_t channels;                    /* d */
    float epsilon;
    float *sum, *normed; /* [T, d]: stream + added; sum / sqrt(mean(sum²) + epsilon) · gain */
} ResidualNorm;

/* Of T tokens. The numbers do not depend on the processor nor on the threads. */
void residual_norm(const ResidualNorm *r, size_t tokens, const Pool *pool);

#endif
