// CUDA C++ for g++, one block at a time on one thread of the CPU. Every CUDA thread is a fibre with a stack of its own;
// barriers and warp collectives are places where fibres wait for each other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// All shared variables lie in one section, which is filled with NaN before every block.
#define __shared__ static __attribute__((section("shared_memory")))

struct dim3_ {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Four of the eight bytes of x, which are the lower ones, and y: each named by four bits of `selector`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = x | (uint64_t)y << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= (unsigned)(bytes >> (selector >> i * 4 & 7) * 8 & 0xff) << i * 8;
    }
    return result;
}

namespace emulation {

constexpr size_t STACK = 256 * 1024;
constexpr unsigned WARP = 32;

// What a fibre waits for.
enum class State { ready, barrier, warp, done };

// A call of the kernel's.
struct Place {
    const char *name = "";
    const char *file = "";
    int line = 0;

    bool operator==(const Place &other) const {
        return line == other.line && std::strcmp(name, other.name) == 0 && std::strcmp(file, other.file) == 0;
    }
    std::string text() const { return std::string(name) + " at " + file + ":" + std::to_string(line); }
};

// As a default argument: the place of the call that leaves it out.
constexpr Place here(const char *name, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {name, file, line};
}

struct Copy {
    void *to;
    const void *from;
    bool valid;
};

struct Fibre {
    void *stack_pointer = nullptr;
    char *stack = nullptr;
    State state = State::ready;
    dim3_ index{};
    unsigned lane = 0;
    std::vector<std::vector<Copy>> groups{1}; // asynchronous copies, by group; the last is still open
    Place place; // where it waits
    uint64_t offered[8] = {};
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack = nullptr;
#endif
};

inline std::vector<Fibre> fibres;
inline Fibre *current = nullptr;
inline void *scheduler_pointer = nullptr;
inline dim3_ block_index, block_dim, grid_dim;
inline std::string failure;
inline uint64_t rounds = 0; // of letting all fibres run
#if defined(__SANITIZE_ADDRESS__)
inline const void *scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
inline void *scheduler_fake = nullptr;
#endif

// Save the callee's registers, swap stacks, restore.
extern "C" void emulation_switch(void **save, void *load);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

struct Stop {};

// Give way to the other fibres.
inline void yield() {
    Fibre *self = current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&self->fake_stack, scheduler_stack, scheduler_size);
#endif
    emulation_switch(&self->stack_pointer, scheduler_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_size);
#endif
    if (!failure.empty()) {
        throw Stop{};
    }
}

// End the launch. The first failure is the one that is told.
inline void set_failure(const std::string &text) {
    failure = text + " (block " + std::to_string(block_index.x) + "," + std::to_string(block_index.y) + "," +
              std::to_string(block_index.z) + ")";
}

inline void fail(const Place &place, const std::string &text) {
    set_failure("thread " + std::to_string(current->index.x) + ", " + place.text() + ": " + text);
    throw Stop{};
}

// The 32 lanes that the current fibre is among.
inline const Fibre *warp_of(const Place &place) {
    const size_t first = current->index.x / WARP * WARP;
    if (first + WARP > fibres.size()) {
        fail(place, "the warp is not whole");
    }
    return &fibres[first];
}

// Meet the other lanes of the warp, each offering some words; what they offer can be read until the next meeting.
inline void meet(const Place &place, const uint64_t *words, size_t count) {
    std::copy(words, words + count, current->offered);
    current->place = place;
    current->state = State::warp;
    yield();
}

// After a meeting: let the other lanes read before anything else is offered.
inline void part(const Place &place) { meet(place, nullptr, 0); }

inline void (*entry)(void *) = nullptr;
inline void *entry_arguments = nullptr;

inline void finish_copies(Fibre &fibre, size_t pending) {
    while (fibre.groups.size() - 1 > pending) {
        for (const Copy &copy : fibre.groups.front()) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
        fibre.groups.erase(fibre.groups.begin());
    }
}

inline void run_fibre() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    try {
        entry(entry_arguments);
    } catch (const Stop &) {
    }
    Fibre *self = current;
    self->state = State::done;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
#endif
    emulation_switch(&self->stack_pointer, scheduler_pointer);
    std::abort();
}

inline void prepare(Fibre &fibre) {
    auto *top = reinterpret_cast<uint64_t *>(fibre.stack + STACK);
    *--top = 0;
    *--top = reinterpret_cast<uint64_t>(&run_fibre);
    for (int i = 0; i < 6; ++i) {
        *--top = 0;
    }
    fibre.stack_pointer = top;
    fibre.state = State::ready;
    fibre.groups.assign(1, {});
}

inline void resume(Fibre &fibre) {
    current = &fibre;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake, fibre.stack, STACK);
