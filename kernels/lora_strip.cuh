// What a warp does with a strip: UNIT_ROWS rows of one list, STRIP columns of y, in the registers of its lanes.
//
// The columns of y are the rows of mma's result, so that eight rows of y fill it. Lane (g, t) = (lane / 4, lane % 4) has
// rows 2t and 2t + 1 of each tile of eight, in eight columns from 8g on: sum[tile][j] holds (row 2t, column 8g + j),
// (row 2t + 1, column 8g + j), and the same two rows in column 8g + 4 + j. Row g of product j is column 8g + j, row g + 8 is
// column 8g + 4 + j: so lanes read B, and read and write y, by whole 16-byte vectors, side by side.
#pragma once

#define STRIP 64
#define TILES (ROWS > 8 ? 2 : 1) // of eight rows
#define UNIT_ROWS (TILES * 8)
#define LANE_ROWS (TILES * 2)
#define UNITS (ROWS / UNIT_ROWS) // of a list

// y, or what takes its place: [rows, end], rows `stride` vectors of eight apart.
template <typename Half>
struct Matrix {
    Half *first;
    int stride, end;
};

// Where a warp works: rows of a list from `top` on, columns from `column` on.
struct Unit {
    const Task *list;
    int top, column;

    // The first of a lane's columns.
    __device__ __forceinline__ int lane_column() const { return column + threadIdx.x % 32 / 4 * 8; }
};

struct Strip {
    float sum[TILES][4][4];
    bool is_loaded;  // y is in `sum`
    bool is_covered; // a part has added something to the lane's columns
};

// A lane's columns in its rows, which are whole vectors of eight; none beyond the list's last row and the matrix's last column.
template <typename Half>
struct Lines {
    Half *first;
    int vector[LANE_ROWS]; // behind the first; -1: none

    __device__ __forceinline__ Lines(const Matrix<Half> &matrix, const Unit &unit) : first(matrix.first) {
        const int first = unit.top + threadIdx.x % 4 * 2, column = unit.lane_column();
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            const int index = first + i / 2 * 8 + i % 2;
            const bool exists = index < unit.list->count && column < matrix.end;
            vector[i] = exists ? unit.list->row[index] * matrix.stride + column / 8 : -1;
        }
    }
    __device__ __forceinline__ bool has(int i) const { return vector[i] >= 0; }
    __device__ __forceinline__ Half *at(int i) const { return first + vector[i] * 8LL; }
};

// Read y; zeros where it has nothing.
template <typename Half, typename Any>
__device__ __forceinline__ void load_strip(Strip &strip, const Lines<Any> &y) {
    uint4 row[LANE_ROWS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
        row[i] = y.has(i) ? load_16(y.at(i)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < TILES * 4; ++i) {
        const uint4 from = row[i / 4 * 2 + i % 2];
        const unsigned pairs[2] = {i % 4 < 2 ? from.x : from.z, i % 4 < 2 ? from.y : from.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            strip.sum[i / 4][j][i % 4] = j % 2 ? high_of<Half>(pairs[j / 2]) : low_of<Half>(pairs[j / 2]);
        }
    }
    strip.is_loaded = true;
}

// A lane's columns of one of a tile's rows, rounded.
template <typename Half>
__device__ __forceinline__ uint4 rounded(const float (&sum)[4][4], int row) {
    return make_uint4(pack<Half>(sum[0][row], sum[1][row]), pack<Half>(sum[2][row], sum[3][row]),
                      pack<Half>(sum[0][row + 2], sum[1][row + 2]), pack<Half>(sum[2][row + 2], sum[3][row + 2]));
}

__device__ __forceinline__ bool is_rank(int rank, int ranks) { return (unsigned)rank < (unsigned)ranks; }

// Where a task's hidden values lie among all: `splits` partial sums of [count, width] from `begin` on.
struct Hidden {
    const float *all;
    int begin, count, width, splits;
};

// Four values of each split of a row's hidden ones, or zeros.
__device__ __forceinline__ void read_hidden(float4 (&value)[SPLITS], const Hidden &hidden, int at, bool exist) {
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) {
        const bool has_split = exist && split < hidden.splits;
        value[split] = has_split ? *(const float4 *)(hidden.all + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        at += hidden.count * hidden.width;
    }
}

// The sums of the splits, of `rank` and the three behind it, as mma wants them; zeros for what is no rank of the part.
template <typename Half>
__device__ __forceinline__ void sum_hidden(unsigned (&pairs)[2], const float4 (&value)[SPLITS], int rank, int ranks) {
    float4 sum = value[0];
#pragma unroll
    for (int split = 1; split < SPLITS; ++split) {
        sum = make_float4(sum.x + value[split].x, sum.y + value[split].y, sum.z + value[split].z, sum.w + value[split].w);
    }
    pairs[0] = pack<Half>(is_rank(rank, ranks) ? sum.x : 0.0f, is_rank(rank + 1, ranks) ? sum.y : 0.0f);
    pairs[1] = pack<Half>(is_rank(rank + 2, ranks) ? sum.z : 0.0f, is_rank(rank + 3, ranks) ? sum.w : 0.0f);
}

// sum = scale * sum + weight * shift in a lane's columns; `at`: their place in the part.
__device__ __forceinline__ void apply_vectors(Strip &strip, const Part &part, float weight, int at) {
    const bool inside = at >= 0 && at < part.width;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float scale = part.scale && inside ? part.scale[at + i] : 1.0f;
        const float shift = part.shift && inside ? weight * part.shift[at + i] : 0.0f;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            float(&pair)[4] = strip.sum[tile][i % 4];
            pair[i / 4 * 2] = scale * pair[i / 4 * 2] + shift;
            pair[i / 4 * 2 + 1] = scale * pair[i / 4 * 2 + 1] + shift;
        }
    }
}

