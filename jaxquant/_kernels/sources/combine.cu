// Join the parts that `decode` wrote into outputs and log-sum-exps, and rotate the outputs back: one block a query head.
//
// Compiled with: D, QUERIES (dtype of the output), VALUE_ROUNDS, WAYS (warps that share the parts).
constexpr int THREADS = 32 * WAYS, PER_LANE = (D + 31) / 32;

KERNEL(THREADS, 1) combine(const float* __restrict__ parts, const float* __restrict__ sums,
                           const signed char* __restrict__ value_signs, void* __restrict__ out, float* __restrict__ lse,
                           int count) {
    SHARED float space[WAYS][D], totals[WAYS];
    const long long head = block_x();
    const int lane = thread() % 32, way = thread() / 32;
    const float* mine = sums + 2 * head * count;
    // A warp's first part is on its way while the peaks are compared.
    float top = -1e30f, total = 0.0f, x[PER_LANE], first[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        x[i] = 0.0f;
        first[i] = way < count && PER_LANE * lane + i < D ? parts[(head * count + way) * D + PER_LANE * lane + i] : 0.0f;
    }
    for (int p = lane; p < count; p += 32) top = fmaxf(top, mine[2 * p]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
#pragma unroll 4
    for (int p = way; p < count; p += WAYS) {
        const float decay = exp2_(mine[2 * p] - top);
        total += decay * mine[2 * p + 1];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (PER_LANE * lane + i < D)
                x[i] += decay * (p == way ? first[i] : parts[(head * count + p) * D + PER_LANE * lane + i]);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (PER_LANE * lane + i < D) space[way][PER_LANE * lane + i] = x[i];
    if (lane == 0) totals[way] = total;
    sync();
    if (way) return;
    for (int w = 1; w < WAYS; w++) {
        total += totals[w];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (PER_LANE * lane + i < D) x[i] += space[w][PER_LANE * lane + i];
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) x[i] = total > 0.0f ? x[i] / total : 0.0f;
    unrotate<VALUE_ROUNDS>(x, value_signs, lane);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (PER_LANE * lane + i < D) store(out, head * D + PER_LANE * lane + i, x[i], QUERIES);
    if (lane == 0) lse[head] = total > 0.0f ? 0.6931471805599453f * (top + log2_(total)) : -INFINITY;
}
