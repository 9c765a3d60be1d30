// What `decode` wrote of a query head, part by part, becomes its output and log-sum-exp: one vector a warp.
//
// Compiled with: D, OUTPUT (dtype: 0 float, 1 bfloat16, 2 half), VALUE_ROUNDS, TOGETHER (1 where each log-sum-exp lies
// behind its output, as one more number of type float).
constexpr int SHARE = (D + 31) / 32;  // neighbouring coordinates of a lane

// Add up every `ways`-th part from `way` on, weighed by how far its peak is below the highest.
DEVICE void weigh(const float* parts, const float* sums, int count, int way, int ways, int lane, float (&x)[SHARE],
                  float& top, float& total) {
    float first[SHARE];  // on its way while the peaks are compared
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        x[i] = 0.0f;
        first[i] = way < count && SHARE * lane + i < D ? parts[way * D + SHARE * lane + i] : 0.0f;
    }
    top = -1e30f, total = 0.0f;
    for (int p = lane; p < count; p += 32) top = fmaxf(top, sums[2 * p]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
#pragma unroll 4
    for (int p = way; p < count; p += ways) {
        const float decay = exp2_(sums[2 * p] - top);
        total += decay * sums[2 * p + 1];
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            if (SHARE * lane + i < D) x[i] += decay * (p == way ? first[i] : parts[p * D + SHARE * lane + i]);
    }
}

// Divide by the total, rotate back and write.
DEVICE void finish(float (&x)[SHARE], float top, float total, const Signs<VALUE_ROUNDS, SHARE>& signs, void* out, float* lse,
                   long long head, int lane) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) x[i] = total > 0.0f ? x[i] / total : 0.0f;
    unrotate(x, signs, lane);
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        if (SHARE * lane + i < D) store(out, head * (D + TOGETHER) + SHARE * lane + i, x[i], OUTPUT);
    float* to = TOGETHER ? (float*)out + head * (D + 1) + D : lse + head;
    if (lane == 0) *to = total > 0.0f ? 0.6931471805599453f * (top + log2_(total)) : -INFINITY;
}