#endif
    emulation_switch(&scheduler_pointer, fibre.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

// What the threads of a stuck block wait for.
inline std::string standstill() {
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    for (const Fibre &fibre : fibres) {
        const std::string where = fibre.state == State::done ? "gone" : fibre.place.text();
        auto found = std::find_if(groups.begin(), groups.end(), [&](const auto &group) { return group.first == where; });
        if (found == groups.end()) {
            found = groups.insert(found, {where, {}});
        }
        found->second.push_back(fibre.index.x);
    }
    std::string text = "threads wait for others that do not come:";
    for (const auto &[where, threads] : groups) {
        text += " " + std::to_string(threads.size()) + " (the first is " + std::to_string(threads.front()) + ") " +
                where + ";";
    }
    text.pop_back();
    return text;
}

// Let the fibres from `first` to `end` go on if all of them wait in the same place.
inline bool release(State state, size_t first, size_t end) {
    for (size_t i = first; i < end; ++i) {
        if (fibres[i].state != state || !(fibres[i].place == fibres[first].place)) {
            return false;
        }
    }
    for (size_t i = first; i < end; ++i) {
        fibres[i].state = State::ready;
    }
    return true;
}

// Let go what has met. Without anything to let go, the block is stuck.
inline bool release() {
    if (release(State::barrier, 0, fibres.size())) {
        return true;
    }
    bool moved = false;
    for (size_t first = 0; first < fibres.size(); first += WARP) {
        moved |= release(State::warp, first, std::min(first + WARP, fibres.size()));
    }
    if (!moved && failure.empty()) {
        set_failure(standstill());
    }
    return moved;
}

extern "C" char __start_shared_memory[] __attribute__((weak));
extern "C" char __stop_shared_memory[] __attribute__((weak));

inline bool is_shared(const void *address) {
    return __start_shared_memory != nullptr && address >= __start_shared_memory && address < __stop_shared_memory;
}

#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address"))) // the section has the sanitizer's margins
#endif
inline void poison_shared_memory() {
    if (__start_shared_memory != nullptr) {
        volatile char *at = __start_shared_memory;
        for (size_t i = 0, n = __stop_shared_memory - __start_shared_memory; i < n; ++i) {
            at[i] = static_cast<char>(0xff);
        }
    }
}

// Let every fibre that can run go on to its next wait: upwards and downwards in turn, so that a missing barrier shows
// whichever of two threads is meant to be first.
inline bool run_fibres() {
    bool ran = false;
    ++rounds;
    for (size_t i = 0; i < fibres.size(); ++i) {
        Fibre &fibre = fibres[rounds % 2 ? i : fibres.size() - 1 - i];
        if (fibre.state == State::ready || (!failure.empty() && fibre.state != State::done)) {
            resume(fibre);
            ran = true;
        }
    }
    return ran;
}

inline void run_block() {
    poison_shared_memory();
    for (Fibre &fibre : fibres) {
        prepare(fibre);
    }
    while (run_fibres()) {
        if (std::any_of(fibres.begin(), fibres.end(), [](const Fibre &fibre) { return fibre.state != State::done; })) {
            release();
        }
    }
}

// Blocks run in an order that no kernel may rely on.
inline void run_grid(dim3_ grid, unsigned threads, void (*function)(void *), void *arguments) {
    entry = function;
    entry_arguments = arguments;
    grid_dim = grid;
    block_dim = {threads, 1, 1};
    failure.clear();
    while (fibres.size() > threads) {
        munmap(fibres.back().stack, STACK);
        fibres.pop_back();
    }
    while (fibres.size() < threads) {
        fibres.emplace_back();
        fibres.back().stack = static_cast<char *>(
            mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    for (unsigned i = 0; i < threads; ++i) {
        fibres[i].index = {i, 0, 0};
        fibres[i].lane = i % WARP;
    }
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    uint64_t step = 7919 % std::max<uint64_t>(blocks, 1);
    while (blocks > 1 && std::__gcd(step, blocks) != 1) {
        ++step;
    }
    for (uint64_t i = 0, at = blocks / 2; i < blocks && failure.empty(); ++i, at = (at + step) % blocks) {
        block_index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
        rounds = i;
        run_block();
    }
}

} // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads(const emulation::Place &place = emulation::here("__syncthreads")) {
    emulation::current->place = place;
    emulation::current->state = emulation::State::barrier;
    emulation::yield();
}
inline void __syncwarp(const emulation::Place &place = emulation::here("__syncwarp")) {
    emulation::meet(place, nullptr, 0);
}

namespace emulation {
template <typename Value>
inline Value exchange(const Place &place, Value value, unsigned lane) {
    static_assert(sizeof(Value) == 4);
    const unsigned from = current->index.x / WARP * WARP + lane % WARP;
    if (from >= fibres.size()) {
        fail(place, "there is no lane " + std::to_string(lane % WARP));
    }
    uint64_t word = 0;
    std::memcpy(&word, &value, 4);
    meet(place, &word, 1);
    Value result;
    std::memcpy(&result, &fibres[from].offered[0], 4);
    part(place);
    return result;
}
} // namespace emulation

inline unsigned __ballot_sync(unsigned, bool vote, const emulation::Place &place = emulation::here("__ballot_sync")) {
    const emulation::Fibre *warp = emulation::warp_of(place);
    const uint64_t word = vote;
    emulation::meet(place, &word, 1);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < emulation::WARP; ++lane) {
        votes |= unsigned(warp[lane].offered[0]) << lane;
    }
    emulation::part(place);
    return votes;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }

template <typename Value>
inline Value __shfl_sync(unsigned, Value value, int lane,
                         const emulation::Place &place = emulation::here("__shfl_sync")) {
    return emulation::exchange(place, value, unsigned(lane));
}
template <typename Value>
inline Value __shfl_xor_sync(unsigned, Value value, int mask,
                             const emulation::Place &place = emulation::here("__shfl_xor_sync")) {
    return emulation::exchange(place, value, emulation::current->lane ^ unsigned(mask));
}
template <typename Value>
inline Value __shfl_down_sync(unsigned, Value value, unsigned delta,
                              const emulation::Place &place = emulation::here("__shfl_down_sync")) {
    const unsigned lane = emulation::current->lane;
    return emulation::exchange(place, value, lane + delta < emulation::WARP ? lane + delta : lane);
}
