// Join the parts of lines that `decode` cut (see deal.cuh): one block a query head.
//
// Compiled with: D, HEADS, WARPS, SLIDING, PAGE, OUTPUT (dtype: 0 float, 1 bfloat16, 2 half), VALUE_ROUNDS, WAYS
// (warps that share the parts).
KERNEL(32 * WAYS, 1) combine(const float* __restrict__ parts, const float* __restrict__ sums,
                             const signed char* __restrict__ value_signs, const int* __restrict__ layer,
                             const int* __restrict__ length, const int* __restrict__ exact_from,
                             const int* __restrict__ sliding, const void*, const float*, void* __restrict__ out,
                             float* __restrict__ lse, int batch, int kv_heads, int sinks, int window, int all_layers,
                             int most_blocks) {
    SHARED float space[WAYS][D], totals[WAYS];
    const int lane = thread() % 32, way = thread() / 32, head = block_x() % HEADS, pair = block_x() / HEADS;
    const int lines = kv_heads * PASSES, row = pair / kv_heads, line = pair % kv_heads * PASSES + head / COLUMNS;
    const Rows rows = rows_of(layer, length, exact_from, sliding, batch, sinks, window, all_layers);
    int before = 0;
    for (int other = lane; other < row; other += 32) before += rows.steps(other);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) before += (int)shuffle_xor((u32)before, mask);
    const int own = rows.steps(row);
    const int steps = lines * rows.all_steps(lane), begin = lines * before + line * own;
    const int blocks = most_blocks < steps ? most_blocks : steps;
    const int from = block_of(steps, begin, blocks), count = block_of(steps, begin + own - 1, blocks) - from + 1;
    if (count == 1) return;
    float x[SHARE], top, total;
    weigh(parts, sums, from, count, head % COLUMNS, way, WAYS, lane, x, top, total);
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
    finish(x, top, total, value_signs, out, lse, block_x(), lane);
}
