// How trellis codes become operands of tensor cores: two neighbours at a time, looked up in shared memory as two halves.
//
// A window of log2(states) + 2 BITS bits of the ring decides two levels. Each word of the table has 32 copies, one a bank,
// and a lane reads its own: no two lanes ever wait for each other. Where keys and values have different levels, 16 copies
// are of each, and two lanes share one.
//
// Compiled with: KEY_WINDOW, VALUE_WINDOW (bits of a window of two; 0 where codes are scalars).
constexpr int WINDOW = KEY_WINDOW > VALUE_WINDOW ? KEY_WINDOW : VALUE_WINDOW;
constexpr int TABLE_BYTES = WINDOW ? 128 << WINDOW : 0;

DEVICE u32 two_levels(const float* levels, int window, int last, int bits) {
    return pack_halves(levels[window & last], levels[window >> bits & last]);
}

// Fill the table, and give the offsets into its rows at which a lane reads keys and values.
template <int KEY_BITS, int VALUE_BITS>
DEVICE void prepare_windows(u8* table, const float* key_levels, const float* value_levels, int threads, int& keys,
                            int& values) {
    constexpr int KEY_LEVELS = KEY_WINDOW ? 1 << (KEY_WINDOW - KEY_BITS) : 1;
    constexpr int VALUE_LEVELS = VALUE_WINDOW ? 1 << (VALUE_WINDOW - VALUE_BITS) : 1;
    const int lane = thread() % 32;
    bool apart = KEY_WINDOW && VALUE_WINDOW && (KEY_WINDOW != VALUE_WINDOW || KEY_BITS != VALUE_BITS);
    if (KEY_WINDOW && VALUE_WINDOW && !apart) {
        for (int i = lane; i < KEY_LEVELS; i += 32) apart |= key_levels[i] != value_levels[i];
        apart = any_lane(apart);
    }
    constexpr int ROWS = WINDOW < 5 ? 1 << WINDOW : 32;  // a warp's
    for (int first = thread() - lane; first < 1 << WINDOW; first += threads) {
        const u32 key = KEY_WINDOW ? two_levels(key_levels, first + lane, KEY_LEVELS - 1, KEY_BITS) : 0;
        const u32 value = VALUE_WINDOW ? two_levels(value_levels, first + lane, VALUE_LEVELS - 1, VALUE_BITS) : 0;
#pragma unroll 8
        for (int row = 0; row < ROWS; row++) {
            const u32 of_key = shuffle(key, row), of_value = shuffle(value, row);
            const bool which = KEY_WINDOW && (!apart || lane < 16);
            *(u32*)(table + 128 * (first + row) + 4 * lane) = which ? of_key : of_value;
        }
    }
    keys = 4 * (apart ? lane % 16 : lane), values = 4 * (apart ? 16 + lane % 16 : lane);
}

template <int BITS, bool KEYS>
struct Lookup<BITS, TRELLIS, KEYS> {
    static constexpr u32 MASK = (128u << (KEYS ? KEY_WINDOW : VALUE_WINDOW)) - 128;
    const u8* table;
    int place;
    float step, offset;

    DEVICE void prepare(const float*, u16*, int) { step = 1.0f, offset = 0.0f; }

    // The levels of the coordinate that begins at bit `at` of high:low and of its neighbour.
    DEVICE u32 look_up(u32 low, u32 high, int at) const {
        const u32 entry = at < 7 ? low << (7 - at) : funnel(low, high, at - 7);
        return *(const u32*)(table + ((entry & MASK) | place));
    }
};

template <class Books>
DEVICE void give_table(Books&, const u8*, int) {}
template <int BITS, bool KEYS>
DEVICE void give_table(Lookup<BITS, TRELLIS, KEYS>& book, const u8* table, int place) {
    book.table = table, book.place = place;
}

// One lane's share of a ring, and the word behind it.
template <class L, int LANES>
struct Ring {
    typedef Deal<L, LANES> Dealt;
    static constexpr int N = Dealt::COUNT;
    u32 field[N + 1];

    DEVICE void load(const u8* row, int lane) {
        if constexpr (Dealt::HALF) {
            field[0] = load16(row + 2 * lane) | load16(row + (2 * lane + 2) % L::ROW) << 16;
            field[1] = 0;
        } else {
            u32 some[N];
            load_words<N, gcd(L::ALIGN, 4 * N)>(row + 4 * N * lane, some);
#pragma unroll
            for (int i = 0; i < N; i++) field[i] = some[i];
            field[N] = load32(row + 4 * ((N * lane + N) % L::WORDS));
        }
    }
};

template <int DIM, int BITS>
struct AcrossCoordinates<DIM, BITS, TRELLIS> {
    typedef Layout<DIM, BITS> L;
    typedef Ring<L, 4> Mine;
    typedef Lookup<BITS, TRELLIS, true> Books;
    static constexpr int EACH = 2;
    static constexpr int PER_WORD = 4 * Mine::Dealt::BYTES / BITS, TERMS = 1;

    static DEVICE void operands(const Mine& share, int i, int lane, const Books& book, u32 (&out)[PER_WORD][TERMS]) {
#pragma unroll
        for (int h = 0; h < PER_WORD; h++) out[h][0] = book.look_up(share.field[i], share.field[i + 1], 2 * BITS * h);
    }
    static DEVICE int coordinate(int lane, int i, int h, int e) {
        return 8 * Mine::Dealt::first_byte(lane, i) / BITS + 2 * h + e;
    }
    static DEVICE int factor_at(int c) { return 1; }
};

template <int DIM, int BITS>
struct AcrossTokens<DIM, BITS, TRELLIS> {
    typedef Layout<DIM, BITS> L;
    typedef Ring<L, 8> Mine;
    typedef Lookup<BITS, TRELLIS, false> Books;
    static constexpr int PER_WORD = 8 * Mine::Dealt::BYTES / BITS;

    static DEVICE void pairs(const Mine& a, const Mine& b, int i, int lane, const Books& book, u32 (&pair)[PER_WORD]) {
#pragma unroll
        for (int h = 0; h < PER_WORD; h += 2) {
            const u32 first = book.look_up(a.field[i], a.field[i + 1], BITS * h);
            const u32 second = book.look_up(b.field[i], b.field[i + 1], BITS * h);
            pair[h] = permute(first, second, 0x5410), pair[h + 1] = permute(first, second, 0x7632);
        }
    }
    static DEVICE int coordinate(int lane, int i, int h) { return 8 * Mine::Dealt::first_byte(lane, i) / BITS + h; }
    static DEVICE float factor(int h) { return 1.0f; }
};
