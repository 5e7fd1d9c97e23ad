/* A block of queries over a segment of slots, and the joining of segments, with vectors as GCC and Clang have them:
 * included once for each set of instructions, which defines TARGET, what is named SUFFIX(attend), and what of it has to be
 * said in their own words. */
#define KERNEL static inline __attribute__((always_inline)) TARGET

/* Lanes 0 to 7: sums of neighbours in a; 8 to 15: in b. Four turns over 16 vectors leave the sum of each in a lane. */
KERNEL Vector SUFFIX(fold)(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* scores [slots, QUERIES], stored two slots at a time. Slots are read one after the other: from end to end memory is
 * read more than twice as fast as two slots beside each other. */
KERNEL void SUFFIX(score)(const Attention *a, const float *queries, const float *keys, const float *values, size_t first,
                          size_t last, float *scores) {
    const size_t lead = last - first > BLOCK ? last - BLOCK : first;
    for (size_t s = first; s < last; s += 2, scores += 2 * QUERIES) {
        const float *key = keys + s * a->head, *next = s + 1 < last ? key + a->head : key;
        /* With the last keys, the values that are mixed first are asked for. */
        for (size_t d = 0; s >= lead && d < 2 * a->head; d += LANES)
            __builtin_prefetch(values + (first + s - lead) * a->head + d);
        Vector sums[2 * QUERIES];
        UNROLLED
        for (int slot = 0; slot < 2; slot++) {
            const float *numbers = slot ? next : key;
            UNROLLED
            for (int q = 0; q < QUERIES; q++) sums[slot * QUERIES + q] = (Vector){0};
            size_t d = 0;
            do {
                __builtin_prefetch(numbers + d + AHEAD);
                const Vector columns = LOAD(numbers + d);
                UNROLLED
                for (int q = 0; q < QUERIES; q++) {
                    const int i = slot * QUERIES + q;
                    sums[i] = MULTIPLY_ADD(LOAD(queries + q * a->head + d), columns, sums[i]);
                    KEPT_IN_REGISTER(sums[i]);
                }
                d += LANES;
            } while (d < a->head);
        }
        UNROLLED
        for (int width = 2 * QUERIES / 2; width > 0; width /= 2)
            UNROLLED
            for (int i = 0; i < width; i++) sums[i] = SUFFIX(fold)(sums[2 * i], sums[2 * i + 1]);
        STORE(scores, sums[0]);
    }
}

/* values [QUERIES, columns from d on] += weights [slots, QUERIES] · values of slots [start, end). As many numbers are
 * asked for, from `ahead` on. */
KERNEL void SUFFIX(mix_columns)(const int vectors, const Attention *a, const float *weights, const float *values,
                                size_t start, size_t end, size_t d, const float *ahead, Partial *out) {
    Vector sums[2][QUERIES];
    UNROLLED
    for (int v = 0; v < vectors; v++)
        UNROLLED
        for (int q = 0; q < QUERIES; q++) sums[v][q] = LOAD(&out->values[q][d + v * LANES]);
    size_t s = start;
    do {
        Vector value[2];
        UNROLLED
        for (int v = 0; v < vectors; v++) {
            value[v] = LOAD(values + s * a->head + d + v * LANES);
            __builtin_prefetch(ahead + v * LANES);
        }
        ahead += vectors * LANES;
        UNROLLED
        for (int q = 0; q < QUERIES; q++) {
            const Vector weight = BROADCAST(weights[s * QUERIES + q]);
            UNROLLED
            for (int v = 0; v < vectors; v++) {
                sums[v][q] = MULTIPLY_ADD(value[v], weight, sums[v][q]);
                KEPT_IN_REGISTER(sums[v][q]);
            }
        }
    } while (++s < end);
    UNROLLED
    for (int v = 0; v < vectors; v++)
        UNROLLED
        for (int q = 0; q < QUERIES; q++) STORE(&out->values[q][d + v * LANES], sums[v][q]);
}

/* The same of all columns, a block of slots at a time, while the next block's values are asked for from end to end: so
 * memory is read all the time, here and where keys are. */
KERNEL void SUFFIX(mix)(const Attention *a, const float *weights, const float *values, size_t slots, Partial *out) {
    for (size_t start = 0; start < slots; start += BLOCK) {
        const size_t end = start + BLOCK < slots ? start + BLOCK : slots;
        const float *ahead = values + (end < slots ? end : start) * a->head;
        size_t d = 0;
        for (; d + 2 * LANES <= a->head; d += 2 * LANES, ahead += 2 * LANES * (end - start))
            SUFFIX(mix_columns)(2, a, weights, values, start, end, d, ahead, out);
        if (d < a->head) SUFFIX(mix_columns)(1, a, weights, values, start, end, d, ahead, out);
    }
}

TARGET static void SUFFIX(attend)(const Attention *a, const float *queries, const float *keys, const float *values,
                                  size_t first, size_t last, const size_t *from, const size_t *to, Partial *out) {
    _Alignas(64) float scores[(SEGMENT + 1) * QUERIES];
    const size_t slots = last - first;
    SUFFIX(score)(a, queries, keys, values, first, last, scores);
    for (size_t s = 0; s < slots && a->softcap > 0; s++)
        for (int q = 0; q < QUERIES; q++)
            scores[s * QUERIES + q] = a->softcap * tanhf(scores[s * QUERIES + q] / a->softcap);
    for (int q = 0; q < QUERIES; q++) {
        const size_t seen_from = from[q] > first ? from[q] - first : 0, seen_to = to[q] > first ? to[q] - first : 0;
        for (size_t s = 0; s < seen_from && s < slots; s++) scores[s * QUERIES + q] = -INFINITY;
        for (size_t s = seen_to; s < slots; s++) scores[s * QUERIES + q] = -INFINITY;
    }
    /* A vector is two slots of the queries; what would be a slot too many weighs nothing. */
    for (int q = 0; q < QUERIES; q++) scores[slots * QUERIES + q] = -INFINITY;
    Vector largest = LOAD(scores), total = {0};
    for (size_t s = 2; s < slots; s += 2) {
        const Vector two = LOAD(scores + s * QUERIES);
        const Integers greater = two > largest;
        largest = (Vector)(((Integers)two & greater) | ((Integers)largest & ~greater));
    }
    Vector shift;
    for (int q = 0; q < QUERIES; q++) {
        const float found = largest[q] > largest[q + QUERIES] ? largest[q] : largest[q + QUERIES];
        out->largest[q] = found;
        shift[q] = shift[q + QUERIES] = found > -INFINITY ? found : 0.0f;
    }
    for (size_t s = 0; s < slots; s += 2) {
        const Vector weights = exponential(LOAD(scores + s * QUERIES) - shift);
        STORE(scores + s * QUERIES, weights);
        total += weights;
    }
    for (int q = 0; q < QUERIES; q++) out->total[q] = total[q] + total[q + QUERIES];
    memset(out->values, 0, sizeof out->values);
    SUFFIX(mix)(a, scores, values + first * a->head, slots, out);
}

/* What a query has of no slot yet, it takes as it is. */
TARGET static void SUFFIX(join)(const Attention *a, Partial *sum, const Partial *next) {
    for (size_t q = 0; q < QUERIES; q++) {
        if (next->total[q] == 0) continue;
        if (sum->total[q] == 0) {
            sum->largest[q] = next->largest[q], sum->total[q] = next->total[q];
            memcpy(sum->values[q], next->values[q], a->head * sizeof(float));
            continue;
        }
        const float largest = sum->largest[q] > next->largest[q] ? sum->largest[q] : next->largest[q];
        const float old = expf(sum->largest[q] - largest), new = expf(next->largest[q] - largest);
        sum->largest[q] = largest;
        sum->total[q] = sum->total[q] * old + next->total[q] * new;
        for (size_t d = 0; d < a->head; d++)
            sum->values[q][d] = sum->values[q][d] * old + next->values[q][d] * new;
    }
}

#undef KERNEL
#undef TARGET
#undef SUFFIX
#undef MULTIPLY_ADD
#undef BROADCAST
#undef KEPT_IN_REGISTER
