// A CPU stand-in for jaxquant/_kernels/sources/intrinsics.cuh: every thread of a block is a fibre, and the instructions
// that a warp executes together are meeting points.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE inline
#define KERNEL(threads, blocks) extern "C" void
#define SHARED alignas(16) static
#define ARENA extern
#define __restrict__

struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
};

static ucontext_t scheduler;
static std::vector<Fibre> fibres;
static std::function<void()> body;
static int current, grid_x, grid_y, at_x, at_y;
static u32 deposits[1024][8];

// Dynamic shared memory.
alignas(16) u8 arena[232448];

// Asynchronous copies happen when they are waited for, and not before.
struct Copy { u8* to; const u8* from; int bytes; };
static std::vector<std::vector<Copy>> groups[1024];

struct Meeting { int arrived, generation; };
static Meeting meetings[33];  // one a warp, and one for the block

static void meet(Meeting& meeting, int size) {
    int generation = meeting.generation;
    if (++meeting.arrived == size) {
        meeting.arrived = 0;
        meeting.generation++;
    } else {
        while (meeting.generation == generation) swapcontext(&fibres[current].context, &scheduler);
    }
}
static void meet_warp() { meet(meetings[current / 32], 32); }

static void enter() {
    body();
    fibres[current].done = true;
}

static void launch(int x, int y, int threads, std::function<void()> kernel) {
    body = kernel;
    grid_x = x, grid_y = y;
    for (at_y = 0; at_y < y; at_y++)
        for (at_x = 0; at_x < x; at_x++) {
            fibres = std::vector<Fibre>(threads);
            memset(meetings, 0, sizeof meetings);
            memset(arena, 0xff, sizeof arena);
            for (auto& waiting : groups) waiting.clear();
            for (auto& fibre : fibres) {
                fibre.done = false;
                fibre.stack.reset(new char[1 << 17]);
                getcontext(&fibre.context);
                fibre.context.uc_stack.ss_sp = fibre.stack.get();
                fibre.context.uc_stack.ss_size = 1 << 17;
                fibre.context.uc_link = &scheduler;
                makecontext(&fibre.context, enter, 0);
            }
            for (bool running = true; running;) {
                running = false;
                for (current = 0; current < threads; current++)
                    if (!fibres[current].done) {
                        swapcontext(&scheduler, &fibres[current].context);
                        running = true;
                    }
            }
        }
}

DEVICE int thread() { return current; }
DEVICE int block_x() { return at_x; }
DEVICE int block_y() { return at_y; }
DEVICE int blocks_x() { return grid_x; }
DEVICE int blocks_y() { return grid_y; }
DEVICE void sync() { meet(meetings[32], (int)fibres.size()); }

DEVICE bool any_lane(bool x) {
    deposits[current][0] = x;
    meet_warp();
    bool found = false;
    for (int lane = 0; lane < 32; lane++) found |= deposits[current / 32 * 32 + lane][0];
    meet_warp();
    return found;
}
DEVICE u32 shuffle(u32 x, int lane) {
    deposits[current][0] = x;
    meet_warp();
    u32 y = deposits[current / 32 * 32 + lane][0];
    meet_warp();
    return y;
}
DEVICE u32 shuffle_xor(u32 x, int mask) {
    deposits[current][0] = x;
    meet_warp();
    u32 y = deposits[current ^ mask][0];
    meet_warp();
    return y;
}
DEVICE float shuffle_xor(float x, int mask) {
    u32 bits;
    memcpy(&bits, &x, 4);
    bits = shuffle_xor(bits, mask);
    memcpy(&x, &bits, 4);
    return x;
}

// Addresses must be aligned, as on the device.
template <class T, int BYTES>
static T load_aligned(const u8* p) {
    if ((uintptr_t)p % BYTES) abort();
    T x;
    memcpy(&x, p, sizeof x);
    return x;
}
DEVICE u32 load16(const u8* p) { return load_aligned<u16, 2>(p); }
DEVICE u32 load32(const u8* p) { return load_aligned<u32, 4>(p); }
DEVICE Words2 load64(const u8* p) { return load_aligned<Words2, 8>(p); }
DEVICE Words4 load128(const u8* p) { return load_aligned<Words4, 16>(p); }

template <int BYTES>
DEVICE void copy_async(u8* to, const u8* from) {
    if ((uintptr_t)to % BYTES || (uintptr_t)from % BYTES) abort();
    if (groups[current].empty()) groups[current].emplace_back();
    groups[current].back().push_back({to, from, BYTES});
}
DEVICE void end_group() {
    if (groups[current].empty()) groups[current].emplace_back();
    groups[current].emplace_back();
}
template <int NEWEST>
DEVICE void wait_for_all_but() {
    auto& mine = groups[current];  // the last of them is still open
    while ((int)mine.size() > NEWEST + 1) {
        for (auto& copy : mine.front()) memcpy(copy.to, copy.from, copy.bytes);
        mine.erase(mine.begin());
    }
}
DEVICE void sync_warp() { meet_warp(); }

