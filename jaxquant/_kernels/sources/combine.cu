// Join the parts that `decode` wrote where it did not do so itself: one block a query head.
//
// Compiled with: WAYS (warps that share the parts), and what join.cuh is.
constexpr int THREADS = 32 * WAYS;

KERNEL(THREADS, 1) combine(const float* __restrict__ parts, const float* __restrict__ sums,
                           const signed char* __restrict__ value_signs, void* __restrict__ out, float* __restrict__ lse,
                           int count) {
    SHARED float space[WAYS][D], totals[WAYS];
    const long long head = block_x();
    const int lane = thread() % 32, way = thread() / 32;
    const Signs<VALUE_ROUNDS, SHARE> value_sign(value_signs, lane);
    float x[SHARE], top, total;
    weigh(parts + head * count * D, sums + 2 * head * count, count, way, WAYS, lane, x, top, total);
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        if (SHARE * lane + i < D) space[way][SHARE * lane + i] = x[i];
    if (lane == 0) totals[way] = total;
    sync();
    if (way) return;
    for (int w = 1; w < WAYS; w++) {
        total += totals[w];
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            if (SHARE * lane + i < D) x[i] += space[w][SHARE * lane + i];
    }
    finish(x, top, total, value_sign, out, lse, head, lane);
}
