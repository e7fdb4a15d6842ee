// Kernels that use what real ones do, and the functions that launch them: cuda_driver_cases.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../../csrc/cuda/ptx.cuh"

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

// Tiles of a product: 32 rows of 64 bytes of each factor, three times, as two are under way.
constexpr int ROWS = 32, ROW_BYTES = 64, STAGES = 3, STAGE_BYTES = 2 * ROWS * ROW_BYTES;

// Where 16 bytes of a tile are. Moved about, those of one column in 8 rows are in different banks.
template <bool MOVED>
__device__ int place(int row, int column) {
  return row * ROW_BYTES + 16 * (MOVED ? column ^ row / 2 % 4 : column);
}

// c [m, n] = a [m, k] · b, which is [n, k] for float and [k, n] for the others; m and n are
// multiples of 16. By 4 warps, of which each makes 16 x 16 sums.
template <class T, bool MOVED>
__global__ __launch_bounds__(128) void products(const T* a, const T* b, float* c, int m, int n,
                                                int k) {
  constexpr int PIECE = 16 / sizeof(T), DEPTH = ROW_BYTES / sizeof(T);
  constexpr bool TRANSPOSED = sizeof(T) == 2;
  char* const shared = reinterpret_cast<char*>(toy_shared);
  const int first_m = blockIdx.y * 32, first_n = blockIdx.x * 32;
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;

  const auto copy = [&](int step) {
    char* const to = shared + step % STAGES * STAGE_BYTES + place<MOVED>(row, column);
    const int depth = step * DEPTH;
    const int a_row = first_m + row, a_column = depth + column * PIECE;
    fastgan::copy_async<16>(to, a + a_row * k + a_column, a_row < m && a_column < k);
    const int b_row = (TRANSPOSED ? depth : first_n) + row;
    const int b_column = (TRANSPOSED ? first_n : depth) + column * PIECE;
    const int rows = TRANSPOSED ? k : n, columns = TRANSPOSED ? n : k;
    fastgan::copy_async<16>(to + ROWS * ROW_BYTES, b + b_row * columns + b_column,
                            b_row < rows && b_column < columns);
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Of the 16 x 32 bytes that a step multiplies, lanes 0-15 say where the left half is.
  const int left_row = lane % 16, right = lane / 16;
  const int warp_m = warp / 2 * 16, warp_n = warp % 2 * 16;
  float sums[2][4] = {};
  const int steps = (k + DEPTH - 1) / DEPTH;
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) copy(step);
    fastgan::commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    fastgan::wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
    fastgan::commit_copies();
    const char* const a_tile = shared + step % STAGES * STAGE_BYTES;
    const char* const b_tile = a_tile + ROWS * ROW_BYTES;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[4], y[4];
      fastgan::load_matrices<false>(a_tile + place<MOVED>(warp_m + left_row, 2 * half + right), x);
      if constexpr (TRANSPOSED) {
        const int b_row = 16 * half + left_row, b_column = warp_n / PIECE + right;
        fastgan::load_matrices<true>(b_tile + place<MOVED>(b_row, b_column), y);
      } else {
        const int b_row = warp_n + lane / 16 * 8 + lane % 8, b_column = 2 * half + lane / 8 % 2;
        fastgan::load_matrices<false>(b_tile + place<MOVED>(b_row, b_column), y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = fastgan::to_tf32(__uint_as_float(x[i]));
          y[i] = fastgan::to_tf32(__uint_as_float(y[i]));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t part[2] = {y[2 * i], y[2 * i + 1]};
        fastgan::multiply_add<T>(x, part, sums[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int c_row = first_m + warp_m + i % 4 / 2 * 8 + lane / 4;
    const int c_column = first_n + warp_n + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (c_row < m && c_column < n) c[c_row * n + c_column] = sums[i / 4][i % 4];
  }
}

// Numbers from pieces of 4 and 8 bytes, with zeros for every third of each.
__global__ void pieces(const float* x, const float2* y, float* z) {
  const int i = threadIdx.x;
  float2* const pairs = reinterpret_cast<float2*>(toy_shared);
  float* const singles = reinterpret_cast<float*>(pairs + blockDim.x);
  fastgan::copy_async<4>(singles + i, x + i, i % 3);
  fastgan::copy_async<8>(pairs + i, y + i, (i + 1) % 3);
  fastgan::commit_copies();
  fastgan::wait_for_copies<0>();
  z[i] = singles[i] + 10 * pairs[i].x + 100 * pairs[i].y;
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

int run_products(int dtype, int moved, const void* a, const void* b, void* c, int m, int n, int k) {
  const auto run = [&](auto element, auto kernel) {
    using T = decltype(element);
    const dim3 grid((n + 31) / 32, (m + 31) / 32);
    return launch(kernel, grid, 128, STAGES * STAGE_BYTES, nullptr, (const T*)a, (const T*)b,
                  (float*)c, m, n, k);
  };
  if (dtype == 0)
    return run(float(), moved ? products<float, true> : products<float, false>);
  if (dtype == 1)
    return run(__nv_bfloat16(),
               moved ? products<__nv_bfloat16, true> : products<__nv_bfloat16, false>);
  return run(__half(), moved ? products<__half, true> : products<__half, false>);
}

int run_pieces(const void* x, const void* y, void* z, unsigned threads) {
  return launch(pieces, 1, threads, threads * 12, nullptr, (const float*)x, (const float2*)y,
                (float*)z);
}

int last_error() { return cudaGetLastError(); }

int choose_device(int device) { return cudaSetDevice(device); }

int multiprocessors() {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
  return count;
}

}
