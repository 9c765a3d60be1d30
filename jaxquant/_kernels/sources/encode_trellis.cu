// Search for trellis codes of new tokens and write them into the cache in one pass: rotate, normalize, search, scale, pack.
//
// A warp rotates VECTORS vectors, one after the other, and searches for the codes of all of them at a time. The old states
// 2^b k + j, j < 2^b, lead to the new states k + i STATES / 2^b, i < 2^b: such a butterfly belongs to one lane, which holds
// the levels of its windows in registers. Costs of states change lanes between two steps, through shared memory. A
// candidate's lowest bits are lent to the symbol that it drops, so that one minimum gives both; the arithmetic is that of
// `viterbi.py`, but that the bits are not cleared afterwards. Symbols of a state gather in a word before they are stored.
//
// Compiled with: D (a power of two), BITS, STATES, DEPTH (coordinates on either side of the seam that the first pass looks
// at), SCALES and INPUT (0 float, 1 bfloat16, 2 half), ROUNDS, RULE (0 norm, 1 preserve, 2 unbiased, 3 least squares),
// WARPS, BLOCKS (per multiprocessor), SPACE (bytes of shared memory of a warp).
constexpr int BRANCHES = 1 << BITS, BUTTERFLIES = STATES / BRANCHES;
constexpr int LANES = BUTTERFLIES < 32 ? BUTTERFLIES : 32, VECTORS = 32 / LANES, EACH = BUTTERFLIES / LANES;
constexpr int STEPS = 32 / BITS, UNROLLED = BITS < 3 ? 4 : 1;  // steps of a word of symbols, and of a loop
constexpr int PITCH = STATES + (LANES < 4 ? 4 : LANES < 32 ? LANES : 0), Y_PITCH = D + 1;          // against bank conflicts
constexpr int PER_LANE = D / 32, THREADS = 32 * WARPS, ROW = D * BITS / 8;
constexpr float BARRED = 1e30f;

// Shared memory of a warp. `kept` has a word for every vector, state and STEPS steps, the last step in its upper bits.
constexpr int KEPT = (D + STEPS - 1) / STEPS * VECTORS * STATES * 4, METRICS = 2 * VECTORS * PITCH * 4;
constexpr int WINDOWS = VECTORS * D * 2;
static_assert(SPACE == (KEPT + METRICS + WINDOWS + VECTORS * Y_PITCH * 4 + 15) / 16 * 16, "");
struct Space {
    u8* base;
    DEVICE u32* kept() const { return (u32*)base; }
    DEVICE float* metric(int which, int vector) const { return (float*)(base + KEPT) + (which * VECTORS + vector) * PITCH; }
    DEVICE u16* windows(int vector) const { return (u16*)(base + KEPT + METRICS) + vector * D; }
    DEVICE float* y(int vector) const { return (float*)(base + KEPT + METRICS + WINDOWS) + vector * Y_PITCH; }
};

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

typedef float Levels[EACH][BRANCHES][BRANCHES];
typedef u32 Words[EACH][BRANCHES];

// One coordinate: costs `from` the old states `to` the new ones, and the symbols that their best ways dropped.
DEVICE void step(const float* from, float* to, float y, const Levels& level, u32 upper, Words& word, int lane) {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int k = e * LANES + lane;
        u32 old[BRANCHES];
        load_words<BRANCHES, 16>((const u8*)(from + k * BRANCHES), old);
#pragma unroll
        for (int i = 0; i < BRANCHES; i++) {
            int best = 0x7fffffff;
#pragma unroll
            for (int j = 0; j < BRANCHES; j++) {
                const float error = y - level[e][i][j];
                const float cost = error * error + bits_to_float(old[j]);
                const int tagged = (int)((float_to_bits(cost) & upper) | j);
                best = tagged < best ? tagged : best;
            }
            to[i * BUTTERFLIES + k] = bits_to_float((u32)best);
            word[e][i] = funnel(word[e][i], (u32)best, BITS);
        }
    }
}

