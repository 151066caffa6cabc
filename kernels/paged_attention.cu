// Attention of one new token a row over the row's paged keys and values, in half precision, on tensor cores.
//
//   out[r, h] = softmax over tokens of (score(q[r, h] . k[token, h / group])) v[token, h / group]
//
// q, out [rows, kv_heads * group, DIM]; keys, values [blocks, block_size, kv_heads, DIM]; tables [rows, table_width] int32;
// lengths [rows] int64, 0 for a row of padding, whose output is zero; group at most HEADS, which is 8 or 16, block_size a
// multiple of 16.
// score(s) = scale * s, or softcap * tanh(scale * s / softcap) where softcap > 0. The last `window` tokens are seen.
//
// A block has all query heads of one KV head, over SPLIT tokens: each of its warps takes every fourth stretch of 16
// tokens. Where a row has several splits their results go to `partial` [rows, heads, splits, DIM + 2], fp32: the sum of
// p v, then the largest score and the sum of p; attention_combine adds them. Scores are kept times log2(e).
//
// Lane (g, t) reads 16 bytes of K's token g, which serve two products as in lora_shrink.cu, and 16 bytes each of V's
// tokens 2t, 2t + 1, 2t + 8 and 2t + 9, as B is read in lora_strip.cuh.
// All loads of a stretch are under way together, where there are registers for them.
//
// grid <pieces * any>: pieces are rows x KV heads x DIM / OUT columns; the first blocks of all pieces come before the second
// of any, so that those that find no split left come last. block 128.
#include "ptx.cuh"
#include "pairs.cuh"

using T = ELEMENT;

#define WARPS 4
#define STEPS ((DIM + 31) / 32)
#define OUT (DIM > 128 ? DIM / 4 : DIM) // columns of the output that a block has
#define STRIPS ((OUT + 63) / 64)
#define HALVES (HEADS / 8)       // of mma's 16 rows that hold heads
#define LOG2E 1.4426950408889634f
#define MINUS_INFINITY __uint_as_float(0xff800000u)

struct State {
    float sum[STRIPS][8][4]; // of p v: row g, then g + 8
    float top[HALVES], mass[HALVES];
};

// Which of a row's blocks a token is in, and which of its tokens it is.
struct Place {
    int block, token;

    __device__ __forceinline__ Place(int token, int block_size) : block(token / block_size), token(token % block_size) {}
    // By a distance that is told as a place: a division would keep the next loads waiting.
    __device__ __forceinline__ void advance(const Place &distance, int block_size) {
        block += distance.block;
        token += distance.token;
        if (token >= block_size) {
            token -= block_size;
            ++block;
        }
    }
};

__device__ __forceinline__ uint4 read(const T *from, bool inside) {
    return inside ? load_once(from) : make_uint4(0, 0, 0, 0);
}

// A lane's part of the keys of eight tokens.
__device__ __forceinline__ void load_keys(uint4 (&k)[STEPS], const T *keys, int stride) {
    const int g = threadIdx.x % 32 / 4, at = threadIdx.x % 4 * 8;
    const T *own = keys + (g * stride + at);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        k[step] = read(own + step * 32, step * 32 + at < DIM);
    }
}

// Scores of the heads and eight tokens, as mma gives them.
__device__ __forceinline__ void score(float (&s)[4], const uint4 (&low)[STEPS], const uint4 (&high)[STEPS],
                                      const uint4 (&k)[STEPS]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const unsigned near_q[4] = {low[step].x, high[step].x, low[step].y, high[step].y};
        const unsigned far_q[4] = {low[step].z, high[step].z, low[step].w, high[step].w};
        const unsigned near_k[2] = {k[step].x, k[step].y}, far_k[2] = {k[step].z, k[step].w};
        mma_m16n8k16<T>(s, near_q, near_k);
        mma_m16n8k16<T>(s, far_q, far_k);
    }
}

