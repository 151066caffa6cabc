// Products with a matrix whose rows lie along the columns of the result, straight from 16-byte reads of it: mma wants
// pairs along k, which are put together here.
#pragma once

// Column j of eight in two rows of a matrix that a lane has read, as a pair: the upper row's below.
__device__ __forceinline__ unsigned column_pair(uint4 upper, uint4 lower, int j) {
    const unsigned a = j < 2 ? upper.x : j < 4 ? upper.y : j < 6 ? upper.z : upper.w;
    const unsigned b = j < 2 ? lower.x : j < 4 ? lower.y : j < 6 ? lower.z : lower.w;
    return __byte_perm(a, b, j % 2 ? 0x7632 : 0x5410);
}

// sum += a [16 x 16] b [16 x 64], b row-major. Lane (g, t) holds columns 8 g .. 8 g + 7 of b's rows 2t, 2t + 1, 2t + 8 and
// 2t + 9. So column n of product j is column 8 n + j of b: sum[j] holds (row g, column 16 t + j), (row g, column 16 t + 8 +
// j), and the same of row g + 8.
template <typename Half>
__device__ __forceinline__ void multiply_pairs(float (&sum)[8][4], const unsigned (&a)[4], const uint4 (&b)[4]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const unsigned pairs[2] = {column_pair(b[0], b[1], j), column_pair(b[2], b[3], j)};
        mma_m16n8k16<Half>(sum[j], a, pairs);
    }
}
