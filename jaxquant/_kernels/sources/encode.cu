// Code new tokens and write them into the cache in one pass: rotate, normalize, assign, scale, pack.
//
// A warp takes 16 vectors at a time. Lane (g, t), g = lane / 4 and t = lane % 4, holds coordinates i D/4 + t D/16 + r,
// i < 4 and r < D/16, of vectors g and g + 8: those whose codes share bytes. Of a Hadamard transform, tensor cores do
// the four bits of a coordinate's index that are t and the lowest of r, and butterflies in registers the others. Their
// product takes numbers of 8 bits: anything finer than bfloat16 goes through as a sum of two.
//
// Compiled with: D (a power of two), BITS, BOOK, SCALES and INPUT (0 float, 1 bfloat16, 2 half), ROUNDS, BLOCKS (per
// multiprocessor), RULE (0 norm, 1 preserve, 2 unbiased, 3 least squares).
typedef Layout<D, BITS> L;
constexpr int WARPS = 4, THREADS = 32 * WARPS, LEVELS = 1 << BITS;
constexpr int RUN = D / 16, HELD = D / 4, PLANES = L::PER_WORD / 4, SPAN = HELD / PLANES;  // SPAN: field bytes of a lane

DEVICE int coordinate(int t, int i) { return i / RUN * (D / 4) + t * RUN + i % RUN; }

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

// Read two vectors of bfloat16, with the signs of the first round, and transform them as they are.
DEVICE void read_and_transform(float (&a)[HELD], float (&b)[HELD], const u8* first, const u8* second, int t,
                               const u32 (&flips)[HELD / 2], const u32 (&basis)[2][2]) {
    const u8* from[2] = {first + 2 * t * RUN, second + 2 * t * RUN};
    u32 words[2][HELD / 2];
#pragma unroll
    for (int v = 0; v < 2; v++)
#pragma unroll
        for (int run = 0; run < 4; run++) {
            u32 some[RUN / 2];
            load_words<RUN / 2, RUN >= 8 ? 16 : 8>(from[v] + run * D / 2, some);
#pragma unroll
            for (int k = 0; k < RUN / 2; k++) words[v][run * RUN / 2 + k] = some[k] ^ flips[run * RUN / 2 + k];
        }
#pragma unroll
    for (int i = 0; i < HELD; i += 4) {
        float out[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        const u32 x[4] = {words[0][i / 2], words[1][i / 2], words[0][i / 2 + 1], words[1][i / 2 + 1]};
        turn(out, x, basis);
#pragma unroll
        for (int c = 0; c < 4; c++) a[i + c] = out[c / 2][c % 2], b[i + c] = out[c / 2][2 + c % 2];
    }
    butterflies(a, b);
}

// Read the lane's share of a vector, with the signs of the first round.
DEVICE void read_share(float (&y)[HELD], const void* x, long long vector, int t, const u32 (&flips)[HELD / 2]) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const u32 flip = i % 2 ? flips[i / 2] & 0x80000000u : flips[i / 2] << 16;
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

// Codes by cells. Thresholds lie on a grid: of half the step of the levels, or of the whole one where they are
// equidistant. A cell (i - 1, i] of it is an entry of a table: a level whose lowest bits are the code instead.
constexpr bool TREE = BOOK == TABLE;
constexpr int CELLS = TREE ? 2 : BOOK == UNIFORM ? LEVELS : 513;
struct Cells {
    float origin, per_cell;  // index = ceil((y * per_cell + origin, clamped to [0, 1]) * (CELLS - 1))
};

DEVICE Cells cells_of(const float* levels) {
    const float low = levels[0], high = levels[LEVELS - 1];
    Cells cells;
    if (BOOK == UNIFORM) {
        cells.per_cell = (LEVELS - 1) / (high - low);
        cells.origin = LEVELS / 2 - 1 - EPSILON / 2;  // so that a third of it, rounded up, puts 0 into the lower cell
    } else if (BOOK == SIGNED) {
        cells.per_cell = 2.0f * 127.0f / high;
        cells.origin = 256.0f;
    } else {
        cells.per_cell = 2.0f * 255.0f / (high - low);
        cells.origin = 1.0f - low * cells.per_cell;
    }
    cells.per_cell /= CELLS - 1;
    cells.origin /= CELLS - 1;
    return cells;
}

DEVICE u32 stored(int rank) { return BITS != 4 ? rank : rank >= 8 ? rank - 8 : 15 - rank; }

// The number of thresholds below y, which form a tree: entry 1 is asked first, then 2 or 3, then one of 4 to 7, ...
DEVICE int assign(float y, const float* thresholds) {
    int at = 1;
#pragma unroll
    for (int bit = 0; bit < BITS; bit++) at = 2 * at + (y > thresholds[at]);
    return at - LEVELS;
}

// Code a vector whose coordinates are y * unit with unit variance, and write it. `size` is its length.
DEVICE void write(const float (&y)[HELD], float unit, float size, const Cells& cells, const u32* table,
                  const float* thresholds, const float* level_of, u8* codes, u8* scales, long long place, bool wanted,
                  int t) {
    const float per_cell = unit * cells.per_cell, magic = 8388608.0f;  // floats from 2^23 on are integers
    float along = 0.0f, energy = 0.0f;
    u32 field[SPAN / 4], third[SPAN / 4];
#pragma unroll
    for (int i = 0; i < SPAN / 4; i++) field[i] = third[i] = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int byte = i % SPAN, plane = i / SPAN;
        u32 code;
        float level;
        if (TREE) {
            code = assign(y[i] * unit, thresholds);
            level = level_of[code];
        } else {
            const float cell = multiply_add_up(multiply_add_clamped(y[i], per_cell, cells.origin), CELLS - 1, magic);
            const u32 entry = table[float_to_bits(cell) - 0x4b000000u];
            code = entry & (LEVELS - 1);
            level = bits_to_float(entry);
        }
        if (RULE > 1) along += y[i] * level;
        if (RULE % 2) energy += level * level;
        field[byte / 4] += (BITS == 3 ? code & 3 : code) << (8 * (byte % 4) + L::FIELD * plane);
        if (BITS == 3) third[byte / 4] += (code >> 2) << (8 * (byte % 4) + 2 * plane);
    }
    if (RULE > 1) along = sum_of_four(along) * unit;
    if (RULE % 2) energy = sum_of_four(energy);

    // Bytes run with a coordinate's low bits; at 4 bits a lane's are two runs of D / 16, otherwise one.
    u8* to = codes + place * L::ROW;
#pragma unroll
    for (int i = 0; i < SPAN; i += 4)
        if (wanted) *(u32*)(to + i / RUN * (D / 4) + t * RUN + i % RUN) = field[i / 4];
    if (BITS == 3) {
        // Third bits of lanes t and t + 2 share bytes.
#pragma unroll
        for (int i = 0; i < SPAN / 4; i++) {
            third[i] <<= t / 2;
            third[i] |= shuffle_xor(third[i], 2);
            if (wanted && t < 2) *(u32*)(to + L::STRIDE + t * RUN + 4 * i) = third[i];
        }
    }
    if (wanted && t == 0) store(scales, place, stored_scale(size, along, energy), SCALES);
}

