// The gate of an MLP.
//
//   out[t, c] = round(gate[t, c] / (1 + exp(-gate[t, c]))) * up[t, c]
//
// gate_up [rows, 2 * width]: gates, then ups; out [rows, width]; both contiguous. In half precision width is a multiple
// of VECTOR = 8; else VECTOR = 1.
//
// grid <any>: over rows x vectors. block 256.
#include "ptx.cuh"
#include "gate.cuh"

using T = ELEMENT;

#define THREADS 256

#if VECTOR == 8

__device__ __forceinline__ void gate_vector(T *out, const T *gate, const T *up) {
    *(uint4 *)out = gated<T>(*(const uint4 *)gate, *(const uint4 *)up);
}

#else

__device__ __forceinline__ void gate_vector(T *out, const T *gate, const T *up) {
    const float value = to_float(*gate);
    *out = from_float<T>(to_float(from_float<T>(value / (1.0f + expf(-value)))) * to_float(*up));
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    silu_mul(T *__restrict__ out, const T *__restrict__ gate_up, int rows, int width) {
    const long long vectors = (long long)rows * (width / VECTOR);
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < vectors; i += gridDim.x * (long long)THREADS) {
        const long long row = i / (width / VECTOR);
        const int column = i % (width / VECTOR) * VECTOR;
        const T *gate = gate_up + row * 2 * width + column;
        gate_vector(out + row * width + column, gate, gate + width);
    }
}
