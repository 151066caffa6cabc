// A decoder's pieces between its products. Included once for each level, inside its namespace.

constexpr long long ALONE = 1 << 13; // values that one thread sees to sooner than several would

template <typename T>
static void norm_of(const NormCall &call) {
    const T *weight = (const T *)call.weight;
#pragma omp parallel for if (call.rows * call.width > ALONE)
    for (long long row = 0; row < call.rows; ++row) {
        T *x = (T *)call.x + row * call.width, *out = (T *)call.out + row * call.width;
        const T *added = call.added ? (const T *)call.added + row * call.width : nullptr;
        Floats squares = {};
        each_vector(call.width, [&](long long at, long long count) {
            Floats value = load_up_to(x + at, count);
            if (added) {
                value = rounded(value + load_up_to(added + at, count), T{});
                store_up_to(x + at, value, count);
            }
            squares += value * value;
        });
        const float factor = 1.0f / std::sqrt(sum_of(squares) / float(call.width) + float(call.eps));
        each_vector(call.width, [&](long long at, long long count) {
            const Floats value = rounded(load_up_to(x + at, count) * factor, T{});
            store_up_to(out + at, load_up_to(weight + at, count) * value, count);
        });
    }
}

template <typename T>
static void gate_of(const GateCall &call) {
#pragma omp parallel for if (call.rows * call.width > ALONE)
    for (long long row = 0; row < call.rows; ++row) {
        const T *gate = (const T *)call.gate_up + row * 2 * call.width, *up = gate + call.width;
        T *out = (T *)call.out + row * call.width;
        each_vector(call.width, [&](long long at, long long count) {
            const Floats value = load_up_to(gate + at, count);
            const Floats gated = rounded(value / (1.0f + exponential(-value)), T{});
            store_up_to(out + at, gated * load_up_to(up + at, count), count);
        });
    }
}

// to [dim] = from * cos + rotate_half(from) * sin
template <typename T>
INLINE void rotate(T *to, const T *from, const T *cos, const T *sin, long long dim) {
    const long long half = dim / 2;
    each_vector(half, [&](long long at, long long count) {
        const Floats low = load_up_to(from + at, count), high = load_up_to(from + half + at, count);
        store_up_to(to + at, low * load_up_to(cos + at, count) - high * load_up_to(sin + at, count), count);
        store_up_to(to + half + at,
                    high * load_up_to(cos + half + at, count) + low * load_up_to(sin + half + at, count), count);
    });
}

template <typename T>
static void rope_of(const RopeCall &call) {
    const long long stride = call.kv_heads * call.dim;
#pragma omp parallel for if (call.rows * call.qkv_stride > ALONE)
    for (long long row = 0; row < call.rows; ++row) {
        const T *from = (const T *)call.qkv + row * call.qkv_stride;
        const T *cos = (const T *)call.cos + row * call.dim, *sin = (const T *)call.sin + row * call.dim;
        T *q = (T *)call.q + row * call.heads * call.dim;
        T *k = (T *)call.keys + call.slots[row] * stride, *v = (T *)call.values + call.slots[row] * stride;
        for (long long head = 0; head < call.heads; ++head, from += call.dim) {
            rotate(q + head * call.dim, from, cos, sin, call.dim);
        }
        for (long long head = 0; head < call.kv_heads; ++head, from += call.dim) {
            rotate(k + head * call.dim, from, cos, sin, call.dim);
        }
        std::memcpy(v, from, stride * sizeof(T));
    }
}

static void norm(const NormCall &call) { call.element == BFLOAT16 ? norm_of<Bf16>(call) : norm_of<float>(call); }
static void gate(const GateCall &call) { call.element == BFLOAT16 ? gate_of<Bf16>(call) : gate_of<float>(call); }
static void rope(const RopeCall &call) { call.element == BFLOAT16 ? rope_of<Bf16>(call) : rope_of<float>(call); }
