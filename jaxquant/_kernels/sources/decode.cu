// Attention of one token per row over packed codes: every warp streams tiles of 32 or 64 tokens through shared memory
// into tensor cores.
//
// Scores are K q^T, tokens by heads, outputs V^T P^T, coordinates by heads, so that up to 8 query heads fill the narrow
// side of the tensor cores. Queries have 16 bits, in two columns of bytes (where keys have a trellis code, two columns of
// halves, the second of what the first left), so a product of keys takes 4 heads and one of values 8, in the order 0, 4,
// 1, 5, ... Lane (g, t), g = lane / 4 and t = lane % 4, reads the t-th share of keys 8 j + mix(g) and the g-th share of
// values 4 m + t: the fragments that the two products want. Between the products, weights are transposed by `movmatrix`;
// lane (g, t) has those of keys 8 j + mix(g) and heads 4 k + t.
//
// Weights are 2^(score - peak), with a peak that moves only when a score leaves it behind by more than 8, and values'
// scales enter them times a power of two that keeps them well inside a half.
//
// Compiled with: D, HEADS (that share a kv head), KEY_BITS, VALUE_BITS, KEY_BOOK, VALUE_BOOK, KEY_SCALES, VALUE_SCALES,
// QUERIES (0 float, 1 bfloat16, 2 half), OUTPUT, KEY_ROUNDS, VALUE_ROUNDS, SOFT_CAP, SLIDING (0 or 1), WARPS, BLOCKS (per
// multiprocessor), TILE (tokens), STAGES (tiles of a warp in shared memory), KEY_WINDOW and VALUE_WINDOW (see
// windows.cuh), EVEN (1 where slots are a multiple of 8), PAGE (tokens of a page, a multiple of TILE, or 0 where a row's
// tokens are neighbours), WHOLE (1 where a row is one part, whose output is written here, 0 where `combine` joins them), and
// what join.cuh is.

constexpr int COLUMNS = HEADS > 8 && D <= 128 ? 16 : 8;
constexpr int SIDES = COLUMNS / 8;               // products of values
constexpr int FOURS = (HEADS < COLUMNS ? HEADS + 3 : COLUMNS) / 4;  // products of keys
constexpr int THREADS = 32 * WARPS;
constexpr int EIGHTS = TILE / 8;
constexpr int CHAINS = TILE > 32 && !WHOLE ? Keys::TERMS : 1;  // of products that wait for each other
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float FAR = -1e30f;

constexpr int KEY_WORDS = Keys::Mine::N;
constexpr int KEY_STEPS = KEY_WORDS * Keys::PER_WORD / 2;
constexpr int VALUE_WORDS = Values::Mine::N;
constexpr int VALUE_TILES = VALUE_WORDS * Values::PER_WORD / 2;

// Levels that are read at once: all, or one where tables are made of them.
DEVICE constexpr int few(Book book, int bits) { return book == TABLE || book == TRELLIS ? 1 : 1 << bits; }
constexpr int FEW_KEYS = few(KEY_BOOK, KEY_BITS), FEW_VALUES = few(VALUE_BOOK, VALUE_BITS);

constexpr bool KEY_HALVES = KEY_BOOK == TABLE || KEY_BOOK == TRELLIS;
constexpr bool TWO_HALVES = KEY_BOOK == TRELLIS;  // of a query: what the first one leaves is another column

// A score: integers or floats of both parts of the query.
DEVICE float whole(int upper, int lower) {
    return D > 128 ? 256.0f * (float)upper + (float)lower : (float)(256 * upper + lower);
}
DEVICE float whole(float x, float rest) { return TWO_HALVES ? x + rest : x; }
DEVICE void product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_bytes<KEY_BOOK == SIGNED>(c, a0, a1, a2, a3, b0, b1);
}
DEVICE void product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { multiply(c, a0, a1, a2, a3, b0, b1); }
template <Book>
struct ScoreOf { typedef int type; };
template <>
struct ScoreOf<TABLE> { typedef float type; };
template <>
struct ScoreOf<TRELLIS> { typedef float type; };
typedef ScoreOf<KEY_BOOK>::type Score;

DEVICE int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

