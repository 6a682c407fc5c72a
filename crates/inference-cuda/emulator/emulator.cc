// The fibers behind emulator.h, and the entry points that the tests call. Appended to the kernels' source.
#include <csetjmp>
#include <cstdio>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

extern "C" char __start_rb_shared[], __stop_rb_shared[];

namespace emulated {
struct Copy { void *to; const void *from; size_t bytes; bool valid; };
struct Barrier { u32 arrived, round; };
struct Warp {
    Barrier in, out;
    int what;
    alignas(16) unsigned char lanes[32 * 32];
};
struct Fiber {
    jmp_buf at;
    ucontext_t start;
    bool started, done;
    Index index;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};
constexpr size_t STACK = 128 << 10;

Index block_index;
static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static std::vector<Warp> warps;
static Barrier block;
static Fiber *current;
static jmp_buf scheduler;
static bool moved, copies_land_early;
static std::string error;
static void (*entry)(void **);
static void **entry_arguments;

Index &thread_index() { return current->index; }

void fail(const char *text) {
    char where[160];
    snprintf(where, sizeof where, " (block %u,%u thread %u)", block_index.x, block_index.y, current->index.x);
    error = text + std::string(where);
    _longjmp(scheduler, 2);
}

__attribute__((noinline)) static void yield() {
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

static void wait(Barrier &barrier, u32 expected) {
    u32 round = barrier.round;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.round++;
        moved = true;
    }
    while (barrier.round == round) yield();
}

void block_barrier() { wait(block, (u32)fibers.size()); }

const unsigned char *exchange(int what, const void *mine, size_t bytes) {
    Warp &warp = warps[current->index.x / 32];
    if (warp.in.arrived && warp.what != what) fail("lanes of a warp are at different warp instructions");
    warp.what = what;
    memcpy(warp.lanes + current->index.x % 32 * bytes, mine, bytes);
    wait(warp.in, 32);
    return warp.lanes;
}

void exchanged() { wait(warps[current->index.x / 32].out, 32); }

static void copy(const Copy &copy) {
    if (copy.valid) memcpy(copy.to, copy.from, copy.bytes);
    else memset(copy.to, 0, copy.bytes);
}

void copy_later(void *to, const void *from, size_t bytes, bool valid) {
    // A copy may land at once, or as late as its wait: a kernel has to bear both.
    if (copies_land_early) copy({to, from, bytes, valid});
    else current->open.push_back({to, from, bytes, valid});
}

void copies_commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

void copies_wait(int pending) {
    while ((int)current->groups.size() > pending) {
        for (const Copy &later : current->groups.front()) copy(later);
        current->groups.erase(current->groups.begin());
    }
}

static void run_fiber() {
    entry(entry_arguments);
    current->done = true;
    moved = true;
    _longjmp(scheduler, 1);
}

static void resume(Fiber &fiber) {
    current = &fiber;
    int back = _setjmp(scheduler);
    if (back == 2) throw error;
    if (back) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

static void run_block(u32 threads, u32 order, u32 &random) {
    block = {};
    warps.assign((threads + 31) / 32, Warp{});
    // 0xff everywhere is NaN in all three formats.
    memset(__start_rb_shared, 0xff, (size_t)(__stop_rb_shared - __start_rb_shared));
    fibers.resize(threads);
    stacks.resize(threads * STACK);
    for (u32 i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.started = fiber.done = false;
        fiber.index = {i, 0, 0};
        fiber.open.clear();
        fiber.groups.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks.data() + i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
    }
    std::vector<u32> turn(threads);
    for (u32 i = 0; i < threads; i++) turn[i] = order == 1 ? threads - 1 - i : i;
    copies_land_early = order == 1;
    for (;;) {
        if (order >= 2) {
            for (u32 i = threads - 1; i > 0; i--) {
                random = random * 1664525 + 1013904223;
                std::swap(turn[i], turn[(random >> 8) % (i + 1)]);
            }
        }
        bool left = false, any = false;
        // In descending order each warp runs until it waits for the others: warps are as far apart as they can be.
        u32 together = order == 1 ? 32 : threads;
        for (u32 first = 0; first < threads; first += together) {
            do {
                moved = false;
                for (u32 t = first; t < first + together && t < threads; t++)
                    if (!fibers[turn[t]].done) resume(fibers[turn[t]]);
                any |= moved;
            } while (moved && order == 1);
        }
        for (const Fiber &fiber : fibers) left |= !fiber.done;
        if (!left) return;
        if (!any) throw std::string("threads wait for each other: a barrier that not all of them reach");
    }
}

struct Kernel {
    const char *name;
    void (*call)(void **);
    std::vector<u32> sizes;
};

template <auto FUNCTION, class... A, size_t... I> static void call_with(void **arguments, void (*)(A...), std::index_sequence<I...>) {
    FUNCTION(*(A *)arguments[I]...);
}
template <auto FUNCTION, class... A> static Kernel describe(const char *name, void (*function)(A...)) {
    (void)function;
    return {name,
            [](void **arguments) { call_with<FUNCTION>(arguments, (void (*)(A...))nullptr, std::index_sequence_for<A...>{}); },
            {(u32)sizeof(A)...}};
}
#define DESCRIBE(name) describe<name>(#name, name)
static const std::vector<Kernel> &kernels() {
    static const std::vector<Kernel> all = {DESCRIBE(embed_layer_norm), DESCRIBE(residual_layer_norm),
                                            DESCRIBE(bias_gelu),        DESCRIBE(attention),
                                            DESCRIBE(pool),             DESCRIBE(classify)};
    return all;
}
} // namespace emulated

// 0 if the kernel ran. `sizes` are those of the arguments given, checked against the kernel's own.
extern "C" int rb_launch(const char *name, u32 grid_x, u32 grid_y, u32 threads, void **arguments, const u32 *sizes,
                         u32 count, u32 order) {
    using namespace emulated;
    for (const Kernel &kernel : kernels()) {
        if (strcmp(kernel.name, name)) continue;
        if (kernel.sizes != std::vector<u32>(sizes, sizes + count)) {
            error = std::string(name) + ": the arguments are not those of the kernel";
            return 1;
        }
        entry = kernel.call;
        entry_arguments = arguments;
        u32 random = order;
        try {
            for (u32 y = 0; y < grid_y; y++)
                for (u32 x = 0; x < grid_x; x++) {
                    block_index = {x, y, 0};
                    run_block(threads, order, random);
                }
        } catch (const std::string &text) {
            error = std::string(name) + ": " + text;
            return 1;
        }
        return 0;
    }
    error = std::string("no kernel ") + name;
    return 1;
}

extern "C" const char *rb_error() { return emulated::error.c_str(); }

// y[rows][outputs] = x[rows][inputs] * w[outputs][inputs]^T (+ bias), fp32 sums: what cublasLt is asked for.
extern "C" void rb_gemm(u16 *y, const u16 *x, const u16 *w, const u16 *bias, u32 rows, u32 outputs, u32 inputs) {
    auto floats = [](const u16 *from, size_t count) {
        std::vector<float> to(count);
        for (size_t i = 0; i < count; i++) to[i] = to_float(from[i]);
        return to;
    };
    std::vector<float> xs = floats(x, (size_t)rows * inputs), ws = floats(w, (size_t)outputs * inputs);
    for (u32 r = 0; r < rows; r++)
        for (u32 o = 0; o < outputs; o++) {
            float sum = 0.0f;
            for (u32 i = 0; i < inputs; i++) sum += xs[(size_t)r * inputs + i] * ws[(size_t)o * inputs + i];
            y[(size_t)r * outputs + o] = to_storage(sum + (bias ? to_float(bias[o]) : 0.0f));
        }
}
