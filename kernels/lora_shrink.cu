// w x A^T of every task, in half precision, on tensor cores.
//
//   hidden[split, i, r] = weight * sum over the split's k of x[row_i, k] * A[r, k]
//
// x [rows, in_features], A [a_rows, in_features], both contiguous along k, 16-byte aligned, in_features a multiple of 8;
// hidden as in lora_tables.cuh: whoever reads it adds the splits, in their order. Lanes read the operands of mma straight
// from memory, 16 bytes each: a lane's eight values along k serve two products, and as x and A are read alike, the order of
// k within a product does not matter. The rows of A are the rows of mma's result, so that eight rows of x fill it.
//
// A block has up to TILES * 8 rows of a task, RANKS rows of A and one split of k: its warps take a slice each, added in the
// order of warps.
//
// grid <any, splits>: x over tasks x groups of rows x stretches of RANKS rows of A. block WARPS * 32.
#include "ptx.cuh"
#include "lora_tables.cuh"

using T = ELEMENT;

#define WARPS 16
#define RANKS 16
#define TILES (ROWS > 8 ? 4 : 1) // of eight rows of x
#define GROUPS (ROWS / (TILES * 8))
#define DEPTH 32                 // values along k in one step: four lanes times eight
#define STEPS (ROWS > 8 ? 2 : 4) // of a round

// Adds RANKS rows of A times TILES * 8 rows of x over k = begin .. end - 1. Lane: row g of A at `a`, of which `left` rows are
// left from there on, row g + 8, `next` further on, and row g of each tile of x, null for a row of zeros. A round's loads
// stand before its products, so that as many are under way together as there are registers for.
__device__ __forceinline__ void multiply(float (&sum)[TILES][4], const T *a, int left, int next, const T *const (&x)[TILES],
                                         int begin, int end) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int lane_k = threadIdx.x % 4 * 8;
#pragma unroll 1
    for (int round = begin; round < end; round += STEPS * DEPTH) {
        uint4 low[STEPS], high[STEPS], in[STEPS][TILES];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int k = round + step * DEPTH + lane_k;
            low[step] = k < end && left > 0 ? load_once(a + k) : zero;
            high[step] = k < end && left > 8 ? load_once(a + (next + k)) : zero;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                in[step][tile] = k < end && x[tile] ? load_16(x[tile] + k) : zero;
            }
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const unsigned near_a[4] = {low[step].x, high[step].x, low[step].y, high[step].y};
            const unsigned far_a[4] = {low[step].z, high[step].z, low[step].w, high[step].w};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const unsigned near_x[2] = {in[step][tile].x, in[step][tile].y};
                const unsigned far_x[2] = {in[step][tile].z, in[step][tile].w};
                mma_m16n8k16<T>(sum[tile], near_a, near_x);
                mma_m16n8k16<T>(sum[tile], far_a, far_x);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, ROWS > 8 ? 1 : 2)
    lora_shrink(float *__restrict__ hidden, const T *__restrict__ x, long long x_stride, const Tasks *__restrict__ tasks,
                const char *table, long long table_stride, int shares, int in_features, int slice) {
    __shared__ float part[WARPS][TILES * 8][RANKS + 4];
    const Table adapters = {table, table_stride, shares};
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, split = blockIdx.y;
    const int begin = (split * WARPS + warp) * slice, end = min(begin + slice, in_features);
    const int stretches = tasks->stretches;

    for (int item = blockIdx.x; item < tasks->count * GROUPS * stretches; item += gridDim.x) {
        const Task &task = tasks->at(item / (GROUPS * stretches));
        const int first = item % stretches * RANKS, top = item / stretches % GROUPS * (TILES * 8);
        if (task.slot < 0 || top >= task.count) {
            continue;
        }
        const Adapter *adapter = adapters.at(task.slot);
        const int a_rows = adapter->a_rows, rows = min(task.count - top, TILES * 8);
        if (first >= a_rows) {
            continue;
        }
        const T *inputs[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int index = tile * 8 + g;
            inputs[tile] = index < rows ? x + task.row[top + index] * x_stride : nullptr;
        }
        const T *a = (const T *)adapter->a + (long long)(first + g) * in_features;
        float sum[TILES][4] = {};
        multiply(sum, a, a_rows - first - g, 8 * in_features, inputs, begin, end);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                part[warp][tile * 8 + t * 2 + i % 2][g + i / 2 * 8] = sum[tile][i];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * RANKS; i += WARPS * 32) {
            const int row = i / RANKS, rank = i % RANKS;
            float total = part[0][row][rank];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) {
                total += part[w][row][rank];
            }
            if (first + rank < a_rows) {
                hidden[hidden_index(task, a_rows, split * task.count + top + row, first + rank)] = task.weight * total;
            }
        }
        __syncthreads();
    }
}