KERNEL(THREADS, BLOCKS) decode(
    const void* __restrict__ q, const int* __restrict__ layer, const int* __restrict__ index,
    const int* __restrict__ length, const int* __restrict__ exact_from, const float* __restrict__ scale,
    const float* __restrict__ soft_cap, const int* __restrict__ sliding, const int* __restrict__ table,
    const u8* __restrict__ key_codes, const u8* __restrict__ key_scales, const float* __restrict__ key_levels,
    const signed char* __restrict__ key_signs,
    const u8* __restrict__ value_codes, const u8* __restrict__ value_scales, const float* __restrict__ value_levels,
    const signed char* __restrict__ value_signs, float* __restrict__ parts, float* __restrict__ sums,
    void* __restrict__ out, float* __restrict__ lse, int layers, int batch, int kv_heads, int slots, int sinks,
    int window, int all_layers) {
    ARENA u8 arena[];
    constexpr int PITCH = D + 8, OUT_PITCH = D + 1;  // against bank conflicts
    SHARED u16 queries[(1 + TWO_HALVES) * COLUMNS * PITCH];
    SHARED float warp_peak[WARPS][COLUMNS], warp_total[WARPS][COLUMNS];
    SHARED float bias_of[COLUMNS];
    constexpr int FRAGMENTS = 2 * KEY_STEPS * FOURS;
    SHARED u32 fragments[KEY_HALVES ? 1 : 32 * FRAGMENTS];
    SHARED u16 key_table[KEY_BOOK == TABLE ? 256 : 2], value_table[VALUE_BOOK == TABLE ? 256 : 2];

    constexpr int PASSES = (HEADS + COLUMNS - 1) / COLUMNS;
    const int pair = block_x() / PASSES, first_head = block_x() % PASSES * COLUMNS, part = block_y();
    const int heads = HEADS - first_head < COLUMNS ? HEADS - first_head : COLUMNS;
    const int row = pair / kv_heads, lane = thread() % 32, warp = thread() / 32, g = lane / 4, t = lane % 4;

    // What waits for nothing is asked for first.
    const int held = clamp(index[0], layers - 1), lengths = clamp(layer[0], all_layers - 1) * batch + row;
    const long long base = ((long long)row * kv_heads + pair % kv_heads) * HEADS + first_head;
    constexpr int PER_LANE = (D + 31) / 32, PER_WARP = (COLUMNS + WARPS - 1) / WARPS;
    const float temperature = scale[0] * (SOFT_CAP ? 1.0f : LOG2_E);
    float turned_query[PER_WARP][PER_LANE], some_keys[FEW_KEYS], some_values[FEW_VALUES];
#pragma unroll
    for (int k = 0; k < PER_WARP; k++)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int head = k * WARPS + warp, c = lane * PER_LANE + i;
            const bool there = head < heads && c < D;
            const float x = read(q, there ? (base + head) * D + c : base * D, QUERIES);
            turned_query[k][i] = there ? x * temperature : 0.0f;
        }
    const Signs<KEY_ROUNDS, PER_LANE> key_sign(key_signs, lane);
#pragma unroll
    for (int i = 0; i < FEW_KEYS; i++) some_keys[i] = key_levels[i];
#pragma unroll
    for (int i = 0; i < FEW_VALUES; i++) some_values[i] = value_levels[i];
    Keys::Books key_book;
    Values::Books value_book;
    key_book.prepare(FEW_KEYS > 1 ? some_keys : key_levels, key_table, THREADS);
    value_book.prepare(FEW_VALUES > 1 ? some_values : value_levels, value_table, THREADS);

    // The tokens of this block: its share of those that the row reads from codes.
    const int tokens = length[lengths], unexact = exact_from[lengths];
    int stop = tokens - window > unexact ? tokens - window : unexact;
    stop = (stop < tokens ? stop : tokens) - sinks;
    int first = SLIDING ? tokens - sliding[0] - sinks : 0;
    first = first > 0 ? first : 0;
    int share = stop > first ? (stop - first + blocks_y() - 1) / blocks_y() : 0;
    share = (share + TILE - 1) / TILE * TILE;
    first += part * share;
    stop = stop < first + share ? stop : first + share;

    const long long vectors = PAGE ? 0 : (((long long)held * batch + row) * kv_heads + pair % kv_heads) * slots;
    const u8* own_value_scales = value_scales + vectors * VALUE_SCALE_BYTES;
    const Source from = source_of(key_codes + vectors * Keys::L::ROW, value_codes + vectors * Values::L::ROW,
                                  key_scales + vectors * KEY_SCALE_BYTES, own_value_scales, lane);
    const Place place = {table + (long long)row * (slots / (PAGE ? PAGE : 1)), kv_heads, pair % kv_heads};

    // Tiles end inside the buffer: the last one may start before its tokens, which are masked.
    const int last_start = slots - TILE;
    const int mix = g / 2 + 4 * (g % 2);
    u8* stages = arena + TABLE_BYTES + warp * STAGES * STAGE;
    int at = (first & (PAGE ? ~(TILE - 1) : ~7)) + warp * TILE;  // a tile is part of one page
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        const int ahead = at + i * TILE * WARPS;
        if (ahead < stop)
            fetch(stages + i * STAGE, from, own_value_scales, place.of(ahead < last_start ? ahead : last_start), lane);
        end_group();
    }
    if constexpr (TABLE_BYTES) {
        int of_keys, of_values;
        prepare_windows<KEY_BITS, VALUE_BITS>(arena, key_levels, value_levels, THREADS, of_keys, of_values);
        give_table(key_book, arena, of_keys);
        give_table(value_book, arena, of_values);
    }

    // The queries: rotated, scaled, and as integers of 16 bits or as halves, in the order of their coordinates.
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < PER_WARP; k++) {
        if (k * WARPS + warp < heads) rotate(turned_query[k], key_sign, lane);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) largest = fmaxf(largest, fabsf(turned_query[k][i]));
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    if (lane == 0) warp_peak[warp][0] = largest;
    sync();
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, warp_peak[w][0]);
    // Queries become integers of 16 bits, or halves where keys are; `key_unit` undoes the factor.
    largest = largest > 1e-30f ? largest : 1e-30f;
    const float grow = (KEY_HALVES ? 256.0f : 32600.0f) / largest;
    const float key_unit = key_book.step * rsqrt_(D) / grow;
