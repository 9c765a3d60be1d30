// How packed codes become operands of tensor cores, in registers.
//
// A vector's field words (`Layout`) are dealt to the lanes; what each word yields, and which coordinates that is, is known
// at compile time. The order of coordinates is therefore free: queries and outputs follow it. Levels are integers of 8
// bits times a step. Keys become bytes, that multiply queries of 16 bits in two halves; values become halves, integers in
// whose low bits are subnormal, exactly integer * 2^-24, which tensor cores multiply at full speed. A codebook is
//   UNIFORM    2 bits, levels (code - 1.5) * step: the field itself is the integer; fields of higher planes are powers of
//              4 too large, which the query (or output) makes good;
//   SIGNED     4 bits, codes of sign and magnitude, integers k from -127 to 127: values look magnitudes up, keys are
//              sums from two tables;
//   ANY        2, 3, 4 bits: byte permutations look up bytes, level = (byte - offset) * step;
//   TABLE      8 bits: halves in shared memory;
//   TRELLIS    see windows.cuh.
enum Book { UNIFORM, SIGNED, ANY, TABLE, TRELLIS };

DEVICE constexpr bool has_offset(Book book) { return book == UNIFORM || book == ANY; }

// Where the codes of a vector of DIM coordinates lie: FIELD bits a code in `words` words, planes `stride` codes apart, and
// at 3 bits a plane of third bits behind them.
template <int DIM, int BITS>
struct Layout {
    static constexpr int FIELD = BITS == 3 ? 2 : BITS;
    static constexpr int ROW = DIM * BITS / 8;
    static constexpr int WORDS = DIM * FIELD / 32;
    static constexpr int STRIDE = DIM * FIELD / 8;
    static constexpr int PER_WORD = 32 / FIELD;
    static constexpr int ALIGN = ROW % 16 == 0 ? 16 : ROW % 8 == 0 ? 8 : ROW % 4 == 0 ? 4 : 2;
};

// The words of a vector that one of LANES lanes holds: neighbours where they divide evenly, every LANES-th otherwise, or
// half a word.
template <class L, int LANES>
struct Deal {
    static constexpr bool HALF = L::WORDS * 2 == LANES;
    static constexpr bool NEIGHBOURS = L::WORDS % LANES == 0;
    static constexpr int COUNT = (L::WORDS + LANES - 1) / LANES;
    static constexpr int BYTES = HALF ? 2 : 4;

    static DEVICE int word(int lane, int i) { return NEIGHBOURS ? lane * COUNT + i : lane + LANES * i; }
    static DEVICE int first_byte(int lane, int i) { return HALF ? 2 * lane : 4 * word(lane, i); }
    static DEVICE bool held(int lane, int i) { return HALF || word(lane, i) < L::WORDS; }
};

DEVICE constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }

// One lane's share of one vector: field words and, at 3 bits, words of third bits, code p's at bit 2 p of each byte.
template <class L, int LANES, int BITS>
struct Share {
    typedef Deal<L, LANES> Dealt;
    static constexpr int N = Dealt::COUNT;
    static constexpr int THIRDS = BITS == 3 ? N : 1;
    u32 field[N], third[THIRDS];

    DEVICE void load(const u8* row, int lane) {
        if constexpr (Dealt::HALF) {
            field[0] = load16(row + 2 * lane);
            if (BITS == 3) third[0] = load16(row + 4 * L::WORDS + 2 * (lane % (LANES / 2)));
        } else if constexpr (Dealt::NEIGHBOURS) {
            load_words<N, gcd(L::ALIGN, 4 * N)>(row + 4 * N * lane, field);
            if constexpr (BITS == 3)
                load_words<N, gcd(L::ALIGN, 4 * N)>(row + 4 * L::WORDS + 4 * N * (lane % (LANES / 2)), third);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) {
                int word = Dealt::word(lane, i);
                word = word < L::WORDS ? word : L::WORDS - 1;
                field[i] = load_word<L::ALIGN>(row + 4 * word);
                if constexpr (BITS == 3) {
                    const u8* plane = row + 4 * L::WORDS;
                    constexpr int plane_bytes = L::STRIDE / 2;
                    if constexpr (plane_bytes % 4 == 0) {
                        third[i] = load_word<L::ALIGN>(plane + 4 * word % plane_bytes) >> (4 * word / plane_bytes);
                    } else {
                        int a = 4 * word, b = 4 * word + 2;
                        third[i] = load16(plane + a % plane_bytes) >> (a / plane_bytes) |
                                   load16(plane + b % plane_bytes) >> (b / plane_bytes) << 16;
                    }
                }
            }
        }
    }

    // Bring third bits to bit 2 p where the load could not.
    DEVICE u32 thirds(int i, int lane) const {
        int shift = Dealt::HALF || Dealt::NEIGHBOURS ? lane / (LANES / 2) : 0;
        return (third[BITS == 3 ? i : 0] >> shift) & 0x55555555u;
    }

    // Words of eight nibbles, a code in each: planes 0 and 2 (which = 0), or 1 and 3, of a word of 2-bit fields.
    DEVICE u32 nibbles(int i, int which, int lane) const {
        if (BITS == 4) return field[i];
        u32 two = which ? field[i] >> 2 : field[i];
        if (BITS == 2) return two & 0x33333333u;
        u32 third_bit = which ? thirds(i, lane) : thirds(i, lane) << 2;
        return (two & 0x33333333u) | (third_bit & 0x44444444u);
    }
};

