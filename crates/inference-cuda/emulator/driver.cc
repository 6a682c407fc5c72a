// The functions of libcuda and libcublasLt that the engine calls, on emulated kernels: so that the whole engine, with
// its streams, events, graphs and copies, runs in a test without a GPU. Appended to emulator.cc.
//
// Nothing runs when it is asked for, only when something waits for it, and then only what that needs: a missing wait
// between streams shows as NaN. Device memory begins and ends as NaN. A thread without a current context is refused.
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>

namespace driver {
typedef std::function<void()> Work;
struct Stream {
    std::deque<Work> queue;
    uint64_t issued, done;
    bool recording;
    std::vector<Work> recorded;
};
struct Event { Stream *stream; uint64_t at; };
struct Graph { std::vector<Work> work; };
struct Description { int transpose_a, epilogue; const u16 *bias; };
struct Layout { int type; uint64_t rows, columns; int64_t step; };

static std::vector<Stream *> streams;
static std::map<char *, size_t> device_memory, host_memory;
static std::map<std::string, u32> counts;
static int sticky, break_with, context;
static thread_local void *current;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
       NOT_FOUND = 500, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900 };

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void run_until(Stream *stream, uint64_t at) {
    while (stream->done < at && !stream->queue.empty()) {
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        work();
        stream->done++;
    }
}

static int start(Stream *stream, Work work) {
    if (sticky) return sticky;
    if (!current) return INVALID_CONTEXT;
    if (stream->recording) stream->recorded.push_back(std::move(work));
    else {
        stream->queue.push_back(std::move(work));
        stream->issued++;
    }
    return OK;
}

static bool inside(const std::map<char *, size_t> &memory, const void *at, size_t bytes) {
    auto after = memory.upper_bound((char *)at);
    if (after == memory.begin()) return false;
    --after;
    return (char *)at + bytes <= after->first + after->second;
}

static int take(std::map<char *, size_t> &memory, void **to, size_t bytes) {
    if (sticky) return sticky;
    if (!current) return INVALID_CONTEXT;
    for (Stream *stream : streams)
        if (stream->recording) return CAPTURE_UNSUPPORTED;
    if (posix_memalign(to, 256, bytes + 256)) return OUT_OF_MEMORY;
    memset(*to, 0xff, bytes);
    memory[(char *)*to] = bytes;
    return OK;
}

static int now(int code = OK) { return sticky ? sticky : !current ? INVALID_CONTEXT : code; }
} // namespace driver

