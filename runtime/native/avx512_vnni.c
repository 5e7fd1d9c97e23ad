/* Kernels for x86 with AVX-512 VNNI, whose vpdpbusd adds four products of an unsigned and a signed byte to each of 16
 * sums, exactly. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "quantize.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define KERNEL INLINE TARGET

#define AHEAD 8192 /* Bytes that are asked for before they are read: hardware stops asking at the end of a page. */
#define FEW 4      /* Tokens that share a read of a weight. */

static int is_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

TARGET static void quantize(const Weight *w, const float *x, int8_t *codes, float *scales, int32_t *corrections) {
    quantize_row(w, x, codes, scales, corrections);
}

/* sums[t] += the dot products of a chunk with each token, in 16 parts. `keep`: which of its bytes there are. */
KERNEL void add_chunk(const int bits, const int tokens, const uint8_t *w, __mmask64 keep, const int8_t *x,
                      size_t stride, __m512i *sums) {
    const __m512i codes = _mm512_maskz_loadu_epi8(keep, w);
    const __m512i low = bits == 4 ? _mm512_and_si512(codes, _mm512_set1_epi8(15)) : codes;
    UNROLLED
    for (int t = 0; t < tokens; t++) sums[t] = _mm512_dpbusd_epi32(sums[t], low, _mm512_load_si512(x + t * stride));
    if (bits == 4) {
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
        UNROLLED
        for (int t = 0; t < tokens; t++)
            sums[t] = _mm512_dpbusd_epi32(sums[t], high, _mm512_load_si512(x + t * stride + CHUNK));
    }
}

KERNEL int32_t sum_of(__m512i parts) {
    const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64(parts, 1));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
}

KERNEL float add_block(float sum, int32_t dot, const Weight *w, const FewTokens *x, const float *scales, size_t token,
                       size_t block) {
    const size_t at = token * w->blocks + block;
    return __builtin_fmaf((float)(dot + x->corrections[at]), scales[block] * x->scales[at], sum);
}

