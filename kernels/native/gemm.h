// Products with weights of bfloat16 by pairs: y [rows, outputs] = x [rows, inputs] W^T + bias, summed in fp32.
//
// W lies in panels: [outputs / PANEL, inputs / 2, PANEL, 2], read from its first byte to its last, once for every BLOCK
// rows: what comes next is sent for while this is multiplied. Included once, where there are such instructions.

constexpr int BLOCK = 8; // rows at once: as many sums as registers hold beside two vectors of W

// Of one panel's `inputs` and M rows. `ahead` is brought to the cache: with EVERY 1 as much as the panel, with 2 half as
// much, with 0 nothing.
template <int M, int EVERY>
INLINE void multiply(const GemmCall &call, const Pairs *panel, long long row, long long output, const char *ahead) {
    const Bf16 *x = (const Bf16 *)call.x + row * call.x_stride, *bias = (const Bf16 *)call.bias;
    const long long count = std::min<long long>(PANEL, call.outputs - output);
    const Floats start[2] = {bias ? load_some(bias + output, std::min<long long>(LANES, count)) : Floats{},
                             bias ? load_some(bias + output + LANES, std::max<long long>(0, count - LANES)) : Floats{}};
    __m512 sums[2 * M];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * M; ++i) {
        sums[i] = (__m512)start[i % 2];
    }
    for (long long k = 0; k < call.inputs / 2; ++k) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + LANES);
        if (EVERY) {
            __builtin_prefetch(ahead + k * 128 / EVERY, 0, 2);
        }
        if (EVERY == 1) {
            __builtin_prefetch(ahead + k * 128 + 64, 0, 2);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            int pair;
            std::memcpy(&pair, x + m * call.x_stride + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[2 * m] = _mm512_dpbf16_ps(sums[2 * m], left, both);
            sums[2 * m + 1] = _mm512_dpbf16_ps(sums[2 * m + 1], right, both);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        Bf16 *y = (Bf16 *)call.y + (row + m) * call.outputs + output;
        store_up_to(y, (Floats)sums[2 * m], std::min<long long>(LANES, count));
        if (count > LANES) {
            store_up_to(y + LANES, (Floats)sums[2 * m + 1], count - LANES);
        }
    }
}

template <int EVERY>
INLINE void multiply_rows(const GemmCall &call, const Pairs *panel, long long row, long long rows, long long output,
                          const char *ahead) {
    switch (rows) {
#define CASE(M)                                                                                                        \
    case M:                                                                                                            \
        multiply<M, EVERY>(call, panel, row, output, ahead);                                                           \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

static void gemm(const GemmCall &call) {
    const long long panels = (call.outputs + PANEL - 1) / PANEL, pairs = call.inputs / 2;
    const long long blocks = (call.rows + BLOCK - 1) / BLOCK, each = blocks ? (call.rows + blocks - 1) / blocks : 0;
#pragma omp parallel for schedule(static)
    for (long long p = 0; p < panels; ++p) {
        const Pairs *panel = (const Pairs *)call.weight + p * pairs * PANEL;
        const char *next = (const char *)(panel + pairs * PANEL);
        for (long long b = 0; b < blocks; ++b) {
            const long long row = b * each, rows = std::min(each, call.rows - row), output = p * PANEL;
            if (blocks == 1) {
                multiply_rows<1>(call, panel, row, rows, output, next);
            } else if (b < 2) {
                multiply_rows<2>(call, panel, row, rows, output, next + b * pairs * PANEL * 2);
            } else {
                multiply_rows<0>(call, panel, row, rows, output, nullptr);
            }
        }
    }
}
