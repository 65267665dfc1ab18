// A CUDA runtime and driver that run nothing, to be preloaded: torch and Triton see a GPU.
//
// Its memory is ordinary memory, all zeros but for what the host copied there. A kernel, a product of cuBLAS, a copy on
// the device: each is counted, and does nothing. So a program's numbers mean nothing under it, and all that does not
// depend on them is as on a GPU: what is launched, where the host waits, what the allocator takes.
//
// Here is what must answer with more than "success". fakegpu.py adds the other functions that torch and Triton want.

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// What fakegpu.py reads. A kernel or product that is recorded into a graph counts as recorded, not as launched.
_Atomic long fake_launches;    // torch's own kernels
_Atomic long fake_triton;      // Triton's kernels
_Atomic long fake_gemms;       // cuBLAS's products
_Atomic long fake_recorded;    // kernels and products in graphs
_Atomic long fake_recordings;  // of graphs
_Atomic long fake_replays;     // of graphs
_Atomic long fake_syncs;       // times that the host waited
_Atomic long fake_mallocs;     // of device memory

void (*fake_on_sync)(void);    // set by fakegpu.py: called when the host waits
void *fake_read;               // where the host's last copy from the device went

static const struct gpu { int sm, processors, threads, shared, gigabytes; const char *name; } gpus[] = {
    {75, 40, 1024, 65536, 15, "Tesla T4"},
    {80, 108, 2048, 166912, 80, "NVIDIA A100-SXM4-80GB"},
    {89, 128, 1536, 101376, 24, "NVIDIA GeForce RTX 4090"},
    {90, 132, 2048, 232448, 80, "NVIDIA H100 80GB HBM3"},
}, *gpu = gpus;

static const size_t ROOM = 1UL << 40;  // addresses, of which the touched ones alone take memory
static char *memory;
static _Atomic size_t used, live;

