// What adapters add to one site's output. Included once for each level, inside its namespace.
//
//   hidden[i, r] = weight * sum over k of x[row_i, k] * A[r, k]
//   y = scale * y + weight * shift + hidden B, for each task of a list, for each part
//
// Everything is summed in fp32 and y rounded once. A row's company changes the order of its sums, nothing else.

// A and B are read once, each from its first byte to its last: what comes next is sent for in this order, since memory
// is slower for one that jumps between rows.

constexpr int RANKS = 8;     // of A that one piece of work shrinks with
constexpr int COLUMNS = 512; // of y that one piece of work expands, where it has ROWS rows; else more
constexpr int MANY_TASKS = 8; // that keep all threads busy, each whole
constexpr int DEPTH = 64;    // ranks whose hidden values are laid out together

// As much from `ahead` on as `values` of each of R rows, for those from `at` on of each of them.
template <int R, typename T>
INLINE void send_for(const T *ahead, long long at, long long values = LANES) {
    const long long bytes = R * values * sizeof(T), line = 64;
    for (long long i = 0; i < bytes; i += line) {
        __builtin_prefetch((const char *)(ahead + R * at) + i, 0, 2);
    }
}

// sum[r * M + m] = a[r] . x[m] over k < width. What lies at `ahead`, if anything, is brought to the cache meanwhile.
template <typename T, int R, int M>
INLINE void products(float (&sum)[R * M], const T *const (&a)[R], const T *const (&x)[M], long long width, const T *ahead) {
    Floats total[R * M] = {};
    each_stretch<T>(width, [&](long long at, long long count) __attribute__((always_inline)) {
        if (ahead) {
            send_for<R>(ahead, at, Stretch<T>::VALUES);
        }
        Loaded<T> left[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            left[r] = fetch(a[r] + at, count);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Loaded<T> right = fetch(x[m] + at, count);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                add_product(total[r * M + m], left[r], right);
            }
        }
    });
    if constexpr (R * M == LANES) {
        store(sum, sums_of(total));
    } else {
        for (int i = 0; i < R * M; ++i) {
            sum[i] = sum_of(total[i]);
        }
    }
}

// Up to M rows of a task from `top` on, ranks first .. end - 1, R at a time.
template <typename T, int R, int M>
INLINE void shrink_rows(const LoraCall &call, const Task &task, const Adapter &adapter, int top, int first, int end) {
    const T *x[M];
    for (int m = 0; m < M; ++m) {
        x[m] = (const T *)call.x + task.row[top + m] * call.x_stride;
    }
    for (; first < end; first += R) {
        const T *a[R];
        for (int r = 0; r < R; ++r) {
            a[r] = (const T *)adapter.a + std::min(first + r, end - 1) * call.in_features;
        }
        float sum[R * M];
        products<T, R, M>(sum, a, x, call.in_features, top ? nullptr : a[0] + R * call.in_features);
        for (int r = 0; r < R && first + r < end; ++r) {
            for (int m = 0; m < M; ++m) {
                call.hidden[hidden_index(task, adapter.a_rows, top + m, first + r)] = task.weight * sum[r * M + m];
            }
        }
    }
}

template <typename T>
INLINE void shrink(const LoraCall &call, const Task &task, const Adapter &adapter, int first) {
    const int end = std::min(first + RANKS, adapter.a_rows);
    int top = 0;
    for (; top + TILE <= task.count; top += TILE) {
        shrink_rows<T, TILE, TILE>(call, task, adapter, top, first, end);
    }
    for (; top < task.count; ++top) {
        shrink_rows<T, 4, 1>(call, task, adapter, top, first, end);
    }
}

// sums[m] += h[m] . b over four ranks, M rows `stride` and DEPTH apart. `ahead` as of `products`.
template <typename T, int M>
INLINE void add_ranks(float *sums, long long stride, const float *h, const T *const (&b)[4], long long width, const T *ahead) {
    each_vector(width, [&](long long at, long long count) __attribute__((always_inline)) {
        if (ahead) {
            send_for<4>(ahead, at);
        }
        Floats right[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            right[r] = load_up_to(b[r] + at, count);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            float *to = sums + m * stride + at;
            Floats total = load_up_to(to, count);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                total += h[m * DEPTH + r] * right[r];
            }
            store_up_to(to, total, count);
        }
    });
}

// sums = scale * sums + weight * shift.
INLINE void apply_vectors(float *sums, const Part &part, float weight, int first, int width) {
    for (int i = 0; i < width; ++i) {
        const float scale = part.scale ? part.scale[first + i] : 1.0f;
        const float shift = part.shift ? weight * part.shift[first + i] : 0.0f;
        sums[i] = scale * sums[i] + shift;
    }
}