// Turn scores into p = 2^(s - top), of tokens first .. end - 1 that lie at or behind `begin`, and rescale what was summed.
__device__ __forceinline__ void soften(float (&s)[2][4], State &state, int first, int begin, int end, float scale,
                                       float softcap) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int row = 0; row < HALVES; ++row) {
        float top = state.top[row];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &value = s[i / 2][row * 2 + i % 2];
            const int token = first + i / 2 * 8 + t * 2 + i % 2;
            value *= scale;
            if (softcap > 0.0f) {
                value = softcap * tanhf(value / softcap);
            }
            value = token >= begin && token < end ? value * LOG2E : MINUS_INFINITY;
            top = fmaxf(top, value);
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float reference = top == MINUS_INFINITY ? 0.0f : top;
        const float keep = exp2_approx(state.top[row] - reference);
        float mass = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &value = s[i / 2][row * 2 + i % 2];
            value = exp2_approx(value - reference);
            mass += value;
        }
        state.mass[row] = state.mass[row] * keep + mass;
        state.top[row] = top;
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                state.sum[strip][j][row * 2] *= keep;
                state.sum[strip][j][row * 2 + 1] *= keep;
            }
        }
    }
}

// A lane's part of the values of 16 tokens. Those from `count` on are not read: what lies there may be anything.
__device__ __forceinline__ void load_values(uint4 (&v)[STRIPS][4], const T *values, int stride, int count) {
    const int at = threadIdx.x % 32 / 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
        const T *own = values + (token * stride + at);
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip) {
            v[strip][i] = read(own + strip * 64, strip * 64 + at < OUT && token < count);
        }
    }
}

// sum += p v of 16 tokens.
__device__ __forceinline__ void add_values(State &state, const float (&p)[2][4], const uint4 (&v)[STRIPS][4]) {
    const unsigned weights[4] = {pack<T>(p[0][0], p[0][1]), HALVES > 1 ? pack<T>(p[0][2], p[0][3]) : 0,
                                 pack<T>(p[1][0], p[1][1]), HALVES > 1 ? pack<T>(p[1][2], p[1][3]) : 0};
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip) {
        multiply_pairs<T>(state.sum[strip], weights, v[strip]);
    }
}

