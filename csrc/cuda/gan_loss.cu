// The adversarial loss, its gradient and the mean of D(x): one launch, a block for each group.
#include "moments.cuh"

namespace fastgan {
namespace {

constexpr int kThreads = 512;

// The sum over the block, in its first thread.
__device__ __forceinline__ float sum_block(float own, float* parts) {
  const float warp = sum_lanes(own, 1);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = warp;
  __syncthreads();
  float all = 0.0f;
  if (threadIdx.x == 0)
    for (int part = 0; part < kThreads / kWarp; ++part) all += parts[part];
  return all;
}

template <class T>
__global__ __launch_bounds__(kThreads) void bce_fwd_kernel(int size, const T* logits,
                                                           Targets targets, T* loss, T* d,
                                                           T* dlogits) {
  const int group = blockIdx.x;
  const float target = targets.of[group];
  const size_t first = size_t(group) * size;
  float losses = 0.0f, sigmoids = 0.0f;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const float l = to_float(logits[first + i]);
    const float small = expf(-fabsf(l));
    const float sigmoid = (l >= 0.0f ? 1.0f : small) / (1.0f + small);
    // Not fmaxf, which loses NaN.
    const float positive = l <= 0.0f ? 0.0f : l;
    losses += positive - l * target + log1pf(small);
    sigmoids += sigmoid;
    dlogits[first + i] = from_float<T>((sigmoid - target) / float(size));
  }
  float* const parts = shared_floats();
  const float loss_sum = sum_block(losses, parts);
  const float d_sum = sum_block(sigmoids, parts + kThreads / kWarp);
  if (threadIdx.x == 0) {
    loss[group] = from_float<T>(loss_sum / float(size));
    d[group] = from_float<T>(d_sum / float(size));
  }
}

}  // namespace

void bce_forward(Queue queue, int groups, int size, Dtype dtype, const void* logits,
                 Targets targets, void* loss, void* d, void* dlogits) {
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "bce_forward", bce_fwd_kernel<T>, dim3(groups), kThreads,
           2 * sizeof(float) * kThreads / kWarp, size, static_cast<const T*>(logits), targets,
           static_cast<T*>(loss), static_cast<T*>(d), static_cast<T*>(dlogits));
  });
}

}  // namespace fastgan
