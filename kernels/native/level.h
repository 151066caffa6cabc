// Everything for one set of instructions. Included inside its namespace, where TILE is set: how many rows,
// and how many ranks, registers hold the products of.
#include "vectors.h"

#include "lora.h"

#include "layers.h"

#include "attention.h"

#ifdef HAS_PAIRS
#include "gemm.h"
#else
constexpr void (*gemm)(const GemmCall &) = nullptr;
#endif

constexpr Level functions(const char *name) { return {name, lora, norm, gate, rope, attention, gemm}; }
#undef INLINE
