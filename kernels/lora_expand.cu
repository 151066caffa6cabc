// From the hidden values to y, in half precision, on tensor cores.
//
//   lora_expand: for each task of a list, for each part: y = scale * y + weight * shift + hidden B
//   lora_gate:   out = silu(y's first half) * y's second half, of what lora_expand would make of y
//
// y [rows, columns], rows y_stride apart, 16-byte aligned; B [rank, width]; offsets and widths of parts are multiples
// of 8; out [rows, columns / 2]. y is widened once, everything is added to it in fp32, and rounded once. A vector of
// eight columns that no part covers is not written by lora_expand; lora_gate writes every row that has a task, and
// spares an MLP a pass over y.
//
// grid <any>: over tasks x strips of 128 columns x eight rows, one for each warp. block 128. Warps never wait for each
// other; those of a block read the same strip of B where a list has many rows.
#include "ptx.cuh"
#include "lora_tables.cuh"
#include "pairs.cuh"
#include "lora_strip.cuh"
#include "gate.cuh"

using T = ELEMENT;

#define WARPS 4

// Where a unit lies in its task. In a chunk of a prompt the groups of rows come first, so that the warps of a block read
// the same B; in one of decode rows the strips do, so that the groups a short list does not have fall to all warps alike.
__device__ __forceinline__ int strip_of(int unit, int strips) { return ROWS > 16 ? unit / UNITS % strips : unit % strips; }
__device__ __forceinline__ int group_of(int unit, int strips) { return ROWS > 16 ? unit % UNITS : unit / strips % UNITS; }

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
    lora_expand(T *__restrict__ y, long long y_stride, int columns, const T *__restrict__ hidden,
                const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares) {
    const Table adapters = {table, table_stride, shares};
    const int strips = (columns + STRIP - 1) / STRIP, units = tasks->count * strips * UNITS;

    for (int unit = blockIdx.x * WARPS + threadIdx.x / 32; unit < units; unit += gridDim.x * WARPS) {
        const Task *list = &tasks->task[unit / (strips * UNITS)];
        const int column = strip_of(unit, strips) * STRIP, top = group_of(unit, strips) * UNIT_ROWS;
        if (top >= list->count || !is_covered(list, adapters, column)) {
            continue;
        }
        T *rows[2];
        find_rows(rows, y, y_stride, list, top);
        float sum[8][4];
        load_strip<T>(sum, rows, column, columns);
        const int covered = add_list(sum, hidden, list, adapters, column, top);
        store_strip(rows, column, sum, covered);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
    lora_gate(T *__restrict__ out, const T *__restrict__ y, long long y_stride, int columns, const T *__restrict__ hidden,
              const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares) {
    const Table adapters = {table, table_stride, shares};
    const int width = columns / 2, strips = (width + STRIP - 1) / STRIP, units = tasks->count * strips * UNITS;

    for (int unit = blockIdx.x * WARPS + threadIdx.x / 32; unit < units; unit += gridDim.x * WARPS) {
        const Task *list = &tasks->task[unit / (strips * UNITS)];
        const int column = strip_of(unit, strips) * STRIP, top = group_of(unit, strips) * UNIT_ROWS;
        if (top >= list->count || (list->length == 0 && list->slot >= 0)) {
            continue;
        }
        const T *rows[2];
        find_rows(rows, y, y_stride, list, top);
        float sum[8][4];
        uint4 gate[4];
        load_strip<T>(sum, rows, column, width);
        add_list(sum, hidden, list, adapters, column, top);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            gate[i] = rounded<T>(sum, i);
        }
        load_strip<T>(sum, rows, width + column, columns);
        add_list(sum, hidden, list, adapters, width + column, top);
        T *targets[2];
        find_rows(targets, out, width, list, top);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = lane_column(column, i / 2);
            if (targets[i % 2] && at < width) {
                *(uint4 *)(targets[i % 2] + at) = gated<T>(gate[i], rounded<T>(sum, i));
            }
        }
    }
}
