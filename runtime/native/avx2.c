/* Kernels for x86 with AVX2. Its product of bytes saturates, so codes are widened: vpmaddwd adds two products of 16 bits
 * to each of 8 sums, exactly. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "quantize.h"

#define TARGET __attribute__((target("avx2,fma")))
#define KERNEL INLINE TARGET

#define AHEAD 2048 /* Bytes that are asked for before they are read: hardware stops asking at the end of a page. */
#define FEW 4      /* Tokens that share a read of a weight. */
enum { ROWS = 4, STRIP = 64, TOKENS = 16, HALVES = TOKENS / 8, STRIDE = LARGEST_BLOCK + 32 /* of a row's unpacked block */ };
typedef int16_t Unpacked;

static int is_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

TARGET static void quantize(const Weight *w, const float *x, int8_t *codes, float *scales, int32_t *corrections) {
    quantize_row(w, x, codes, scales, corrections);
}

KERNEL __m256i wide(__m128i codes) { return _mm256_cvtepu8_epi16(codes); }

KERNEL __m256i add_products(__m256i sum, __m256i w, const int8_t *x) {
    const __m256i activations = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w, activations));
}

/* sums[t] += the dot products of 16 bytes of codes, or of 8, with each token, in 8 parts. */
KERNEL void add_bytes(const int bits, const int tokens, const uint8_t *w, size_t bytes, const int8_t *x, size_t stride,
                      __m256i *sums) {
    const __m128i codes = bytes == 8 ? _mm_loadl_epi64((const __m128i *)w) : _mm_loadu_si128((const __m128i *)w);
    const __m128i mask = _mm_set1_epi8(15);
    const __m256i low = wide(bits == 4 ? _mm_and_si128(codes, mask) : codes);
    UNROLLED
    for (int t = 0; t < tokens; t++) sums[t] = add_products(sums[t], low, x + t * stride);
    if (bits == 4) {
        const __m256i high = wide(_mm_and_si128(_mm_srli_epi16(codes, 4), mask));
        UNROLLED
        for (int t = 0; t < tokens; t++) sums[t] = add_products(sums[t], high, x + t * stride + CHUNK);
    }
}

KERNEL int32_t sum_of(__m256i parts) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(parts), _mm256_extracti128_si256(parts, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
}

/* A row with tokens [token, token + tokens). */
KERNEL void row(const int bits, const int tokens, const Weight *w, const FewTokens *x, size_t n, size_t token,
                float *y) {
    const size_t bytes = block_bytes(w), step = at_most(bytes, 16);
    const uint8_t *codes = w->codes + n * row_bytes(w);
    const float *scales = w->scales + n * w->blocks;
    const int8_t *activations = x->codes + token * x->stride;
    float sums[FEW] = {0};
    for (size_t b = 0; b < w->blocks; b++) {
        __m256i parts[FEW];
        UNROLLED
        for (int t = 0; t < tokens; t++) parts[t] = _mm256_setzero_si256();
        for (size_t byte = b * bytes; byte < (b + 1) * bytes; byte += step) {
            if (byte % CHUNK == 0) _mm_prefetch((const char *)codes + byte + AHEAD, _MM_HINT_T0);
            const size_t at = bits == 4 ? byte / CHUNK * 2 * CHUNK + byte % CHUNK : byte;
            add_bytes(bits, tokens, codes + byte, step, activations + at, x->stride, parts);
        }
        UNROLLED
        for (int t = 0; t < tokens; t++) {
            const size_t at = (token + t) * w->blocks + b;
            sums[t] = __builtin_fmaf((float)(sum_of(parts[t]) + x->corrections[at]), scales[b] * x->scales[at], sums[t]);
        }
    }
    UNROLLED
    for (int t = 0; t < tokens; t++) y[(token + t) * w->rows + n] = sums[t];
}

#include "few.h"

