// RMS norm, with the residual addition before it.
//
//   rms_norm:     residual += x where there is one (rounded), else residual = x
//                 out[t] = weight * round(residual[t] / sqrt(mean(residual[t]^2) + eps))
//
// out, residual, x [rows, width], contiguous; weight [width]. In half precision width is a multiple of 8 and at most
// 2048 * VECTORS: a row stays in the registers of its block.
//
// grid <rows>. block 256.
#include "ptx.cuh"

using T = ELEMENT;

#define THREADS 256

__device__ __forceinline__ float block_sum(float value) {
    __shared__ float warps[THREADS / 32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) {
        total += warps[warp];
    }
    return total;
}

#if VECTORS > 0

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rms_norm(T *__restrict__ out, T *__restrict__ residual, const T *__restrict__ x, const T *__restrict__ weight, int width,
             float eps) {
    const long long row = blockIdx.x * (long long)width;
    float value[VECTORS][8];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = (i * THREADS + threadIdx.x) * 8;
        uint4 pairs = make_uint4(0, 0, 0, 0);
        if (at < width) {
            pairs = *(const uint4 *)(x + row + at);
        }
        unsigned word[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
        if (residual && at < width) {
            const uint4 before = *(const uint4 *)(residual + row + at);
            const unsigned old[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                word[j] = pack<T>(low_of<T>(old[j]) + low_of<T>(word[j]), high_of<T>(old[j]) + high_of<T>(word[j]));
            }
            *(uint4 *)(residual + row + at) = make_uint4(word[0], word[1], word[2], word[3]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            value[i][2 * j] = low_of<T>(word[j]);
            value[i][2 * j + 1] = high_of<T>(word[j]);
            squares += value[i][2 * j] * value[i][2 * j] + value[i][2 * j + 1] * value[i][2 * j + 1];
        }
    }
    const float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int at = (i * THREADS + threadIdx.x) * 8;
        if (at < width) {
            const uint4 pairs = *(const uint4 *)(weight + at);
            const unsigned word[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
            unsigned result[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned normal = pack<T>(value[i][2 * j] * scale, value[i][2 * j + 1] * scale);
                result[j] = pack<T>(low_of<T>(word[j]) * low_of<T>(normal), high_of<T>(word[j]) * high_of<T>(normal));
            }
            *(uint4 *)(out + row + at) = make_uint4(result[0], result[1], result[2], result[3]);
        }
    }
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rms_norm(T *__restrict__ out, T *residual, const T *x, const T *__restrict__ weight, int width, float eps) {
    const long long row = blockIdx.x * (long long)width;
    const T *sum = residual ? residual : x;
    float squares = 0.0f;
    for (int at = threadIdx.x; at < width; at += THREADS) {
        if (residual) {
            residual[row + at] = from_float<T>(to_float(residual[row + at]) + to_float(x[row + at]));
        }
        const float value = to_float(sum[row + at]);
        squares += value * value;
    }
    const float scale = rsqrtf(block_sum(squares) / width + eps);
    for (int at = threadIdx.x; at < width; at += THREADS) {
        const float normal = to_float(from_float<T>(to_float(sum[row + at]) * scale));
        out[row + at] = from_float<T>(to_float(weight[at]) * normal);
    }
}

#endif