// Looks codes up: level = (integer - offset) * step. For keys the integers are bytes; for values, halves.
template <int BITS, Book BOOK, bool KEYS>
struct Lookup {
    u32 table[4];
    const u16* halves;
    float step, offset;

    // Levels are given in increasing order; for TABLE, `space` holds 256 halves of shared memory.
    DEVICE void prepare(const float* levels, u16* space, int threads) {
        constexpr int count = 1 << BITS;
        const float low = levels[0], high = levels[count - 1];
        offset = 0.0f;
        table[0] = table[1] = table[2] = table[3] = 0;
        if (BOOK == TABLE) {
            step = high > -low ? high : -low;
            for (int i = thread(); i < count; i += threads) space[i] = (u16)pack_halves(levels[i] / step, 0.0f);
            halves = space;
            return;
        }
        if (BOOK == UNIFORM) {
            step = (high - low) / (count - 1);
            offset = -low / step;
        } else if (BOOK == SIGNED) {
            step = high / 127.0f;
        } else {
            step = (high - low) / 255.0f;
            offset = -low / step;
        }
        if (BOOK != UNIFORM) {
            const float per_step = 1.0f / step;
#pragma unroll
            for (int i = 0; i < (BOOK == SIGNED ? count / 2 : count); i++)
                table[i / 4] |= (u32)(levels[rank(i)] * per_step + offset + 0.5f) << (8 * (i % 4));
        }
        if (BOOK == SIGNED && KEYS) {  // ~k is -1 - k: sums are one less than the level
            table[2] = ~table[0], table[3] = ~table[1];
            offset = -1.0f;
        }
        if (!KEYS) {
            const float subnormal = 16777216.0f;
            step *= subnormal;
            offset /= subnormal;
        }
    }

    // The level of a code: at 4 bits codes are a sign, 8 where negative, and a magnitude.
    static DEVICE int rank(int code) { return BITS != 4 ? code : code < 8 ? code + 8 : 15 - code; }

    // Bytes of nibbles 0 to 3, and of 4 to 7.
    DEVICE void look_up(u32 z, u32& low, u32& high) const {
        const u32 index = BITS == 4 ? z & 0x77777777u : z;
        low = permute(table[0], table[1], index), high = permute(table[0], table[1], index >> 16);
        if (BITS == 4 && BOOK == ANY) {
            const u32 signs_low = permute(z, z << 4, 0x9d8c), signs_high = permute(z, z << 4, 0xbfae);
            const u32 other_low = permute(table[2], table[3], index);
            const u32 other_high = permute(table[2], table[3], index >> 16);
            low = (low & ~signs_low) | (other_low & signs_low);
            high = (high & ~signs_high) | (other_high & signs_high);
        }
    }

    // The same as sums of two, for SIGNED keys. Where the highest bit of a nibble is set, a permutation gives the sign of
    // the byte it finds: 0 from the first table, whose levels are not negative, and -1 from their complements.
    DEVICE void summands(u32 z, u32 (&low)[2], u32 (&high)[2]) const {
        const u32 flipped = z ^ 0x88888888u;
        low[0] = permute(table[0], table[1], z), low[1] = permute(table[2], table[3], flipped);
        high[0] = permute(table[0], table[1], z >> 16), high[1] = permute(table[2], table[3], flipped >> 16);
    }

    // Halves of nibbles (0, 2), (1, 3), (4, 6), (5, 7).
    DEVICE void halves_of(u32 z, u32 (&pair)[4]) const {
        u32 low, high;
        look_up(z, low, high);
        if (BOOK == SIGNED) {
            const u32 even = (z << 4) & 0x80808080u, odd = z & 0x80808080u;
            pair[0] = permute(low, even, 0x5240);
            pair[1] = permute(low, odd, 0x5341);
            pair[2] = permute(high, even, 0x7260);
            pair[3] = permute(high, odd, 0x7361);
        } else {
            pair[0] = low & 0x00ff00ffu;
            pair[1] = permute(low, 0, 0x4341);
            pair[2] = high & 0x00ff00ffu;
            pair[3] = permute(high, 0, 0x4341);
        }
    }
};

