/* A CUDA driver for machines without a GPU: two devices, computed by the CPU.
 *
 * The real pycuda and cuda-bindings load it as libcuda.so.1, so that every call of
 * emstream/cuda.py is made in earnest. It is as strict as a driver may be, and stricter:
 *
 * - Work on a stream is put off until an event behind it, or the stream, is synchronised,
 *   or memory is freed. A host array changed or read too early shows.
 * - A call needs its context current, and a stream or an event of that context.
 * - No address is used twice, the CPU can read neither device nor freed memory, and new
 *   memory holds rubbish.
 * - Copies are between page-locked and device memory only.
 *
 * PRETEND_CUDA_FAIL=cuMemAlloc=2 makes that call fail with that error (2 when left out),
 * PRETEND_CUDA_GPUS is the number of devices. Tests may call pretend_*.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define DEVICE_BYTES ((size_t)1 << 30)
#define DEEPEST 32 /* contexts on a thread's stack */

#define ERRORS(_)                                                                                     \
    _(SUCCESS, 0, "no error")                                                                         \
    _(ERROR_INVALID_VALUE, 1, "invalid argument")                                                     \
    _(ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                        \
    _(ERROR_NOT_INITIALIZED, 3, "initialization error")                                               \
    _(ERROR_NO_DEVICE, 100, "no device")                                                              \
    _(ERROR_INVALID_DEVICE, 101, "invalid device")                                                    \
    _(ERROR_INVALID_CONTEXT, 201, "invalid device context")                                           \
    _(ERROR_INVALID_HANDLE, 400, "invalid resource handle")                                           \
    _(ERROR_ILLEGAL_STATE, 401, "not possible in this state")                                         \
    _(ERROR_NOT_FOUND, 500, "symbol not found")                                                       \
    _(ERROR_ILLEGAL_ADDRESS, 700, "illegal memory access")                                            \
    _(ERROR_NOT_SUPPORTED, 801, "operation not supported")                                            \
    _(ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "not possible while a stream is captured")               \
    _(ERROR_STREAM_CAPTURE_INVALIDATED, 901, "the capture failed earlier")                            \
    _(ERROR_STREAM_CAPTURE_ISOLATION, 905, "a capture may not depend on what is outside")             \
    _(ERROR_CAPTURED_EVENT, 907, "the event was recorded in a capture")                               \
    _(ERROR_STREAM_CAPTURE_WRONG_THREAD, 908, "the capture was begun by another thread")              \
    _(ERROR_UNKNOWN, 999, "unknown error")
#define CODE(name, code, text) name = code,
enum error { ERRORS(CODE) };

enum kind { CONTEXT, STREAM, EVENT, GRAPH, EXEC, DEVICE, HOST };
static const char *const kind_names[] = {"context", "stream", "event", "graph", "exec", "device", "host"};
typedef uint64_t handle_t; /* a CUcontext, CUstream ..., or an address on a device */

struct moment { /* one recording of an event */
    struct thing *stream;
    bool happened;
};

struct work {
    enum { UPLOAD, DOWNLOAD, RECORD, WAIT } what;
    uint64_t to, from;
    size_t bytes;
    struct moment *moment;
    struct work *next;
};

struct thing { /* whatever has a handle or an address */
    enum kind kind;
    bool live; /* not given back yet */
    uint64_t address;
    struct thing *context, *next;
    unsigned flags;
    int device, retained; /* context */
    char *memory;         /* device, host */
    size_t bytes;
    struct work *work;    /* stream: not done yet; graph, exec: what they do */
    struct work *kept;    /* stream: captured so far */
    const void *capturer; /* stream: the thread that captures it; event: recorded last by that capture */
    bool spoilt;          /* stream: its capture can only be ended */
    struct moment *last;  /* event */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct thing *things;
static bool initialised;
static _Thread_local struct thing *stack[DEEPEST];
static _Thread_local int depth;
#define THIS_THREAD ((const void *)stack)
#define EACH(thing) (struct thing *thing = things; thing; thing = thing->next)

/* -- things ------------------------------------------------------------------------------- */

static struct thing *current(void) { return depth ? stack[depth - 1] : NULL; }

static struct thing *make(enum kind kind, size_t bytes, unsigned flags) {
    static uint64_t unused = 0x200000000000;
    struct thing *thing = malloc(sizeof *thing);
    *thing = (struct thing){.kind = kind, .live = true, .address = unused, .context = current(),
                            .bytes = bytes, .flags = flags, .next = things};
    unused += (bytes + 1023) / 512 * 512; /* with a gap behind */
    return things = thing;
}

static struct thing *find(enum kind kind, handle_t handle) {
    for EACH(thing)
        if (thing->live && thing->kind == kind && thing->address == handle)
            return thing;
    return NULL;
}

static struct thing *own(enum kind kind, handle_t handle) { /* if it is the current context's */
    struct thing *thing = find(kind, handle);
    return thing && thing->context == current() ? thing : NULL;
}

static char *inside(enum kind kind, uint64_t address, size_t bytes, const struct thing *context) {
    for EACH(thing)
        if (thing->live && thing->kind == kind && (kind == HOST || thing->context == context) &&
            address >= thing->address && address + bytes <= thing->address + thing->bytes)
            return thing->memory + (address - thing->address);
    return NULL;
}

/* -- work --------------------------------------------------------------------------------- */

static void append(struct work **list, const struct work *more) { /* a copy of it and what follows */
    while (*list)
        list = &(*list)->next;
    for (; more; more = more->next, list = &(*list)->next) {
        *list = malloc(sizeof **list);
        **list = *more;
    }
    *list = NULL;
}

static bool do_or_check(const struct work *work, const struct thing *context, bool really) {
    char *to = inside(work->what == DOWNLOAD ? HOST : DEVICE, work->to, work->bytes, context);
    const char *from = inside(work->what == UPLOAD ? HOST : DEVICE, work->from, work->bytes, context);
    if (really)
        memcpy(to, from, work->bytes);
    return to && from;
}

static void step(struct thing *stream) { /* do the next work of a stream */
    struct work *work = stream->work;
    stream->work = work->next;
    if (work->what == RECORD)
        work->moment->happened = true;
    else if (work->what == WAIT)
        while (!work->moment->happened)
            step(work->moment->stream);
    else
        do_or_check(work, stream->context, true);
    free(work);
}

static void finish_all(void) {
    for EACH(thing)
        while (thing->kind == STREAM && thing->work)
            step(thing);
}

static int put(handle_t handle, const struct work *work) {
    struct thing *stream = own(STREAM, handle);
    if (!stream)
        return ERROR_INVALID_HANDLE;
    if (!do_or_check(work, stream->context, false))
        return ERROR_INVALID_VALUE;
    append(stream->capturer ? &stream->kept : &stream->work, work);
    return stream->spoilt ? ERROR_STREAM_CAPTURE_INVALIDATED : SUCCESS;
}

/* -- what every call begins with ---------------------------------------------------------- */

enum needs { NOTHING, INIT, A_CONTEXT, NO_CAPTURE }; /* each includes those before it */

static int check(const char *call, enum needs needs) {
    const char *fail = getenv("PRETEND_CUDA_FAIL");
    size_t length = fail ? strcspn(fail, "=") : 0;
    if (length && !strncmp(call, fail, length) && (!call[length] || call[length] == '_'))
        return fail[length] ? atoi(fail + length + 1) : ERROR_OUT_OF_MEMORY;
    if (needs >= INIT && !initialised)
        return ERROR_NOT_INITIALIZED;
    if (needs >= A_CONTEXT && !(current() && current()->live))
        return ERROR_INVALID_CONTEXT;
    int error = SUCCESS;
    if (needs == NO_CAPTURE)
        for EACH(thing)
            if (thing->live && thing->kind == STREAM && thing->capturer == THIS_THREAD) {
                thing->spoilt = true;
                error = ERROR_STREAM_CAPTURE_UNSUPPORTED;
            }
    return error;
}

static void unlock(pthread_mutex_t **locked) { pthread_mutex_unlock(*locked); }

#define LOCK                                                                                          \
    pthread_mutex_lock(&mutex);                                                                       \
    pthread_mutex_t *locked __attribute__((cleanup(unlock))) = &mutex
#define REFUSE(condition, error)                                                                      \
    if (condition)                                                                                    \
        return error
#define CALL(needs)                                                                                   \
    LOCK;                                                                                             \
    int refused = check(__func__, needs);                                                             \
    REFUSE(refused, refused)

static int destroy(struct thing *thing) {
    REFUSE(!thing, ERROR_INVALID_HANDLE);
    return thing->live = false, SUCCESS;
}

/* -- the driver and its devices ----------------------------------------------------------- */

static int devices(void) { return getenv("PRETEND_CUDA_GPUS") ? atoi(getenv("PRETEND_CUDA_GPUS")) : 2; }

int cuInit(unsigned flags) {
    CALL(NOTHING);
    REFUSE(flags, ERROR_INVALID_VALUE);
    REFUSE(!devices(), ERROR_NO_DEVICE);
    initialised = true;
    return SUCCESS;
}

int cuDriverGetVersion(int *version) {
    CALL(NOTHING);
    return *version = 13000, SUCCESS;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    char newest[128];
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    (void)version, (void)flags;
    snprintf(newest, sizeof newest, !strcmp(symbol, "cuGraphInstantiate") ? "%sWithFlags" : "%s_v2", symbol);
    *function = dlsym(self, newest);
    if (!*function)
        *function = dlsym(self, symbol);
    if (status)
        *status = !*function;
    return *function ? SUCCESS : ERROR_NOT_FOUND;
}

#define NAME(name, code, text) if (error == code) return *string = "CUDA_" #name, SUCCESS;
#define TEXT(name, code, text) if (error == code) return *string = text, SUCCESS;

int cuGetErrorName(int error, const char **string) {
    ERRORS(NAME)
    return *string = NULL, ERROR_INVALID_VALUE;
}

int cuGetErrorString(int error, const char **string) {
    ERRORS(TEXT)
    return *string = NULL, ERROR_INVALID_VALUE;
}

int cuDeviceGetCount(int *count) {
    CALL(INIT);
    return *count = devices(), SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    CALL(INIT);
    REFUSE(ordinal < 0 || ordinal >= devices(), ERROR_INVALID_DEVICE);
    return *device = ordinal, SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device) {
    CALL(INIT);
    REFUSE(device < 0 || device >= devices(), ERROR_INVALID_DEVICE);
    snprintf(name, (size_t)length, "Pretend GPU %d", device);
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    CALL(INIT);
    REFUSE(device < 0 || device >= devices(), ERROR_INVALID_DEVICE);
    return *bytes = DEVICE_BYTES, SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };
    CALL(INIT);
    REFUSE(device < 0 || device >= devices(), ERROR_INVALID_DEVICE);
    REFUSE(attribute != CAPABILITY_MAJOR && attribute != CAPABILITY_MINOR, ERROR_INVALID_VALUE);
    return *value = attribute == CAPABILITY_MAJOR ? 9 : 0, SUCCESS;
}

int cuDeviceComputeCapability(int *major, int *minor, int device) {
    int error = cuDeviceGetAttribute(major, 75, device);
    return error ? error : cuDeviceGetAttribute(minor, 76, device);
}

/* -- contexts ----------------------------------------------------------------------------- */

int cuDevicePrimaryCtxRetain(handle_t *handle, int device) {
    static struct thing *primary[DEEPEST];
    CALL(INIT);
    REFUSE(device < 0 || device >= devices() || device >= DEEPEST, ERROR_INVALID_DEVICE);
    if (!primary[device])
        primary[device] = make(CONTEXT, 0, 0);
    *handle = primary[device]->address;
    return SUCCESS;
}

int cuCtxPushCurrent_v2(handle_t handle) {
    CALL(INIT);
    struct thing *context = find(CONTEXT, handle);
    REFUSE(!context || depth == DEEPEST, ERROR_INVALID_CONTEXT);
    stack[depth++] = context;
    return SUCCESS;
}

int cuCtxPopCurrent_v2(handle_t *handle) {
    CALL(INIT);
    REFUSE(!depth, ERROR_INVALID_CONTEXT);
    return *handle = stack[--depth]->address, SUCCESS;
}

/* -- memory ------------------------------------------------------------------------------- */

int cuMemGetInfo_v2(size_t *unused, size_t *total) {
    CALL(A_CONTEXT);
    *unused = *total = DEVICE_BYTES;
    for EACH(thing)
        if (thing->live && thing->kind == DEVICE && thing->context == current())
            *unused -= thing->bytes;
    return SUCCESS;
}

static int allocate(enum kind kind, size_t bytes, unsigned flags, uint64_t *address) {
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REFUSE(memory == MAP_FAILED, ERROR_OUT_OF_MEMORY);
    struct thing *thing = make(kind, bytes, flags);
    thing->memory = memset(memory, 0xa5, bytes);
    if (kind == HOST)
        thing->address = (uint64_t)memory;
    *address = thing->address;
    return SUCCESS;
}

static int give_back(struct thing *thing) {
    REFUSE(!thing, ERROR_INVALID_VALUE);
    finish_all();
    thing->live = false;
    madvise(thing->memory, thing->bytes, MADV_DONTNEED);
    mprotect(thing->memory, thing->bytes, PROT_NONE);
    return SUCCESS;
}

int cuMemHostAlloc(uint64_t *address, size_t bytes, unsigned flags) {
    CALL(NO_CAPTURE);
    REFUSE(!bytes || flags > 7, ERROR_INVALID_VALUE);
    return allocate(HOST, bytes, flags, address);
}

int cuMemFreeHost(uint64_t address) {
    CALL(NO_CAPTURE);
    return give_back(find(HOST, address));
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    size_t unused, total;
    int error = cuMemGetInfo_v2(&unused, &total);
    REFUSE(error, error);
    CALL(NO_CAPTURE);
    REFUSE(!bytes, ERROR_INVALID_VALUE);
    REFUSE(bytes > unused, ERROR_OUT_OF_MEMORY);
    return allocate(DEVICE, bytes, 0, address);
}

int cuMemFree_v2(uint64_t address) {
    CALL(NO_CAPTURE);
    return give_back(own(DEVICE, address));
}

int cuMemcpyHtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, handle_t stream) {
    CALL(A_CONTEXT);
    return put(stream, &(struct work){.what = UPLOAD, .to = to, .from = from, .bytes = bytes});
}

