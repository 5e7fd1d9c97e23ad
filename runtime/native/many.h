/* How many tokens are multiplied, included where TARGET, KERNEL, ROWS, STRIP, TOKENS, STRIDE, Unpacked, `unpack`,
 * `add_tile` and `store` are: a target's own code cannot be inlined into a function that was compiled for another. */

/* Where a block of `rows` rows is as `add_tile` reads it, which is where it lies if that is how it is stored. */
KERNEL const Unpacked *block_of_strip(const Weight *w, const uint8_t *codes, size_t rows, Unpacked *unpacked,
                                      size_t *stride) {
    if (sizeof *unpacked == 1 && w->bits == 8 && rows == STRIP) {
        *stride = row_bytes(w);
        return (const Unpacked *)codes;
    }
    for (size_t r = 0; r < rows; r++) unpack(w, codes + r * row_bytes(w), unpacked + r * STRIDE);
    *stride = STRIDE;
    return unpacked;
}

/* A strip of rows after the other is read from end to end, for all tokens: that is how memory is fast. A strip is a
 * tile high or several, and the higher it is, the less often activations are read. */
TARGET static void multiply_many(const Weight *w, const ManyTokens *x, size_t first, size_t last, float *y) {
    _Alignas(64) float all_sums[PANEL_ROWS * MANY_AT_ONCE];
    _Alignas(64) Unpacked unpacked[STRIP * STRIDE];
    const size_t tile_sums = ROWS * TOKENS, block = block_bytes(w);
    memset(all_sums, 0, ceiling(last - first, ROWS) * x->tiles * tile_sums * sizeof *all_sums);
    float *sums = all_sums;
    for (size_t n = first; n < last; n += STRIP, sums += STRIP / ROWS * x->tiles * tile_sums) {
        const size_t rows = at_most(last - n, STRIP);
        float row_scales[STRIP] = {0}; /* Rows that there are not have scale 0, and are not stored. */
        memset(unpacked, 0, sizeof unpacked);
        for (size_t b = 0; b < w->blocks; b++) {
            const uint8_t *codes = w->codes + n * row_bytes(w) + b * block;
            /* What comes next is asked for: more streams are read here than hardware asks for by itself. */
            const size_t next = b + 1 < w->blocks ? block : STRIP * row_bytes(w) - b * block;
            for (size_t r = 0; r < rows; r++) {
                for (size_t i = 0; i < block; i += CHUNK)
                    _mm_prefetch((const char *)codes + r * row_bytes(w) + next + i, _MM_HINT_T0);
                row_scales[r] = w->scales[(n + r) * w->blocks + b];
            }
            size_t stride;
            const Unpacked *strip = block_of_strip(w, codes, rows, unpacked, &stride);
            for (size_t tile = 0; tile < x->tiles; tile++) {
                const size_t at = tile * w->blocks + b;
                const char *columns = (const char *)x->codes + at * w->block * TOKENS * sizeof(Unpacked);
                for (size_t r = 0; r < rows; r += ROWS)
                    add_tile(w, strip + r * stride, stride, row_scales + r, columns, x->scales + at * TOKENS,
                             x->corrections + at * TOKENS, sums + (r / ROWS * x->tiles + tile) * tile_sums);
            }
        }
    }
    store(w, x, first, last - first, all_sums, y);
}
