// Code new tokens and write them into the cache in one pass: rotate, normalize, assign, scale, pack.
//
// A warp takes a tile of 16 tokens of one head at a time. Lane (g, t), g = lane / 4 and t = lane % 4, holds a share
// (assign.cuh) of the vectors of tokens g and g + 8. Of a Hadamard transform, tensor cores do the four bits of a
// coordinate's index that are t and the lowest of r, and butterflies in registers the others. Their product takes numbers
// of 8 bits: anything finer than bfloat16 goes through as a sum of two. Vectors of bfloat16 that are rotated here are read
// one tile ahead.
//
// Compiled with: D (a power of two), BITS, BOOK, SCALES and INPUT (0 float, 1 bfloat16, 2 half), ROUNDS, BLOCKS (per
// multiprocessor), RULE (0 norm, 1 preserve, 2 unbiased, 3 least squares).
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr bool AHEAD = INPUT == 1 && ROUNDS > 0;

// Four coordinates of two vectors, in bfloat16, times the basis.
DEVICE void turn(float (&out)[2][4], const u32 (&x)[4], const u32 (&basis)[2][2]) {
#pragma unroll
    for (int u = 0; u < 2; u++) multiply_bfloats(out[u], x[0], x[1], x[2], x[3], basis[u][0], basis[u][1]);
}

// One round without its factor 1 / sqrt(D): a[] and b[] are the lane's shares of two vectors.
DEVICE void butterflies(float (&a)[HELD], float (&b)[HELD]) {
#pragma unroll
    for (int half = 4; half < HELD; half *= 2)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (!(i & half)) {
                const float p = a[i], q = b[i];
                a[i] = p + a[i + half], a[i + half] = p - a[i + half];
                b[i] = q + b[i + half], b[i + half] = q - b[i + half];
            }
}

DEVICE void transform(float (&a)[HELD], float (&b)[HELD], const u32 (&basis)[2][2]) {
#pragma unroll
    for (int i = 0; i < HELD; i += 4) {
        float out[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        u32 x[4];
        const float* from[4] = {a + i, b + i, a + i + 2, b + i + 2};
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = pack_bfloats(from[k][0], from[k][1]);
        turn(out, x, basis);
#pragma unroll
        for (int k = 0; k < 4; k++)
            x[k] = pack_bfloats(from[k][0] - bits_to_float(x[k] << 16), from[k][1] - bits_to_float(x[k] & 0xffff0000u));
        turn(out, x, basis);
#pragma unroll
        for (int c = 0; c < 4; c++) a[i + c] = out[c / 2][c % 2], b[i + c] = out[c / 2][2 + c % 2];
    }
    butterflies(a, b);
}

// Read a lane's share of two vectors of bfloat16.
DEVICE void fetch(u32 (&words)[2][HELD / 2], const u8* first, const u8* second, int t) {
    const u8* from[2] = {first + 2 * t * RUN, second + 2 * t * RUN};
#pragma unroll
    for (int v = 0; v < 2; v++)
#pragma unroll
        for (int run = 0; run < 4; run++) {
            u32 some[RUN / 2];
            load_words<RUN / 2, RUN >= 8 ? 16 : 8>(from[v] + run * D / 2, some);
#pragma unroll
            for (int k = 0; k < RUN / 2; k++) words[v][run * RUN / 2 + k] = some[k];
        }
}

// Transform them as they are, with the signs of the first round.
DEVICE void transform_packed(float (&a)[HELD], float (&b)[HELD], const u32 (&words)[2][HELD / 2],
                             const u32* flips, const u32 (&basis)[2][2]) {
    u32 flip[HELD / 2];
    load_words<HELD / 2, 16>((const u8*)flips, flip);
#pragma unroll
    for (int i = 0; i < HELD; i += 4) {
        float out[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        u32 x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = words[k % 2][i / 2 + k / 2] ^ flip[i / 2 + k / 2];
        turn(out, x, basis);
#pragma unroll
        for (int c = 0; c < 4; c++) a[i + c] = out[c / 2][c % 2], b[i + c] = out[c / 2][2 + c % 2];
    }
    butterflies(a, b);
}

// Read the lane's share of a vector, with the signs of the first round.
DEVICE void read_share(float (&y)[HELD], const void* x, long long vector, int t, const u32* flips) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const u32 flip = !ROUNDS ? 0u : i % 2 ? flips[i / 2] & 0x80000000u : flips[i / 2] << 16;
        y[i] = bits_to_float(float_to_bits(read(x, vector * D + coordinate(t, i), INPUT)) ^ flip);
    }
}