int cuMemcpyDtoHAsync_v2(uint64_t to, uint64_t from, size_t bytes, handle_t stream) {
    CALL(A_CONTEXT);
    return put(stream, &(struct work){.what = DOWNLOAD, .to = to, .from = from, .bytes = bytes});
}

/* -- streams and events ------------------------------------------------------------------- */

int cuStreamCreate(handle_t *handle, unsigned flags) {
    CALL(A_CONTEXT);
    REFUSE(flags > 1, ERROR_INVALID_VALUE);
    return *handle = make(STREAM, 0, flags)->address, SUCCESS;
}

int cuStreamDestroy_v2(handle_t handle) {
    CALL(A_CONTEXT);
    return destroy(own(STREAM, handle)); /* its work is done nevertheless */
}

int cuStreamSynchronize(handle_t handle) {
    CALL(NO_CAPTURE);
    struct thing *stream = own(STREAM, handle);
    REFUSE(!stream, ERROR_INVALID_HANDLE);
    while (stream->work)
        step(stream);
    return SUCCESS;
}

int cuStreamWaitEvent(handle_t handle, handle_t event_handle, unsigned flags) {
    CALL(A_CONTEXT);
    struct thing *stream = own(STREAM, handle), *event = find(EVENT, event_handle);
    REFUSE(!stream || !event, ERROR_INVALID_HANDLE);
    REFUSE(flags, ERROR_INVALID_VALUE);
    if (stream->capturer && event->capturer != stream->capturer) {
        stream->spoilt = true;
        return ERROR_STREAM_CAPTURE_ISOLATION;
    }
    REFUSE(event->capturer && !stream->capturer, ERROR_NOT_SUPPORTED); /* captures this stream, too */
    if (event->last && !stream->capturer)
        append(&stream->work, &(struct work){.what = WAIT, .moment = event->last});
    return SUCCESS;
}

