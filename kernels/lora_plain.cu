// The operators without tensor cores: fp32, and half precision where rows are not made of whole 16-byte vectors.
//
//   lora_shrink_plain: hidden[i, r] = weight * sum over k of x[row_i, k] * A[r, k]
//   lora_expand_plain: for each task of a list, for each part: y = scale * y + weight * shift + hidden B
//   lora_embed:        for each task of a list:                e = scale * e + weight * A[token] B
//
// Shapes as in lora_shrink.cu and lora_expand.cu, hidden values in fp32; A [a_rows, rank] at an embedding: a row for each token,
// none for tokens from a_rows on. Everything is fp32 and rounded once. ROWS is only what Task was written for.
#include "ptx.cuh"
#include "lora_tables.cuh"

using T = ELEMENT;

#define WARPS 4

// grid <any>: over tasks x rows. block 128: a warp for each of A's rows in turn.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)
    lora_shrink_plain(float *__restrict__ hidden, const T *__restrict__ x, long long x_stride,
                      const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares,
                      int in_features) {
    const Table adapters = {table, table_stride, shares};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int item = blockIdx.x; item < tasks->count * ROWS; item += gridDim.x) {
        const Task &task = tasks->at(item / ROWS);
        const int row = item % ROWS;
        if (task.slot < 0 || row >= task.count) {
            continue;
        }
        const Adapter *adapter = adapters.at(task.slot);
        const T *input = x + task.row[row] * x_stride;
        for (int rank = warp; rank < adapter->a_rows; rank += WARPS) {
            const T *a = (const T *)adapter->a + (long long)rank * in_features;
            float sum = 0.0f;
            for (int k = lane; k < in_features; k += 32) {
                sum += to_float(input[k]) * to_float(a[k]);
            }
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            }
            if (lane == 0) {
                hidden[hidden_index(task, adapter->a_rows, row, rank)] = task.weight * sum;
            }
        }
    }
}

// grid <any>: over tasks x rows. block 128: threads over columns.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)
    lora_expand_plain(T *__restrict__ y, long long y_stride, int columns, const float *__restrict__ hidden,
                      const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares) {
    const Table adapters = {table, table_stride, shares};
    for (int item = blockIdx.x; item < tasks->count * ROWS; item += gridDim.x) {
        const Task *list = &tasks->at(item / ROWS);
        const int row = item % ROWS;
        if (row >= list->count) {
            continue;
        }
        for (int column = threadIdx.x; column < columns && list->length > 0; column += WARPS * 32) {
            T *at = y + list->row[row] * y_stride + column;
            float value = to_float(*at);
            bool covered = false;
            for (int entry = 0; entry < list->length; ++entry) {
                const Task &task = list[entry];
                const Adapter *adapter = adapters.at(task.slot);
                for (int p = 0; p < adapter->parts; ++p) {
                    const Part &part = adapter->part[p];
                    const int in_part = column - part.out_offset;
                    if (in_part < 0 || in_part >= part.width) {
                        continue;
                    }
                    covered = true;
                    float sum = part.shift ? task.weight * part.shift[in_part] : 0.0f;
                    for (int r = 0; r < part.rank; ++r) {
                        sum += hidden[hidden_index(task, adapter->a_rows, row, part.rank_offset + r)] *
                               to_float(((const T *)part.b)[(long long)r * part.width + in_part]);
                    }
                    value = (part.scale ? part.scale[in_part] : 1.0f) * value + sum;
                }
            }
            if (covered) {
                *at = from_float<T>(value);
            }
        }
    }
}

// e [rows, columns], rows e_stride apart; token [rows] int64. grid <any>: over tasks x rows. block 128: over columns.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)
    lora_embed(T *__restrict__ e, long long e_stride, int columns, const long long *__restrict__ tokens,
               const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares) {
    const Table adapters = {table, table_stride, shares};
    for (int item = blockIdx.x; item < tasks->count * ROWS; item += gridDim.x) {
        const Task *list = &tasks->at(item / ROWS);
        const int row = item % ROWS;
        if (row >= list->count) {
            continue;
        }
        const long long token = tokens[list->row[row]];
        for (int column = threadIdx.x; column < columns && list->length > 0; column += WARPS * 32) {
            T *at = e + list->row[row] * e_stride + column;
            float value = to_float(*at);
            bool covered = false;
            for (int entry = 0; entry < list->length; ++entry) {
                const Adapter *adapter = adapters.at(list[entry].slot);
                if (adapter->parts == 0) {
                    continue;
                }
                const Part &part = adapter->part[0];
                float sum = 0.0f;
                if (token < adapter->a_rows) {
                    const T *looked_up = (const T *)adapter->a + token * part.rank;
                    for (int r = 0; r < part.rank; ++r) {
                        sum += to_float(looked_up[r]) * to_float(((const T *)part.b)[(long long)r * columns + column]);
                    }
                }
                covered = true;
                value = (part.scale ? part.scale[column] : 1.0f) * value + list[entry].weight * sum;
            }
            if (covered) {
                *at = from_float<T>(value);
            }
        }
    }
}
