// What encoders do about the length of a vector, whatever the code: its square is kept in range, and what is stored of it
// is corrected and rounded.
//
// Compiled with: D, SCALES (0 float, 1 bfloat16, 2 half), RULE (0 norm, 1 preserve, 2 unbiased, 3 least squares).
constexpr float HUGE_FLOAT = 3.4028235e38f, EPSILON = 1.1920929e-7f;

// NaN becomes 0, and infinities the largest number.
DEVICE float finite(float x) { return x != x ? 0.0f : fminf(fmaxf(x, -HUGE_FLOAT), HUGE_FLOAT); }

// A power of two that brings the largest magnitude to [1, 2), and its inverse.
struct Range {
    float down, up;
};
DEVICE Range range_of(float peak) {
    int exponent = (int)(float_to_bits(peak) >> 23) - 127;
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    return {bits_to_float((u32)(127 - exponent) << 23), bits_to_float((u32)(127 + exponent) << 23)};
}

// The length of a vector that was brought into range, at most 2^126.
DEVICE float length_of(float size, float up) {
    return up > 1.0f ? fminf(size * (up * 5.421010862427522e-20f), 4611686018427387904.0f) * 18446744073709551616.0f
                     : size * up;
}

// What is stored: `along` is the sum of coordinates of unit variance times levels, `energy` that of squares of levels.
DEVICE float stored_scale(float size, float along, float energy) {
    float scale = size;
    if (RULE == 1) scale *= sqrtf((float)D / fmaxf(energy, EPSILON));
    if (RULE == 2) scale *= (float)D / fmaxf(along, EPSILON);
    if (RULE == 3) scale *= along / fmaxf(energy, EPSILON);
    if (SCALES) scale = fminf(scale, SCALES == 2 ? 65504.0f : 3.3895314e38f);
    return scale;
}
