// Attention of tokens, one a row, over the paged keys and values of their sequences. Included once for each level, inside its namespace.
//
//   out[r, h] = softmax over tokens of (score(q[r, h] . k[token, h / group])) v[token, h / group]
//   score(s) = scale * s, or softcap * tanh(scale * s / softcap)
//
// Keys and values are read once, a block after the other as they lie in memory: of each block, all KV heads that
// one piece of work has; of those, up to four query heads that share one together.

constexpr int MANY = 8; // rows that are work enough for all threads

// Room for one piece of work, kept by each thread.
struct Room {
    std::vector<float> scores, out, masses;
};

// One row and some of its KV heads, over the tokens begin .. end - 1.
struct Piece {
    long long row, first, last, begin, end;

    long long tokens() const { return end - begin; }
};

// f(first, at, next, count) for stretches of adjacent tokens: KV head h of token first + i lies
// `at` + (i * kv_heads + h) * dim values into the cache, of the stretch behind it, in the last one its own, from `next` on.
template <typename F>
INLINE void each_run(const AttentionCall &call, const Piece &piece, F f) {
    const int *table = call.tables + piece.row * call.table_stride;
    for (long long first = piece.begin; first < piece.end;) {
        const long long inside = first % call.block_size, block = first / call.block_size;
        const long long count = std::min(call.block_size - inside, piece.end - first);
        const long long size = call.block_size * call.kv_heads * call.dim;
        const long long at = table[block] * size + inside * call.kv_heads * call.dim;
        f(first, at, first + count < piece.end ? table[block + 1] * size : at, count);
        first += count;
    }
}

// f(head) for a piece's query heads, G of them that share a KV head at a time, as f.template operator()<G>(head, kv_head).
template <typename F>
INLINE void each_heads(const AttentionCall &call, const Piece &piece, F f) {
    const long long group = call.heads / call.kv_heads;
    for (long long kv_head = piece.first; kv_head < piece.last; ++kv_head) {
        long long head = kv_head * group;
        const long long last = head + group;
        for (; head + 4 <= last; head += 4) {
            f.template operator()<4>(head, kv_head);
        }
        switch (last - head) {
        case 3:
            f.template operator()<3>(head, kv_head);
            break;
        case 2:
            f.template operator()<2>(head, kv_head);
            break;
        case 1:
            f.template operator()<1>(head, kv_head);
            break;
        }
    }
}

// scores[g * stride + n] = q[g] . k[n] of G heads and N tokens, at most LANES products.
template <typename T, int G, int N>
INLINE void score(float *scores, long long stride, const T *q, const T *k, const AttentionCall &call) {
    Floats total[LANES] = {};
    each_stretch<T>(call.dim, [&](long long at, long long count) __attribute__((always_inline)) {
        Loaded<T> query[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            query[g] = fetch(q + g * call.dim + at, count);
        }
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            const Loaded<T> key = fetch(k + n * call.kv_heads * call.dim + at, count);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                add_product(total[n * G + g], query[g], key);
            }
        }
    });
    float sums[LANES];
    store(sums, sums_of(total));
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) {
            scores[g * stride + n] = sums[n * G + g];
        }
    }
}

// Scores become weights; answers their sum.
INLINE float soften(float *scores, long long count, float scale, float softcap) {
    Floats tops = Floats{} - INFINITY;
    for (long long i = 0; i < count && softcap > 0.0f; ++i) {
        scores[i] = softcap / scale * std::tanh(scale * scores[i] / softcap);
    }
    each_vector(count, [&](long long at, long long some) {
        Floats value = load_up_to(scores + at, some) * scale;
        store_up_to(scores + at, value, some);
        for (int i = 0; some < LANES && i < LANES; ++i) {
            value[i] = i < some ? value[i] : -INFINITY;
        }
        tops = value > tops ? value : tops;
    });
    float top = tops[0];
    for (int i = 1; i < LANES; ++i) {
        top = std::max(top, tops[i]);
    }
    Floats masses = {};
    each_vector(count, [&](long long at, long long some) {
        store_up_to(scores + at, exponential(load_up_to(scores + at, some) - top), some);
        masses += load_up_to(scores + at, some);
    });
    return sum_of(masses);
}

// out[g] += weights[g * stride + n] * v[n] of G heads and `count` tokens: V vectors of columns, the last of `some` values.
template <typename T, int G, int V>
INLINE void add_columns(float *out, const float *weights, long long stride, const T *v, long long count, long long some,
                        const AttentionCall &call) {
    Floats total[G * V];
#pragma GCC unroll 16
    for (int i = 0; i < G * V; ++i) {
        total[i] = load_up_to(out + i / V * call.dim + i % V * LANES, i % V == V - 1 ? some : LANES);
    }
    for (long long n = 0; n < count; ++n, v += call.kv_heads * call.dim) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Floats value = load_up_to(v + i * LANES, i == V - 1 ? some : LANES);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                total[g * V + i] += weights[g * stride + n] * value;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < G * V; ++i) {
        store_up_to(out + i / V * call.dim + i % V * LANES, total[i], i % V == V - 1 ? some : LANES);
    }
}