// Bring a vector's numbers into range; give the power of two that undoes it.
DEVICE float tame(float (&y)[HELD]) {
    float peak = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        y[i] = finite(y[i]);
        peak = fmaxf(peak, fabsf(y[i]));
    }
    peak = fmaxf(peak, shuffle_xor(peak, 1));
    peak = fmaxf(peak, shuffle_xor(peak, 2));
    const Range range = range_of(peak);
#pragma unroll
    for (int i = 0; i < HELD; i++) y[i] *= range.down;
    return range.up;
}

DEVICE float sum_of_four(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Lanes of even t finish the first of two vectors, and those of odd t the second.
template <class T>
DEVICE T own(const T (&pair)[2], int t) { return t % 2 ? pair[1] : pair[0]; }

// The sum over four lanes of `even`, where t is even, or of `odd`.
DEVICE float sums_of_four(float even, float odd, int t) {
    const float x = (t % 2 ? odd : even) + shuffle_xor(t % 2 ? even : odd, 1);
    return x + shuffle_xor(x, 2);
}

// Quotients of numbers below 2^32 without a division.
struct Divisor {
    u32 by, inverse;

    DEVICE u32 quotient(u32 n) const {
        const u32 least = multiply_high(n, inverse);  // or one less than the quotient
        return least + (n - least * by >= by);
    }
};

// Tokens are numbered over all rows.
struct Tile {
    u32 head, token[2];
    int slot[2];  // or -1
};

DEVICE Tile tile_of(u32 index, const Divisor& heads, u32 tokens, const int* slot, int g) {
    Tile tile;
    const u32 run = heads.quotient(index);
    tile.head = index - run * heads.by;
#pragma unroll
    for (int v = 0; v < 2; v++) {
        const u32 token = 16 * run + 8 * v + g;
        tile.token[v] = token < tokens ? token : tokens - 1;
        tile.slot[v] = token < tokens ? slot[token] : -1;
    }
    return tile;
}

KERNEL(THREADS, BLOCKS) encode(const void* __restrict__ x, const int* __restrict__ index, const int* __restrict__ slot,
                          const float* __restrict__ levels, const signed char* __restrict__ signs, const u8*, const u8*,
                          u8* codes, u8* scales, int layers, int batch, int count, int kv_heads, int slots) {
    SHARED float thresholds[LEVELS], level_of[LEVELS];
    SHARED u8 table[CELLS];
    constexpr int PAIRS = HELD / 2;
    SHARED u32 flips_of[4 * PAIRS];  // signs of the first round, of a lane's pairs of coordinates
    const u32 tokens = (u32)batch * count, tiles = (tokens + 15) / 16 * kv_heads, stride = blocks_x() * WARPS;
    if (!tiles) return;
    const Divisor heads = {(u32)kv_heads, 0xffffffffu / kv_heads}, rows = {(u32)count, 0xffffffffu / count};
    const int lane = thread() % 32, g = lane / 4, t = lane % 4, held = index[0];
    const auto bytes_of = [&](const Tile& tile, int v) {
        return (const u8*)x + ((long long)tile.token[v] * kv_heads + tile.head) * (2 * D);
    };
    u32 now = block_x() * WARPS + thread() / 32, words[2][HELD / 2];
    Tile tile;
    if (now < tiles) {
        tile = tile_of(now, heads, tokens, slot, g);
        if (AHEAD) fetch(words, bytes_of(tile, 0), bytes_of(tile, 1), t);
    }
    for (int i = thread(); i < 4 * PAIRS; i += THREADS) {
        const int at = coordinate(i / PAIRS, 2 * (i % PAIRS));
        flips_of[i] = ROUNDS ? (signs[at] < 0 ? 0x8000u : 0u) | (signs[at + 1] < 0 ? 0x80000000u : 0u) : 0u;
    }
    const u32* flips = flips_of + t * PAIRS;
    Coder coder;
    coder.prepare(levels, thresholds, level_of, table, THREADS);

    u32 basis[2][2];
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            // Row 2 t + e of the basis's upper (k = 1) or lower half, column g of its left or right: inner bits t, e, k.
            const u32 even = parity(t & g / 2) ^ (u & k), odd = even ^ (g & 1);
            basis[u][k] = 0x3f803f80u | even << 15 | odd << 31;
        }

    while (now < tiles) {
        float y[2][HELD], square[2], grown[2] = {1.0f, 1.0f};
#pragma unroll 1
        for (int attempt = 0; attempt < 2; attempt++) {
            if (AHEAD && !attempt) {
                transform_packed(y[0], y[1], words, flips, basis);
            } else {
#pragma unroll
                for (int v = 0; v < 2; v++) {
                    read_share(y[v], x, (long long)tile.token[v] * kv_heads + tile.head, t, flips);
                    if (attempt) grown[v] = tame(y[v]);
                }
                if (ROUNDS) transform(y[0], y[1], basis);
            }
#pragma unroll
            for (int round = 1; round < ROUNDS; round++) {
#pragma unroll
                for (int i = 0; i < HELD; i++) {
                    const float sign = signs[round * D + coordinate(t, i)];
                    y[0][i] *= sign, y[1][i] *= sign;
                }
                transform(y[0], y[1], basis);
            }
            bool fine = true;
#pragma unroll
            for (int v = 0; v < 2; v++) {
                square[v] = 0.0f;
#pragma unroll
                for (int i = 0; i < HELD; i++) square[v] += y[v][i] * y[v][i];
                square[v] = sum_of_four(square[v]);
                fine = fine && square[v] > 1e-24f && square[v] < 1e36f;
            }
            if (!any_lane(!fine)) break;
        }
        const u32 next = now + stride;
        Tile after = tile;
        if (next < tiles) {
            after = tile_of(next, heads, tokens, slot, g);
            if (AHEAD) fetch(words, bytes_of(after, 0), bytes_of(after, 1), t);
        }

        Coded made[2];
        long long place[2];
        bool wanted[2];
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const u32 row = rows.quotient(tile.token[v]);
            place[v] = (((long long)held * batch + row) * kv_heads + tile.head) * slots + tile.slot[v];
            wanted[v] = tile.slot[v] >= 0 && tile.slot[v] < slots && held >= 0 && held < layers;
            coder.code(y[v], square[v] > 0.0f ? rsqrt_(square[v] / D) : 1.0f, made[v]);
            store_codes(codes + place[v] * L::ROW, made[v], wanted[v], t);
        }
        float rounds = 1.0f, along = 0.0f, energy = 0.0f;
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) rounds *= rsqrt_(D);
        if (RULE > 1) along = sums_of_four(made[0].along, made[1].along, t);
        if (RULE % 2) energy = sums_of_four(made[0].energy, made[1].energy, t);
        const float size = length_of(sqrtf(own(square, t)) * rounds, own(grown, t));
        if (t < 2 && own(wanted, t)) store(scales, own(place, t), stored_scale(size, along, energy), SCALES);
        now = next, tile = after;
    }
}
