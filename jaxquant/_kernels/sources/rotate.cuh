// Rounds of signs and Sylvester-Hadamard transforms over sqrt(D), D a power of two: one vector a warp, D / 32 neighbours in
// a lane.
template <int PER_LANE>
DEVICE void transform(float (&x)[PER_LANE], int lane) {
#pragma unroll
    for (int half = 1; half < PER_LANE; half *= 2)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (!(i & half)) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
        const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] = sign * x[i] + shuffle_xor(x[i], mask);
    }
}

// The signs of ROUNDS rounds at a lane's coordinates, over sqrt(D).
template <int ROUNDS, int PER_LANE>
struct Signs {
    float of[ROUNDS ? ROUNDS : 1][PER_LANE];

    DEVICE Signs(const signed char* signs, int lane) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                of[round][i] = (float)signs[(32 * round + lane) * PER_LANE + i] * rsqrt_(32 * PER_LANE);
    }
};

template <int ROUNDS, int PER_LANE>
DEVICE void rotate(float (&x)[PER_LANE], const Signs<ROUNDS, PER_LANE>& signs, int lane) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] *= signs.of[round][i];
        transform(x, lane);
    }
}

template <int ROUNDS, int PER_LANE>
DEVICE void unrotate(float (&x)[PER_LANE], const Signs<ROUNDS, PER_LANE>& signs, int lane) {
#pragma unroll
    for (int round = ROUNDS - 1; round >= 0; round--) {
        transform(x, lane);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] *= signs.of[round][i];
    }
}

DEVICE float read(const void* p, long long i, int kind) {  // 0 float, 1 bfloat16, 2 half
    if (kind == 0) return ((const float*)p)[i];
    u32 bits = ((const u16*)p)[i];
    return kind == 1 ? bits_to_float(bits << 16) : half_to_float(bits);
}

DEVICE void store(void* p, long long i, float x, int kind) {
    if (kind == 0) {
        ((float*)p)[i] = x;
    } else if (kind == 2) {
        ((u16*)p)[i] = (u16)pack_halves(x, 0.0f);
    } else {
        u32 bits = float_to_bits(x);
        ((u16*)p)[i] = (u16)(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