/* The sums of four vectors. */
KERNEL __m128i sums_of(const __m512i *parts, int stride) {
    __m256i eight[4];
    UNROLLED
    for (int i = 0; i < 4; i++)
        eight[i] = _mm256_add_epi32(_mm512_castsi512_si256(parts[i * stride]),
                                    _mm512_extracti64x4_epi64(parts[i * stride], 1));
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(eight[0], eight[1]), _mm256_hadd_epi32(eight[2], eight[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}

/* `add_block` of four blocks. */
KERNEL float add_blocks(float sum, __m128i dots, const Weight *w, const FewTokens *x, const float *scales, size_t token,
                        size_t block) {
    const size_t at = token * w->blocks + block;
    const __m128i corrections = _mm_loadu_si128((const __m128i *)(x->corrections + at));
    const __m128 numbers = _mm_cvtepi32_ps(_mm_add_epi32(dots, corrections));
    const __m128 both = _mm_mul_ps(_mm_loadu_ps(scales + block), _mm_loadu_ps(x->scales + at));
    UNROLLED
    for (int i = 0; i < 4; i++) sum = __builtin_fmaf(numbers[i], both[i], sum);
    return sum;
}

/* A row with tokens [token, token + tokens), where a block is one chunk or several. Blocks are taken by fours, since it
 * is their sums that would take the time. */
KERNEL void row_of_chunks(const int bits, const int tokens, const Weight *w, const FewTokens *x, size_t n, size_t token,
                          float *y) {
    const size_t chunks = block_bytes(w) / CHUNK, step = bits == 4 ? 2 * CHUNK : CHUNK;
    const uint8_t *codes = w->codes + n * row_bytes(w);
    const float *scales = w->scales + n * w->blocks;
    const int8_t *activations = x->codes + token * x->stride;
    float sums[FEW] = {0};
    size_t b = 0;
    for (; b + 4 <= w->blocks; b += 4) {
        __m512i parts[4][FEW];
        UNROLLED
        for (int i = 0; i < 4; i++) {
            UNROLLED
            for (int t = 0; t < tokens; t++) parts[i][t] = _mm512_setzero_si512();
            for (size_t c = 0; c < chunks; c++, codes += CHUNK, activations += step) {
                _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
                add_chunk(bits, tokens, codes, ~(__mmask64)0, activations, x->stride, parts[i]);
            }
        }
        UNROLLED
        for (int t = 0; t < tokens; t++)
            sums[t] = add_blocks(sums[t], sums_of(&parts[0][t], FEW), w, x, scales, token + t, b);
    }
    for (; b < w->blocks; b++) {
        __m512i parts[FEW];
        UNROLLED
        for (int t = 0; t < tokens; t++) parts[t] = _mm512_setzero_si512();
        for (size_t c = 0; c < chunks; c++, codes += CHUNK, activations += step) {
            _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
            add_chunk(bits, tokens, codes, ~(__mmask64)0, activations, x->stride, parts);
        }
        UNROLLED
        for (int t = 0; t < tokens; t++) sums[t] = add_block(sums[t], sum_of(parts[t]), w, x, scales, token + t, b);
    }
    UNROLLED
    for (int t = 0; t < tokens; t++) y[(token + t) * w->rows + n] = sums[t];
}

/* `add_block` of at most eight blocks. */
KERNEL float add_small_blocks(float sum, __m256i dots, size_t count, const Weight *w, const FewTokens *x,
                              const float *scales, size_t token, size_t block) {
    const size_t at = token * w->blocks + block;
    const __mmask8 keep = (__mmask8)(0xff >> (8 - count));
    const __m256i corrections = _mm256_maskz_loadu_epi32(keep, x->corrections + at);
    const __m256 both = _mm256_mul_ps(_mm256_maskz_loadu_ps(keep, scales + block),
                                      _mm256_maskz_loadu_ps(keep, x->scales + at));
    _Alignas(32) float numbers[8], factors[8];
    _mm256_store_ps(numbers, _mm256_cvtepi32_ps(_mm256_add_epi32(dots, corrections)));
    _mm256_store_ps(factors, both);
    for (size_t i = 0; i < count; i++) sum = __builtin_fmaf(numbers[i], factors[i], sum);
    return sum;
}

/* The same where a chunk has several blocks. */
KERNEL void row_of_small_blocks(const int bits, const int tokens, const Weight *w, const FewTokens *x, size_t n,
                                size_t token, float *y) {
    const size_t bytes = row_bytes(w), lanes = block_bytes(w) / 4, step = bits == 4 ? 2 * CHUNK : CHUNK;
    const __mmask16 firsts = lanes == 2 ? 0x5555 : lanes == 4 ? 0x1111 : 0x0101; /* The first lane of each block. */
    const uint8_t *codes = w->codes + n * bytes;
    const float *scales = w->scales + n * w->blocks;
    const int8_t *activations = x->codes + token * x->stride;
    float sums[FEW] = {0};
    for (size_t byte = 0, b = 0; byte < bytes; byte += CHUNK, activations += step) {
        const size_t here = at_most(bytes - byte, CHUNK);
        __m512i parts[FEW];
        UNROLLED
        for (int t = 0; t < tokens; t++) parts[t] = _mm512_setzero_si512();
        _mm_prefetch((const char *)codes + byte + AHEAD, _MM_HINT_T0);
        add_chunk(bits, tokens, codes + byte, ~(__mmask64)0 >> (CHUNK - here), activations, x->stride, parts);
        UNROLLED
        for (int t = 0; t < tokens; t++) {
            /* Every lane gets the sum of its block. */
            __m512i dots = _mm512_add_epi32(parts[t], _mm512_shuffle_epi32(parts[t], 0xb1));
            if (lanes > 2) dots = _mm512_add_epi32(dots, _mm512_shuffle_epi32(dots, 0x4e));
            if (lanes > 4) dots = _mm512_add_epi32(dots, _mm512_shuffle_i32x4(dots, dots, 0xb1));
            const __m256i each = _mm512_castsi512_si256(_mm512_maskz_compress_epi32(firsts, dots));
            sums[t] = add_small_blocks(sums[t], each, here / (4 * lanes), w, x, scales, token + t, b);
        }
        b += here / (4 * lanes);
    }
    UNROLLED
    for (int t = 0; t < tokens; t++) y[(token + t) * w->rows + n] = sums[t];
}

KERNEL void row(const int bits, const int tokens, const Weight *w, const FewTokens *x, size_t n, size_t token,
                float *y) {
    if (block_bytes(w) >= CHUNK)
        row_of_chunks(bits, tokens, w, x, n, token, y);
    else
        row_of_small_blocks(bits, tokens, w, x, n, token, y);
}

#include "few.h"

/* Many tokens: a tile is ROWS rows × TOKENS tokens, whose sums are in registers; a lane is a token. Of four columns of a
 * row the codes are one number for all lanes, and those of the activations are 4 bytes of each. */
enum { ROWS = 12, STRIP = 2 * ROWS, TOKENS = 32, HALVES = TOKENS / 16, STRIDE = LARGEST_BLOCK + CHUNK /* of a row's unpacked block */ };
typedef uint8_t Unpacked;

/* Columns of a block in the order in which unpacked weights have them: of 4 bits, a chunk's even ones before its odd. */
KERNEL void order_columns(const Weight *w, const int8_t *natural, int8_t *codes) {
    if (w->bits == 8) {
        memcpy(codes, natural, w->block);
        return;
    }
    const size_t half = at_most(w->block / 2, CHUNK);
    for (size_t k = 0; k < w->block; k += 2 * half) separate_columns(natural + k, half, codes + k, codes + k + half);
}

TARGET static void pack(const Weight *w, const float *x, size_t tokens, void *packed, float *scales,
                        int32_t *corrections) {
    const size_t quads = w->block / 4;
    uint32_t *out = packed; /* [G, quads, TOKENS] */
    for (size_t b = 0; b < w->blocks; b++, out += quads * TOKENS, scales += TOKENS, corrections += TOKENS) {
        _Alignas(64) uint32_t codes[TOKENS][LARGEST_BLOCK / 4];
        memset(scales, 0, TOKENS * sizeof *scales);
        memset(corrections, 0, TOKENS * sizeof *corrections);
        memset(codes, 0, sizeof codes);
        for (size_t t = 0; t < tokens; t++) {
            int8_t natural[LARGEST_BLOCK];
            int32_t sum;
            scales[t] = quantize_block(x + t * w->columns + b * w->block, w->block, natural, &sum);
            corrections[t] = -zero_code(w) * sum;
            order_columns(w, natural, (int8_t *)codes[t]);
        }
        for (size_t q = 0; q < quads; q++)
            for (size_t t = 0; t < TOKENS; t++) out[q * TOKENS + t] = codes[t][q];
    }
}

/* A block of a row to bytes, in the order of `order_columns`. */
KERNEL void unpack(const Weight *w, const uint8_t *codes, uint8_t *out) {
    const size_t bytes = block_bytes(w);
    for (size_t i = 0; i < bytes; i += CHUNK) {
        const size_t here = at_most(bytes - i, CHUNK);
        const __mmask64 keep = ~(__mmask64)0 >> (CHUNK - here);
        const __m512i chunk = _mm512_maskz_loadu_epi8(keep, codes + i);
        if (w->bits == 8) {
            _mm512_storeu_si512(out + i, chunk);
            continue;
        }
        const __m512i mask = _mm512_set1_epi8(15);
        _mm512_storeu_si512(out + 2 * i, _mm512_and_si512(chunk, mask));
        _mm512_storeu_si512(out + 2 * i + here, _mm512_and_si512(_mm512_srli_epi16(chunk, 4), mask));
    }
}

/* sums [ROWS, TOKENS] += a block's products; w: ROWS rows `stride` apart; x [quads, TOKENS, 4]. */
KERNEL void add_tile(const Weight *weight, const Unpacked *w, size_t stride, const float *row_scales, const void *codes,
                     const float *scales, const int32_t *corrections, float *sums) {
    const int8_t *x = codes;
    size_t quads = weight->block / 4;
    __m512i dots[ROWS][HALVES];
    UNROLLED
    for (int h = 0; h < HALVES; h++)
        UNROLLED
        for (int r = 0; r < ROWS; r++) dots[r][h] = _mm512_load_si512(corrections + 16 * h);
    do {
        __m512i columns[HALVES];
        UNROLLED
        for (int h = 0; h < HALVES; h++) columns[h] = _mm512_load_si512(x + CHUNK * h);
        UNROLLED
        for (int r = 0; r < ROWS; r++) {
            int32_t four;
            memcpy(&four, w + r * stride, sizeof four);
            const __m512i row = _mm512_set1_epi32(four);
            UNROLLED
            for (int h = 0; h < HALVES; h++) {
                dots[r][h] = _mm512_dpbusd_epi32(dots[r][h], row, columns[h]);
                KEPT_IN_REGISTER(dots[r][h]);
            }
        }
        w += 4;
        x += 4 * TOKENS;
    } while (--quads);
    UNROLLED
    for (int r = 0; r < ROWS; r++)
        UNROLLED
        for (int h = 0; h < HALVES; h++) {
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scales[r]), _mm512_load_ps(scales + 16 * h));
            float *sum = sums + r * TOKENS + 16 * h;
            _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][h]), scale, _mm512_load_ps(sum)));
        }
}