template <typename T, int G>
INLINE void add_values(float *out, const float *weights, long long stride, const T *v, long long count, const AttentionCall &call) {
    long long column = 0;
    for (; column + 4 * LANES <= call.dim; column += 4 * LANES) {
        add_columns<T, G, 4>(out + column, weights, stride, v + column, count, LANES, call);
    }
    for (; column < call.dim; column += LANES) {
        const long long some = std::min<long long>(LANES, call.dim - column);
        add_columns<T, G, 1>(out + column, weights, stride, v + column, count, some, call);
    }
}

// The keys' or values' next stretch, to be brought to the cache while this one is computed with.
template <typename T>
INLINE void prefetch_run(const T *next, long long count, const AttentionCall &call, const Piece &piece) {
    const long long stride = call.kv_heads * call.dim, width = (piece.last - piece.first) * call.dim;
    for (long long i = 0; i < count; ++i) {
        prefetch(next + i * stride + piece.first * call.dim, width);
    }
}

template <typename T>
INLINE void attend(const AttentionCall &call, Room &room, const Piece &piece) {
    const long long tokens = piece.tokens(), stride = call.kv_heads * call.dim, group = call.heads / call.kv_heads;
    const long long top = piece.first * group, heads = (piece.last - piece.first) * group, width = heads * call.dim;
    const T *keys = (const T *)call.keys, *values = (const T *)call.values;
    const T *q = (const T *)call.q + (piece.row * call.heads + top) * call.dim;
    T *out = (T *)call.out + (piece.row * call.heads + top) * call.dim;
    room.out.assign(width, 0.0f);
    room.masses.resize(heads);
    room.scores.resize(heads * tokens);
    each_run(call, piece, [&](long long first, long long at, long long next, long long count) {
        prefetch_run(first + count < piece.end ? keys + next : values + next, count, call, piece);
        each_heads(call, piece, [&]<int G>(long long head, long long kv_head) __attribute__((always_inline)) {
            constexpr int N = LANES / G;
            const T *k = keys + at + kv_head * call.dim;
            const T *queries = q + (head - top) * call.dim;
            float *to = room.scores.data() + (head - top) * tokens + first - piece.begin;
            long long n = 0;
            for (; n + N <= count; n += N) {
                score<T, G, N>(to + n, tokens, queries, k + n * stride, call);
            }
            for (; n < count; ++n) {
                score<T, G, 1>(to + n, tokens, queries, k + n * stride, call);
            }
        });
    });
    for (long long head = 0; head < heads; ++head) {
        float *scores = room.scores.data() + head * tokens;
        room.masses[head] = soften(scores, tokens, float(call.scale), float(call.softcap));
    }
    each_run(call, piece, [&](long long first, long long at, long long next, long long count) {
        prefetch_run(values + next, count, call, piece);
        each_heads(call, piece, [&]<int G>(long long head, long long kv_head) __attribute__((always_inline)) {
            const float *weights = room.scores.data() + (head - top) * tokens + first - piece.begin;
            const T *v = values + at + kv_head * call.dim;
            add_values<T, G>(room.out.data() + (head - top) * call.dim, weights, tokens, v, count, call);
        });
    });
    for (long long head = 0; head < heads; ++head) {
        each_vector(call.dim, [&](long long at, long long some) {
            const long long place = head * call.dim + at;
            store_up_to(out + place, load_up_to(room.out.data() + place, some) / room.masses[head], some);
        });
    }
}

// Where there are fewer rows than would keep all threads busy, each KV head of a row is a piece of its own.
template <typename T>
static void attention_of(const AttentionCall &call) {
    const long long shares = call.rows < MANY ? call.kv_heads : 1;
#pragma omp parallel
    {
        Room room;
#pragma omp for schedule(dynamic, 1)
        for (long long item = 0; item < call.rows * shares; ++item) {
            const long long row = item / shares, first = item % shares, end = call.lengths[row];
            const long long last = shares == 1 ? call.kv_heads : first + 1;
            attend<T>(call, room, {row, first, last, std::max<long long>(0, end - call.window), end});
        }
    }
}

static void attention(const AttentionCall &call) {
    call.element == BFLOAT16 ? attention_of<Bf16>(call) : attention_of<float>(call);
}