using namespace driver;
extern "C" {
// For tests: the next wait reports this error, and so does everything after it.
void rb_break(int code) { break_with = code; }
u32 rb_count(const char *what) { return counts[what]; }

int cuInit(u32) { return (int)setting("RB_INIT", OK); }
// NVRTC looks for tables that only the real driver has, and does without them if told so.
int cuGetExportTable(const void **, const void *) { return NOT_FOUND; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuDeviceGetCount(int *count) { return *count = (int)setting("RB_DEVICES", 1), OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < setting("RB_DEVICES", 1) ? OK : INVALID_DEVICE; }
int cuDeviceGetName(char *name, int length, int) { return snprintf(name, (size_t)length, "Emulated GPU"), OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = (size_t)16 << 30, OK; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    long capability = setting("RB_CAPABILITY", 90);
    *value = attribute == 75 ? (int)capability / 10 : attribute == 76 ? (int)capability % 10 : attribute == 115 ? 1 : 0;
    return OK;
}
int cuDevicePrimaryCtxRetain(void **to, int) { return *to = &context, OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxGetCurrent(void **to) { return *to = current, OK; }
int cuCtxSetCurrent(void *to) { return current = to, OK; }
int cuCtxSynchronize() {
    if (now()) return now();
    for (Stream *stream : streams) run_until(stream, stream->issued);
    return sticky;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = (size_t)16 << 30;
    *free = (size_t)setting("RB_FREE_MIB", 8192) << 20;
    return now();
}

int cuMemAlloc_v2(void **to, size_t bytes) { return take(device_memory, to, bytes); }
int cuMemAllocAsync(void **to, size_t bytes, Stream *) { return take(device_memory, to, bytes); }
int cuMemHostAlloc(void **to, size_t bytes, u32) { return take(host_memory, to, bytes); }
// Freed memory becomes NaN once the stream gets there, and is not used again: who still reads it is found out.
int cuMemFreeAsync(char *at, Stream *stream) {
    size_t bytes = device_memory.at(at);
    return start(stream, [=] { memset(at, 0xff, bytes); });
}
int cuMemFree_v2(char *at) { return memset(at, 0xff, device_memory.at(at)), now(); }
int cuMemFreeHost(char *at) { return memset(at, 0xff, host_memory.at(at)), now(); }
int cuMemsetD8Async(char *at, unsigned char value, size_t bytes, Stream *stream) {
    if (!inside(device_memory, at, bytes)) return INVALID_VALUE;
    return start(stream, [=] { memset(at, value, bytes); });
}
int cuMemcpyHtoDAsync_v2(char *to, const char *from, size_t bytes, Stream *stream) {
    if (!inside(device_memory, to, bytes)) return INVALID_VALUE;
    if (inside(host_memory, from, bytes)) return start(stream, [=] { memcpy(to, from, bytes); });
    // Pageable memory has been read when the call returns.
    if (stream->recording) return CAPTURE_UNSUPPORTED;
    std::vector<char> copy(from, from + bytes);
    return start(stream, [=] { memcpy(to, copy.data(), bytes); });
}
int cuMemcpyDtoHAsync_v2(char *to, const char *from, size_t bytes, Stream *stream) {
    if (!inside(device_memory, from, bytes) || !inside(host_memory, to, bytes)) return INVALID_VALUE;
    return start(stream, [=] { memcpy(to, from, bytes); });
}

int cuStreamCreate(Stream **to, u32) {
    streams.push_back(*to = new Stream());
    return now();
}
int cuStreamDestroy_v2(Stream *) { return OK; }
int cuStreamSynchronize(Stream *stream) {
    if (now()) return now();
    run_until(stream, stream->issued);
    return sticky;
}
int cuStreamWaitEvent(Stream *stream, Event *event, u32) {
    Event then = *event;
    return start(stream, [=] { if (then.stream) run_until(then.stream, then.at); });
}
int cuEventCreate(Event **to, u32) { return *to = new Event(), now(); }
int cuEventDestroy_v2(Event *event) { return delete event, OK; }
int cuEventRecord(Event *event, Stream *stream) {
    if (stream->recording) return CAPTURE_UNSUPPORTED;
    *event = {stream, stream->issued};
    return now();
}
int cuEventSynchronize(Event *event) {
    // Waiting while a graph is recorded invalidates the recording.
    for (Stream *stream : streams)
        if (stream->recording) return CAPTURE_UNSUPPORTED;
    if (break_with) sticky = break_with;
    if (now()) return now();
    if (event->stream) run_until(event->stream, event->at);
    return sticky;
}

int cuModuleLoadData(void **to, const char *image) {
    *to = &context;
    return memcmp(image, "\x7f" "ELF", 4) ? INVALID_IMAGE : now();
}
int cuModuleUnload(void *) { return OK; }
int cuModuleGetFunction(const emulated::Kernel **to, void *, const char *name) {
    for (const emulated::Kernel &kernel : emulated::kernels())
        if (!strcmp(kernel.name, name)) return *to = &kernel, now();
    return NOT_FOUND;
}
int cuLaunchKernel(const emulated::Kernel *kernel, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared,
                   Stream *stream, void **arguments, void **) {
    if (!gx || !gy || gz != 1 || by != 1 || bz != 1 || shared || gy > 65535) return INVALID_VALUE;
    counts["launch"]++;
    std::vector<uint64_t> values(kernel->sizes.size());
    for (size_t i = 0; i < values.size(); i++) memcpy(&values[i], arguments[i], kernel->sizes[i]);
    return start(stream, [=]() mutable {
        std::vector<void *> pointers;
        for (uint64_t &value : values) pointers.push_back(&value);
        u32 count = (u32)values.size();
        if (rb_launch(kernel->name, gx, gy, bx, pointers.data(), kernel->sizes.data(), count, 0)) {
            fprintf(stderr, "emulated driver: %s\n", rb_error());
            sticky = LAUNCH_FAILED;
        }
    });
}

int cuStreamBeginCapture_v2(Stream *stream, int) {
    stream->recording = true;
    stream->recorded.clear();
    return now();
}
int cuStreamEndCapture(Stream *stream, Graph **to) {
    stream->recording = false;
    *to = new Graph{stream->recorded};
    return now(setting("RB_NO_GRAPHS", 0) ? CAPTURE_UNSUPPORTED : OK);
}
int cuGraphInstantiateWithFlags(Graph **to, Graph *graph, unsigned long long) { return *to = new Graph(*graph), now(); }
int cuGraphLaunch(Graph *graph, Stream *stream) {
    counts["graph"]++;
    for (const Work &work : graph->work) start(stream, work);
    return now();
}
int cuGraphUpload(Graph *, Stream *) { return OK; }
int cuGraphDestroy(Graph *graph) { return delete graph, OK; }
int cuGraphExecDestroy(Graph *graph) { return delete graph, OK; }

size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void **to) { return *to = &context, current ? 0 : 1; }
int cublasLtDestroy(void *) { return 0; }
int cublasLtMatmulDescCreate(Description **to, int compute, int scale) {
    *to = new Description{0, 1, nullptr};
    return compute == 68 && scale == 0 ? 0 : 15; // fp32 sums
}
int cublasLtMatmulDescDestroy(Description *description) { return delete description, 0; }
int cublasLtMatmulDescSetAttribute(Description *description, int attribute, const void *value, size_t bytes) {
    if (attribute == 3 && bytes == 4) return memcpy(&description->transpose_a, value, 4), 0;
    if (attribute == 7 && bytes == 4) return memcpy(&description->epilogue, value, 4), 0;
    if (attribute == 8 && bytes == 8) return memcpy(&description->bias, value, 8), 0;
    return 7;
}
int cublasLtMatrixLayoutCreate(Layout **to, int type, uint64_t rows, uint64_t columns, int64_t step) {
    *to = new Layout{type, rows, columns, step};
    return 0;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { return delete layout, 0; }
int cublasLtMatmulPreferenceCreate(void **to) { return *to = &context, 0; }
int cublasLtMatmulPreferenceDestroy(void *) { return 0; }
int cublasLtMatmulPreferenceSetAttribute(void *, int attribute, const void *, size_t bytes) {
    return attribute == 1 && bytes == 8 ? 0 : 7;
}
struct Heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
int cublasLtMatmulAlgoGetHeuristic(void *, Description *, Layout *, Layout *, Layout *, Layout *, void *, int,
                                   Heuristic *to, int *count) {
    *to = Heuristic{{4711}, 0, 0, 1.0f, {}};
    counts["heuristic"]++;
    return *count = 1, 0;
}
// In cuBLAS' own terms, columns first: D = op(A) B + bias per row.
int cublasLtMatmul(void *, Description *given, const float *alpha, const u16 *a, Layout *la, const u16 *b, Layout *lb,
                   const float *beta, const u16 *, Layout *, u16 *d, Layout *ld, const uint64_t *algorithm,
                   void *workspace, size_t workspace_bytes, Stream *stream) {
    Description how = *given;
    Layout A = *la, B = *lb, D = *ld;
    int type = PRECISION_BF16 ? 14 : 2;
    uint64_t m = D.rows, n = D.columns, k = how.transpose_a ? A.rows : A.columns;
    bool fits = (how.transpose_a ? A.columns : A.rows) == m && B.rows == k && B.columns == n && A.type == type &&
                B.type == type && D.type == type && A.step >= (int64_t)A.rows && B.step >= (int64_t)B.rows &&
                D.step >= (int64_t)D.rows && algorithm[0] == 4711 && inside(device_memory, workspace, workspace_bytes) &&
                inside(device_memory, a, 2 * A.step * A.columns) && inside(device_memory, b, 2 * B.step * B.columns) &&
                inside(device_memory, d, 2 * D.step * D.columns) && *alpha == 1.0f && *beta == 0.0f;
    if (!fits) return 7;
    return start(stream, [=] {
        std::vector<float> row(k);
        for (uint64_t i = 0; i < m; i++) {
            for (uint64_t l = 0; l < k; l++) row[l] = to_float(how.transpose_a ? a[l + i * A.step] : a[i + l * A.step]);
            float bias = how.epilogue == 4 ? to_float(how.bias[i]) : 0.0f;
            for (uint64_t j = 0; j < n; j++) {
                float sum = 0.0f;
                for (uint64_t l = 0; l < k; l++) sum += row[l] * to_float(b[l + j * B.step]);
                d[i + j * D.step] = to_storage(sum + bias);
            }
        }
    }) ? 14 : 0;
}
}
