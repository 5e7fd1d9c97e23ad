/* Kernels in plain C: right on every processor, and what the others are held against. */
#include <math.h>

#include "quantize.h"

static int is_supported(void) { return 1; }

static void quantize(const Weight *w, const float *x, int8_t *codes, float *scales, int32_t *corrections) {
    quantize_row(w, x, codes, scales, corrections);
}

static int32_t dot_8(const uint8_t *w, const int8_t *x, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += (int32_t)w[i] * x[i];
    return sum;
}

static int32_t dot_4(const uint8_t *w, const int8_t *even, const int8_t *odd, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += (int32_t)(w[i] & 15) * even[i] + (int32_t)(w[i] >> 4) * odd[i];
    return sum;
}

static int32_t dot_block(const Weight *w, const uint8_t *codes, const int8_t *row, size_t first_byte) {
    const size_t bytes = block_bytes(w);
    if (w->bits == 8) return dot_8(codes, row + first_byte, bytes);
    int32_t sum = 0;
    const size_t step = at_most(bytes, CHUNK);
    for (size_t i = 0; i < bytes; i += step) {
        const size_t byte = first_byte + i;
        const int8_t *even = row + byte / CHUNK * 2 * CHUNK + byte % CHUNK;
        sum += dot_4(codes + i, even, even + CHUNK, step);
    }
    return sum;
}

static void multiply_few(const Weight *w, const FewTokens *x, size_t first, size_t last, float *y) {
    for (size_t n = first; n < last; n++) {
        const uint8_t *codes = w->codes + n * row_bytes(w);
        const float *scales = w->scales + n * w->blocks;
        for (size_t t = 0; t < x->tokens; t++) {
            float sum = 0;
            for (size_t b = 0; b < w->blocks; b++) {
                const size_t byte = b * block_bytes(w), at = t * w->blocks + b;
                const int32_t dot =
                    dot_block(w, codes + byte, x->codes + t * x->stride, byte) + x->corrections[at];
                sum = fmaf((float)dot, scales[b] * x->scales[at], sum);
            }
            y[t * w->rows + n] = sum;
        }
    }
}

const Kernels portable_kernels = {
    .name = "portable",
    .is_supported = is_supported,
    .quantize = quantize,
    .multiply_few = multiply_few,
};
