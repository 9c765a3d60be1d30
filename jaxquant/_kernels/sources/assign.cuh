// From coordinates to packed codes and what their levels add up to: a lane's share of a vector.
//
// Lane t of four holds coordinates i D/4 + t D/16 + r, i < 4 and r < D/16, of a vector: those whose codes share bytes.
//
// Compiled after codes.cuh and lengths.cuh, with: D (a power of two), BITS, BOOK, RULE (0 norm, 1 preserve, 2 unbiased, 3
// least squares).
typedef Layout<D, BITS> L;
constexpr int LEVELS = 1 << BITS, RUN = D / 16, HELD = D / 4;
constexpr int PLANES = L::PER_WORD / 4, FIELDS = HELD / PLANES / 4, THIRDS = BITS == 3 ? FIELDS : 1;

DEVICE int coordinate(int t, int i) { return i / RUN * (D / 4) + t * RUN + i % RUN; }

// Codes by cells. Thresholds lie on a grid: of half the step of the levels, or of the whole one where they are
// equidistant. The code of a cell (i - 1, i] of it is in a table, or i itself.
constexpr bool TREE = BOOK == TABLE;
constexpr int CELLS = TREE ? 1 : BOOK == UNIFORM ? LEVELS : 513;

DEVICE u32 stored(int rank) { return BITS != 4 ? rank : rank >= 8 ? rank - 8 : 15 - rank; }

// One lane's share of a coded vector: words of fields and, at 3 bits, of third bits, and sums over its coordinates of
// squares of levels and of levels times coordinates.
struct Coded {
    u32 field[FIELDS], third[THIRDS];
    float energy, along;
};

struct Coder {
    float origin, per_cell;  // index = ceil((y * per_cell + origin, clamped to [0, 1]) * (CELLS - 1))
    const u8* table;
    const float *thresholds, *level_of;  // a tree; levels by code
    Lookup<BITS, BOOK, true> books;

    // All threads of a block prepare what they share: LEVELS thresholds and levels, and CELLS codes.
    DEVICE void prepare(const float* levels, float* shared_thresholds, float* shared_levels, u8* shared_table,
                        int threads) {
        // A tree in an array: threshold i comes at the depth that the zeros at its end say.
        for (int i = thread(); i < LEVELS; i += threads) {
            shared_levels[stored(i)] = levels[i];
            if (i > 0) {
                int stride = 1;
                while (i % (2 * stride) == 0) stride *= 2;
                shared_thresholds[(LEVELS / 2 + i / 2) / stride] = (levels[i] + levels[i - 1]) / 2;
            }
        }
        thresholds = shared_thresholds, level_of = shared_levels, table = shared_table;
        sync();
        if constexpr (!TREE) {
            const float low = levels[0], high = levels[LEVELS - 1];
            if (BOOK == UNIFORM) {
                per_cell = (LEVELS - 1) / (high - low);
                origin = LEVELS / 2 - 1 - EPSILON / 2;  // so that a third of it, rounded up, puts 0 into the lower cell
            } else if (BOOK == SIGNED) {
                per_cell = 2.0f * 127.0f / high;
                origin = 256.0f;
            } else {
                per_cell = 2.0f * 255.0f / (high - low);
                origin = 1.0f - low * per_cell;
            }
            per_cell /= CELLS - 1;
            origin /= CELLS - 1;
            for (int i = thread(); i < CELLS && CELLS > LEVELS; i += threads)
                shared_table[i] = stored(assign((((float)i - 0.5f) / (CELLS - 1) - origin) / per_cell));
            books.prepare(levels, nullptr, threads);
            if (BOOK == ANY) {  // less 128, since products take signed bytes
#pragma unroll
                for (int i = 0; i < 4; i++) books.table[i] ^= 0x80808080u;
                books.offset -= 128.0f;
            }
            sync();
        }
    }

    // The number of thresholds below y: entry 1 is asked first, then 2 or 3, then one of 4 to 7, ...
    DEVICE int assign(float y) const {
        int at = 1;
#pragma unroll
        for (int bit = 0; bit < BITS; bit++) at = 2 * at + (y > thresholds[at]);
        return at - LEVELS;
    }