/* in: 16 vectors; out[i] has lane i of each. */
KERNEL void transpose(__m512 *in) {
    __m512 pairs[16], quads[16];
    UNROLLED
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(in[i], in[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(in[i], in[i + 1]);
    }
    UNROLLED
    for (int i = 0; i < 16; i += 4)
        UNROLLED
        for (int j = 0; j < 2; j++) {
            const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
            quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    UNROLLED
    for (int j = 0; j < 4; j++) {
        const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
        const __m512 b = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
        const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
        in[j] = _mm512_shuffle_f32x4(a, b, 0x88);
        in[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
        in[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
        in[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
}

/* Sums [count / ROWS, tiles, ROWS, TOKENS] to rows [first, first + count) of y [T, N]. */
KERNEL void store(const Weight *w, const ManyTokens *x, size_t first, size_t count, const float *sums, float *y) {
    for (size_t r = 0; r < count; r += 16) {
        const size_t here = at_most(count - r, 16);
        const __mmask16 keep = (__mmask16)(0xffff >> (16 - here));
        for (size_t t = 0; t < x->tokens; t += 16) {
            __m512 block[16];
            for (size_t i = 0; i < 16; i++) {
                const size_t row = r + at_most(i, here - 1), tile = row / ROWS * x->tiles + t / TOKENS;
                block[i] = _mm512_load_ps(sums + (tile * ROWS + row % ROWS) * TOKENS + t % TOKENS);
            }
            transpose(block);
            for (size_t i = 0; i < at_most(x->tokens - t, 16); i++)
                _mm512_mask_storeu_ps(y + (t + i) * w->rows + first + r, keep, block[i]);
        }
    }
}

#include "many.h"

const Kernels avx512_vnni_kernels = {
    .name = "avx512-vnni",
    .is_supported = is_supported,
    .few = 12,
    .tile_tokens = TOKENS,
    .strip_rows = STRIP,
    .code_bytes = 1,
    .quantize = quantize,
    .multiply_few = multiply_few,
    .pack = pack,
    .multiply_many = multiply_many,
};
#endif
