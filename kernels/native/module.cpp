// The Python module: which instructions this processor has, and one function for each kind of call.
//
// Threads are OpenMP's, of the runtime that torch has brought into the process: this library is not linked with one.
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "calls.h"
#include "stack.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512_bf16 {
constexpr int TILE = 4;
#define HAS_AVX512
#define HAS_PAIRS
#include "level.h"
#undef HAS_PAIRS
#undef HAS_AVX512
} // namespace avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
constexpr int TILE = 4;
#define HAS_AVX512
#include "level.h"
#undef HAS_AVX512
} // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int TILE = 2;
#include "level.h"
} // namespace avx2
#pragma GCC pop_options
#endif

namespace plain {
constexpr int TILE = 2;
#include "level.h"
} // namespace plain

namespace {

// Those that this processor has, the best first.
std::vector<Level> find_levels() {
    std::vector<Level> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
        found.push_back(avx512_bf16::functions("avx512_bf16"));
    }
    if (has_avx512) {
        found.push_back(avx512::functions("avx512"));
    }
    if (has_avx2) {
        found.push_back(avx2::functions("avx2"));
    }
#endif
    found.push_back(plain::functions("plain"));
    return found;
}

const std::vector<Level> levels = find_levels();
Level level = levels.front();

// The arguments of one call, read one after another. After the last one `is_good` tells whether all were there.
class Arguments {
  public:
    Arguments(PyObject *const *values, Py_ssize_t count) : values_(values), count_(count) {}

    long long number() {
        PyObject *value = next();
        return value ? PyLong_AsLongLong(value) : 0;
    }
    double real() {
        PyObject *value = next();
        return value ? PyFloat_AsDouble(value) : 0.0;
    }
    template <typename T = void>
    T *address() {
        return (T *)number();
    }
    Element element() { return Element(number()); }

    bool is_good() const {
        if (!PyErr_Occurred() && at_ != count_) {
            PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", at_, count_);
        }
        return !PyErr_Occurred();
    }

  private:
    PyObject *next() { return at_++ < count_ ? values_[at_ - 1] : nullptr; }

    PyObject *const *values_;
    Py_ssize_t count_, at_ = 0;
};

// Run what may take long beside Python's other threads.
template <typename Call>
PyObject *answer(const Arguments &arguments, void (*run)(const Call &), const Call &call, bool is_long) {
    if (!arguments.is_good()) {
        return nullptr;
    }
    if (is_long) {
        Py_BEGIN_ALLOW_THREADS;
        run(call);
        Py_END_ALLOW_THREADS;
    } else {
        run(call);
    }
    Py_RETURN_NONE;
}

// Braces order the reading of arguments as they are written.
PyObject *lora(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const LoraCall call{a.element(),        a.address(),      a.number(), a.number(),       a.address(),
                        a.number(),         a.number(),       a.address<float>(), a.address<const Tasks>(),
                        {a.address<const char>(), a.number(), int(a.number())}};
    return answer(a, level.lora, call, true);
}

PyObject *norm(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const NormCall call{a.element(), a.address(), a.address(), a.address(), a.address(), a.number(), a.number(), a.real()};
    return answer(a, level.norm, call, false);
}

PyObject *gate(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const GateCall call{a.element(), a.address(), a.address(), a.number(), a.number()};
    return answer(a, level.gate, call, false);
}

PyObject *rope(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const RopeCall call{a.element(), a.address(), a.address(),                a.address(), a.address(), a.number(),
                        a.address(), a.address(), a.address<const long long>(), a.number(),  a.number(),  a.number(),
                        a.number()};
    return answer(a, level.rope, call, false);
}

PyObject *attention(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const AttentionCall call{a.element(),  a.address(),  a.address(),
                             a.address(),  a.address(),  a.address<const int>(),
                             a.number(),   a.address<const long long>(),
                             a.number(),   a.number(),   a.number(),
                             a.number(),   a.number(),   a.real(),
                             a.real(),     a.number()};
    return answer(a, level.attention, call, true);
}

PyObject *gemm(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const GemmCall call{a.address(), a.address(), a.address(), a.address(), a.number(), a.number(), a.number(), a.number()};
    if (!levels.front().gemm) {
        return PyErr_Format(PyExc_RuntimeError, "this processor multiplies no pairs of bfloat16");
    }
    return answer(a, levels.front().gemm, call, true);
}

PyObject *stack(PyObject *, PyObject *const *values, Py_ssize_t count) {
    Arguments a(values, count);
    const StackCall call{a.address<const Layer>(),
                         a.number(),
                         a.number(),
                         a.number(),
                         a.number(),
                         a.number(),
                         a.number(),
                         a.number(),
                         a.address(),
                         a.address(),
                         a.address(),
                         a.address(),
                         a.address<const long long>(),
                         a.address<const int>(),
                         a.number(),
                         a.address<const long long>(),
                         a.address<const Tasks>(),
                         a.address<float>(),
                         a.number(),
                         a.address(),
                         a.address(),
                         a.address(),
                         a.address(),
                         a.address(),
                         a.address()};
    if (!levels.front().gemm) {
        return PyErr_Format(PyExc_RuntimeError, "this processor multiplies no pairs of bfloat16");
    }
    return answer<StackCall>(
        a, [](const StackCall &each) { Stack(each, level, levels.front().gemm).run(); }, call, true);
}

PyObject *names(PyObject *, PyObject *) {
    PyObject *result = PyTuple_New(Py_ssize_t(levels.size()));
    for (size_t i = 0; result && i < levels.size(); ++i) {
        PyTuple_SetItem(result, Py_ssize_t(i), PyUnicode_FromString(levels[i].name));
    }
    return result;
}

PyObject *use(PyObject *, PyObject *name) {
    const char *wanted = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (!wanted) {
        return nullptr;
    }
    for (const Level &each : levels) {
        if (std::strcmp(each.name, wanted) == 0) {
            level = each;
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "this processor has no %s", wanted);
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {FAST(lora),
                         FAST(norm),
                         FAST(gate),
                         FAST(rope),
                         FAST(attention),
                         FAST(gemm),
                         FAST(stack),
                         {"levels", names, METH_NOARGS, nullptr},
                         {"use", use, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__native() {
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntConstant(made, "RECORD_BYTES", sizeof(Adapter)) < 0 ||
                 PyModule_AddIntConstant(made, "LAYER_BYTES", sizeof(Layer)) < 0 ||
                 PyModule_AddIntConstant(made, "PANEL", levels.front().gemm ? PANEL : 0) < 0)) {
        Py_CLEAR(made);
    }
    return made;
}
