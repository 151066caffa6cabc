// What one call from Python asks for. Matrices are row-major; strides count elements.
#pragma once

#define __device__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define PARTS 4
#define ROWS 16
#include "../lora_tables.cuh"

struct Bf16 {
    unsigned short bits;
};

enum Element { FLOAT32 = 0, BFLOAT16 = 1 };

// Every task of a step at one site: y [rows, columns], x [rows, in_features], hidden as in lora_tables.cuh.
struct LoraCall {
    Element element;
    void *y;
    long long y_stride, columns;
    const void *x;
    long long x_stride, in_features;
    float *hidden;
    const Tasks *tasks;
    Table table;
};

// out [rows, width] = norm of x; where `added` is given x += added before. x and added lie densely.
struct NormCall {
    Element element;
    void *out, *x;
    const void *added, *weight;
    long long rows, width;
    double eps;
};

// out [rows, width] = silu(gate) * up of gate_up [rows, 2 * width].
struct GateCall {
    Element element;
    void *out;
    const void *gate_up;
    long long rows, width;
};

// qkv [rows, (heads + 2 * kv_heads) * dim] into q [rows, heads, dim] and, at `slots`, into keys and values
// [.., kv_heads, dim]; cos, sin [rows, dim].
struct RopeCall {
    Element element;
    void *q, *keys, *values;
    const void *qkv;
    long long qkv_stride;
    const void *cos, *sin;
    const long long *slots;
    long long rows, heads, kv_heads, dim;
};

// Tokens, one a row, over their paged keys [.., block_size, kv_heads, dim] and values: q, out [rows, heads, dim];
// tables [rows, ..] int32; lengths [rows].
struct AttentionCall {
    Element element;
    void *out;
    const void *q, *keys, *values;
    const int *tables;
    long long table_stride;
    const long long *lengths;
    long long rows, heads, kv_heads, dim, block_size;
    double scale, softcap; // no cap: 0
    long long window;      // how many newest tokens are seen
};

constexpr int PANEL = 32; // outputs whose weights lie together

struct Pairs {
    Bf16 values[2];
};

// y [rows, outputs] = x [rows, inputs] W^T + bias, where there is one; y lies densely, `weight` in panels.
struct GemmCall {
    void *y;
    const void *x, *weight, *bias;
    long long x_stride, rows, inputs, outputs;
};

// One of a model's weights, and the adapters that change what it makes: the first record of its site's table, null
// where no row of the step has one there. Every field has eight bytes, as Python writes them.
struct Linear {
    const void *weight, *bias;
    long long inputs, outputs;
    const char *adapters;
};

struct Layer {
    const void *input_norm, *post_norm;
    double input_eps, post_eps;
    Linear qkv, o, gate_up, down;
    void *keys, *values;
    double scale, softcap;
    long long window;
};

// Layers of bfloat16 one after another, of the usual decoder: norm, q/k/v, positions, attention, o, norm, gate/up, down.
// `residual` [rows, hidden] is changed; `added` is what the last layer adds to it. Room for one layer's values comes
// from the caller.
struct StackCall {
    const Layer *layers;
    long long count, rows, hidden, heads, kv_heads, dim, block_size;
    void *residual, *added;
    const void *cos, *sin;
    const long long *slots;
    const int *tables;
    long long table_stride;
    const long long *lengths;
    const Tasks *tasks; // null where no row has an adapter
    float *lora_hidden;
    long long slot_stride; // of the tables of adapters
    void *normed, *qkv, *q, *attended, *gate_up, *gated;
};

// One set of instructions.
struct Level {
    const char *name;
    void (*lora)(const LoraCall &);
    void (*norm)(const NormCall &);
    void (*gate)(const GateCall &);
    void (*rope)(const RopeCall &);
    void (*attention)(const AttentionCall &);
    void (*gemm)(const GemmCall &); // null where there are no instructions for it
};