int cuEventCreate(handle_t *handle, unsigned flags) {
    CALL(A_CONTEXT);
    REFUSE(flags > 3, ERROR_INVALID_VALUE);
    return *handle = make(EVENT, 0, flags)->address, SUCCESS;
}

int cuEventDestroy_v2(handle_t handle) {
    CALL(A_CONTEXT);
    return destroy(own(EVENT, handle));
}

int cuEventRecord(handle_t event_handle, handle_t handle) {
    CALL(A_CONTEXT);
    struct thing *stream = own(STREAM, handle), *event = own(EVENT, event_handle);
    REFUSE(!stream || !event, ERROR_INVALID_HANDLE);
    event->capturer = stream->capturer;
    if (!stream->capturer) {
        event->last = malloc(sizeof *event->last); /* for good: work may look at it */
        *event->last = (struct moment){stream, false};
        append(&stream->work, &(struct work){.what = RECORD, .moment = event->last});
    }
    return SUCCESS;
}

int cuEventSynchronize(handle_t handle) {
    CALL(NO_CAPTURE);
    struct thing *event = own(EVENT, handle);
    REFUSE(!event, ERROR_INVALID_HANDLE);
    REFUSE(event->capturer, ERROR_CAPTURED_EVENT);
    while (event->last && !event->last->happened)
        step(event->last->stream);
    return SUCCESS;
}

