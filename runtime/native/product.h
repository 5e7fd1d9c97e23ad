/* The product of activations with a quantized weight, y = x · Wᵀ, in the arithmetic of MatMulNBits's accuracy level 4:
 * x is rounded to 8 bits per token and per block of columns, the dot product of a block is one of integers, and the
 * blocks are summed in fp32.
 *
 *     y[t, n] = Σ_b  fma( Σ_k (w[n, b, k] - zero) · q[t, b, k],  sw[n, b] · sx[t, b],  · )      b in ascending order
 *
 * That order is kept whatever the instructions, the number of threads and the number of tokens, and a block's sum of
 * integers has no rounding: so the numbers are the same bit by bit on all of these paths.
 *
 * Symbols: T tokens, N rows of the weight, K columns, G = K / block.
 */
#ifndef GEMMA_EXPORT_PRODUCT_H
#define GEMMA_EXPORT_PRODUCT_H

#include <stddef.h>
#include <stdint.h>

#include "pool.h"

#define LARGEST_BLOCK 256
#define CHUNK 64 /* Bytes of codes that are read at once. */
#define ABREAST 4 /* Rows that kernels may take together: a piece of work has a multiple of them. */

/* A weight as MatMulNBits stores it. Its codes are unsigned, and the code of zero is in the middle of their range; of
 * 4 bits the even column is in the lower half of a byte. */
typedef struct {
    size_t rows, columns, block, blocks; /* N, K, columns that share a scale, G */
    int bits;                            /* 4 or 8 */
    const uint8_t *codes;                /* [N, G, block · bits / 8] */
    const float *scales;                 /* [N, G] */
    /* Compact: the same in fewer bytes, as they are stored, where they are known beforehand; or NULL. */
    const float *row_scales;      /* [N], where each row has but one */
    const uint16_t *upper_halves; /* [N, G], where the lower halves are zero: bfloat16 */
} Weight;

static inline size_t block_bytes(const Weight *w) { return w->block * (size_t)w->bits / 8; }
static inline size_t row_bytes(const Weight *w) { return w->blocks * block_bytes(w); }
static inline int32_t zero_code(const Weight *w) { return 1 << (w->bits - 1); }
static inline size_t at_most(size_t value, size_t limit) { return value < limit ? value : limit; }
static inline size_t ceiling(size_t value, size_t unit) { return (value + unit - 1) / unit; }

/* Rounded activations of a few tokens, row by row. What a chunk of a weight's bytes is multiplied with lies together:
 * of 8 bits 64 columns, of 4 bits the 64 even ones of 128 and then the odd ones. Columns past K are zero. */
typedef struct {
    size_t tokens, stride;      /* stride: codes of a row, a multiple of 64 (8 bits) or 128 (4 bits) */
    const int8_t *codes;        /* [T, stride] */
    const float *scales;        /* [T, G] */
    const int32_t *corrections; /* [T, G]: -zero · the sum of a block's codes */
} FewTokens;

/* Rounded activations of many tokens, in tiles as wide as the instructions. `codes` is what a set of kernels makes of
 * them; scales and corrections of a tile's tokens lie together. Tokens past T are zero. */
typedef struct {
    size_t tokens, tiles;       /* tiles = ⌈T / tile_tokens⌉ */
    void *codes;                /* [tiles, G, block, tile_tokens], by columns in a kernel's own order */
    float *scales;              /* [tiles, G, tile_tokens] */
    int32_t *corrections;       /* [tiles, G, tile_tokens] */
} ManyTokens;

/* One set of instructions. */
typedef struct {
    const char *name;
    int (*is_supported)(void);
    size_t few;          /* Up to so many tokens, `multiply_few` is the faster. */
    size_t tile_tokens;  /* Tokens of a tile of ManyTokens; 0 where there is only `multiply_few`. */
    size_t strip_rows;   /* Rows that are read together: a panel has a multiple of them. */
    size_t code_bytes;   /* Of a code in ManyTokens. */
    size_t compact_from; /* Bytes of a block from which on `multiply_few` reads compact scales; 0: never. */
    /* x [K] → a row of FewTokens. */
    void (*quantize)(const Weight *w, const float *x, int8_t *codes, float *scales, int32_t *corrections);
    /* Rows [first, last) of y [T, N]. */
    void (*multiply_few)(const Weight *w, const FewTokens *x, size_t first, size_t last, float *y);
    /* x [up to tile_tokens, K] → a tile of ManyTokens. */
    void (*pack)(const Weight *w, const float *x, size_t tokens, void *codes, float *scales, int32_t *corrections);
    /* Rows [first, last) of y [T, N]; at most PANEL_ROWS of them, and at most MANY_AT_ONCE tokens. */
    void (*multiply_many)(const Weight *w, const ManyTokens *x, size_t first, size_t last, float *y);
} Kernels;

/* A panel's sums of so many tokens stay in the second-level cache, and on a thread's stack. */
#define PANEL_ROWS 128
#define MANY_AT_ONCE 512

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_vnni_kernels;
#endif

/* The kernels that GEMMA_EXPORT_KERNELS names, or else the fastest that the processor has; NULL where onnxruntime's own
 * are to run: that is "built-in" there, or no kernel here is made for the processor. */
const Kernels *chosen_kernels(void);

/* y [T, N] = x [T, K] · Wᵀ. Returns 0, or -1 if memory ran out. */
int multiply(const Kernels *kernels, const Weight *w, const float *x, size_t tokens, float *y, const Pool *pool);

#endif
