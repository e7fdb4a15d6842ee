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

}  // namespace fastgan