/* -- graphs ------------------------------------------------------------------------------- */

int cuStreamBeginCapture_v2(handle_t handle, int mode) {
    enum { THREAD_LOCAL = 1 };
    CALL(A_CONTEXT);
    struct thing *stream = own(STREAM, handle);
    REFUSE(!stream, ERROR_INVALID_HANDLE);
    REFUSE(mode != THREAD_LOCAL, ERROR_NOT_SUPPORTED);
    REFUSE(stream->capturer, ERROR_ILLEGAL_STATE);
    stream->capturer = THIS_THREAD;
    return SUCCESS;
}

int cuStreamEndCapture(handle_t handle, handle_t *result) {
    CALL(A_CONTEXT);
    struct thing *stream = own(STREAM, handle);
    *result = 0;
    REFUSE(!stream, ERROR_INVALID_HANDLE);
    REFUSE(!stream->capturer, ERROR_ILLEGAL_STATE);
    REFUSE(stream->capturer != THIS_THREAD, ERROR_STREAM_CAPTURE_WRONG_THREAD);
    struct work *kept = stream->kept;
    bool spoilt = stream->spoilt;
    stream->kept = NULL, stream->capturer = NULL, stream->spoilt = false;
    REFUSE(spoilt, ERROR_STREAM_CAPTURE_INVALIDATED);
    struct thing *graph = make(GRAPH, 0, 0);
    graph->work = kept;
    *result = graph->address;
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(handle_t *handle, handle_t graph_handle, uint64_t flags) {
    CALL(NO_CAPTURE);
    struct thing *graph = find(GRAPH, graph_handle);
    REFUSE(!graph, ERROR_INVALID_HANDLE);
    REFUSE(flags, ERROR_INVALID_VALUE);
    struct thing *exec = make(EXEC, 0, 0);
    append(&exec->work, graph->work);
    *handle = exec->address;
    return SUCCESS;
}

int cuGraphLaunch(handle_t exec_handle, handle_t handle) {
    CALL(A_CONTEXT);
    struct thing *exec = own(EXEC, exec_handle), *stream = own(STREAM, handle);
    REFUSE(!exec || !stream, ERROR_INVALID_HANDLE);
    REFUSE(stream->capturer, ERROR_NOT_SUPPORTED);
    for (struct work *work = exec->work; work; work = work->next)
        REFUSE(!do_or_check(work, stream->context, false), ERROR_ILLEGAL_ADDRESS);
    append(&stream->work, exec->work);
    return SUCCESS;
}

int cuGraphDestroy(handle_t handle) {
    CALL(INIT);
    return destroy(find(GRAPH, handle));
}

int cuGraphExecDestroy(handle_t handle) {
    CALL(INIT);
    return destroy(find(EXEC, handle));
}

/* -- for tests ---------------------------------------------------------------------------- */

int pretend_live(const char *kind) { /* how many were not given back */
    LOCK;
    int count = 0;
    for EACH(thing)
        count += thing->live && !strcmp(kind_names[thing->kind], kind);
    return count;
}

int pretend_pending(void) { /* pieces of work put off */
    LOCK;
    int count = 0;
    for EACH(thing)
        for (struct work *work = thing->kind == STREAM ? thing->work : NULL; work; work = work->next)
            count++;
    return count;
}

int pretend_flags(const char *kind) { /* that the newest was made with; -1 if there is none */
    LOCK;
    for EACH(thing)
        if (thing->live && !strcmp(kind_names[thing->kind], kind))
            return (int)thing->flags;
    return -1;
}
