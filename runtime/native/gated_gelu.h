/* The activation between the products of Gemma's MLP: y = gelu(gate) · up, with the Gelu that tanh approximates.
 *
 * Source: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415, section 2. Symbols: T tokens, F columns.
 */
#ifndef GEMMA_EXPORT_GATED_GELU_H
#define GEMMA_EXPORT_GATED_GELU_H

#include <stddef.h>

#include "pool.h"

/* x [T, 2F], a row's gates before its ups → y [T, F]. The numbers do not depend on the processor nor on the threads. */
void gated_gelu(const float *x, size_t tokens, size_t columns, float *y, const Pool *pool);

#endif
