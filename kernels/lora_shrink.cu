// w x A^T of every task, in half precision, on tensor cores.
//
//   hidden[i, r] = weight * sum over k of x[row_i, k] * A[r, k]
//
// x [rows, in_features], A [a_rows, in_features], both contiguous along k, 16-byte aligned, in_features a multiple of 8;
// hidden as in lora_tables.cuh. Lanes read the operands of mma straight from memory, 16 bytes each: a lane's eight
// values along k serve two products, and as x and A are read alike, the order of k within a product does not matter.
//
// A block has 16 rows and RANKS rows of A: its warps take a slice of k each, added in the order of warps.
//
// grid <any, any>: x over tasks x stretches of 16 rows, y over stretches of RANKS rows of A. block 512.
#include "ptx.cuh"
#include "lora_tables.cuh"

using T = ELEMENT;

#define WARPS 16
#define RANKS 16
#define TILES (RANKS / 8)
#define M_TILES (ROWS / 16)
#define DEPTH 32 // values along k in one step: four lanes times eight
#define STEPS 4  // steps whose loads are under way together

// Adds 16 rows of x times RANKS rows of A over k = begin .. end - 1. Lane: rows g and g + 8 of x, row g of each tile
// of A. A null pointer is a row of zeros. All loads of a round are under way before its first product.
__device__ __forceinline__ void multiply(float (&sum)[TILES][4], const T *low, const T *high, const T *const (&a)[TILES],
                                         int begin, int end) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int lane_k = threadIdx.x % 4 * 8;
    for (int round = begin; round < end; round += STEPS * DEPTH) {
        uint4 x0[STEPS], x1[STEPS], w[STEPS][TILES];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int k = round + step * DEPTH + lane_k;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                w[step][tile] = k < end && a[tile] ? load_once(a[tile] + k) : zero;
            }
            x0[step] = k < end && low ? *(const uint4 *)(low + k) : zero;
            x1[step] = k < end && high ? *(const uint4 *)(high + k) : zero;
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned near_x[4] = {x0[step].x, x1[step].x, x0[step].y, x1[step].y};
            unsigned far_x[4] = {x0[step].z, x1[step].z, x0[step].w, x1[step].w};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                unsigned near_a[2] = {w[step][tile].x, w[step][tile].y};
                unsigned far_a[2] = {w[step][tile].z, w[step][tile].w};
                mma_m16n8k16<T>(sum[tile], near_x, near_a);
                mma_m16n8k16<T>(sum[tile], far_x, far_a);
            }
        }
    }
}

__device__ __forceinline__ const T *row_of(const T *x, long long stride, const Task &task, int index) {
    return index < task.count ? x + task.row[index] * stride : nullptr;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    lora_shrink(T *__restrict__ hidden, const T *__restrict__ x, long long x_stride, const Tasks *__restrict__ tasks,
                const char *table, long long table_stride, int shares, int in_features) {
    __shared__ float part[WARPS][16][RANKS + 1];
    const Table adapters = {table, table_stride, shares};
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int slice = (in_features + WARPS * DEPTH - 1) / (WARPS * DEPTH) * DEPTH;
    const int begin = warp * slice, end = min(begin + slice, in_features);

    for (int item = blockIdx.x; item < tasks->count * M_TILES; item += gridDim.x) {
        const Task &task = tasks->task[item / M_TILES];
        const int top = item % M_TILES * 16;
        if (task.slot < 0 || top >= task.count) {
            continue;
        }
        const Adapter *adapter = adapters.at(task.slot);
        const int a_rows = adapter->a_rows;
        const T *low = row_of(x, x_stride, task, top + g);
        const T *high = row_of(x, x_stride, task, top + g + 8);

        for (int first = blockIdx.y * RANKS; first < a_rows; first += gridDim.y * RANKS) {
            const T *a[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int rank = first + tile * 8 + g;
                a[tile] = rank < a_rows ? (const T *)adapter->a + (long long)rank * in_features : nullptr;
            }
            float sum[TILES][4] = {};
            multiply(sum, low, high, a, begin, end);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    part[warp][g + i / 2 * 8][tile * 8 + t * 2 + i % 2] = sum[tile][i];
                }
            }
            __syncthreads();
            const int row = threadIdx.x / RANKS, rank = threadIdx.x % RANKS;
            if (row < 16 && top + row < task.count && first + rank < a_rows) {
                float total = part[0][row][rank];
#pragma unroll
                for (int w = 1; w < WARPS; ++w) {
                    total += part[w][row][rank];
                }
                hidden[hidden_index(task, a_rows, top + row, first + rank)] = from_float<T>(task.weight * total);
            }
            __syncthreads();
        }
    }
}
