// Kernels that break a rule of benchmarks/compiled_cuda.py each, and one that breaks none.
#include <cuda_bf16.h>

namespace fastgan {

struct alignas(16) Vector {
  __nv_bfloat16 at[8];
};

// Under the name of a kernel that reads two tensors and writes one, 16 bytes at a time.
template <class T, int N>
__global__ __launch_bounds__(256) void act_bwd_kernel(const Vector* dy, const Vector* y,
                                                      Vector* dx) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  const Vector a = dy[i], b = y[i];
  Vector out;
  for (int j = 0; j < N; ++j) out.at[j] = a.at[j] * b.at[j];
  dx[i] = out;
}

template <class T, int N>
__global__ __launch_bounds__(256) void bn_act_bwd_kernel(const T* dy, const T* x, T* dx) {
  for (int j = 0; j < N; ++j) {
    const int i = (blockIdx.x * 256 + threadIdx.x) * N + j;
    dx[i] = dy[i] * x[i];
  }
}

template <int ROWS, int COLUMNS, int DOWN, int ACROSS>
struct MmaTile {};
template <int A, int B, bool WHOLE>
struct Widths {};

// Under the name of a product on tensor cores, on ordinary ones.
template <class T, int PASSES, class Tile, class Widths>
__global__ __launch_bounds__(128) void conv_fprop_kernel(const T* high, const T* weight, T* low) {
  const int row = blockIdx.x, column = threadIdx.x;
  float sum = 0.0f;
  for (int k = 0; k < 64; ++k) sum += float(high[row * 64 + k]) * float(weight[column * 64 + k]);
  low[row * 128 + column] = T(sum);
}

// More values than a thread of so large a block has registers.
__global__ __launch_bounds__(1024) void spills_kernel(const float* x, float* y) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = values[95 - i] * values[(7 * i) % 96];
}

__global__ __launch_bounds__(64) void shared_kernel(float* y) {
  __shared__ float values[12 * 1024];
  values[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[63 - threadIdx.x];
}

template __global__ void act_bwd_kernel<__nv_bfloat16, 8>(const Vector*, const Vector*, Vector*);
template __global__ void bn_act_bwd_kernel<float, 4>(const float*, const float*, float*);
template __global__ void conv_fprop_kernel<__nv_bfloat16, 1, MmaTile<128, 64, 2, 2>, Widths<8, 8, true>>(
    const __nv_bfloat16*, const __nv_bfloat16*, __nv_bfloat16*);
template __global__ void conv_fprop_kernel<float, 1, MmaTile<64, 64, 2, 2>, Widths<4, 4, false>>(
    const float*, const float*, float*);
template __global__ void conv_fprop_kernel<float, 3, MmaTile<64, 64, 2, 2>, Widths<1, 4, false>>(
    const float*, const float*, float*);

}  // namespace fastgan