DEVICE u32 permute(u32 a, u32 b, u32 selector) {
    u64 bytes = (u64)b << 32 | a;
    u32 x = 0;
    for (int i = 0; i < 4; i++) {
        u32 chosen = selector >> 4 * i & 15, byte = bytes >> 8 * (chosen & 7) & 255;
        if (chosen & 8) byte = byte & 128 ? 255 : 0;
        x |= byte << 8 * i;
    }
    return x;
}

DEVICE u32 funnel(u32 low, u32 high, int shift) { return (u32)(((u64)high << 32 | low) >> shift); }

DEVICE float bits_to_float(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE u32 float_to_bits(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE float half_to_float(u32 x) {
    _Float16 h;
    u16 bits = x;
    memcpy(&h, &bits, 2);
    return h;
}
DEVICE u32 pack_halves(float low, float high) {
    _Float16 h[2] = {(_Float16)low, (_Float16)high};
    u32 x;
    memcpy(&x, h, 4);
    return x;
}
DEVICE float exp2_(float x) { return exp2f(x); }
DEVICE float log2_(float x) { return log2f(x); }
DEVICE float rsqrt_(float x) { return 1 / sqrtf(x); }
DEVICE float multiply_add_clamped(float a, float b, float c) { return fminf(fmaxf(fmaf(a, b, c), 0), 1); }
template <int N>
DEVICE u32 ceiling(float x) { return (u32)ceil((double)x * N); }
template <int N>
DEVICE u32 byte_at_ceiling(const u8* table, float x) { return table[ceiling<N>(x)]; }
DEVICE int rint_(float x) { return (int)rintf(x); }

DEVICE u32 multiply_high(u32 a, u32 b) { return (u64)a * b >> 32; }
DEVICE int dot_bytes(u32 a, u32 b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
    return c;
}
DEVICE u32 parity(u32 x) { return __builtin_popcount(x) & 1; }
DEVICE u32 bfloat_bits(float x) {
    u32 bits = float_to_bits(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pack_bfloats(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }

DEVICE float half_of(u32 pair, int which) { return half_to_float(which ? pair >> 16 : pair & 0xffff); }

DEVICE float bfloat_of(u32 pair, int which) { return bits_to_float(which ? pair & 0xffff0000u : pair << 16); }

template <float (*OF)(u32, int)>
DEVICE void multiply_pairs(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(deposits[current], mine, sizeof mine);
    meet_warp();
    const u32(*all)[8] = deposits + current / 32 * 32;
    const int lane = current % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; k++) {
            const int pair = k % 8 / 2, upper = k / 8;
            const float a = OF(all[row % 8 * 4 + pair][row / 8 + 2 * upper], k % 2);
            const float b = OF(all[column * 4 + pair][4 + upper], k % 2);
            sum += (double)a * b;
        }
        c[i] = (float)sum;
    }
    meet_warp();
}

DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_pairs<half_of>(c, a0, a1, a2, a3, b0, b1);
}
DEVICE void multiply_bfloats(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_pairs<bfloat_of>(c, a0, a1, a2, a3, b0, b1);
}

template <bool SIGNED>
DEVICE void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(deposits[current], mine, sizeof mine);
    meet_warp();
    const u32(*all)[8] = deposits + current / 32 * 32;
    const int lane = current % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < 32; k++) {
            const int word = k % 16 / 4, upper = k / 16, byte = k % 4;
            const u32 a = all[row % 8 * 4 + word][row / 8 + 2 * upper] >> 8 * byte & 255;
            const u32 b = all[column * 4 + word][4 + upper] >> 8 * byte & 255;
            c[i] += (SIGNED ? (int)(signed char)a : (int)a) * (int)(signed char)b;
        }
    }
    meet_warp();
}

DEVICE u32 transpose(u32 x) {
    deposits[current][0] = x;
    meet_warp();
    const u32(*all)[8] = deposits + current / 32 * 32;
    const int lane = current % 32, g = lane / 4, t = lane % 4;
    u32 y = 0;
    for (int e = 0; e < 2; e++) {
        u32 pair = all[(2 * t + e) * 4 + g / 2][0];
        y |= (g % 2 ? pair >> 16 : pair & 0xffff) << 16 * e;
    }
    meet_warp();
    return y;
}

// Lets a wrapper pass untyped pointers to a kernel.
struct Any {
    const void* p;
    template <class T>
    operator T*() const { return (T*)p; }
};
