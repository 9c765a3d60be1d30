// The instructions the kernels are made of. Tests replace this file by one that emulates a warp on a CPU.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED __shared__ __align__(16)
#define ARENA extern __shared__ __align__(16)

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

struct __align__(8) Words2 { u32 x, y; };
struct __align__(16) Words4 { u32 x, y, z, w; };

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE int blocks_y() { return gridDim.y; }
DEVICE void sync() { __syncthreads(); }
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 shuffle(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DEVICE u32 load16(const u8* p) { return *(const u16*)p; }
DEVICE u32 load32(const u8* p) { return *(const u32*)p; }
DEVICE Words2 load64(const u8* p) { return *(const Words2*)p; }
DEVICE Words4 load128(const u8* p) { return *(const Words4*)p; }

// Copies from global to shared memory that a thread waits for by groups.
template <int BYTES>
DEVICE void copy_async(u8* to, const u8* from) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int NEWEST>
DEVICE void wait_for_all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory"); }
DEVICE void sync_warp() { __syncwarp(); }

// Byte i of the result is byte (selector >> 4 i) & 7 of b:a; with bit 3 of the selector, its sign in all bits.
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
    u32 x;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(selector));
    return x;
}

// The lower half of high:low >> shift.
DEVICE u32 funnel(u32 low, u32 high, int shift) { return __funnelshift_r(low, high, shift); }

// c[16 x 8] += a[16 x 16] b[16 x 8], in the fragment layouts of mma.m16n8k16.
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void multiply_bfloats(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same for bytes: c[16 x 8] += a[16 x 32] b[32 x 8] with signed b, and a signed or not.
template <bool SIGNED>
DEVICE void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (SIGNED)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transpose an 8 x 8 matrix of halves, two neighbours of a row in each lane.
DEVICE u32 transpose(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

DEVICE float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_(float x) { return log2f(x); }
DEVICE float rsqrt_(float x) { return rsqrtf(x); }
DEVICE float multiply_add_clamped(float a, float b, float c) { return __saturatef(__fmaf_rn(a, b, c)); }  // to [0, 1]

// The integer to which x * N, with 0 <= x <= 1, is rounded up: that many times the smallest float, whose bits are it.
template <int N>
DEVICE u32 ceiling(float x) { return __float_as_uint(__fmul_ru(x, __uint_as_float(N))); }

// The byte of that index of a table in shared memory. Its address is far below 2^23, the bits of a multiple of the smallest
// float as well, and goes into the same sum.
template <int N>
DEVICE u32 byte_at_ceiling(const u8* table, float x) {
    const float start = __uint_as_float((u32)__cvta_generic_to_shared(table));
    return *(const u8*)__cvta_shared_to_generic(__float_as_uint(__fmaf_ru(x, __uint_as_float(N), start)));
}

DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE int dot_bytes(u32 a, u32 b, int c) { return __dp4a((int)a, (int)b, c); }  // c + four products of signed bytes
DEVICE u32 parity(u32 x) { return __popc(x) & 1; }
DEVICE int rint_(float x) { return __float2int_rn(x); }
DEVICE u32 pack_halves(float low, float high) {
    u32 x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DEVICE u32 pack_bfloats(float low, float high) {
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DEVICE float half_to_float(u32 x) {
    float y;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "r"(x));
    return y;
}
DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }
// end of intrinsics.cuh
