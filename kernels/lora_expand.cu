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
// grid <any>: over tasks x strips of 64 columns x eight rows, so many for each warp. block 128. Warps never wait for each
// other.
#include "ptx.cuh"
#include "lora_tables.cuh"
#include "pairs.cuh"
#include "lora_strip.cuh"
#include "gate.cuh"

using T = ELEMENT;

#define WARPS 4

// A warp's units, which follow each other: first the groups of a list's rows, which share B, then the strips, which share
// the list.
struct Walk {
    const Tasks *tasks;
    int task, strip, group, strips, left;

    __device__ __forceinline__ Walk(const Tasks *tasks, int columns) : tasks(tasks), strips((columns + STRIP - 1) / STRIP) {
        const int units = tasks->count * strips * UNITS, warps = gridDim.x * WARPS, share = (units + warps - 1) / warps;
        const int begin = (blockIdx.x * WARPS + threadIdx.x / 32) * share;
        left = min(share, units - begin);
        group = begin % UNITS;
        strip = begin / UNITS % strips;
        task = begin / UNITS / strips;
    }
    __device__ __forceinline__ Unit unit() const { return {&tasks->at(task), group * UNIT_ROWS, strip * STRIP}; }
    __device__ __forceinline__ void advance() {
        --left;
        if (++group == UNITS) {
            group = 0;
            if (++strip == strips) {
                strip = 0;
                ++task;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, ROWS > 8 ? 3 : 5)
    lora_expand(T *__restrict__ y, long long y_stride, int columns, const float *__restrict__ hidden, int splits,
                const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares) {
    __shared__ __align__(16) Adapter records[WARPS];
    const Table adapters = {table, table_stride, shares};
    const Matrix<T> result = {y, (int)(y_stride / 8), columns};
    Desk desk = {records[threadIdx.x / 32], -1};

    for (Walk walk(tasks, columns); walk.left > 0; walk.advance()) {
        const Unit unit = walk.unit();
        if (unit.top >= unit.list->count) {
            continue;
        }
        Strip strip;
        const Lines<T> lines(result, unit);
        add_list<T>(strip, lines, hidden, splits, unit, adapters, desk);
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            if (lines.has(i) && strip.is_covered) {
                *(uint4 *)lines.at(i) = rounded<T>(strip.sum[i / 2], i % 2);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
    lora_gate(T *__restrict__ out, const T *__restrict__ y, long long y_stride, int columns, const float *__restrict__ hidden,
              int splits, const Tasks *__restrict__ tasks, const char *table, long long table_stride, int shares) {
    __shared__ __align__(16) Adapter records[WARPS];
    const Table adapters = {table, table_stride, shares};
    const int width = columns / 2;
    const Matrix<const T> base = {y, (int)(y_stride / 8), columns};
    const Matrix<T> result = {out, width / 8, width};
    Desk desk = {records[threadIdx.x / 32], -1};

    for (Walk walk(tasks, width); walk.left > 0; walk.advance()) {
        const Unit unit = walk.unit();
        const Task *list = unit.list;
        if (unit.top >= list->count || (list->length == 0 && list->slot >= 0)) {
            continue;
        }
        const Unit up = {list, unit.top, width + unit.column};
        Strip strip;
        uint4 gate[LANE_ROWS];
        const Lines<const T> gates(base, unit);
        add_list<T>(strip, gates, hidden, splits, unit, adapters, desk);
        if (!strip.is_loaded) {
            load_strip<T>(strip, gates);
        }
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            gate[i] = rounded<T>(strip.sum[i / 2], i % 2);
        }
        const Lines<const T> ups(base, up);
        add_list<T>(strip, ups, hidden, splits, up, adapters, desk);
        if (!strip.is_loaded) {
            load_strip<T>(strip, ups);
        }
        const Lines<T> lines(result, unit);
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            if (lines.has(i)) {
                *(uint4 *)lines.at(i) = gated<T>(gate[i], rounded<T>(strip.sum[i / 2], i % 2));
            }
        }
    }
}