KERNEL(THREADS, BLOCKS) encode(const void* __restrict__ x, const int* __restrict__ index, const int* __restrict__ slot,
                          const float* __restrict__ levels, const signed char* __restrict__ signs, const u8*, const u8*,
                          u8* codes, u8* scales, int layers, int batch, int count, int kv_heads, int slots) {
    SHARED float thresholds[LEVELS], level_of[LEVELS];
    SHARED u32 table[CELLS];
    // A tree in an array: threshold i comes at the depth that the zeros at its end say.
    for (int i = thread(); i < LEVELS; i += THREADS) {
        level_of[i] = levels[i];
        if (i > 0) {
            int stride = 1;
            while (i % (2 * stride) == 0) stride *= 2;
            thresholds[(LEVELS / 2 + i / 2) / stride] = (levels[i] + levels[i - 1]) / 2;
        }
    }
    sync();
    const Cells cells = cells_of(level_of);
    for (int i = thread(); i < CELLS && !TREE; i += THREADS) {
        const int rank = assign((((float)i - 0.5f) / (CELLS - 1) - cells.origin) / cells.per_cell, thresholds);
        table[i] = (float_to_bits(level_of[rank]) & ~(LEVELS - 1u)) | stored(rank);
    }
    sync();

    const int lane = thread() % 32, g = lane / 4, t = lane % 4;
    u32 basis[2][2], flips[HELD / 2];
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            // Row 2 t + e of the basis's upper (k = 1) or lower half, column g of its left or right: inner bits t, e, k.
            const u32 even = parity(t & g / 2) ^ (u & k), odd = even ^ (g & 1);
            basis[u][k] = 0x3f803f80u | even << 15 | odd << 31;
        }
#pragma unroll
    for (int i = 0; i < HELD / 2; i++) {
        flips[i] = 0;
        if (ROUNDS)
            flips[i] = (signs[coordinate(t, 2 * i)] < 0 ? 0x8000u : 0u) |
                       (signs[coordinate(t, 2 * i + 1)] < 0 ? 0x80000000u : 0u);
    }

    // Vectors go by tokens, then heads, where there are tokens enough for a warp, and by heads, then tokens, otherwise.
    const u32 vectors = (u32)batch * count * kv_heads, stride = blocks_x() * WARPS * 16;
    const u32 inner = count >= 16 ? count : kv_heads, outer = count >= 16 ? kv_heads : count;
    const int held = index[0];
    for (u32 group = (block_x() * WARPS + thread() / 32) * 16; group < vectors; group += stride) {
        long long vector[2], place[2];
        bool wanted[2];
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const u32 one = group + g + 8 * v, some = one < vectors ? one : vectors - 1;
            const u32 quick = some % inner, rest = some / inner, slow = rest % outer, row = rest / outer;
            const u32 token = row * count + (count >= 16 ? quick : slow), head = count >= 16 ? slow : quick;
            const int at = slot[token];
            vector[v] = (long long)token * kv_heads + head;
            wanted[v] = one < vectors && at >= 0 && at < slots && held >= 0 && held < layers;
            place[v] = (((long long)held * batch + row) * kv_heads + head) * slots + at;
        }
        float y[2][HELD], square[2], grown[2] = {1.0f, 1.0f};
#pragma unroll 1
        for (int attempt = 0; attempt < 2; attempt++) {
            if (INPUT == 1 && ROUNDS && !attempt) {
                const u8* bytes = (const u8*)x;
                read_and_transform(y[0], y[1], bytes + vector[0] * 2 * D, bytes + vector[1] * 2 * D, t, flips, basis);
            } else {
#pragma unroll
                for (int v = 0; v < 2; v++) {
                    read_share(y[v], x, vector[v], t, flips);
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
        float rounds = 1.0f;
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) rounds *= rsqrt_(D);
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const float unit = square[v] > 0.0f ? rsqrt_(square[v] / D) : 1.0f;
            const float size = length_of(sqrtf(square[v]) * rounds, grown[v]);
            write(y[v], unit, size, cells, table, thresholds, level_of, codes, scales, place[v], wanted[v], t);
        }
    }
}