#pragma unroll
    for (int k = 0; k < PER_WARP; k++) {
        const int head = k * WARPS + warp;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int c = lane * PER_LANE + i;
            const float x = turned_query[k][i] * grow;
            if (head >= COLUMNS || c >= D) continue;
            u16* to = queries + head * PITCH + c;
            if (KEY_HALVES) {
                *to = (u16)pack_halves(x, 0.0f);
                if (TWO_HALVES) to[COLUMNS * PITCH] = (u16)pack_halves(x - half_to_float(*to), 0.0f);
            } else {
                const int factor = Keys::factor_at(c), integer = rint_(x / factor);
                *to = (u16)(short)integer;
                sum += factor * integer;
            }
        }
        float bias = -(float)sum * key_book.offset;
#pragma unroll
        for (int mask = 16; mask; mask /= 2) bias += shuffle_xor(bias, mask);
        if (lane == 0 && head < COLUMNS) bias_of[head] = bias;
    }
    sync();

    // Column g of product k: a byte of head 4 k + g / 2, the upper one where g is even. Halves: head 4 k + g / 2 in even
    // columns, and nothing in odd ones, or what the half left.
    const auto fragment = [&](int n) {
        const u16* head = queries + (4 * (n % FOURS) + g / 2) * PITCH;
        const int i = n / FOURS / Keys::PER_WORD, h = n / FOURS % Keys::PER_WORD;
        u32 both = 0;
#pragma unroll
        for (int e = 0; e < Keys::EACH; e++) {
            const int c = Keys::coordinate(t, i, h, e);
            if (TWO_HALVES) {
                both |= (u32)head[g % 2 * COLUMNS * PITCH + c] << 16 * e;
            } else if (KEY_HALVES) {
                both |= (c < 0 || g % 2 ? 0u : (u32)head[c]) << 16 * e;
            } else {
                const int x = c < 0 ? 0 : (int)(short)head[c];
                both |= (u32)((g % 2 ? x : (x - (int)(signed char)x) >> 8) & 255) << 8 * e;
            }
        }
        return both;
    };
    // Halves are twice as many and cost no arithmetic; bytes are made by all warps together.
    if (!KEY_HALVES) {
        for (int n = warp; n < FRAGMENTS; n += WARPS) fragments[32 * n + lane] = fragment(n);
        sync();
    }
    u32 query[KEY_STEPS][FOURS][2];
#pragma unroll
    for (int n = 0; n < FRAGMENTS; n++)
        query[n / FOURS / 2][n % FOURS][n / FOURS % 2] = KEY_HALVES ? fragment(n) : fragments[32 * n + lane];

    float peak[FOURS], total[FOURS], bias[FOURS], acc[VALUE_TILES][SIDES][4], offset_sum[SIDES][4];
    float grown = bits_to_float((u32)(127 + 100) << 23);  // factor in the weights that meet values
#pragma unroll
    for (int k = 0; k < FOURS; k++) peak[k] = FAR, total[k] = 0.0f, bias[k] = bias_of[4 * k + t];
