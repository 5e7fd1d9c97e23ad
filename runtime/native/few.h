/* How few tokens are multiplied, included where TARGET, KERNEL, FEW and `row` are: a target's own code cannot be
 * inlined into a function that was compiled for another. */

/* Rows [first, last) with all tokens. `row` computes one row with up to FEW of them. */
KERNEL void few(const int bits, const Weight *w, const FewTokens *x, size_t first, size_t last, float *y) {
    for (size_t n = first; n < last; n++) {
        /* A row is read once from memory; for further tokens it is in the cache. */
        size_t token = 0;
        for (; token + FEW <= x->tokens; token += FEW) row(bits, FEW, w, x, n, token, y);
        switch (x->tokens - token) {
            case 1: row(bits, 1, w, x, n, token, y); break;
            case 2: row(bits, 2, w, x, n, token, y); break;
            case 3: row(bits, 3, w, x, n, token, y); break;
        }
    }
}

TARGET static void multiply_few(const Weight *w, const FewTokens *x, size_t first, size_t last, float *y) {
    if (w->bits == 4)
        few(4, w, x, first, last, y);
    else
        few(8, w, x, first, last, y);
}