__attribute__((constructor)) static void start(void) {
    int sm = atoi(getenv("FAKE_SM"));
    while (gpu->sm != sm)
        gpu++;
    memory = mmap(0, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static int wait(void) {
    fake_syncs++;
    if (fake_on_sync)
        fake_on_sync();
    return 0;
}

static void *handle(void) {  // of a stream, an event, a module, ...: any address will do that is not null
    static _Atomic uintptr_t last = 4096;
    return (void *)(last += 16);
}

// the device

static int attribute(int a) {  // the driver's attributes have the same numbers
    switch (a) {
    case cudaDevAttrComputeCapabilityMajor: return gpu->sm / 10;
    case cudaDevAttrComputeCapabilityMinor: return gpu->sm % 10;
    case cudaDevAttrMultiProcessorCount: return gpu->processors;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return gpu->threads;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return gpu->shared;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return gpu->shared + 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxGridDimX: return INT32_MAX;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: return 1500000;
    case cudaDevAttrGlobalMemoryBusWidth: return 4096;
    default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr a, int d) { *value = attribute(a); return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) { *value = attribute(a); return 0; }
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuDeviceGet(CUdevice *d, int n) { *d = n; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (void *)gpus; return 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
size_t cublasLtGetVersion(void) { return CUDART_VERSION * 10; }
const char *cudaGetErrorString(cudaError_t e) { return e == 0 ? "no error" : "an error of the fake GPU"; }
const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, gpu->name);
    p->major = gpu->sm / 10;
    p->minor = gpu->sm % 10;
    p->totalGlobalMem = (size_t)gpu->gigabytes << 30;
    p->multiProcessorCount = gpu->processors;
    p->maxThreadsPerMultiProcessor = gpu->threads;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = gpu->shared;
    p->sharedMemPerMultiprocessor = gpu->shared + 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = INT32_MAX;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 40 << 20;
    p->textureAlignment = 512;
    return 0;
}

// memory: each address is given out once; before an allocation stands its size

cudaError_t cudaMalloc(void **p, size_t n) {
    size_t size = (n + 511) / 512 * 512, place = used, limit = (size_t)gpu->gigabytes << 30;
    if (live + size > limit || place + size + 512 > ROOM)
        return cudaErrorMemoryAllocation;
    *p = memory + (used += size + 512) - size;
    ((size_t *)*p)[-1] = size;
    live += size;
    fake_mallocs++;
    return 0;
}
cudaError_t cudaFree(void *p) {
    if (p)
        live -= ((size_t *)p)[-1];
    return 0;
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return posix_memalign(p, 4096, n); }
cudaError_t cudaMallocHost(void **p, size_t n) { return posix_memalign(p, 4096, n); }
cudaError_t cudaFreeHost(void *p) { free(p); return 0; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return cudaMalloc(p, 4096); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = (size_t)gpu->gigabytes << 30;
    *unused = *total - live;
    return 0;
}

static int on_device(const void *p) { return memory <= (char *)p && (char *)p < memory + ROOM; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    *(on_device(p) ? &a->devicePointer : &a->hostPointer) = (void *)p;
    return 0;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute a, CUdeviceptr p) {
    *(CUdeviceptr *)value = p;
    return 0;
}

static int copy(void *to, const void *from, size_t n) {
    if (on_device(to) && on_device(from))
        return 0;
    memcpy(to, from, n);
    if (on_device(from)) {
        fake_read = to;
        if (n == 1)
            *(char *)to = 1;  // the host asks whether: yes
    }
    return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
    return copy(to, from, n);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) {
    copy(to, from, n);
    return wait();
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait(); }
cudaError_t cudaDeviceSynchronize(void) { return wait(); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { fake_syncs++; return 0; }  // the allocator may hold a lock

// streams, events, and graphs, which are the number of kernels in them

struct CUgraph_st { long kernels; };
static cudaStream_t capturing;
static long recorded_before;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { *s = handle(); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = handle(); return 0; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return 0; }

cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = capturing && s == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                             cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                             size_t *n) {
    if (id)
        *id = 1;
    return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    capturing = s;
    recorded_before = fake_recorded;
    return 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    capturing = 0;
    fake_recordings++;
    *graph = malloc(sizeof **graph);
    (*graph)->kernels = fake_recorded - recorded_before;
    return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { *n = graph->kernels; return 0; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    *exec = handle();
    return 0;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) { fake_replays++; return 0; }

// kernels and products

static int count(_Atomic long *counter) {
    (*(capturing ? &fake_recorded : counter))++;
    return 0;
}
int fake_gemm(void) { return count(&fake_gemms); }

static int launch(_Atomic long *counter, dim3 grid, dim3 block, size_t shared) {
    int threads = block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || threads < 1 || threads > 1024
        || shared > gpu->shared)
        return cudaErrorInvalidConfiguration;  // what a GPU refuses
    return count(counter);
}
// a <<< >>> in torch's code pushes, and the stub of its kernel pops
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;
int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
    return 0;
}
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
int __cudaLaunchKernel(void *f, dim3 grid, dim3 block, void **args, size_t shared, void *stream) {
    return launch(&fake_launches, grid, block, shared);
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
    return launch(&fake_launches, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
    return launch(&fake_launches, c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, CUstream s, void **args, void **extra) {
    return launch(&fake_triton, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **args, void **extra) {
    return launch(&fake_triton, (dim3){c->gridDimX, c->gridDimY, c->gridDimZ},
                  (dim3){c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes);
}
CUresult cuModuleLoad(CUmodule *m, const char *path) { *m = handle(); return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = handle(); return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = handle(); return 0; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f) {
    *value = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = gpu->sm == 89 ? 86 : gpu->sm;  // torch is built for 8.6, whose code 8.9 runs
    a->maxDynamicSharedSizeBytes = gpu->shared;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) {
    *n = gpu->threads / threads;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared,
                                                           unsigned flags) {
    *n = gpu->threads / threads;
    return 0;
}
// cuBLASLt's search: one algorithm, of zeros
int cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
    memset(results, 0, 64);
    *found = 1;
    return 0;
}

// functions that are asked for by name

static int succeed(void) { return 0; }
static void *named(const char *name) {
    void *f = dlsym(RTLD_DEFAULT, name);
    return f ? f : succeed;
}
CUresult cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *r) {
    *f = named(name);
    if (r)
        *r = 0;
    return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                     enum cudaDriverEntryPointQueryResult *r) {
    *f = named(name);
    if (r)
        *r = 0;
    return 0;
}
