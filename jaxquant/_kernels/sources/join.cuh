// What `decode` wrote of a query head, part by part, becomes its output and log-sum-exp: one vector a warp.
//
// Part p of a line whose first part is of block `from` is in slot 1 of that block (p = 0), or in slot 0 of block
// `from` + p. A slot holds COLUMNS vectors, and a peak and a total for each.
constexpr int SHARE = (D + 31) / 32;  // neighbouring coordinates of a lane

DEVICE long long place_of(int block, bool begins, int column) { return (2LL * block + (begins ? 1 : 0)) * COLUMNS + column; }

// Add up every `ways`-th part from `way` on, weighed by how far its peak is below the highest.
DEVICE void weigh(const float* parts, const float* sums, int from, int count, int column, int way, int ways, int lane,
                  float (&x)[SHARE], float& top, float& total) {
    float first[SHARE];  // on its way while the peaks are compared
    const long long early = place_of(from + way, way == 0, column);
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        x[i] = 0.0f;
        first[i] = way < count && SHARE * lane + i < D ? parts[early * D + SHARE * lane + i] : 0.0f;
    }
    top = -1e30f, total = 0.0f;
    for (int p = lane; p < count; p += 32) top = fmaxf(top, sums[2 * place_of(from + p, p == 0, column)]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
#pragma unroll 4
    for (int p = way; p < count; p += ways) {
        const long long place = place_of(from + p, p == 0, column);
        const float decay = exp2_(sums[2 * place] - top);
        total += decay * sums[2 * place + 1];
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            if (SHARE * lane + i < D) x[i] += decay * (p == way ? first[i] : parts[place * D + SHARE * lane + i]);
    }
}

// Divide by the total, rotate back and write.
DEVICE void finish(float (&x)[SHARE], float top, float total, const signed char* signs, void* out, float* lse,
                   long long head, int lane) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) x[i] = total > 0.0f ? x[i] / total : 0.0f;
    unrotate<VALUE_ROUNDS>(x, signs, lane);
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        if (SHARE * lane + i < D) store(out, head * D + SHARE * lane + i, x[i], OUTPUT);
    if (lane == 0) lse[head] = total > 0.0f ? 0.6931471805599453f * (top + log2_(total)) : -INFINITY;
}
