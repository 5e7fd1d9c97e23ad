/* Vectors of 16 numbers as GCC and Clang have them, whatever the instructions they become: the numbers are the same. */
#ifndef GEMMA_EXPORT_VECTORS_H
#define GEMMA_EXPORT_VECTORS_H

#include <stdint.h>

#define LANES 16
#define LOAD(address) (*(const Unaligned *)(address))
#define STORE(address, vector) (*(Unaligned *)(address) = (vector))
typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* eˣ of numbers up to 0 to some 2e-7 of it; 0 where x is below -87. Polynomial: Cephes, expf. */
static inline __attribute__((always_inline)) Vector exponential(Vector x) {
    const Integers tiny = x < -87.0f;
    const Vector shifted = x * 1.44269504f + 12582912.0f; /* Its lowest digits: x / ln 2, rounded. */
    const Vector rounded = shifted - 12582912.0f;
    const Vector r = x - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers power = ((Integers)shifted - 0x4b400000) << 23;
    return (Vector)(((Integers)p + power) & ~tiny);
}

#endif
