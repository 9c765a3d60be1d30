// Words from memory of a known alignment.
template <int ALIGN>
DEVICE u32 load_word(const u8* p) {
    if (ALIGN >= 4) return load32(p);
    return load16(p) | load16(p + 2) << 16;
}

template <int N, int ALIGN>
DEVICE void load_words(const u8* p, u32 (&words)[N]) {
    if constexpr (N % 4 == 0 && ALIGN >= 16) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            Words4 x = load128(p + 4 * i);
            words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
        }
    } else if constexpr (N % 2 == 0 && ALIGN >= 8) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            Words2 x = load64(p + 4 * i);
            words[i] = x.x, words[i + 1] = x.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) words[i] = load_word<ALIGN>(p + 4 * i);
    }
}
