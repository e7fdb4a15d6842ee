// Poses as the CUDA runtime to a library linked with `nvcc -cudart shared`: the library's own host
// code runs, on a machine without a GPU, and what it launches is handed to a function. One device,
// whose limits and error codes are a GPU's. What a library needs beyond this fails to load by name.
#include <cuda_runtime_api.h>

// Returns an error code. Names are mangled; there is an address for each argument.
typedef int (*Launch)(const char* name, const unsigned* grid, const unsigned* block, size_t shared,
                      void* stream, void** arguments);

enum { kKernels = 4096, kNested = 16, kDefaultShared = 48 * 1024 };

static struct Kernel {
  const void* host;
  const char* name;
  size_t shared;
} kernels[kKernels];
static int kernel_count;

static struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configurations[kNested];
static int configuration_count;

static Launch launch;
static int capability = 80, multiprocessors = 108, most_shared = 163 * 1024;
static cudaError_t last_error, injected;

static cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// For the test that drives it.

void stand_in_on_launch(Launch function) { launch = function; }

void stand_in_fail_next_launch(int error) { injected = error; }

void stand_in_device(int its_capability, int its_multiprocessors, int its_most_shared) {
  capability = its_capability;
  multiprocessors = its_multiprocessors;
  most_shared = its_most_shared;
}

// What nvcc's host code calls when the library is loaded, and around <<<>>>.

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  handle = binary;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void** handle) {}

void __cudaUnregisterFatBinary(void** handle) {}

char __cudaInitModule(void** handle) { return 1; }

void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int is_extern,
                       size_t size, int is_constant, int is_global) {}

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                            int thread_limit, void* tid, void* bid, void* block, void* grid,
                            int* warp_size) {
  if (kernel_count == kKernels) __builtin_trap();
  kernels[kernel_count++] = (struct Kernel){host, name, kDefaultShared};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  if (configuration_count == kNested) return result(cudaErrorInvalidConfiguration);
  configurations[configuration_count++] = (struct Configuration){grid, block, shared, stream};
  return cudaSuccess;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (!configuration_count) return result(cudaErrorMissingConfiguration);
  struct Configuration* last = &configurations[--configuration_count];
  *grid = last->grid;
  *block = last->block;
  *shared = last->shared;
  *(void**)stream = last->stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return cudaSuccess;
}

// Launches.

static struct Kernel* kernel_of(const void* host) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == host) return &kernels[i];
  return 0;
}

static cudaError_t checked(const struct Kernel* kernel, dim3 grid, dim3 block, size_t shared) {
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  const size_t threads = (size_t)block.x * block.y * block.z;
  const int none = !grid.x || !grid.y || !grid.z || !threads;
  if (none || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024)
    return cudaErrorInvalidConfiguration;
  return shared > kernel->shared ? cudaErrorInvalidValue : cudaSuccess;
}

static cudaError_t launched(const void* host, dim3 grid, dim3 block, void** arguments,
                            size_t shared, void* stream) {
  const struct Kernel* kernel = kernel_of(host);
  cudaError_t error = checked(kernel, grid, block, shared);
  if (error == cudaSuccess && injected != cudaSuccess) {
    error = injected;
    injected = cudaSuccess;
  }
  if (error == cudaSuccess && !launch) error = cudaErrorDevicesUnavailable;
  if (error != cudaSuccess) return result(error);
  const unsigned of_grid[3] = {grid.x, grid.y, grid.z}, of_block[3] = {block.x, block.y, block.z};
  return result(launch(kernel->name, of_grid, of_block, shared, stream, arguments));
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  return launched(host, grid, block, arguments, shared, stream);
}

cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, void* stream) {
  return launched(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  // Clusters and the like are not known here.
  if (config->numAttrs) return result(cudaErrorNotSupported);
  return launched(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                  config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* host, enum cudaFuncAttribute attribute, int value) {
  struct Kernel* kernel = kernel_of(host);
  if (!kernel) return result(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > most_shared)
    return result(cudaErrorInvalidValue);
  kernel->shared = value;
  return cudaSuccess;
}

// Devices.

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return result(device ? cudaErrorInvalidDevice : cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  if (device) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kDefaultShared;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = most_shared + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }

// Errors.

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

static const struct {
  cudaError_t error;
  const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration",
     "__global__ function call is not configured"},
    {cudaErrorDevicesUnavailable, "cudaErrorDevicesUnavailable",
     "CUDA-capable device(s) is/are busy or unavailable"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

const char* cudaGetErrorName(cudaError_t error) {
  for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); ++i)
    if (errors[i].error == error) return errors[i].name;
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); ++i)
    if (errors[i].error == error) return errors[i].text;
  return "unrecognized error code";
}
