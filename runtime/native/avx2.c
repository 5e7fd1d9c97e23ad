/* Kernels for x86 with AVX2. Its product of bytes saturates, so codes are widened: vpmaddwd adds two products of 16 bits
 * to each of 8 sums, exactly. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "quantize.h"

#define TARGET __attribute__((target("avx2,fma")))
#define KERNEL INLINE TARGET

#define AHEAD 2048 /* Bytes that are asked for before they are read: hardware stops asking at the end of a page. */
#define FEW 4      /* Tokens that share a read of a weight. */
enum { ROWS = 4, TOKENS = 16, HALVES = TOKENS / 8, STRIDE = LARGEST_BLOCK + 32 /* of a row's unpacked block */ };

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

/* Rows' codes of the block after this one, into the second-level cache while this one is computed. */
KERNEL void ask_for_next_block(const Weight *w, size_t first, size_t last, size_t block) {
    for (size_t n = first; n < last; n++)
        for (size_t i = 0; i < block_bytes(w); i += CHUNK)
            _mm_prefetch((const char *)w->codes + n * row_bytes(w) + (block + 1) * block_bytes(w) + i, _MM_HINT_T1);
}

/* sums [ROWS, TOKENS] += a block's products; w [ROWS, STRIDE], x [pairs, TOKENS, 2]. */
KERNEL void add_tile(const int16_t *w, const float *row_scales, const int16_t *x, const float *scales,
                     const int32_t *corrections, size_t pairs, float *sums) {
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
            memcpy(&two, w + r * STRIDE, sizeof two);
            const __m256i codes = _mm256_set1_epi32(two);
            UNROLLED
            for (int h = 0; h < HALVES; h++) {
                dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(codes, columns[h]));
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

TARGET static void multiply_many(const Weight *w, const ManyTokens *x, size_t first, size_t last, float *y) {
    _Alignas(32) int16_t unpacked[PANEL_ROWS * STRIDE];
    _Alignas(32) float sums[PANEL_ROWS * MANY_AT_ONCE];
    const size_t count = last - first, strips = ceiling(count, ROWS);
    memset(sums, 0, strips * x->tiles * ROWS * TOKENS * sizeof *sums);
    for (size_t b = 0; b < w->blocks; b++) {
        float row_scales[PANEL_ROWS] = {0}; /* Rows that there are not have scale 0, and are not stored. */
        for (size_t r = 0; r < count; r++) {
            unpack(w, w->codes + (first + r) * row_bytes(w) + b * block_bytes(w), unpacked + r * STRIDE);
            row_scales[r] = w->scales[(first + r) * w->blocks + b];
        }
        for (size_t r = count; r < strips * ROWS; r++) memset(unpacked + r * STRIDE, 0, w->block * sizeof *unpacked);
        for (size_t tile = 0; tile < x->tiles; tile++) {
            const size_t at = tile * w->blocks + b;
            ask_for_next_block(w, first + count * tile / x->tiles, first + count * (tile + 1) / x->tiles, b);
            for (size_t strip = 0; strip < strips; strip++)
                add_tile(unpacked + strip * ROWS * STRIDE, row_scales + strip * ROWS,
                         (const int16_t *)x->codes + at * w->block * TOKENS, x->scales + at * TOKENS,
                         x->corrections + at * TOKENS, w->block / 2,
                         sums + (strip * x->tiles + tile) * ROWS * TOKENS);
        }
    }
    for (size_t r = 0; r < count; r++)
        for (size_t t = 0; t < x->tokens; t++) {
            const size_t tile = r / ROWS * x->tiles + t / TOKENS;
            y[t * w->rows + first + r] = sums[(tile * ROWS + r % ROWS) * TOKENS + t % TOKENS];
        }
}

const Kernels avx2_kernels = {
    .name = "avx2",
    .is_supported = is_supported,
    .few = 8,
    .tile_tokens = TOKENS,
    .tile_rows = ROWS,
    .code_bytes = 2,
    .quantize = quantize,
    .multiply_few = multiply_few,
    .pack = pack,
    .multiply_many = multiply_many,
};
#endif
