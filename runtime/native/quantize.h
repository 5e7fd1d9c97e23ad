/* Activations to 8 bits: written once, compiled for each set of instructions that calls it. */
#ifndef GEMMA_EXPORT_QUANTIZE_H
#define GEMMA_EXPORT_QUANTIZE_H

#include <string.h>

#include "product.h"

#define INLINE static inline __attribute__((always_inline))
/* Sums that a loop adds to stay in registers only if what runs over them is unrolled, and if GCC (12) takes each for
 * one variable: what this says changes a sum, for all it knows, so that it has no earlier value to keep beside it. */
#define UNROLLED _Pragma("GCC unroll 16")
#define KEPT_IN_REGISTER(sum) __asm__("" : "+v"(sum))

/* A block [n] to codes in [-127, 127], the largest magnitude to 127, halves to even. Returns the scale; what is too
 * small to have a finite inverse is zero. A block with a number that is not finite gets the scale infinity or NaN and
 * codes of zero, which make every output NaN: it is not hidden. */
INLINE float quantize_block(const float *x, size_t n, int8_t *codes, int32_t *sum) {
    uint32_t largest = 0; /* Bits of magnitudes are ordered as these are, and NaN comes last. */
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude;
        memcpy(&magnitude, &x[i], sizeof magnitude);
        magnitude &= 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float peak;
    memcpy(&peak, &largest, sizeof peak);
    *sum = 0;
    if (largest >= 0x7f800000u || peak < 1e-36f) {
        memset(codes, 0, n);
        return largest >= 0x7f800000u ? peak : 0.0f;
    }
    const float inverse = 127.0f / peak;
    int32_t total = 0;
    for (size_t i = 0; i < n; i++) {
        /* Beside 1.5 · 2²³ a number's last binary digit is that of the ones. */
        const float shifted = x[i] * inverse + 12582912.0f;
        int32_t code;
        memcpy(&code, &shifted, sizeof code);
        code -= 0x4b400000;
        codes[i] = (int8_t)code;
        total += code;
    }
    *sum = total;
    return peak / 127.0f;
}

/* Codes of columns to the order in which a chunk of 4-bit weights wants them: even columns, then odd ones. */
INLINE void separate_columns(const int8_t *codes, size_t pairs, int8_t *even, int8_t *odd) {
    for (size_t i = 0; i < pairs; i++) {
        even[i] = codes[2 * i];
        odd[i] = codes[2 * i + 1];
    }
}

/* A token's row of FewTokens. */
INLINE void quantize_row(const Weight *w, const float *x, int8_t *codes, float *scales, int32_t *corrections) {
    const size_t half = w->bits == 4 ? CHUNK : 0;
    for (size_t b = 0; b < w->blocks; b++) {
        int8_t natural[LARGEST_BLOCK];
        int32_t sum;
        const size_t first = b * w->block;
        scales[b] = quantize_block(x + first, w->block, half ? natural : codes + first, &sum);
        corrections[b] = -zero_code(w) * sum;
        for (size_t k = 0; half && k < w->block; k += at_most(w->block, 2 * half)) {
            int8_t *even = codes + (first + k) / (2 * half) * (2 * half) + (first + k) % (2 * half) / 2;
            separate_columns(natural + k, at_most(w->block, 2 * half) / 2, even, even + half);
        }
    }
    const size_t end = w->columns;
    if (half && end % (2 * half)) {
        int8_t *chunk = codes + end / (2 * half) * (2 * half);
        const size_t used = end % (2 * half) / 2;
        memset(chunk + used, 0, half - used);
        memset(chunk + half + used, 0, half - used);
    } else if (!half && end % CHUNK) {
        memset(codes + end, 0, CHUNK - end % CHUNK);
    }
}

#endif