/* Many tokens: as with AVX-512, with pairs of 16 bits where that has four bytes. Columns keep their order. */
TARGET static void pack(const Weight *w, const float *x, size_t tokens, void *packed, float *scales,
                        int32_t *corrections) {
    int16_t *out = packed; /* [G, block / 2, TOKENS, 2] */
    for (size_t b = 0; b < w->blocks; b++, out += w->block * TOKENS, scales += TOKENS, corrections += TOKENS) {
        _Alignas(32) int8_t codes[TOKENS][LARGEST_BLOCK];
        memset(scales, 0, TOKENS * sizeof *scales);
        memset(corrections, 0, TOKENS * sizeof *corrections);
        memset(codes, 0, sizeof codes);
        for (size_t t = 0; t < tokens; t++) {
            int32_t sum;
            scales[t] = quantize_block(x + t * w->columns + b * w->block, w->block, codes[t], &sum);
            corrections[t] = -zero_code(w) * sum;
        }
        for (size_t k = 0; k < w->block; k += 2)
            for (size_t t = 0; t < TOKENS; t++) {
                out[k * TOKENS + 2 * t] = codes[t][k];
                out[k * TOKENS + 2 * t + 1] = codes[t][k + 1];
            }
    }
}

/* A block of a row to 16 bits. */
KERNEL void unpack(const Weight *w, const uint8_t *codes, int16_t *out) {
    if (w->bits == 8) {
        for (size_t k = 0; k < w->block; k++) out[k] = codes[k];
        return;
    }
    for (size_t k = 0; k < w->block; k += 2) {
        out[k] = codes[k / 2] & 15;
        out[k + 1] = codes[k / 2] >> 4;
    }
}

/* sums [ROWS, TOKENS] += a block's products; w: ROWS rows `stride` apart; x [pairs, TOKENS, 2]. */
KERNEL void add_tile(const Weight *weight, const Unpacked *w, size_t stride, const float *row_scales, const void *codes,
                     const float *scales, const int32_t *corrections, float *sums) {
    const int16_t *x = codes;
    size_t pairs = weight->block / 2;
    __m256i dots[ROWS][HALVES];
    UNROLLED
    for (int h = 0; h < HALVES; h++)
        UNROLLED
        for (int r = 0; r < ROWS; r++) dots[r][h] = _mm256_load_si256((const __m256i *)corrections + h);
    do {
        __m256i columns[HALVES];
        UNROLLED
        for (int h = 0; h < HALVES; h++) columns[h] = _mm256_load_si256((const __m256i *)x + h);
        UNROLLED
        for (int r = 0; r < ROWS; r++) {
            int32_t two;
            memcpy(&two, w + r * stride, sizeof two);
            const __m256i row = _mm256_set1_epi32(two);
            UNROLLED
            for (int h = 0; h < HALVES; h++) {
                dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(row, columns[h]));
                KEPT_IN_REGISTER(dots[r][h]);
            }
        }
        w += 2;
        x += 2 * TOKENS;
    } while (--pairs);
    UNROLLED
    for (int r = 0; r < ROWS; r++)
        UNROLLED
        for (int h = 0; h < HALVES; h++) {
            const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(row_scales[r]), _mm256_load_ps(scales + 8 * h));
            float *sum = sums + r * TOKENS + 8 * h;
            _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][h]), scale, _mm256_load_ps(sum)));
        }
}

/* Sums [count / ROWS, tiles, ROWS, TOKENS] to rows [first, first + count) of y [T, N]. */
KERNEL void store(const Weight *w, const ManyTokens *x, size_t first, size_t count, const float *sums, float *y) {
    for (size_t r = 0; r < count; r++)
        for (size_t t = 0; t < x->tokens; t++) {
            const size_t tile = r / ROWS * x->tiles + t / TOKENS;
            y[t * w->rows + first + r] = sums[(tile * ROWS + r % ROWS) * TOKENS + t % TOKENS];
        }
}

#include "many.h"

const Kernels avx2_kernels = {
    .name = "avx2",
    .is_supported = is_supported,
    .few = 8,
    .tile_tokens = TOKENS,
    .strip_rows = STRIP,
    .code_bytes = 2,
    .quantize = quantize,
    .multiply_few = multiply_few,
    .pack = pack,
    .multiply_many = multiply_many,
};
#endif