// `COUNT` coordinates from `first` on; `which` says where the costs are.
template <int COUNT, bool KEEP>
DEVICE void forward(const Space& space, int first, int& which, const Levels& level, u32 upper, int vector, int lane) {
    const float* y = space.y(vector) + first;
    float *from = space.metric(which, vector), *to = space.metric(1 - which, vector);
    u32* kept = space.kept() + vector * STATES + lane;
    Words word;
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int i = 0; i < BRANCHES; i++) word[e][i] = 0;
#pragma unroll 1
    for (int group = 0; group < COUNT; group += STEPS) {
        const int stop = group + STEPS < COUNT ? group + STEPS : COUNT;
#pragma unroll UNROLLED
        for (int s = group; s < stop; s++) {
            step(from, to, y[s], level, upper, word, lane);
            sync_warp();
            float* other = from;
            from = to, to = other;
        }
        if (KEEP) {
#pragma unroll
            for (int e = 0; e < EACH; e++)
#pragma unroll
                for (int i = 0; i < BRANCHES; i++) kept[i * BUTTERFLIES + e * LANES] = word[e][i];
            kept += VECTORS * STATES;
        }
    }
    which ^= COUNT % 2;
    sync_warp();
}

// Follow the best way back through one word a state, of COUNT steps.
template <int COUNT, bool RECORD>
DEVICE u32 back_through(const u32* kept, u16* windows, u32 state, int lane) {
#pragma unroll
    for (int s = COUNT - 1; s >= 0; s--) {
        const u32 symbol = kept[state] >> (32 - BITS * (COUNT - s)) & (BRANCHES - 1);
        const u32 window = state << BITS | symbol;
        if (RECORD && lane == 0) windows[s] = (u16)window;
        state = window % STATES;
    }
    return state;
}

// Follow the best way back over COUNT coordinates, and give the state in which it began.
template <int COUNT, bool RECORD>
DEVICE u32 back(const Space& space, u32 state, int vector, int lane) {
    constexpr int WHOLE = COUNT / STEPS;
    const u32* kept = space.kept() + vector * STATES;
    u16* windows = space.windows(vector);
    state = back_through<COUNT % STEPS, RECORD>(kept + WHOLE * VECTORS * STATES, windows + WHOLE * STEPS, state, lane);
#pragma unroll 1
    for (int group = WHOLE - 1; group >= 0; group--)
        state = back_through<STEPS, RECORD>(kept + group * VECTORS * STATES, windows + group * STEPS, state, lane);
    return state;
}

// The state of least cost, the first of several.
DEVICE u32 cheapest(const float* metric, int lane) {
    u32 least = 0xffffffffu, state = STATES;
#pragma unroll
    for (int i = 0; i < STATES; i += LANES) {
        const u32 cost = float_to_bits(metric[i + lane]) & ~(BRANCHES - 1u);
        if (cost < least) least = cost, state = i + lane;
    }
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) {
        const u32 cost = shuffle_xor(least, mask), other = shuffle_xor(state, mask);
        if (cost < least || (cost == least && other < state)) least = cost, state = other;
    }
    return state;
}

// Read a vector and rotate it: coordinates of unit variance, and its length.
DEVICE float read_and_rotate(float (&y)[PER_LANE], const void* x, long long vector, const signed char* signs, int lane) {
    float peak = 0.0f, square = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        y[i] = finite(read(x, vector * D + lane * PER_LANE + i, INPUT));
        peak = fmaxf(peak, fabsf(y[i]));
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) peak = fmaxf(peak, shuffle_xor(peak, mask));
    const Range range = range_of(peak);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) y[i] *= range.down;
    rotate(y, Signs<ROUNDS, PER_LANE>(signs, lane), lane);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) square += y[i] * y[i];
    square = sum_of_warp(square);
    const float unit = square > 0.0f ? rsqrt_(square / D) : 1.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) y[i] *= unit;
    return length_of(sqrtf(square), range.up);
}

