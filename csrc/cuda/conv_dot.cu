// fprop to a low side of 1x1 with few channels: the last layer of a discriminator. With every tap
// so many more channels of the high side, high [n, k] and weight [cl, k], each element of
// low = high * weight^T is a dot product.
#include "moments.cuh"

namespace fastgan {
namespace {

constexpr int kThreads = 128;

// One block an image, whose row of the high side it reads once for all of low's few channels.
template <class T, int N>
__global__ __launch_bounds__(kThreads) void dot_fprop_kernel(const T* high, const T* weight,
                                                             PerChannel bias, Act act, T* low,
                                                             int cl, int k) {
  float sums[kMostDots] = {};
  const T* const row = high + int64_t(blockIdx.x) * k;
  for (int i = threadIdx.x * N; i < k; i += kThreads * N) {
    const Vector<T, N> highs = load<N>(row + i);
#pragma unroll
    for (int a = 0; a < kMostDots; ++a) {
      if (a >= cl) break;
      const Vector<T, N> weights = load<N>(weight + int64_t(a) * k + i);
#pragma unroll
      for (int j = 0; j < N; ++j)
        sums[a] = fmaf(to_float(highs.at[j]), to_float(weights.at[j]), sums[a]);
    }
  }
  float* const parts = shared_floats();  // [warps, kMostDots]
#pragma unroll
  for (int a = 0; a < kMostDots; ++a) {
    const float sum = sum_lanes(sums[a], 1);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp * kMostDots + a] = sum;
  }
  __syncthreads();
  const int a = threadIdx.x;
  if (a >= cl) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += parts[warp * kMostDots + a];
  low[int64_t(blockIdx.x) * cl + a] =
      from_float<T>(activate(act, sum + value_or(bias, a, 0.0f)));
}

}  // namespace

void dot_fprop(Queue queue, ConvShape s, Dtype dtype, const void* high, const void* weight,
               ConvEpilogue end, void* low) {
  const int k = s.ch * s.high_h * s.high_w;
  with_vectors(dtype, k, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "dot_fprop", dot_fprop_kernel<T, decltype(vector)::value>, dim3(s.n), kThreads,
           sizeof(float) * kMostDots * kThreads / kWarp, static_cast<const T*>(high),
           static_cast<const T*>(weight), end.bias, end.act, static_cast<T*>(low), s.cl, k);
  });
}

}  // namespace fastgan