#pragma unroll
    for (int side = 0; side < SIDES; side++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            offset_sum[side][c] = 0.0f;
#pragma unroll
            for (int i = 0; i < VALUE_TILES; i++) acc[i][side][c] = 0.0f;
        }

    int slot_of_stage = 0;
    for (; at < stop; at += TILE * WARPS) {
        const u8* stage = stages + slot_of_stage * STAGE;
        wait_for_all_but<STAGES - 2>();
        sync_warp();
        {
            const int free_stage = slot_of_stage == 0 ? STAGES - 1 : slot_of_stage - 1;
            const int ahead = at + (STAGES - 1) * TILE * WARPS;
            if (ahead < stop)
                fetch(stages + free_stage * STAGE, from, own_value_scales, place.of(ahead < last_start ? ahead : last_start),
                      lane);
            end_group();
        }
        slot_of_stage = slot_of_stage == STAGES - 1 ? 0 : slot_of_stage + 1;
        const int here = at < last_start ? at : last_start;
        const int begin = at > first ? at : first;  // tokens before it belong to another tile

        // weight[k][j]: of key 8 j + mix(g) and head 4 k + t.
        float weight[FOURS][EIGHTS], value_scale[EIGHTS];
#pragma unroll
        for (int first_j = 0; first_j < EIGHTS; first_j += 4) {
            Keys::Mine keys[4];
#pragma unroll
            for (int j = 0; j < 4; j++) keys[j].load(stage + (8 * (first_j + j) + mix) * Keys::L::ROW, t);
            Score score[FOURS][2][CHAINS][4];
#pragma unroll
            for (int k = 0; k < FOURS; k++)
#pragma unroll
                for (int c = 0; c < 8 * CHAINS; c++) score[k][c / 4 % 2][c / 8][c % 4] = 0;
#pragma unroll
            for (int i = 0; i < KEY_WORDS; i++) {
                u32 x[4][Keys::PER_WORD][Keys::TERMS];
#pragma unroll
                for (int j = 0; j < 4; j++) Keys::operands(keys[j], i, t, key_book, x[j]);
#pragma unroll
                for (int h = 0; h < Keys::PER_WORD; h += 2) {
                    const int step = (i * Keys::PER_WORD + h) / 2;
#pragma unroll
                    for (int s = 0; s < 2; s++)
#pragma unroll
                        for (int k = 0; k < FOURS; k++)
#pragma unroll
                            for (int e = 0; e < Keys::TERMS; e++)
                                product(score[k][s][e % CHAINS], x[2 * s][h][e], x[2 * s + 1][h][e], x[2 * s][h + 1][e],
                                        x[2 * s + 1][h + 1][e], query[step][k][0], query[step][k][1]);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int token = 8 * (first_j + j) + mix;
                const float key_scale = read(stage + KEY_SCALES_AT, token, KEY_SCALES) * key_unit;
                value_scale[first_j + j] = read(stage + VALUE_SCALES_AT, token, VALUE_SCALES);
#pragma unroll
                for (int k = 0; k < FOURS; k++) {
                    Score upper = 0, lower = 0;
#pragma unroll
                    for (int chain = 0; chain < CHAINS; chain++) {
                        upper += score[k][j / 2][chain][2 * (j % 2)];
                        lower += score[k][j / 2][chain][2 * (j % 2) + 1];
                    }
                    float x = (whole(upper, lower) + bias[k]) * key_scale;
                    if (SOFT_CAP) {
                        const float cap = soft_cap[0];
                        x = cap * LOG2_E * (1.0f - 2.0f / (1.0f + exp2_(x * (2.0f * LOG2_E / cap))));
                    }
                    weight[k][first_j + j] = x;
                }
            }
        }
        if (here < begin || here + TILE > stop) {
#pragma unroll
            for (int j = 0; j < EIGHTS; j++) {
                const int slot = here + 8 * j + mix;
                if (slot < begin || slot >= stop) {
#pragma unroll
                    for (int k = 0; k < FOURS; k++) weight[k][j] = -INFINITY;
                    value_scale[j] = 0.0f;
                }
            }
        }

        float most[FOURS], widest = 0.0f;
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) widest = fmaxf(widest, fabsf(value_scale[j]));
        bool left_behind = widest * grown > 128.0f;
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            most[k] = weight[k][0];
#pragma unroll
            for (int j = 1; j < EIGHTS; j++) most[k] = fmaxf(most[k], weight[k][j]);
            left_behind |= most[k] > peak[k] + 8.0f;
        }
        if (any_lane(left_behind)) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) widest = fmaxf(widest, shuffle_xor(widest, mask));
            float shrink = 1.0f;
            if (widest * grown > 128.0f) {
                const float now = bits_to_float((260u << 23) - (float_to_bits(widest) & 0x7f800000u));
                shrink = now / grown;
                grown = now;
            }