// Put the four warps' results together, in the order of warps, and write them: as the row's output, or as a part of it.
__device__ __forceinline__ void finish(const State &state, T *out, float *partial, int group, int splits, int column) {
    __shared__ float sums[WARPS][HEADS][OUT];
    __shared__ float tops[WARPS][HEADS], masses[WARPS][HEADS];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    __syncthreads();
#pragma unroll
    for (int row = 0; row < HALVES; ++row) {
        float mass = state.mass[row];
        mass += __shfl_xor_sync(0xffffffffu, mass, 1);
        mass += __shfl_xor_sync(0xffffffffu, mass, 2);
        if (t == 0) {
            tops[warp][g + row * 8] = state.top[row];
            masses[warp][g + row * 8] = mass;
        }
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int at = strip * 64 + t * 16 + i;
                if (g + row * 8 < group && at < OUT) {
                    sums[warp][g + row * 8][at] = state.sum[strip][i % 8][row * 2 + i / 8];
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * OUT; i += WARPS * 32) {
        const int head = i / OUT, at = i % OUT;
        float top = tops[0][head];
        for (int w = 1; w < WARPS; ++w) {
            top = fmaxf(top, tops[w][head]);
        }
        float sum = 0.0f, mass = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            const float keep = exp2_approx(tops[w][head] - top);
            sum += keep * sums[w][head][at];
            mass += keep * masses[w][head];
        }
        if (out) {
            out[head * DIM + at] = from_float<T>(sum / mass);
        } else {
            float *to = partial + head * splits * (DIM + 2) + column;
            to[at] = sum;
            if (at == 0 && column == 0) {
                to[DIM] = top;
                to[DIM + 1] = mass;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    paged_attention(T *__restrict__ out, float *__restrict__ partial, const T *__restrict__ q, const T *__restrict__ keys,
                    const T *__restrict__ values, const int *__restrict__ tables, long long table_stride,
                    const long long *__restrict__ lengths, int rows, int kv_heads, int group, int block_size, int splits,
                    float scale, float softcap, int window) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int pieces = rows * kv_heads * (DIM / OUT);
    const int stride = kv_heads * DIM;

    const int piece = blockIdx.x % pieces, column = piece % (DIM / OUT) * OUT, kv_head = piece / (DIM / OUT) % kv_heads;
    const long long row = piece / (DIM / OUT) / kv_heads, head = (row * kv_heads + kv_head) * group;
    const int length = lengths[row];
    const int *table = tables + row * table_stride;
    if (length == 0) {
        for (int i = threadIdx.x; blockIdx.x < pieces && i < group * OUT; i += WARPS * 32) {
            out[(head + i / OUT) * DIM + column + i % OUT] = from_float<T>(0.0f);
        }
        return;
    }
    const Place distance(WARPS * 16, block_size);
    const int begin = max(length - window, 0), last = (length - 1) / SPLIT;
    uint4 low[STEPS], high[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int at = step * 32 + t * 8;
        low[step] = read(q + (head + g) * DIM + at, g < group && at < DIM);
        high[step] = read(q + (head + g + 8) * DIM + at, HEADS > 8 && g + 8 < group && at < DIM);
    }
    for (int split = begin / SPLIT + blockIdx.x / pieces; split <= last; split += gridDim.x / pieces) {
        State state = {};
#pragma unroll
        for (int row = 0; row < HALVES; ++row) {
            state.top[row] = MINUS_INFINITY;
        }
        const int end = min(length, (split + 1) * SPLIT), start = max(begin / 16 * 16, split * SPLIT);
        Place place(start + warp * 16, block_size);
        int block = start + warp * 16 < end ? table[place.block] : 0;
#pragma unroll 1
        for (int first = start + warp * 16; first < end; first += WARPS * 16) {
            const long long at = (block * (long long)block_size + place.token) * stride + kv_head * DIM;
            float s[2][4] = {};
            uint4 k[2][STEPS], v[STRIPS][4];
            load_keys(k[0], keys + at, stride);
            load_keys(k[1], keys + at + 8 * stride, stride);
            load_values(v, values + at + column, stride, end - first);
            place.advance(distance, block_size);
            block = first + WARPS * 16 < end ? table[place.block] : 0;
            score(s[0], low, high, k[0]);
            score(s[1], low, high, k[1]);
            soften(s, state, first, begin, end, scale, softcap);
            add_values(state, s, v);
        }
        const bool is_only = begin / SPLIT == last;
        finish(state, is_only ? out + head * DIM + column : nullptr, partial + (head * splits + split) * (DIM + 2),
               group, splits, column);
    }
}

// grid <rows * heads>. block 128: threads over the columns of one head.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)
    attention_combine(T *__restrict__ out, const float *__restrict__ partial, const long long *__restrict__ lengths, int heads,
                      int splits, int window) {
    const int length = lengths[blockIdx.x / heads];
    const int first = max(length - window, 0) / SPLIT, last = (length - 1) / SPLIT;
    if (length == 0 || first == last) {
        return;
    }
    const float *parts = partial + blockIdx.x * (long long)splits * (DIM + 2);
    float top = MINUS_INFINITY;
    for (int split = first; split <= last; ++split) {
        top = fmaxf(top, parts[split * (DIM + 2) + DIM]);
    }
    for (int at = threadIdx.x; at < DIM; at += WARPS * 32) {
        float sum = 0.0f, mass = 0.0f;
        for (int split = first; split <= last; ++split) {
            const float *part = parts + split * (DIM + 2);
            const float keep = exp2_approx(part[DIM] - top);
            sum += keep * part[at];
            mass += keep * part[DIM + 1];
        }
        out[blockIdx.x * (long long)DIM + at] = from_float<T>(sum / mass);
    }
}
