// The functions of kernels/ptx.cuh in C++, for kernels on the CPU.
#pragma once

struct Bf16 {
    unsigned short bits;
};
struct Fp16 {
    unsigned short bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
inline float to_float(Fp16 value) {
    const unsigned sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) { // infinity or NaN
        return __uint_as_float(sign | 0x7f800000u | rest);
    }
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f)); // the exponents differ by 112
}

namespace emulation {
// To nearest even.
inline unsigned short round_to(float value, Bf16) {
    unsigned bits = __float_as_uint(value);
    if (value != value) {
        return 0x7fff;
    }
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline unsigned short round_to(float value, Fp16) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
    const float size = std::fabs(value);
    if (value != value) {
        return 0x7fff;
    }
    if (size >= 65520.0f) {
        return (unsigned short)(sign | 0x7c00u);
    }
    int exponent = 0;
    std::frexp(size, &exponent);
    if (size < 0x1p-14f) {
        exponent = -13; // as of the smallest normal number
    }
    const unsigned mantissa = (unsigned)std::nearbyint(std::ldexp(size, 11 - exponent));
    return (unsigned short)(sign | (((unsigned)(exponent + 13) << 10) + mantissa));
}

inline void check_aligned(const Place &place, const void *address) {
    if ((uintptr_t)address % 16) {
        fail(place, "an address that is no multiple of 16");
    }
}
inline void check_memory(const Place &place, const void *address, bool shared) {
    check_aligned(place, address);
    if (is_shared(address) != shared) {
        fail(place, shared ? "an address outside of shared memory" : "an address in shared memory");
    }
}
} // namespace emulation

template <typename T>
inline unsigned pack(float low, float high) {
    return emulation::round_to(low, T{}) | (unsigned)emulation::round_to(high, T{}) << 16;
}
template <typename T>
inline float low_of(unsigned pair) {
    return to_float(T{(unsigned short)(pair & 0xffffu)});
}
template <typename T>
inline float high_of(unsigned pair) {
    return to_float(T{(unsigned short)(pair >> 16)});
}
template <typename T>
inline T from_float(float value) {
    return T{emulation::round_to(value, T{})};
}
template <>
inline float from_float<float>(float value) {
    return value;
}

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                         const emulation::Place &place = emulation::here("mma")) {
    const uint64_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulation::meet(place, words, 6);
    const emulation::Fibre *warp = emulation::warp_of(place);
    const unsigned lane = emulation::current->lane, g = lane / 4, t = lane % 4;
    double sum[4];
    for (int i = 0; i < 4; ++i) {
        const unsigned row = g + i / 2 * 8, column = t * 2 + i % 2;
        sum[i] = d[i];
        for (unsigned k = 0; k < 16; ++k) {
            // a: register (row / 8) + (k / 8) * 2 of lane (row % 8, k % 8 / 2); b: register k / 8 of (column, k % 8 / 2).
            const unsigned pair_a = (unsigned)warp[row % 8 * 4 + k % 8 / 2].offered[row / 8 + k / 8 * 2];
            const unsigned pair_b = (unsigned)warp[column * 4 + k % 8 / 2].offered[4 + k / 8];
            sum[i] += (double)(k % 2 ? high_of<T>(pair_a) : low_of<T>(pair_a)) *
                      (double)(k % 2 ? high_of<T>(pair_b) : low_of<T>(pair_b));
        }
    }
    emulation::part(place);
    for (int i = 0; i < 4; ++i) {
        d[i] = (float)sum[i];
    }
}

namespace emulation {
inline void load_matrices(const Place &place, unsigned (&r)[4], const void *row, bool transposed) {
    check_memory(place, row, true);
    const uint64_t word = (uint64_t)row;
    meet(place, &word, 1);
    const Fibre *warp = warp_of(place);
    const unsigned lane = current->lane;
    for (unsigned m = 0; m < 4; ++m) {
        unsigned short half[2];
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned from = transposed ? lane % 4 * 2 + i : lane / 4, at = transposed ? lane / 4 : lane % 4 * 2 + i;
            half[i] = ((const unsigned short *)warp[m * 8 + from].offered[0])[at];
        }
        r[m] = half[0] | (unsigned)half[1] << 16;
    }
    part(place);
}
} // namespace emulation

inline void ldmatrix_x4(unsigned (&r)[4], const void *row,
                        const emulation::Place &place = emulation::here("ldmatrix")) {
    emulation::load_matrices(place, r, row, false);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row,
                              const emulation::Place &place = emulation::here("ldmatrix")) {
    emulation::load_matrices(place, r, row, true);
}

// The copy is made when it is waited for, and what lies there until then is no number.
inline void cp_async_16(void *shared, const void *global, bool valid,
                        const emulation::Place &place = emulation::here("cp.async")) {
    emulation::check_memory(place, shared, true);
    if (valid) {
        emulation::check_memory(place, global, false);
    }
    std::memset(shared, 0xff, 16);
    emulation::current->groups.back().push_back({shared, global, valid});
}
inline void cp_async_commit() { emulation::current->groups.emplace_back(); }
template <int pending>
inline void cp_async_wait() {
    emulation::finish_copies(*emulation::current, pending);
}

inline uint4 load_16(const void *address, const emulation::Place &place = emulation::here("load")) {
    emulation::check_memory(place, address, false);
    return *(const uint4 *)address;
}
inline uint4 load_once(const void *address, const emulation::Place &place = emulation::here("load")) {
    return load_16(address, place);
}
// Sent for is only what there is.
inline void prefetch_16(const void *address, const emulation::Place &place = emulation::here("prefetch")) {
    volatile unsigned seen = load_16(address, place).x;
    (void)seen;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