    DEVICE u32 code_of(float y, float unit, float per_cell_of_unit) const {
        if (TREE) return assign(y * unit);
        const float fraction = multiply_add_clamped(y, per_cell_of_unit, origin);
        return CELLS > LEVELS ? byte_at_ceiling<CELLS - 1>(table, fraction) : ceiling<CELLS - 1>(fraction);
    }

    // Add eight levels, as integers without their offset, and their squares.
    DEVICE void add(u32 z, int& sum, int& squares) const {
        u32 some[2];
        if (BOOK == UNIFORM)
            some[0] = z & 0x03030303u, some[1] = z >> 4 & 0x03030303u;
        else
            books.look_up(z, some[0], some[1]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            squares = dot_bytes(some[half], some[half], squares);
            if (has_offset(BOOK)) sum = dot_bytes(some[half], 0x01010101u, sum);
        }
    }

    // Coordinates y * unit have unit variance.
    DEVICE void code(const float (&y)[HELD], float unit, Coded& made) const {
        const float per_cell_of_unit = unit * per_cell;
        int sum = 0, squares = 0;
        made.energy = made.along = 0.0f;
#pragma unroll
        for (int j = 0; j < FIELDS; j++) {
            u32 plane[PLANES];
#pragma unroll
            for (int p = 0; p < PLANES; p++) {
                u32 four[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float x = y[4 * (FIELDS * p + j) + e];
                    four[e] = code_of(x, unit, per_cell_of_unit);
                    const float level = TREE || RULE > 1 ? level_of[four[e]] : 0.0f;
                    if (RULE > 1) made.along += x * level;
                    if (TREE && RULE % 2) made.energy += level * level;
                }
                plane[p] = permute(permute(four[0], four[1], 0x40), permute(four[2], four[3], 0x40), 0x5410);
            }
            if constexpr (BITS == 8) {
                made.field[j] = plane[0];
            } else if constexpr (BITS == 4) {
                made.field[j] = plane[0] | plane[1] << 4;
                if (RULE % 2) add(made.field[j], sum, squares);
            } else {
                const u32 even = plane[0] | plane[2] << 4, odd = plane[1] | plane[3] << 4;
                made.field[j] = (even & 0x33333333u) | (odd & 0x33333333u) << 2;
                if (BITS == 3) made.third[j] = (even >> 2 & 0x11111111u) | (odd & 0x44444444u);
                if (RULE % 2) add(even, sum, squares), add(odd, sum, squares);
            }
        }
        made.along *= unit;
        if (TREE || RULE % 2 == 0) return;
        const float offset = has_offset(BOOK) ? books.offset : 0.0f;
        made.energy = ((float)squares - 2.0f * offset * (float)sum + HELD * offset * offset) * books.step * books.step;
    }
};

// Write N words at an address that is a multiple of their size.
template <int N>
DEVICE void store_words(u8* to, const u32* words) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) *(Words4*)(to + 4 * i) = {words[i], words[i + 1], words[i + 2], words[i + 3]};
    } else if constexpr (N == 2) {
        *(Words2*)to = {words[0], words[1]};
    } else {
        static_assert(N == 1, "words are written by one, two or four");
        *(u32*)to = words[0];
    }
}

// Write lane t's share of a vector's codes to its row. Bytes run with a coordinate's low bits, so that a lane has runs of
// D / 16 of them, and lanes t and t + 2 share third bits.
DEVICE void store_codes(u8* row, const Coded& made, bool wanted, int t) {
    constexpr int WORDS = FIELDS < RUN / 4 ? FIELDS : RUN / 4;
#pragma unroll
    for (int i = 0; i < FIELDS; i += WORDS)
        if (wanted) store_words<WORDS>(row + i / (RUN / 4) * (D / 4) + t * RUN, made.field + i);
    if constexpr (BITS == 3) {
        u32 both[THIRDS];
#pragma unroll
        for (int i = 0; i < THIRDS; i++) {
            both[i] = made.third[i] << t / 2;
            both[i] |= shuffle_xor(both[i], 2);
        }
        if (wanted && t < 2) store_words<WORDS>(row + L::STRIDE + t * RUN, both);
    }
}
