// Rotary positions for queries and keys, and keys and values into the paged cache.
//
//   rotated[c]           = v[c] * cos[c] - v[c + dim / 2] * sin[c]                        for c < dim / 2
//   rotated[c + dim / 2] = v[c + dim / 2] * cos[c + dim / 2] + v[c] * sin[c + dim / 2]
//
// qkv [rows, (heads + 2 * kv_heads) * dim], rows qkv_stride apart; cos, sin [rows, dim]; q [rows, heads, dim];
// keys, values [slots, kv_heads, dim]; slot [rows] int64, the place of each row's keys and values. VECTOR is 8 in half
// precision where dim is a multiple of 16, else 1.
//
// grid <rows>. block 256: threads over vectors of all heads.
#include "ptx.cuh"

using T = ELEMENT;

#define THREADS 256

#if VECTOR == 8

__device__ __forceinline__ void copy(T *to, const T *from) { *(uint4 *)to = *(const uint4 *)from; }

__device__ __forceinline__ unsigned turned(unsigned a, unsigned b, unsigned cos, unsigned sin, float sign) {
    return pack<T>(low_of<T>(a) * low_of<T>(cos) + sign * low_of<T>(b) * low_of<T>(sin),
                   high_of<T>(a) * high_of<T>(cos) + sign * high_of<T>(b) * high_of<T>(sin));
}

__device__ __forceinline__ uint4 turned(uint4 a, uint4 b, const T *cos, const T *sin, float sign) {
    const uint4 c = *(const uint4 *)cos, s = *(const uint4 *)sin;
    return make_uint4(turned(a.x, b.x, c.x, s.x, sign), turned(a.y, b.y, c.y, s.y, sign),
                      turned(a.z, b.z, c.z, s.z, sign), turned(a.w, b.w, c.w, s.w, sign));
}

__device__ __forceinline__ void rotate(T *to, const T *from, const T *cos, const T *sin, int half) {
    const uint4 low = *(const uint4 *)from, high = *(const uint4 *)(from + half);
    *(uint4 *)to = turned(low, high, cos, sin, -1.0f);
    *(uint4 *)(to + half) = turned(high, low, cos + half, sin + half, 1.0f);
}

#else

__device__ __forceinline__ void copy(T *to, const T *from) { *to = *from; }

__device__ __forceinline__ void rotate(T *to, const T *from, const T *cos, const T *sin, int half) {
    const float low = to_float(from[0]), high = to_float(from[half]);
    to[0] = from_float<T>(low * to_float(cos[0]) - high * to_float(sin[0]));
    to[half] = from_float<T>(high * to_float(cos[half]) + low * to_float(sin[half]));
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    rope_kv(T *__restrict__ q, T *__restrict__ keys, T *__restrict__ values, const T *__restrict__ qkv, long long qkv_stride,
            const T *__restrict__ cos, const T *__restrict__ sin, const long long *__restrict__ slots, int heads, int kv_heads,
            int dim) {
    const long long row = blockIdx.x, slot = slots[row];
    const T *from = qkv + row * qkv_stride;
    const int half = dim / 2, turns = (heads + kv_heads) * (half / VECTOR);
    for (int i = threadIdx.x; i < turns; i += THREADS) {
        const int head = i / (half / VECTOR), at = i % (half / VECTOR) * VECTOR;
        T *to = head < heads ? q + (row * heads + head) * dim : keys + (slot * kv_heads + head - heads) * dim;
        rotate(to + at, from + head * dim + at, cos + row * dim + at, sin + row * dim + at, half);
    }
    const int copies = kv_heads * dim / VECTOR;
    for (int i = threadIdx.x; i < copies; i += THREADS) {
        copy(values + slot * kv_heads * dim + i * VECTOR, from + (heads + kv_heads) * dim + i * VECTOR);
    }
}
