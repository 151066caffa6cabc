// What the LoRA kernels are told: who is in which slot of a site, and which rows name which slots.
//
// Written by the host (device_tables.py, placement.py), read by every block. Sizes in bytes.
#pragma once

// One linear's share of an adapter: columns out_offset .. out_offset + width of y, rows rank_offset ..
// rank_offset + rank of the stacked A. `scale` and `shift` are null where the adapter has none.
struct Part {
    const void *b;  // [rank, width]
    const float *scale;
    const float *shift;
    int rank_offset;
    int rank;
    int out_offset;
    int width;
};

// One adapter at one site; all zero where the slot's adapter leaves the site alone.
struct Adapter {
    const void *a;  // [a_rows, in]
    int a_rows;     // the parts' ranks in all; at an embedding, its vocabulary
    int parts;
    Part part[PARTS];
};

// One site's adapters. An adapter's `shares` lie side by side, the same share of two slots `stride` apart.
struct Table {
    const char *first;
    long long stride;
    int shares;

    __device__ __forceinline__ const Adapter *at(int slot) const {
        return shares == 1 ? (const Adapter *)(first + slot * stride)
                           : (const Adapter *)(first + slot / shares * stride) + slot % shares;
    }
};

// One entry of at most ROWS rows that share their entry list. The tasks of one list follow each other. Rows without
// entries have tasks as well, of length 0 and without a slot.
struct __align__(16) Task {
    int slot; // -1: none
    float weight;
    int hidden; // where this task's values begin among the hidden ones
    int count;  // rows
    int length; // on the first task of a list: how many it has; else 0
    int unused[3];
    int row[ROWS];
};

// The number of tasks, which lie behind it.
struct __align__(16) Tasks {
    int count;
    int stretches; // of 16 rows that A has at most, at any site, of the slots that are named
    int unused[2];

    __device__ __forceinline__ const Task &at(int index) const { return ((const Task *)(this + 1))[index]; }
};

// Hidden values of a row, padded to whole vectors.
__device__ __forceinline__ int hidden_width(int a_rows) { return (a_rows + 7) / 8 * 8; }

// Where a task's x A^T lies: [splits of k, count, hidden width], `row` going on over the splits.
__device__ __forceinline__ int hidden_index(const Task &task, int a_rows, int row, int rank) {
    return task.hidden + row * hidden_width(a_rows) + rank;
}
