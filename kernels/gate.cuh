// The gate of an MLP, of pairs of half-precision values: round(gate / (1 + exp(-gate))) * up, rounded as torch does. For
// large negative gates the sum overflows to infinity, whose reciprocal is the zero that is wanted.
#pragma once

__device__ __forceinline__ float silu(float gate) {
    return gate * reciprocal_approx(1.0f + exp2_approx(-1.4426950408889634f * gate));
}

template <typename Half>
__device__ __forceinline__ unsigned gated(unsigned gate, unsigned up) {
    const unsigned active = pack<Half>(silu(low_of<Half>(gate)), silu(high_of<Half>(gate)));
    return pack<Half>(low_of<Half>(active) * low_of<Half>(up), high_of<Half>(active) * high_of<Half>(up));
}

template <typename Half>
__device__ __forceinline__ uint4 gated(uint4 gate, uint4 up) {
    return make_uint4(gated<Half>(gate.x, up.x), gated<Half>(gate.y, up.y), gated<Half>(gate.z, up.z),
                      gated<Half>(gate.w, up.w));
}
