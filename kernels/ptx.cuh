// The machine's own instructions, one wrapper each. Nothing else in this folder holds assembly.
//
// Storage types of half precision are bare bits; arithmetic is done in float, or by mma on packed pairs. A
// pair holds its element of lower address, or lower index along k, in the lower 16 bits.
#pragma once

struct Bf16 {
    unsigned short bits;
};
struct Fp16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ __forceinline__ float to_float(Fp16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Two floats rounded to nearest even, as a pair.
template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<Bf16>(float low, float high) {
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
template <>
__device__ __forceinline__ unsigned pack<Fp16>(float low, float high) {
    unsigned result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

template <typename T>
__device__ __forceinline__ float low_of(unsigned pair) {
    return to_float(T{(unsigned short)(pair & 0xffffu)});
}
template <typename T>
__device__ __forceinline__ float high_of(unsigned pair) {
    return to_float(T{(unsigned short)(pair >> 16)});
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
    return T{(unsigned short)(pack<T>(value, 0.0f) & 0xffffu)};
}
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

// d [16 x 8] += a [16 x 16] b [16 x 8], fp32 accumulation. With g = lane / 4 and t = lane % 4:
// a: pairs (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8);
// b: pairs (k 2t, column g), (k 2t + 8, column g);
// d: (row g, column 2t), (row g, column 2t + 1), (row g + 8, column 2t), (row g + 8, column 2t + 1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Fp16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l names row l % 8 of matrix l / 8, 16 bytes at
// a 16-byte boundary; it receives pair l % 4 of row l / 4 of every matrix. Transposed: of column l / 4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Copy 16 bytes to shared memory behind the thread's back; zeros where not `valid`, and `global` is not read.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid) {
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's newest groups are unfinished. Other threads need a barrier as well.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 16 bytes that are read once, past the first-level cache.
__device__ __forceinline__ uint4 load_once(const void *address) {
    uint4 r;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(address));
    return r;
}

// 16 bytes that nobody writes meanwhile.
__device__ __forceinline__ uint4 load_16(const void *address) {
    uint4 r;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(address));
    return r;
}

// Send for 16 bytes as far as the second-level cache.
__device__ __forceinline__ void prefetch_16(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// 2 to the power of x, to about 22 bits.
__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x, to about 23 bits; 0 for infinity.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
