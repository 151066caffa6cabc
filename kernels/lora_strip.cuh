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
#define UNITS (ROWS / UNIT_ROWS) // of a list

// y, or what takes its place: [rows, end], rows `stride` apart.
template <typename Half>
struct Matrix {
    Half *first;
    long long stride;
    int end;
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

// A lane's columns in one of its rows; null beyond the list's last row and the matrix's last column.
template <typename Half>
__device__ __forceinline__ Half *find(const Matrix<Half> &matrix, const Unit &unit, int tile, int row) {
    const int index = unit.top + tile * 8 + threadIdx.x % 4 * 2 + row, at = unit.lane_column();
    return index < unit.list->count && at < matrix.end ? matrix.first + unit.list->row[index] * matrix.stride + at : nullptr;
}

// Read y; zeros where it has nothing.
template <typename Half, typename Any>
__device__ __forceinline__ void load_strip(Strip &strip, const Matrix<Any> &matrix, const Unit &unit) {
    uint4 y[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) {
        const Any *at = find(matrix, unit, i / 2, i % 2);
        y[i / 2][i % 2] = at ? load_16(at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < TILES * 4; ++i) {
        const uint4 row = y[i / 4][i % 2];
        const unsigned pairs[2] = {i % 4 < 2 ? row.x : row.z, i % 4 < 2 ? row.y : row.w};
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

// Where a task's hidden values lie: `splits` partial sums of [count, width].
struct Hidden {
    const float *first;
    int count, width, splits;
};

// The ranks of one row of a part as mma wants them from a lane: `rank` and the next, and eight further on; each the sum of its
// splits, zero beyond the part's last. All loads are under way together.
template <typename Half>
__device__ __forceinline__ void read_hidden(unsigned (&pairs)[2], const Hidden &hidden, int row, const Part &part, int rank) {
    float value[SPLITS][4];
    const float *from = hidden.first + (row * hidden.width + part.rank_offset + rank);
    const int left = row < hidden.count ? part.rank - rank : 0;
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i / 2 * 8 + i % 2;
            value[split][i] = split < hidden.splits && r < left ? from[r] : 0.0f;
        }
        from += hidden.count * hidden.width;
    }
#pragma unroll
    for (int split = 1; split < SPLITS; ++split) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            value[0][i] += value[split][i];
        }
    }
    pairs[0] = pack<Half>(value[0][0], value[0][1]);
    pairs[1] = pack<Half>(value[0][2], value[0][3]);
}

// sum = scale * sum + weight * shift in a lane's columns; `at`: their place in the part.
__device__ __forceinline__ void apply_vectors(Strip &strip, const Part &part, float weight, int at) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float scale = part.scale ? part.scale[at + i] : 1.0f;
        const float shift = part.shift ? weight * part.shift[at + i] : 0.0f;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            float(&pair)[4] = strip.sum[tile][i % 4];
            pair[i / 4 * 2] = scale * pair[i / 4 * 2] + shift;
            pair[i / 4 * 2 + 1] = scale * pair[i / 4 * 2 + 1] + shift;
        }
    }
}

// A lane's values of B's rows first .. first + 15; zeros outside of the part.
template <typename Half>
__device__ __forceinline__ void load_part(uint4 (&b)[4], const Part &part, int first, int at, bool inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int rank = first + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
        const bool exists = inside && rank < part.rank;
        b[i] = exists ? load_16((const Half *)part.b + (rank * part.width + at)) : make_uint4(0, 0, 0, 0);
    }
}

// Add one part of one task to a strip of y, which is read, where it was not yet, while B is on its way.
template <typename Half, typename Any>
__device__ __forceinline__ void add_part(Strip &strip, const Matrix<Any> &y, const Hidden &hidden, const Part &part,
                                         float weight, const Unit &unit) {
    const int at = unit.lane_column() - part.out_offset, lane = threadIdx.x % 32;
    const bool inside = at >= 0 && at < part.width;
    uint4 b[4];
    load_part<Half>(b, part, 0, at, inside);
    if (!strip.is_loaded) {
        load_strip<Half>(strip, y, unit);
    }
    if (inside && (part.scale || part.shift)) {
        apply_vectors(strip, part, weight, at);
    }
    strip.is_covered |= inside;
#pragma unroll 1
    for (int first = 0; first < part.rank; first += 16) {
        uint4 next[4];
        load_part<Half>(next, part, first + 16, at, inside);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            unsigned h[2];
            read_hidden<Half>(h, hidden, unit.top + tile * 8 + lane / 4, part, first + lane % 4 * 2);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned pairs[4] = {column_pair(b[0], b[1], j), column_pair(b[0], b[1], 4 + j),
                                           column_pair(b[2], b[3], j), column_pair(b[2], b[3], 4 + j)};
                mma_m16n8k16<Half>(strip.sum[tile][j], pairs, h);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            b[i] = next[i];
        }
    }
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
__device__ __forceinline__ void add_list(Strip &strip, const Matrix<Any> &y, const float *hidden, int splits,
                                         const Unit &unit, const Table &adapters, Desk &desk) {
    strip.is_loaded = strip.is_covered = false;
    const int length = unit.list->length;
    for (int entry = 0; entry < length; ++entry) {
        const Task &task = unit.list[entry];
        const int slot = task.slot, begin = task.hidden, count = task.count;
        const float weight = task.weight;
        const Adapter &adapter = desk.take(adapters, slot);
        const Hidden values = {hidden + begin, count, hidden_width(adapter.a_rows), splits};
        for (unsigned left = parts_in(adapter, unit.column); left; left &= left - 1) {
            add_part<Half>(strip, y, values, adapter.part[__ffs(left) - 1], weight, unit);
        }
    }
}
