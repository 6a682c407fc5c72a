// What the kernels need of the GPU. No header of the toolkit is used, so NVRTC needs nothing beside itself.
// tests/emulator/emulator.h defines the same words for the CPU.

typedef unsigned short u16; // storage of one fp16 or bf16
typedef unsigned int u32;

#define RB_KERNEL extern "C" __global__
#define RB_DEVICE __device__ __forceinline__
#define MINUS_INFINITY __int_as_float(0xff800000)

#if PRECISION_BF16
RB_DEVICE float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// `low` goes to the lower address.
RB_DEVICE u32 pack2(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
#else
RB_DEVICE float to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// `low` goes to the lower address.
RB_DEVICE u32 pack2(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
#endif

// 2 to the power of x, about 2 ulp; 0 for minus infinity.
RB_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

RB_DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

RB_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// c (16x8) += a (16x16, rows) * b (16x8, columns), by a whole warp. Fragments as PTX numbers them for m16n8k16:
// lane = 4 g + t; a = rows g, g+8 at columns 2t and 2t+8; b = rows 2t and 2t+8 of column g; c = rows g, g+8 at 2t.
RB_DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
#if PRECISION_BF16
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices from shared memory: lane 8 m + r names the address of row r of matrix m (16 bytes, aligned);
// r[m] of lane 4 g + t is row g, columns 2t and 2t+1.
RB_DEVICE void load_matrices(u32 (&r)[4], const u16 *row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed: r[m] of lane 4 g + t is rows 2t and 2t+1 of column g.
RB_DEVICE void load_matrices_transposed(u32 (&r)[4], const u16 *row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Begins to copy 16 bytes to shared memory, or to fill them with zeros where `valid` is false.
RB_DEVICE void copy_async_16(u16 *shared, const u16 *global, bool valid) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

RB_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING> RB_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
