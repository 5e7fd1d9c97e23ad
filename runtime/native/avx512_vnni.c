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

/* The scales of four blocks of a row. */
KERNEL __m128 four_scales(const Weight *w, size_t n, size_t block) {
    const size_t at = n * w->blocks + block;
    if (w->row_scales) return _mm_set1_ps(w->row_scales[n]);
    if (!w->upper_halves) return _mm_loadu_ps(w->scales + at);
    const __m128i halves = _mm_loadl_epi64((const __m128i *)(w->upper_halves + at));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
}

KERNEL float add_block(float sum, int32_t dot, const Weight *w, const FewTokens *x, size_t n, size_t token,
                       size_t block) {
    const size_t at = token * w->blocks + block;
    const float scale = w->row_scales ? w->row_scales[n] : w->scales[n * w->blocks + block];
    return __builtin_fmaf((float)(dot + x->corrections[at]), scale * x->scales[at], sum);
}

/* Each quarter of the result has the sums of four vectors over that quarter. */
KERNEL __m512i over_quarters(const __m512i *vectors) {
    __m512i pairs[2];
    UNROLLED
    for (int i = 0; i < 2; i++)
        pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(vectors[2 * i], vectors[2 * i + 1]),
                                    _mm512_unpackhi_epi32(vectors[2 * i], vectors[2 * i + 1]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[0], pairs[1]), _mm512_unpackhi_epi64(pairs[0], pairs[1]));
}

/* The sums of four vectors. */
KERNEL __m128i sums_of(const __m512i *parts, int stride) {
    const __m512i four[4] = {parts[0], parts[stride], parts[2 * stride], parts[3 * stride]};
    const __m512i quarters = over_quarters(four);
    const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(quarters), _mm512_extracti64x4_epi64(quarters, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

/* `add_block` of four blocks. */
KERNEL float add_blocks(float sum, __m128i dots, const Weight *w, const FewTokens *x, __m128 scales, size_t token,
                        size_t block) {
    const size_t at = token * w->blocks + block;
    const __m128i corrections = _mm_loadu_si128((const __m128i *)(x->corrections + at));
    const __m128 numbers = _mm_cvtepi32_ps(_mm_add_epi32(dots, corrections));
    const __m128 both = _mm_mul_ps(scales, _mm_loadu_ps(x->scales + at));
    UNROLLED
    for (int i = 0; i < 4; i++) sum = __builtin_fmaf(numbers[i], both[i], sum);
    return sum;
}

/* A row with tokens [token, token + tokens), where a block is one chunk or several. Blocks are taken by fours, since it
 * is their sums that would take the time. */
KERNEL void row(const int bits, const int tokens, const Weight *w, const FewTokens *x, size_t n, size_t token,
                float *y) {
    const size_t chunks = block_bytes(w) / CHUNK, step = bits == 4 ? 2 * CHUNK : CHUNK;
    const uint8_t *codes = w->codes + n * row_bytes(w);
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
        const __m128 scales = four_scales(w, n, b);
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
        for (int t = 0; t < tokens; t++) sums[t] = add_block(sums[t], sum_of(parts[t]), w, x, n, token + t, b);
    }
    UNROLLED
    for (int t = 0; t < tokens; t++) y[(token + t) * w->rows + n] = sums[t];
}

#include "few.h"

/* Where a chunk has several blocks, it is the adding up of their sums that would take the time: it is done for four
 * rows at once. Each is read for itself all the same, since memory gives that faster than four beside each other. */
enum { MOST_FEW = 12, SEGMENT = 32 /* Chunks of a row whose sums wait for those of the other three. */ };
typedef __m512i Chunks[SEGMENT][ABREAST];

/* The sums of each chunk of a row's next `bytes` bytes. */
KERNEL void multiply_segment(const int bits, const uint8_t *w, size_t bytes, const int8_t *x, __m512i *out) {
    for (size_t byte = 0; byte < bytes; byte += CHUNK, out += ABREAST, x += bits == 4 ? 2 * CHUNK : CHUNK) {
        *out = _mm512_setzero_si512();
        _mm_prefetch((const char *)w + byte + AHEAD, _MM_HINT_T0);
        add_chunk(bits, 1, w + byte, ~(__mmask64)0 >> (CHUNK - at_most(bytes - byte, CHUNK)), x, 0, out);
    }
}

/* The sums of pairs of quarters, first those of a. */
KERNEL __m512i over_halves(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* Where a quarter has two blocks: the rows' sums of a chunk's first four blocks, or of the others. */
KERNEL __m512i over_eighths(const __m512i *rows, const int others) {
    __m512 pairs[2];
    UNROLLED
    for (int i = 0; i < 2; i++) { /* In each quarter two blocks of a row, then of the next. */
        const __m512 a = _mm512_castsi512_ps(rows[2 * i]), b = _mm512_castsi512_ps(rows[2 * i + 1]);
        pairs[i] = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                                                        _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd))));
    }
    const __m512 even = _mm512_shuffle_ps(pairs[0], pairs[1], 0x88), odd = _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd);
    const __m512i in_turn = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    return _mm512_castps_si512(
        _mm512_permutex2var_ps(even, _mm512_add_epi32(in_turn, _mm512_set1_epi32(others ? 8 : 0)), odd));
}

/* A number of each block, for all rows: [block, row]. */
KERNEL __m512i for_rows(__m128i blocks) {
    const __m512i of = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_epi32(of, _mm512_castsi128_si512(blocks));
}

