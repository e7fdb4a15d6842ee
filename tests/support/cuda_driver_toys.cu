// Kernels that use what real ones do, and the functions that launch them: cuda_driver_cases.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

extern __shared__ float4 toy_shared[];

namespace {

// Arguments of a kernel, with padding.
struct Affine {
  int64_t size;
  int period;
  float scale;
  const float* offset;
  float last[3];
};

__constant__ float table[4] = {0.5f, 1.5f, 2.5f, -1.0f};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) { return x; }
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// Functions that the compiler writes out, and division, on elements of any type.
template <class T>
__global__ void functions(const T* __restrict__ x, T* y, Affine by) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= by.size) return;
  const float v = to_float(x[i]) * by.scale + by.offset[i % by.period] + by.last[i % 3];
  const float small = expf(-fabsf(v));
  y[i] = from_float<T>(tanhf(v) + log1pf(small) + 1.0f / (1.0f + small) + sqrtf(fabsf(v)) +
                       rsqrtf(1.0f + v * v) + logf(2.0f + small) + table[i & 3]);
}

// Sums of rows of 4 * blockDim.x numbers: by 16 lanes, then of a row's parts in shared memory.
__global__ __launch_bounds__(256) void row_sums(const float4* x, float* sums) {
  const float4 v = x[size_t(blockIdx.x) * blockDim.x + threadIdx.x];
  toy_shared[threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
  __syncthreads();
  const float4 other = toy_shared[blockDim.x - 1 - threadIdx.x];
  float sum = other.x + other.y + other.z + other.w;
  for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step, 16);
  float* const parts = reinterpret_cast<float*>(toy_shared + blockDim.x);
  if (threadIdx.x % 16 == 0) parts[threadIdx.x / 16] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  float all = 0.0f;
  for (int part = 0; part < blockDim.x / 16; ++part) all += parts[part];
  sums[blockIdx.x] = all;
}

// 16 bytes of halves at a time.
struct alignas(16) Eight {
  __nv_bfloat16 at[8];
};

__global__ void halves(const Eight* x, Eight* y, __half* z) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  Eight v = x[i];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float f = __bfloat162float(v.at[k]);
    z[8 * i + k] = __float2half_rn(f);
    v.at[k] = __float2bfloat16_rn(f * 1.01f);
  }
  y[i] = v;
}

// What is rounded as IEEE 754 says.
__global__ void rounded(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float a = x[3 * i], b = x[3 * i + 1], c = x[3 * i + 2];
  float* const to = y + 8 * i;
  to[0] = fmaf(a, b, c);
  to[1] = a * b + c;
  to[2] = a / b;
  to[3] = sqrtf(fabsf(a));
  to[4] = __fadd_rd(a, c);
  to[5] = __fmul_ru(a, b);
  to[6] = __fmaf_rz(a, b, c);
  to[7] = float(fma(double(a), double(b), double(c)) - double(a) * b);
}

__global__ void integers(const int64_t* x, int64_t* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t a = x[2 * i], b = x[2 * i + 1];
  const unsigned low = unsigned(a), high = unsigned(b);
  int64_t* const to = y + 8 * i;
  to[0] = b ? a / b : 0;
  to[1] = b ? a % b : 0;
  to[2] = int64_t(__byte_perm(low, high, 0x5241)) << 1;
  to[3] = __funnelshift_l(low, high, 13) ^ __brev(low);
  to[4] = __popc(low) * 100 + __clz(int(high));
  to[5] = int(low) / 7 + int(high) % 10;
  to[6] = (low >> 5 & 0x1ff) + (int(high << 20) >> 24);
  to[7] = __mul64hi(a, b);
}

// A jump that each thread takes to a place of its own, and an array that it indexes.
__global__ void chosen(const int* x, int* y, int most) {
  const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z) +
                blockDim.x * blockDim.y * blockDim.z * (blockIdx.x + gridDim.x * blockIdx.y);
  int seen[8];
  for (int k = 0; k < 8; ++k) seen[k] = k * k + most;
  int v = x[i];
  switch (v) {
    case 0: v = most * 3; break;
    case 1: v = i / 3; break;
    case 2: y[i] = -5; return;
    case 3: v = seen[i % 8]; break;
    case 4: v = 17 - i; break;
    case 5: v = i % 5 * most; break;
    case 6: v = -i; break;
    case 7: v = i ^ most; break;
    default: break;
  }
  y[i] = v + seen[v & 7];
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream,
           Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace

extern "C" {

int run_functions(int dtype, const void* x, void* y, int64_t size, int period, float scale,
                  const float* offset) {
  const Affine by{size, period, scale, offset, {0.0f, 0.25f, -0.5f}};
  const dim3 grid((size + 127) / 128);
  if (dtype == 0)
    return launch(functions<float>, grid, 128, 0, nullptr, (const float*)x, (float*)y, by);
  if (dtype == 1)
    return launch(functions<__nv_bfloat16>, grid, 128, 0, nullptr, (const __nv_bfloat16*)x,
                  (__nv_bfloat16*)y, by);
  return launch(functions<__half>, grid, 128, 0, nullptr, (const __half*)x, (__half*)y, by);
}

int run_row_sums(const void* x, void* sums, unsigned rows, unsigned threads, size_t more_shared,
                 void* stream) {
  const size_t shared = threads * sizeof(float4) + threads / 16 * sizeof(float) + more_shared;
  return launch(row_sums, rows, threads, shared, stream, (const float4*)x, (float*)sums);
}

int allow_shared(int bytes) {
  return cudaFuncSetAttribute((const void*)row_sums, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}

int run_halves(const void* x, void* y, void* z, unsigned blocks) {
  return launch(halves, blocks, 64, 0, nullptr, (const Eight*)x, (Eight*)y, (__half*)z);
}

int run_rounded(const void* x, void* y, unsigned blocks) {
  return launch(rounded, blocks, 64, 0, nullptr, (const float*)x, (float*)y);
}

int run_integers(const void* x, void* y, unsigned blocks) {
  integers<<<blocks, 64>>>((const int64_t*)x, (int64_t*)y);
  return cudaPeekAtLastError();
}

int run_chosen(const void* x, void* y, int most, unsigned grid_x, unsigned grid_y,
               unsigned block_x, unsigned block_y, unsigned block_z) {
  return launch(chosen, dim3(grid_x, grid_y), dim3(block_x, block_y, block_z), 0, nullptr,
                (const int*)x, (int*)y, most);
}


int last_error() { return cudaGetLastError(); }

int choose_device(int device) { return cudaSetDevice(device); }

int multiprocessors() {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
  return count;
}

}