// Write the codes and the scale of a vector whose windows are known.
DEVICE void write(const Space& space, int vector, float size, const float* table, u8* codes, u8* scales, long long place,
                  int lane) {
    const u16* windows = space.windows(vector);
    float along = 0.0f, energy = 0.0f;
    if (RULE) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float level = table[windows[lane * PER_LANE + i]];
            along += space.y(vector)[lane * PER_LANE + i] * level;
            energy += level * level;
        }
    }
    if (RULE > 1) along = sum_of_warp(along);
    if (RULE % 2) energy = sum_of_warp(energy);
    if (lane == 0) store(scales, place, stored_scale(size, along, energy), SCALES);
    if (lane >= D / 8) return;
    u32 eight[4], octets = 0;
    load_words<4, 16>((const u8*)(windows + 8 * lane), eight);
#pragma unroll
    for (int i = 0; i < 8; i++) octets |= (eight[i / 2] >> 16 * (i % 2) & (BRANCHES - 1)) << BITS * i;
    u8* to = codes + place * ROW + lane * BITS;
    if (BITS == 2) {
        *(u16*)to = (u16)octets;
    } else {
#pragma unroll
        for (int i = 0; i < BITS; i++) to[i] = (u8)(octets >> 8 * i);
    }
}

KERNEL(THREADS, BLOCKS) encode_trellis(const void* __restrict__ x, const int* __restrict__ index,
                                       const int* __restrict__ slot, const float* __restrict__ table,
                                       const signed char* __restrict__ signs, const u8*, const u8*, u8* codes, u8* scales,
                                       int layers, int batch, int count, int kv_heads, int slots) {
    ARENA u8 arena[];
    const int lane = thread() % 32, mine = lane / LANES, own = lane % LANES;
    const Space space = {arena + thread() / 32 * SPACE};
    // The bits of a cost that are not lent, in a register: with two constants, tagging would take two instructions.
    const u32 upper = ~(BRANCHES - 1u) ^ (u32)(layers >> 31);
    Levels level;
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int i = 0; i < BRANCHES; i++)
#pragma unroll
            for (int j = 0; j < BRANCHES; j++)
                level[e][i][j] = table[(i * BUTTERFLIES + e * LANES + own) * BRANCHES + j];

    const u32 vectors = (u32)batch * count * kv_heads, stride = blocks_x() * WARPS * VECTORS;
    const int held = index[0];
    for (u32 group = (block_x() * WARPS + thread() / 32) * VECTORS; group < vectors; group += stride) {
        // Of vector `group + mine`; a negative place drops it.
        const u32 one = group + mine, some = one < vectors ? one : vectors - 1, token = some / kv_heads;
        const int at = slot[token];
        const bool wanted = one < vectors && at >= 0 && at < slots && held >= 0 && held < layers;
        if (!any_lane(wanted)) continue;
        float size[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const u32 vector = group + v < vectors ? group + v : vectors - 1;
            float y[PER_LANE];
            size[v] = read_and_rotate(y, x, vector, signs, lane);
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) space.y(v)[lane * PER_LANE + i] = y[i];
        }
        // In which state the ring closes.
        int which = 0;
#pragma unroll
        for (int i = 0; i < STATES; i += LANES) space.metric(0, mine)[i + own] = 0.0f;
        sync_warp();
        forward<DEPTH, false>(space, D - DEPTH, which, level, upper, mine, own);
        forward<DEPTH, true>(space, 0, which, level, upper, mine, own);
        u32 seam = cheapest(space.metric(which, mine), own);
        seam = back<DEPTH, false>(space, seam, mine, own);
        sync_warp();
#pragma unroll
        for (int i = 0; i < STATES; i += LANES) space.metric(which, mine)[i + own] = i + own == seam ? 0.0f : BARRED;
        sync_warp();
        forward<D, true>(space, 0, which, level, upper, mine, own);
        back<D, true>(space, seam, mine, own);
        sync_warp();
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const u32 vector = group + v < vectors ? group + v : vectors - 1;
            const int at = slot[vector / kv_heads];
            const long long row = (long long)held * batch + vector / kv_heads / count;
            if (group + v < vectors && at >= 0 && at < slots && held >= 0 && held < layers)
                write(space, v, size[v], table, codes, scales, (row * kv_heads + vector % kv_heads) * slots + at, lane);
        }
        sync_warp();
    }
}
