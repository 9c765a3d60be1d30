// Tiles of tokens on their way from global to shared memory: a warp copies its own, lane by lane, some tiles ahead.
//
// A stage holds a tile's key codes, value codes, key scales and value scales, as they lie in memory.
typedef AcrossCoordinates<D, KEY_BITS, KEY_BOOK> Keys;
typedef AcrossTokens<D, VALUE_BITS, VALUE_BOOK> Values;

constexpr int KEY_SCALE_BYTES = KEY_SCALES ? 2 : 4, VALUE_SCALE_BYTES = VALUE_SCALES ? 2 : 4;
constexpr int VALUES_AT = TILE * Keys::L::ROW, KEY_SCALES_AT = VALUES_AT + TILE * Values::L::ROW;
constexpr int VALUE_SCALES_AT = KEY_SCALES_AT + TILE * KEY_SCALE_BYTES;
constexpr int STAGE = VALUE_SCALES_AT + TILE * VALUE_SCALE_BYTES;
static_assert((EVEN || TILE == 32) && PAGE % TILE == 0, "wide tiles copy scales by 16 bytes; a tile is part of one page");

// What one lane copies of one row of one kv head. Scales of keys and then of values go by 16 bytes where EVEN.
struct Source {
    const u8 *keys, *values, *scales;
    int scale_bytes;  // a token's, of the lane's scales; 0 where it copies none
};
constexpr int KEY_UNIT = Keys::L::ALIGN, VALUE_UNIT = Values::L::ALIGN;

template <int BYTES, int UNIT>
DEVICE void copy(u8* to, const u8* from, int lane) {
#pragma unroll
    for (int i = 0; i < BYTES; i += 32 * UNIT)
        if (BYTES % (32 * UNIT) == 0 || i + lane * UNIT < BYTES) {
            if constexpr (UNIT >= 4)
                copy_async<UNIT>(to + i, from + i);
            else
                *(u16*)(to + i) = *(const u16*)(from + i);
        }
}

// Where the vector of a token is, counted in vectors: of the row, or of the pages.
struct Place {
    const int* pages;
    int kv_heads, head;
    DEVICE long long of(int token) const {
        if (!PAGE) return token;
        constexpr int page = PAGE ? PAGE : 1;
        return ((long long)pages[token / page] * kv_heads + head) * page + token % page;
    }
};

DEVICE Source source_of(const u8* keys, const u8* values, const u8* key_scales, const u8* value_scales, int lane) {
    Source from;
    from.keys = keys + lane * KEY_UNIT;
    from.values = values + lane * VALUE_UNIT;
    constexpr int for_keys = TILE * KEY_SCALE_BYTES / 16, for_values = TILE * VALUE_SCALE_BYTES / 16;
    const bool of_keys = lane < for_keys;
    from.scales = of_keys ? key_scales + 16 * lane : value_scales + 16 * (lane - for_keys);
    from.scale_bytes = of_keys ? KEY_SCALE_BYTES : lane < for_keys + for_values ? VALUE_SCALE_BYTES : 0;
    if (!EVEN) from.scales = key_scales;
    return from;
}

DEVICE void fetch(u8* stage, const Source& from, const u8* value_scales, long long start, int lane) {
    copy<TILE * Keys::L::ROW, KEY_UNIT>(stage + lane * KEY_UNIT, from.keys + start * Keys::L::ROW, lane);
    copy<TILE * Values::L::ROW, VALUE_UNIT>(stage + VALUES_AT + lane * VALUE_UNIT, from.values + start * Values::L::ROW,
                                            lane);
    if (EVEN) {
        if (from.scale_bytes)
            copy_async<16>(stage + KEY_SCALES_AT + 16 * lane, from.scales + start * from.scale_bytes);
        return;
    }
    const u8* sources[2] = {from.scales, value_scales};
#pragma unroll
    for (int which = 0; which < 2; which++) {
        const int bytes = which ? VALUE_SCALE_BYTES : KEY_SCALE_BYTES;
        u8* to = stage + (which ? VALUE_SCALES_AT : KEY_SCALES_AT) + lane * bytes;
        const u8* at = sources[which] + (start + lane) * bytes;
        if (bytes == 4)
            copy_async<4>(to, at);
        else
            *(u16*)to = *(const u16*)at;
    }
}