// B's values in a lane's columns, which begin at `at` in the part: of rows, if they exist.
template <typename Half>
struct Columns {
    const Half *b;
    int ranks, width, at;

    __device__ __forceinline__ bool inside() const { return at >= 0 && at < width; }
    __device__ __forceinline__ bool has(int rank) const { return is_rank(rank, ranks) && inside(); }
    __device__ __forceinline__ const Half *row(int rank) const { return b + (rank * width + at); }

    // Rows rank .. rank + 3; zeros for those that are none.
    __device__ __forceinline__ void read(uint4 (&rows)[4], int rank) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rows[i] = has(rank + i) ? load_16(row(rank + i)) : make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ void send_for(int rank) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (has(rank + i)) {
                prefetch_16(row(rank + i));
            }
        }
    }
};

// Add one part of one task to a strip of y, which is read, where it was not yet, while B and the hidden values are on their
// way: the first sixteen ranks to the lanes, the others as far as the second-level cache. A lane has four of each sixteen,
// those whose hidden values are a whole vector: which of mma's k they are does not matter, as B and the hidden values agree.
template <typename Half, typename Any>
__device__ __forceinline__ void add_part(Strip &strip, const Lines<Any> &y, const Hidden &hidden, const Part &part,
                                         const Task &task, const Unit &unit) {
    const int lane = threadIdx.x % 32, own = lane % 4 * 4, skipped = part.rank_offset % 4, ranks = part.rank;
    const Columns<Half> columns = {(const Half *)part.b, ranks, part.width, unit.lane_column() - part.out_offset};
    if (part.scale || part.shift) {
        if (!strip.is_loaded) {
            load_strip<Half>(strip, y);
        }
        apply_vectors(strip, part, task.weight, columns.at);
    }
#pragma unroll 1
    for (int first = -skipped; first < ranks; first += 16) {
        uint4 b[4];
        float4 value[TILES][SPLITS];
        columns.read(b, first + own);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int row = min(unit.top + tile * 8 + lane / 4, hidden.count - 1);
            const int begin = hidden.begin + row * hidden.width + part.rank_offset;
            read_hidden(value[tile], hidden, begin + first + own, first + own < ranks);
        }
#pragma unroll 1
        for (int later = first + 16; first <= 0 && later < ranks; later += 16) {
            columns.send_for(later + own);
        }
        if (!strip.is_loaded) {
            load_strip<Half>(strip, y);
        }
        unsigned pairs[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            sum_hidden<Half>(pairs[tile], value[tile], first + own, ranks);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const unsigned pair[4] = {column_pair(b[0], b[1], j), column_pair(b[0], b[1], 4 + j), column_pair(b[2], b[3], j),
                                      column_pair(b[2], b[3], 4 + j)};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                mma_m16n8k16<Half>(strip.sum[tile][j], pair, pairs[tile]);
            }
        }
    }
    strip.is_covered |= strip.is_loaded && columns.inside();
}

// A warp's own copy of the record that it works with. `held`: the slot whose record is there.
struct Desk {
    Adapter &record;
    int held;

    __device__ __forceinline__ const Adapter &take(const Table &adapters, int slot) {
        if (held != slot) {
            const int lane = threadIdx.x % 32;
            __syncwarp();
            if (lane < (int)sizeof(Adapter) / 16) {
                ((uint4 *)&record)[lane] = load_16((const uint4 *)adapters.at(slot) + lane);
            }
            __syncwarp();
            held = slot;
        }
        return record;
    }
};

// The parts of an adapter that lie in a strip, as bits: each looked at by another lane.
__device__ __forceinline__ unsigned parts_in(const Adapter &adapter, int column) {
    const int lane = threadIdx.x % 32;
    bool is_in = false;
    if (lane < adapter.parts) {
        const int begin = adapter.part[lane].out_offset, end = begin + adapter.part[lane].width;
        is_in = begin < column + STRIP && end > column;
    }
    return __ballot_sync(0xffffffffu, is_in);
}

// What a list brings to a strip of y. Nothing is read where that is nothing.
template <typename Half, typename Any>
__device__ __forceinline__ void add_list(Strip &strip, const Lines<Any> &y, const float *hidden, int splits,
                                         const Unit &unit, const Table &adapters, Desk &desk) {
    strip.is_loaded = strip.is_covered = false;
    const int length = unit.list->length;
    for (int entry = 0; entry < length; ++entry) {
        const Task &task = unit.list[entry];
        const int slot = task.slot, begin = task.hidden, count = task.count;
        const Adapter &adapter = desk.take(adapters, slot);
        const Hidden values = {hidden, begin, count, hidden_width(adapter.a_rows), splits};
        for (unsigned left = parts_in(adapter, unit.column); left; left &= left - 1) {
            add_part<Half>(strip, y, values, adapter.part[__ffs(left) - 1], task, unit);
        }
    }
}
