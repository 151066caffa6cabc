// What a warp does with a strip: up to eight rows of one list, STRIP columns of y, in the registers of its lanes.
//
// The columns of y are the rows of mma's result, so that few rows of y waste little. Lane (g, t) = (lane / 4, lane % 4)
// has rows 2t and 2t + 1, in eight columns from 8g on and in eight more HALF columns further: sum[j] holds (row 2t,
// column 8g + j), (row 2t + 1, column 8g + j), and the same two rows in column HALF + 8g + j. Row g of product j is
// column 8g + j: so lanes read B, and read and write y, by whole 16-byte vectors, side by side.
#pragma once

#define STRIP 128
#define HALF 64
#define UNIT_ROWS 8
#define UNITS (ROWS / UNIT_ROWS) // of a list

// A lane's two rows of a matrix; null beyond the list's last.
template <typename Any>
__device__ __forceinline__ void find_rows(Any *(&rows)[2], Any *matrix, long long stride, const Task *list, int top) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int index = top + threadIdx.x % 4 * 2 + i;
        rows[i] = index < list->count ? matrix + list->row[index] * stride : nullptr;
    }
}

// The first of a lane's columns in one half of a strip.
__device__ __forceinline__ int lane_column(int column, int half) { return column + half * HALF + threadIdx.x % 32 / 4 * 8; }

// Columns `column` .. of a lane's rows; zeros from `end` on.
template <typename Half, typename Any>
__device__ __forceinline__ void load_strip(float (&sum)[8][4], Any *const (&rows)[2], int column, int end) {
    uint4 y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = lane_column(column, i / 2);
        y[i] = rows[i % 2] && at < end ? load_16(rows[i % 2] + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned pairs[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sum[j][i] = j % 2 ? high_of<Half>(pairs[j / 2]) : low_of<Half>(pairs[j / 2]);
        }
    }
}

// Eight columns of one of a lane's two rows, rounded.
template <typename Half>
__device__ __forceinline__ uint4 rounded(const float (&sum)[8][4], int i) {
    return make_uint4(pack<Half>(sum[0][i], sum[1][i]), pack<Half>(sum[2][i], sum[3][i]),
                      pack<Half>(sum[4][i], sum[5][i]), pack<Half>(sum[6][i], sum[7][i]));
}

// Write those halves of a strip whose bit is set in `covered`.
template <typename Half>
__device__ __forceinline__ void store_strip(Half *const (&rows)[2], int column, const float (&sum)[8][4], int covered) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (rows[i % 2] && covered & 1 << i / 2) {
            *(uint4 *)(rows[i % 2] + lane_column(column, i / 2)) = rounded<Half>(sum, i);
        }
    }
}

// Two neighbouring ranks of one row of the hidden values, as a pair; zeros beyond the part's rank.
template <typename Half>
__device__ __forceinline__ unsigned read_hidden(const Half *row, const Part &part, int rank) {
    if (!row || rank >= part.rank) {
        return 0;
    }
    const Half *at = row + part.rank_offset + rank;
    if (rank + 1 == part.rank) {
        return at->bits;
    }
    return part.rank_offset % 2 ? at[0].bits | (unsigned)at[1].bits << 16 : *(const unsigned *)at;
}

// sum = scale * sum + weight * shift in the columns of one part.
__device__ __forceinline__ void apply_vectors(float (&sum)[8][4], const Part &part, float weight, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = lane_column(column, half) - part.out_offset;
        if (at >= 0 && at < part.width) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float scale = part.scale ? part.scale[at + j] : 1.0f;
                const float shift = part.shift ? weight * part.shift[at + j] : 0.0f;
                sum[j][half * 2] = scale * sum[j][half * 2] + shift;
                sum[j][half * 2 + 1] = scale * sum[j][half * 2 + 1] + shift;
            }
        }
    }
}

// Add one part of one task to a strip; B is zero outside of the part. `row`: the hidden values of the list's row g, or null.
template <typename Half>
__device__ __forceinline__ void add_part(float (&sum)[8][4], const Half *row, const Part &part, float weight, int column) {
    const int t = threadIdx.x % 4;
    if (part.scale || part.shift) {
        apply_vectors(sum, part, weight, column);
    }
    const Half *columns[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = lane_column(column, half) - part.out_offset;
        columns[half] = at >= 0 && at < part.width ? (const Half *)part.b + at : nullptr;
    }
    for (int first = 0; first < part.rank; first += 16) {
        uint4 b[2][4];
        unsigned h[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int rank = first + t * 2 + i % 2 + i / 2 * 8;
                const bool inside = columns[half] && rank < part.rank;
                b[half][i] = inside ? load_16(columns[half] + rank * part.width) : make_uint4(0, 0, 0, 0);
            }
            h[half] = read_hidden(row, part, first + t * 2 + half * 8);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const unsigned pairs[4] = {column_pair(b[0][0], b[0][1], j), column_pair(b[1][0], b[1][1], j),
                                       column_pair(b[0][2], b[0][3], j), column_pair(b[1][2], b[1][3], j)};
            mma_m16n8k16<Half>(sum[j], pairs, h);
        }
    }
}

// Whether any part of a list's adapters lies in a strip. False for a task that is not the first of its list.
__device__ __forceinline__ bool is_covered(const Task *list, const Table &adapters, int column) {
    for (int entry = 0; entry < list->length; ++entry) {
        const Adapter *adapter = adapters.at(list[entry].slot);
        for (int p = 0; p < adapter->parts; ++p) {
            const Part &part = adapter->part[p];
            if (part.out_offset < column + STRIP && part.out_offset + part.width > column) {
                return true;
            }
        }
    }
    return false;
}

// Add what a list brings to a strip. Bits 0 and 1 of the result: whether any part covers the lane's columns of a half.
template <typename Half>
__device__ __forceinline__ int add_list(float (&sum)[8][4], const Half *hidden, const Task *list, const Table &adapters,
                                        int column, int top) {
    const int near = lane_column(column, 0), far = lane_column(column, 1), index = top + threadIdx.x % 32 / 4;
    int covered = 0;
    for (int entry = 0; entry < list->length; ++entry) {
        const Task &task = list[entry];
        const Adapter *adapter = adapters.at(task.slot);
        const Half *row = index < task.count ? hidden + hidden_index(task, adapter->a_rows, index, 0) : nullptr;
        for (int p = 0; p < adapter->parts; ++p) {
            const Part part = adapter->part[p];
            const int end = part.out_offset + part.width;
            if (part.out_offset < column + STRIP && end > column) {
                covered |= (near >= part.out_offset && near < end) | (far >= part.out_offset && far < end) << 1;
                add_part(sum, row, part, task.weight, column);
            }
        }
    }
    return covered;
}