// Add columns first .. first + width - 1 of one part to every row of a task; sums of rows are `stride` apart.
template <typename T>
INLINE void add_part(float *sums, long long stride, const LoraCall &call, const Task &task, const Adapter &adapter, const Part &part,
                     int first, int width) {
    if (part.scale || part.shift) {
        for (int m = 0; m < task.count; ++m) {
            apply_vectors(sums + m * stride, part, task.weight, first, width);
        }
    }
    const bool is_whole = width == part.width;
    float h[ROWS * DEPTH];
    for (int top = 0; top < part.rank; top += DEPTH) {
        const int depth = std::min(DEPTH, part.rank - top);
        for (int m = 0; m < task.count; ++m) {
            const float *from = call.hidden + hidden_index(task, adapter.a_rows, m, part.rank_offset + top);
            for (int at = 0; at < DEPTH; at += LANES) {
                store(h + m * DEPTH + at, load_up_to(from + at, std::clamp(depth - at, 0, LANES)));
            }
        }
        for (int rank = 0; rank < depth; rank += 4) {
            const T *b[4];
            for (int r = 0; r < 4; ++r) {
                b[r] = (const T *)part.b + (long long)std::min(top + rank + r, part.rank - 1) * part.width + first;
                if (!is_whole) {
                    prefetch(b[r] + 4LL * part.width, width);
                }
            }
            const T *ahead = is_whole ? b[0] + 4LL * part.width : nullptr;
            int m = 0;
            for (; m + TILE <= task.count; m += TILE) {
                add_ranks<T, TILE>(sums + m * stride, stride, h + m * DEPTH + rank, b, width, m ? nullptr : ahead);
            }
            for (; m < task.count; ++m) {
                add_ranks<T, 1>(sums + m * stride, stride, h + m * DEPTH + rank, b, width, m ? nullptr : ahead);
            }
        }
    }
}

// f(task, adapter, part, begin, end) for every part of a list that lies in columns `column` .. of y.
template <typename F>
INLINE void each_part(const LoraCall &call, const Task *list, int column, int end, F f) {
    for (int entry = 0; entry < list->length; ++entry) {
        const Adapter *adapter = call.table.at(list[entry].slot);
        for (int p = 0; p < adapter->parts; ++p) {
            const Part &part = adapter->part[p];
            const int from = std::max(column, part.out_offset), to = std::min(end, part.out_offset + part.width);
            if (from < to) {
                f(list[entry], *adapter, part, from, to);
            }
        }
    }
}

// Columns that one piece of work has: all that there is room for where there are pieces enough for all threads.
INLINE int columns_of(const LoraCall &call, const Task &task) {
    return call.tasks->count < MANY_TASKS ? COLUMNS : COLUMNS * (ROWS / task.count);
}

template <typename T>
INLINE void expand(const LoraCall &call, const Task *list, int column) {
    const long long stride = columns_of(call, *list);
    const int end = std::min<long long>(column + stride, call.columns);
    bool covered = false;
    each_part(call, list, column, end, [&](auto &&...) { covered = true; });
    if (!covered) {
        return;
    }
    float sums[ROWS * COLUMNS];
    for (int m = 0; m < list->count; ++m) {
        const T *y = (const T *)call.y + list->row[m] * call.y_stride + column;
        each_vector(end - column, [&](long long at, long long count) {
            store_up_to(sums + m * stride + at, load_up_to(y + at, count), count);
        });
    }
    each_part(call, list, column, end, [&](const Task &task, const Adapter &adapter, const Part &part, int from, int to) {
        add_part<T>(sums + (from - column), stride, call, task, adapter, part, from - part.out_offset, to - from);
    });
    for (int m = 0; m < list->count; ++m) {
        T *y = (T *)call.y + list->row[m] * call.y_stride + column;
        each_vector(end - column, [&](long long at, long long count) {
            store_up_to(y + at, load_up_to(sums + m * stride + at, count), count);
        });
    }
}

// Pieces of work: for task i those from first[i] to first[i + 1] - 1.
struct Pieces {
    std::vector<int> first;

    int count() const { return first.back(); }
    int task_of(int piece) const { return int(std::upper_bound(first.begin(), first.end(), piece) - first.begin()) - 1; }
};

template <typename F>
static Pieces pieces_of(const Tasks &tasks, F pieces) {
    Pieces result;
    result.first.assign(1, 0);
    for (int i = 0; i < tasks.count; ++i) {
        result.first.push_back(result.first.back() + pieces(tasks.at(i)));
    }
    return result;
}

template <typename T>
static void lora_of(const LoraCall &call) {
    const Pieces shrinks = pieces_of(*call.tasks, [&](const Task &task) {
        return task.slot < 0 ? 0 : (call.table.at(task.slot)->a_rows + RANKS - 1) / RANKS;
    });
    const Pieces expands = pieces_of(*call.tasks, [&](const Task &task) {
        const int columns = columns_of(call, task);
        return task.length ? int((call.columns + columns - 1) / columns) : 0;
    });
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (int piece = 0; piece < shrinks.count(); ++piece) {
            const int at = shrinks.task_of(piece);
            const Task &task = call.tasks->at(at);
            shrink<T>(call, task, *call.table.at(task.slot), (piece - shrinks.first[at]) * RANKS);
        }
#pragma omp for schedule(dynamic, 1)
        for (int piece = 0; piece < expands.count(); ++piece) {
            const int at = expands.task_of(piece);
            const Task &task = call.tasks->at(at);
            expand<T>(call, &task, (piece - expands.first[at]) * columns_of(call, task));
        }
    }
}

static void lora(const LoraCall &call) {
    call.element == BFLOAT16 ? lora_of<Bf16>(call) : lora_of<float>(call);
}
