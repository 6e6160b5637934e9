/* A CUDA runtime without a GPU: the memory of its one device is memory of the host, and streams do their work at once.
 *
 * The library is loaded before the real runtime and takes its place in torch's libraries, so that their allocators, statistics,
 * streams and events are the real ones. Launching a kernel fails: kernels.cpp computes in their place.
 * The driver's functions for expandable segments are here too.
 * LIT_LORA_CUDA_BYTES is the memory of the device, and LIT_LORA_CUDA_NAME its name.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { LARGE = 1 << 18 }; /* bytes */

typedef struct {
  char *start;
  size_t bytes;
  enum cudaMemoryType type;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks;
static size_t count, room, used, total = 24ull << 30;
static const char *name = "Pretended GPU";
static int computes = 1;  /* see kernels.cpp */
static __thread cudaError_t last;

__attribute__((constructor)) static void read_environment(void) {
  if (getenv("LIT_LORA_CUDA_BYTES")) total = strtoull(getenv("LIT_LORA_CUDA_BYTES"), NULL, 10);
  if (getenv("LIT_LORA_CUDA_COMPUTES")) computes = strcmp(getenv("LIT_LORA_CUDA_COMPUTES"), "0");
  if (getenv("LIT_LORA_CUDA_NAME")) name = getenv("LIT_LORA_CUDA_NAME");
}

static cudaError_t failed(cudaError_t error) { return last = error; }

static void add(void *start, size_t bytes, enum cudaMemoryType type) {
  pthread_mutex_lock(&lock);
  if (count == room) blocks = realloc(blocks, (room = 2 * room + 64) * sizeof(Block));
  blocks[count++] = (Block){start, bytes, type};
  if (type == cudaMemoryTypeDevice) used += bytes;
  pthread_mutex_unlock(&lock);
}

static Block find(const void *pointer) {
  Block found = {NULL, 0, cudaMemoryTypeUnregistered};
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < count; i++)
    if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].bytes) found = blocks[i];
  pthread_mutex_unlock(&lock);
  return found;
}

static size_t take_out(void *start) {
  size_t bytes = 0;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < count && !bytes; i++) {
    if (blocks[i].start != start) continue;
    bytes = blocks[i].bytes;
    if (blocks[i].type == cudaMemoryTypeDevice) used -= bytes;
    blocks[i] = blocks[--count];
  }
  pthread_mutex_unlock(&lock);
  return bytes;
}

/* Memory. Pages that nothing writes to take none of the host's. */

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  *pointer = NULL;
  if (used + bytes > total) return failed(cudaErrorMemoryAllocation);
  void *made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  add(*pointer = made, bytes, cudaMemoryTypeDevice);
  return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  size_t bytes = pointer ? take_out(pointer) : 0;
  if (bytes) munmap(pointer, bytes);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  if (posix_memalign(pointer, 4096, bytes ? bytes : 1)) return failed(cudaErrorMemoryAllocation);
  add(*pointer, bytes, cudaMemoryTypeHost);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) {
  take_out(pointer);
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
  add(pointer, bytes, cudaMemoryTypeHost);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
  take_out(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *all) {
  *unused = total - used, *all = total;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = find(pointer).type;
  if (attributes->type != cudaMemoryTypeUnregistered) attributes->devicePointer = (void *)pointer;
  if (attributes->type == cudaMemoryTypeHost) attributes->hostPointer = (void *)pointer;
  return cudaSuccess;
}

/* Memory in pieces at the addresses that the caller chooses, of the driver: what expandable segments are made of. */

CUresult cuMemAddressReserve(CUdeviceptr *start, size_t bytes, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
  void *made = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *start = (CUdeviceptr)made, made == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
  return munmap((void *)start, bytes) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *piece, size_t bytes, const CUmemAllocationProp *of, unsigned long long flags) {
  if (used + bytes > total) return CUDA_ERROR_OUT_OF_MEMORY;
  __atomic_add_fetch(&used, bytes, __ATOMIC_RELAXED);
  return *piece = bytes, CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle piece) {
  return __atomic_sub_fetch(&used, piece, __ATOMIC_RELAXED), CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr start, size_t bytes, size_t offset, CUmemGenericAllocationHandle piece, unsigned long long flags) {
  add((void *)start, bytes, cudaMemoryTypeDevice);
  __atomic_sub_fetch(&used, bytes, __ATOMIC_RELAXED); /* counted where it was created */
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr start, size_t bytes, const CUmemAccessDesc *access, size_t count) {
  return mprotect((void *)start, bytes, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
  __atomic_add_fetch(&used, take_out((void *)start), __ATOMIC_RELAXED);
  mmap((void *)start, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { return *value = 0, CUDA_SUCCESS; }
CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *of, CUmemAllocationGranularity_flags which) {
  return *bytes = 2 << 20, CUDA_SUCCESS;
}

static CUresult not_done(void) { return CUDA_ERROR_NOT_SUPPORTED; }

/* not_done stands for the driver's other functions, which torch must find but does not call. */
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *symbol, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *status) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = (void *)not_done;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

static cudaError_t copied(void *to, const void *from, size_t bytes) {
  if (!computes && bytes > LARGE) return cudaSuccess;
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) { return copied(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copied(to, from, bytes);
}
cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
  if (computes || bytes <= LARGE) memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset(pointer, value, bytes);
}

/* The device. */

cudaError_t cudaGetDeviceCount(int *devices) { return *devices = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device) {
  return snprintf(text, bytes, "0000:01:00.0"), cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
  memset(of, 0, sizeof *of);
  snprintf(of->name, sizeof of->name, "%s", name);
  of->totalGlobalMem = total, of->major = 8, of->minor = 9, of->multiProcessorCount = 128, of->warpSize = 32;
  of->maxThreadsPerBlock = 1024, of->maxThreadsPerMultiProcessor = 1536;
  of->sharedMemPerBlock = 49152, of->sharedMemPerBlockOptin = 101376, of->sharedMemPerMultiprocessor = 102400;
  of->regsPerBlock = of->regsPerMultiprocessor = 65536;
  of->maxGridSize[0] = 2147483647, of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  of->unifiedAddressing = of->canMapHostMemory = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : attribute == cudaDevAttrComputeCapabilityMinor ? 9 : 0;
  return cudaSuccess;
}

/* Streams and events. */

static cudaError_t made(cudaStream_t *stream) {
  static long number;
  *stream = (cudaStream_t)(__atomic_add_fetch(&number, 1, __ATOMIC_RELAXED) << 8);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return made(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return made(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *size) {
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  return function(data), cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return *event = calloc(1, sizeof(struct timespec)), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event), cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  struct timespec *start = (struct timespec *)from, *end = (struct timespec *)to;
  *milliseconds = (end->tv_sec - start->tv_sec) * 1e3f + (end->tv_nsec - start->tv_nsec) / 1e6f;
  return cudaSuccess;
}

/* Errors and kernels. */

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t error) { return "an error of the pretended GPU"; }
const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  if (error == cudaErrorLaunchFailure) return "a kernel was launched, and the pretended GPU has none";
  return cudaGetErrorName(error);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return failed(cudaErrorLaunchFailure);
}
cudaError_t __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return failed(cudaErrorLaunchFailure);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
  return failed(cudaErrorLaunchFailure);
}