#pragma unroll
            for (int k = 0; k < 2 * SIDES; k++) {
                float decay = shrink;
                if (k < FOURS) {
                    float top = most[k];
#pragma unroll
                    for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
                    top = fmaxf(top, peak[k]);
                    const float fade = exp2_(peak[k] - top);
                    peak[k] = top;
                    total[k] *= fade;
                    decay *= fade;
                }
                offset_sum[k / 2][k % 2] *= decay;
#pragma unroll
                for (int i = 0; i < VALUE_TILES; i++) {
                    acc[i][k / 2][k % 2] *= decay;
                    acc[i][k / 2][2 + k % 2] *= decay;
                }
            }
        }
        u32 turned[SIDES][EIGHTS];
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            const float factor = value_scale[j] * grown;
            float x[2 * SIDES];
#pragma unroll
            for (int k = 0; k < 2 * SIDES; k++) {
                if (k < FOURS) {
                    x[k] = exp2_(weight[k][j] - peak[k]);
                    total[k] += x[k];
                    x[k] *= factor;
                } else {
                    x[k] = 0.0f;
                }
            }
#pragma unroll
            for (int side = 0; side < SIDES; side++) turned[side][j] = transpose(pack_halves(x[2 * side], x[2 * side + 1]));
        }
#pragma unroll
        for (int s = 0; s < EIGHTS / 2; s++) {
            if (has_offset(VALUE_BOOK)) {
                const u32 ones = 0x3c003c00u;
#pragma unroll
                for (int side = 0; side < SIDES; side++)
                    multiply(offset_sum[side], ones, ones, ones, ones, turned[side][2 * s], turned[side][2 * s + 1]);
            }
            Values::Mine values[4];
#pragma unroll
            for (int m = 0; m < 4; m++) values[m].load(stage + VALUES_AT + (16 * s + 4 * m + t) * Values::L::ROW, g);
#pragma unroll
            for (int i = 0; i < VALUE_WORDS; i++) {
                u32 low[Values::PER_WORD], high[Values::PER_WORD];
                Values::pairs(values[0], values[1], i, g, value_book, low);
                Values::pairs(values[2], values[3], i, g, value_book, high);
#pragma unroll
                for (int h = 0; h < Values::PER_WORD; h += 2)
#pragma unroll
                    for (int side = 0; side < SIDES; side++)
                        multiply(acc[(i * Values::PER_WORD + h) / 2][side], low[h], low[h + 1], high[h], high[h + 1],
                                 turned[side][2 * s], turned[side][2 * s + 1]);
            }
        }
    }

    // Join the warps; the stages' space takes their outputs.
    wait_for_all_but<0>();
    sync();
    float* space = (float*)arena;
    const float value_unit = value_book.step * rsqrt_(D) / grown;
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int head = 4 * k + t;
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) total[k] += shuffle_xor(total[k], mask);
        if (g == 0) warp_peak[warp][head] = peak[k], warp_total[warp][head] = total[k];
#pragma unroll
        for (int i = 0; i < VALUE_WORDS; i++)
#pragma unroll
            for (int h = 0; h < Values::PER_WORD; h++) {
                const int c = Values::coordinate(g, i, h), at_tile = i * Values::PER_WORD + h;
                const float x = acc[at_tile / 2][k / 2][2 * (at_tile % 2) + k % 2] / Values::factor(h) -
                                value_book.offset * offset_sum[k / 2][k % 2];
                if (c >= 0) space[(warp * COLUMNS + head) * OUT_PITCH + c] = x * value_unit;
            }
    }
    sync();
    for (int i = thread(); i < heads * D; i += THREADS) {
        const int head = i / D, c = i % D;
        float top = FAR, x = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_peak[w][head]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float decay = exp2_(warp_peak[w][head] - top);
            x += decay * space[(w * COLUMNS + head) * OUT_PITCH + c];
            sum += decay * warp_total[w][head];
        }
        const long long place = (base + head) * blocks_y() + part;
        parts[place * D + c] = x;
        if (c == 0) sums[2 * place] = top, sums[2 * place + 1] = sum;
    }
    if constexpr (WHOLE) {
        const Signs<VALUE_ROUNDS, SHARE> value_sign(value_signs, lane);
        sync();
        for (int head = warp; head < heads; head += WARPS) {
            const long long place = base + head;
            float x[SHARE], top, sum;
            weigh(parts + place * D, sums + 2 * place, 1, 0, 1, lane, x, top, sum);
            finish(x, top, sum, value_sign, out, lse, base + head, lane);
        }
    }
}
