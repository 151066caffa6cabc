// Sixteen floats at once, in as many registers as the instructions at hand need; and what is stored as half of one.
// Included once for each level, inside its namespace.

typedef float Floats __attribute__((vector_size(64)));
typedef unsigned Words __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));
typedef unsigned short Halves __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
constexpr int LANES = 16;

// Spelled out where compilers make two halves of it.
INLINE Words widen(Halves halves) {
#ifdef HAS_AVX512
    __m256i bits;
    std::memcpy(&bits, &halves, sizeof bits);
    return (Words)_mm512_cvtepu16_epi32(bits);
#else
    return __builtin_convertvector(halves, Words);
#endif
}
INLINE Halves narrow(Words words) {
#ifdef HAS_AVX512
    const __m256i bits = _mm512_cvtepi32_epi16((__m512i)words);
    Halves halves;
    std::memcpy(&halves, &bits, sizeof halves);
    return halves;
#else
    return __builtin_convertvector(words, Halves);
#endif
}

INLINE Floats load(const float *from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
INLINE Floats load(const Bf16 *from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(widen(halves) << 16);
}

// To the nearest, halfway cases to even; NaN stays one.
INLINE Words round_bits(Words bits) {
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Words isnan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
    return (isnan & 0x7fc0u) | (~isnan & rounded);
}

INLINE void store(float *to, Floats value) { std::memcpy(to, &value, sizeof value); }
INLINE void store(Bf16 *to, Floats value) {
    const Halves halves = narrow(round_bits((Words)value));
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of a vector; zeros behind them.
template <typename T>
INLINE Floats load_some(const T *from, long long count) {
    T values[LANES] = {};
    std::memcpy(values, from, count * sizeof(T));
    return load(values);
}
template <typename T>
INLINE void store_some(T *to, Floats value, long long count) {
    T values[LANES];
    store(values, value);
    std::memcpy(to, values, count * sizeof(T));
}

// Have the cache bring values that are computed with soon. They may lie anywhere.
template <typename T>
INLINE void prefetch(const T *from, long long count) {
    for (const char *at = (const char *)from, *end = (const char *)(from + count); at < end; at += 64) {
        __builtin_prefetch(at);
    }
}

// As a stored value would be.
INLINE Floats rounded(Floats value, float) { return value; }
INLINE Floats rounded(Floats value, Bf16) { return (Floats)(round_bits((Words)value) << 16); }

// f(at, count) for every vector of a row; `count` is LANES but at the end.
template <typename F>
INLINE void each_vector(long long width, F f) {
    long long at = 0;
    for (; at + LANES <= width; at += LANES) {
        f(at, LANES);
    }
    if (at < width) {
        f(at, width - at);
    }
}
template <typename T>
INLINE Floats load_up_to(const T *from, long long count) {
    return count == LANES ? load(from) : load_some(from, count);
}
template <typename T>
INLINE void store_up_to(T *to, Floats value, long long count) {
    if (count == LANES) {
        store(to, value);
    } else {
        store_some(to, value, count);
    }
}

// What a product takes at once: values as floats, or, of bfloat16 where there are instructions for pairs of it, a whole
// vector of them.
template <typename T>
struct Stretch {
    using Loaded = Floats;
    static constexpr int VALUES = LANES;
};
template <typename T>
using Loaded = typename Stretch<T>::Loaded;
INLINE Floats fetch(const float *from, long long count) { return load_up_to(from, count); }
INLINE void add_product(Floats &total, Floats left, Floats right) { total += left * right; }
#ifdef HAS_PAIRS
template <>
struct Stretch<Bf16> {
    using Loaded = __m512bh;
    static constexpr int VALUES = 2 * LANES;
};
INLINE __m512bh fetch(const Bf16 *from, long long count) {
    if (count == 2 * LANES) {
        return (__m512bh)_mm512_loadu_si512(from);
    }
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
}
INLINE void add_product(Floats &total, __m512bh left, __m512bh right) {
    total = (Floats)_mm512_dpbf16_ps((__m512)total, left, right);
}
#else
INLINE Floats fetch(const Bf16 *from, long long count) { return load_up_to(from, count); }
#endif

// As each_vector, by as many values as a product of T takes at once.
template <typename T, typename F>
INLINE void each_stretch(long long width, F f) {
    constexpr int values = Stretch<T>::VALUES;
    long long at = 0;
    for (; at + values <= width; at += values) {
        f(at, values);
    }
    if (at < width) {
        f(at, width - at);
    }
}

INLINE float sum_of(Floats v) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eights[2];
    std::memcpy(eights, &v, sizeof v);
    const Eight eight = eights[0] + eights[1];
    Four fours[2];
    std::memcpy(fours, &eight, sizeof eight);
    const Four four = fours[0] + fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of sixteen vectors, each in its lane. Every step halves what is to be added and puts two vectors side by side.
INLINE Floats sums_of(const Floats *v) {
    constexpr Ints low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    constexpr Ints fourth = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    constexpr Ints pair = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    constexpr Ints single = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    Floats eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) {
        eight[i] = __builtin_shuffle(v[i], v[i + 8], low) + __builtin_shuffle(v[i], v[i + 8], low + 8);
    }
    for (int i = 0; i < 4; ++i) {
        four[i] = __builtin_shuffle(eight[i], eight[i + 4], fourth) + __builtin_shuffle(eight[i], eight[i + 4], fourth + 4);
    }
    for (int i = 0; i < 2; ++i) {
        two[i] = __builtin_shuffle(four[i], four[i + 2], pair) + __builtin_shuffle(four[i], four[i + 2], pair + 2);
    }
    return __builtin_shuffle(two[0], two[1], single) + __builtin_shuffle(two[0], two[1], single + 1);
}

// e^x: 2^n times a polynomial of what is left, to 2 units in the last place; below -87 nearly nothing.
INLINE Floats exponential(Floats x) {
    x = x > 88.0f ? Floats{} + 88.0f : x;
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats turns = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's last bits are the nearest whole number
    const Floats n = turns - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}