/* sum [row] + `count` blocks, at most 4, from `block` on. `scales`: of each row. */
KERNEL __m128 add_blocks_abreast(__m128 sum, __m512i dots, const Weight *w, const float *const *scales,
                                 const FewTokens *x, size_t token, size_t block, size_t count) {
    const __mmask8 there = (__mmask8)((1 << count) - 1);
    const size_t at = token * w->blocks + block;
    __m512 rows = _mm512_castps128_ps512(_mm_maskz_loadu_ps(there, scales[0] + block));
    rows = _mm512_insertf32x4(rows, _mm_maskz_loadu_ps(there, scales[1] + block), 1);
    rows = _mm512_insertf32x4(rows, _mm_maskz_loadu_ps(there, scales[2] + block), 2);
    rows = _mm512_insertf32x4(rows, _mm_maskz_loadu_ps(there, scales[3] + block), 3);
    const __m512i by_block = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i tokens = for_rows(_mm_castps_si128(_mm_maskz_loadu_ps(there, x->scales + at)));
    const __m512 both = _mm512_mul_ps(_mm512_permutexvar_ps(by_block, rows), _mm512_castsi512_ps(tokens));
    const __m512i corrections = for_rows(_mm_maskz_loadu_epi32(there, x->corrections + at));
    const __m512 numbers = _mm512_cvtepi32_ps(_mm512_add_epi32(dots, corrections));
    sum = _mm_fmadd_ps(_mm512_castps512_ps128(numbers), _mm512_castps512_ps128(both), sum);
    if (count > 1) sum = _mm_fmadd_ps(_mm512_extractf32x4_ps(numbers, 1), _mm512_extractf32x4_ps(both, 1), sum);
    if (count > 2) sum = _mm_fmadd_ps(_mm512_extractf32x4_ps(numbers, 2), _mm512_extractf32x4_ps(both, 2), sum);
    if (count > 3) sum = _mm_fmadd_ps(_mm512_extractf32x4_ps(numbers, 3), _mm512_extractf32x4_ps(both, 3), sum);
    return sum;
}

/* Rows [first, last) with all tokens, by fours. `lanes`: the sums of a block, 2, 4 or 8 of a chunk's 16. */
KERNEL void few_of_small_blocks(const int bits, const int lanes, const Weight *w, const FewTokens *x, size_t first,
                                size_t last, float *y) {
    const size_t shared = 16 / (size_t)lanes, blocks = SEGMENT * shared, bytes = block_bytes(w);
    Chunks chunks;
    memset(chunks, 0, sizeof chunks); /* What is past the end is added up, too, and then left out. */
    for (size_t n = first; n < last; n += ABREAST) {
        const uint8_t *codes[ABREAST];
        const float *scales[ABREAST];
        for (size_t r = 0; r < ABREAST; r++) { /* Past the last there is the last again, which is not stored. */
            const size_t row = at_most(n + r, last - 1);
            codes[r] = w->codes + row * row_bytes(w);
            scales[r] = w->scales + row * w->blocks;
        }
        __m128 sums[MOST_FEW];
        for (size_t t = 0; t < x->tokens; t++) sums[t] = _mm_setzero_ps();
        for (size_t start = 0; start < w->blocks; start += blocks) {
            const size_t here = at_most(w->blocks - start, blocks), byte = start * bytes;
            for (size_t r = 0; r < ABREAST; r++)
                for (size_t b = start; b < start + here; b += CHUNK / sizeof(float))
                    _mm_prefetch((const char *)(scales[r] + ABREAST * w->blocks + b), _MM_HINT_T0);
            for (size_t t = 0; t < x->tokens; t++) {
                const int8_t *activations = x->codes + t * x->stride + (bits == 4 ? 2 * byte : byte);
                for (size_t r = 0; r < ABREAST; r++)
                    multiply_segment(bits, codes[r] + byte, here * bytes, activations, &chunks[0][r]);
                for (size_t b = 0; b < here; b += 4) {
                    const __m512i *chunk = chunks[b / shared];
                    __m512i dots;
                    if (lanes == 8) dots = over_halves(over_quarters(chunk), over_quarters(chunk + ABREAST));
                    if (lanes == 4) dots = over_quarters(chunk);
                    if (lanes == 2) dots = over_eighths(chunk, b / 4 % 2);
                    sums[t] = add_blocks_abreast(sums[t], dots, w, scales, x, t, start + b, at_most(here - b, 4));
                }
            }
        }
        const __mmask8 there = (__mmask8)((1 << at_most(last - n, ABREAST)) - 1);
        for (size_t t = 0; t < x->tokens; t++) _mm_mask_storeu_ps(y + t * w->rows + n, there, sums[t]);
    }
}

TARGET static void multiply_few_of_any_block(const Weight *w, const FewTokens *x, size_t first, size_t last, float *y) {
    const size_t lanes = block_bytes(w) / 4;
    if (lanes >= 16)
        multiply_few(w, x, first, last, y);
    else if (w->bits == 8)
        lanes == 8 ? few_of_small_blocks(8, 8, w, x, first, last, y) : few_of_small_blocks(8, 4, w, x, first, last, y);
    else if (lanes == 8)
        few_of_small_blocks(4, 8, w, x, first, last, y);
    else
        lanes == 4 ? few_of_small_blocks(4, 4, w, x, first, last, y) : few_of_small_blocks(4, 2, w, x, first, last, y);
}

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
    .few = MOST_FEW,
    .tile_tokens = TOKENS,
    .strip_rows = STRIP,
    .code_bytes = 1,
    .compact_from = CHUNK,
    .quantize = quantize,
    .multiply_few = multiply_few_of_any_block,
    .pack = pack,
    .multiply_many = multiply_many,
};
#endif
