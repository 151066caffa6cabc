// As paged_attention.cu, for fp32 and for shapes that tensor cores do not take: any DIM up to 256, group and block size.
//
// grid <heads, rows>. block 128: warps over tokens, lanes over columns.
#include "ptx.cuh"

using T = ELEMENT;

#define WARPS 4
#define COLUMNS ((DIM + 31) / 32)
#define LOG2E 1.4426950408889634f
#define MINUS_INFINITY __uint_as_float(0xff800000u)

extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)
    plain_attention(T *__restrict__ out, const T *__restrict__ q, const T *__restrict__ keys, const T *__restrict__ values,
                    const int *__restrict__ tables, long long table_stride, const long long *__restrict__ lengths, int kv_heads,
                    int group, int block_size, float scale, float softcap, int window) {
    __shared__ float sums[WARPS][DIM], tops[WARPS], masses[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = lengths[blockIdx.y];
    const long long head = blockIdx.y * (long long)(kv_heads * group) + blockIdx.x;
    const int *table = tables + blockIdx.y * table_stride;
    float query[COLUMNS], sum[COLUMNS] = {}, top = MINUS_INFINITY, mass = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        query[i] = lane + i * 32 < DIM ? to_float(q[head * DIM + lane + i * 32]) : 0.0f;
    }
    for (int token = max(length - window, 0) + warp; token < length; token += WARPS) {
        const long long slot = table[token / block_size] * (long long)block_size + token % block_size;
        const long long at = (slot * kv_heads + blockIdx.x / group) * DIM;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            score += lane + i * 32 < DIM ? query[i] * to_float(keys[at + lane + i * 32]) : 0.0f;
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            score += __shfl_xor_sync(0xffffffffu, score, distance);
        }
        score *= scale;
        if (softcap > 0.0f) {
            score = softcap * tanhf(score / softcap);
        }
        const float higher = fmaxf(top, score * LOG2E), keep = exp2f(top - higher), weight = exp2f(score * LOG2E - higher);
        top = higher;
        mass = mass * keep + weight;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            sum[i] = sum[i] * keep + (lane + i * 32 < DIM ? weight * to_float(values[at + lane + i * 32]) : 0.0f);
        }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        if (lane + i * 32 < DIM) {
            sums[warp][lane + i * 32] = sum[i];
        }
    }
    if (lane == 0) {
        tops[warp] = top;
        masses[warp] = mass;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < DIM; at += WARPS * 32) {
        float highest = tops[0], total = 0.0f, weights = 0.0f;
        for (int w = 1; w < WARPS; ++w) {
            highest = fmaxf(highest, tops[w]);
        }
        for (int w = 0; w < WARPS && length > 0; ++w) {
            const float keep = exp2f(tops[w] - highest);
            total += keep * sums[w][at];
            weights += keep * masses[w];
        }
        out[head * DIM + at] = from_float<T>(length > 0 ? total / weights : 0.0f);
    }
}