// Operands that hold one vector, and the coordinates they are: four bytes in a word, or two halves.
template <int DIM, int BITS, Book BOOK>
struct AcrossCoordinates {
    typedef Layout<DIM, BITS> L;
    typedef Share<L, 4, BITS> Mine;
    typedef Lookup<BITS, BOOK, true> Books;
    static constexpr int EACH = BOOK == TABLE ? 2 : 4;
    static constexpr int PER_WORD = L::PER_WORD / EACH;
    static constexpr int TERMS = BOOK == SIGNED ? 2 : 1;

    // An operand is a sum of TERMS.
    static DEVICE void operands(const Mine& share, int i, int lane, const Books& book, u32 (&out)[PER_WORD][TERMS]) {
        const u32 word = share.field[i];
        if constexpr (BOOK == UNIFORM) {
            out[0][0] = word & 0x03030303u;
            out[1][0] = word & 0x0c0c0c0cu;
            out[2][0] = word >> 4 & 0x03030303u;
            out[3][0] = word >> 4 & 0x0c0c0c0cu;
        } else if constexpr (BOOK == TABLE) {
            out[0][0] = book.halves[word & 255] | (u32)book.halves[word >> 8 & 255] << 16;
            out[1][0] = book.halves[word >> 16 & 255] | (u32)book.halves[word >> 24] << 16;
        } else if constexpr (BOOK == SIGNED) {
            book.summands(word, out[0], out[1]);
        } else {
#pragma unroll
            for (int which = 0; which < PER_WORD / 2; which++)
                book.look_up(share.nibbles(i, which, lane), out[2 * which][0], out[2 * which + 1][0]);
        }
    }

    // Coordinate of element e of operand h of the lane's word i, or -1 where the lane holds none.
    static DEVICE int coordinate(int lane, int i, int h, int e) {
        if (!Mine::Dealt::held(lane, i)) return -1;
        const int byte = Mine::Dealt::first_byte(lane, i);
        if (BOOK == UNIFORM) return L::STRIDE * h + byte + e;
        if (BOOK == TABLE) return byte + 2 * h + e;
        const int plane = BITS == 4 ? e % 2 : h / 2 + 2 * (e % 2);
        return L::STRIDE * plane + byte + 2 * (h % 2) + e / 2;
    }
    static DEVICE int factor_at(int c) { return BOOK == UNIFORM && c / L::STRIDE % 2 ? 4 : 1; }
};

// Pairs of halves of one coordinate of two vectors.
template <int DIM, int BITS, Book BOOK>
struct AcrossTokens {
    typedef Layout<DIM, BITS> L;
    typedef Share<L, 8, BITS> Mine;
    typedef Lookup<BITS, BOOK, false> Books;
    static constexpr int PER_WORD = L::PER_WORD * Mine::Dealt::BYTES / 4;

    static DEVICE void pairs(const Mine& a, const Mine& b, int i, int lane, const Books& book,
                             u32 (&pair)[PER_WORD]) {
        constexpr int HALVES = Mine::Dealt::BYTES / 2;
        if constexpr (BOOK == UNIFORM) {
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                u32 word = permute(a.field[i], b.field[i], half ? 0x7632 : 0x5410);
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    pair[8 * half + p] = word & (0x00030003u << 2 * p);
                    pair[8 * half + 4 + p] = (word >> 8) & (0x00030003u << 2 * p);
                }
            }
        } else if constexpr (BOOK == TABLE) {
#pragma unroll
            for (int k = 0; k < 4; k++)
                pair[k] = book.halves[a.field[i] >> 8 * k & 255] | (u32)book.halves[b.field[i] >> 8 * k & 255] << 16;
        } else {
#pragma unroll
            for (int which = 0; which < L::PER_WORD / 8; which++) {
                u32 za = a.nibbles(i, which, lane), zb = b.nibbles(i, which, lane);
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    u32 four[4];
                    book.halves_of(permute(za, zb, half ? 0x7362 : 0x5140), four);
#pragma unroll
                    for (int r = 0; r < 4; r++) pair[4 * (HALVES * which + half) + r] = four[r];
                }
            }
        }
    }

    static DEVICE int coordinate(int lane, int i, int h) {
        constexpr int HALVES = Mine::Dealt::BYTES / 2;
        if (!Mine::Dealt::held(lane, i)) return -1;
        int byte = Mine::Dealt::first_byte(lane, i);
        if (BOOK == UNIFORM) return L::STRIDE * (h % 4) + byte + 2 * (h / 8) + h / 4 % 2;
        if (BOOK == TABLE) return byte + h;
        int which = h / (4 * HALVES), half = h / 4 % HALVES;
        int plane = BITS == 4 ? h % 2 : which + 2 * (h % 2);
        return L::STRIDE * plane + byte + 2 * half + h % 4 / 2;
    }
    static DEVICE float factor(int h) { return BOOK == UNIFORM ? (float)(1 << 2 * (h % 4)) : 1.0f; }
};
