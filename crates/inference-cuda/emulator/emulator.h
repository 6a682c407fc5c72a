// Runs the kernels' own source on the CPU, for tests: each GPU thread is a fiber, and the words of platform.cuh are
// defined anew. Blocks run one after the other. What is looked for beside wrong numbers:
//   - threads of a block that wait at different barriers, or lanes of a warp at different warp instructions: an error;
//   - a missing barrier: the order in which threads run is the caller's choice (ascending, all in step; descending,
//     each warp as far ahead of the others as barriers let it; random);
//   - a missing wait for an asynchronous copy, or a missing barrier before one: copies land at the wait and not before,
//     or in descending order at once;
//   - shared memory that is read before it is written: it is filled with NaN before each block;
//   - a misaligned ldmatrix, vector or cp.async address.
// Not seen: bank conflicts, registers, timing, and everything that only the hardware knows.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

typedef unsigned short u16;
typedef unsigned int u32;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

#define RB_KERNEL extern "C"
#define RB_DEVICE static inline
#define MINUS_INFINITY (-INFINITY)
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("rb_shared")))

namespace emulated {
struct Index { u32 x, y, z; };
extern Index block_index;
Index &thread_index();
void block_barrier();
// Exchanges `bytes` of each lane: `mine` goes in, all 32 come out. `what` must be the same for all lanes.
const unsigned char *exchange(int what, const void *mine, size_t bytes);
void exchanged();
void copy_later(void *to, const void *from, size_t bytes, bool valid);
void copies_commit();
void copies_wait(int pending);
[[noreturn]] void fail(const char *text);
} // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index)
#define __syncthreads() emulated::block_barrier()

static inline u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float from_bits(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#if PRECISION_BF16
static inline float to_float(u16 bits) { return from_bits((u32)bits << 16); }
static inline u16 to_storage(float value) {
    u32 bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
static inline float to_float(u16 bits) {
    u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return from_bits(sign) + (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
// Round to nearest, ties to even.
static inline u16 to_storage(float value) {
    u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x477ff000) return (u16)(sign | 0x7c00);
    if (size < 0x38800000) return (u16)(sign | (u32)nearbyintf(from_bits(size) * 0x1p24f));
    u32 rounded = size + 0xfff + (size >> 13 & 1);
    return (u16)(sign | ((rounded >> 13) - (112 << 10)));
}
#endif
static inline u32 pack2(float low, float high) { return to_storage(low) | (u32)to_storage(high) << 16; }

static inline float exp2_fast(float x) { return exp2f(x); }
static inline float reciprocal_fast(float x) { return 1.0f / x; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

static inline float shuffle_xor(float value, int lanes) {
    const float *all = (const float *)emulated::exchange(0, &value, 4);
    float other = all[(threadIdx.x % 32) ^ (u32)lanes];
    emulated::exchanged();
    return other;
}

// From the tables of the PTX manual for mma.m16n8k16, element by element: nothing of the kernels' index arithmetic.
static inline void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const u32(*all)[6] = (const u32(*)[6])emulated::exchange(1, mine, sizeof mine);
    auto half = [&](u32 lane, u32 word, u32 part) { return to_float((u16)(all[lane][word] >> (16 * part))); };
    // The element of A at (row, k): register i holds a_{2i}, a_{2i+1}; row = groupID (+8 for i = 1, 3),
    // k = threadID_in_group * 2 + part (+8 for i = 2, 3).
    auto element_a = [&](u32 row, u32 k) {
        return half(row % 8 * 4 + k % 8 / 2, (row >= 8 ? 1u : 0u) + (k >= 8 ? 2u : 0u), k % 2);
    };
    // The element of B at (k, column): column = groupID, k = threadID_in_group * 2 + part (+8 for register 1).
    auto element_b = [&](u32 k, u32 column) { return half(column * 4 + k % 8 / 2, 4 + (k >= 8 ? 1u : 0u), k % 2); };
    u32 lane = threadIdx.x % 32;
    float out[4];
    for (u32 i = 0; i < 4; i++) {
        u32 row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        float sum = c[i];
        for (u32 k = 0; k < 16; k++) sum += element_a(row, k) * element_b(k, column);
        out[i] = sum;
    }
    emulated::exchanged();
    memcpy(c, out, sizeof out);
}

static inline void load_matrices_either(u32 (&r)[4], const u16 *row, bool transposed) {
    if ((uintptr_t)row % 16) emulated::fail("ldmatrix from an address that is not a multiple of 16");
    const u16 *const *rows = (const u16 *const *)emulated::exchange(transposed ? 3 : 2, &row, sizeof row);
    u32 lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    for (u32 m = 0; m < 4; m++) {
        u16 low = transposed ? rows[m * 8 + pair][group] : rows[m * 8 + group][pair];
        u16 high = transposed ? rows[m * 8 + pair + 1][group] : rows[m * 8 + group][pair + 1];
        r[m] = low | (u32)high << 16;
    }
    emulated::exchanged();
}
static inline void load_matrices(u32 (&r)[4], const u16 *row) { load_matrices_either(r, row, false); }
static inline void load_matrices_transposed(u32 (&r)[4], const u16 *row) { load_matrices_either(r, row, true); }

static inline void copy_async_16(u16 *shared, const u16 *global, bool valid) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) emulated::fail("cp.async with an address not a multiple of 16");
    emulated::copy_later(shared, global, 16, valid);
}
static inline void copy_async_commit() { emulated::copies_commit(); }
template <int PENDING> static inline void copy_async_wait() { emulated::copies_wait(PENDING); }
