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

// Of a logit: the loss, its gradient, and what d is the mean of. NaN stays NaN.
struct Loss {
  float loss, gradient, score;
};

__device__ __forceinline__ Loss bce(float l, float target) {
  const float small = expf(-fabsf(l));
  const float sigmoid = (l >= 0.0f ? 1.0f : small) / (1.0f + small);
  // Not fmaxf, which loses NaN.
  const float positive = l <= 0.0f ? 0.0f : l;
  return {positive - l * target + log1pf(small), sigmoid - target, sigmoid};
}

__device__ __forceinline__ Loss loss_of(GanLoss kind, float l, float target) {
  const float sign = 2.0f * target - 1.0f, margin = 1.0f - sign * l;
  switch (kind) {
    case GanLoss::kLsgan:
      return {0.5f * (l - target) * (l - target), l - target, l};
    case GanLoss::kHinge:
      return {margin <= 0.0f ? 0.0f : margin, margin <= 0.0f ? 0.0f : -sign, l};
    case GanLoss::kWasserstein:
      return {-sign * l, -sign, l};
    default:
      return bce(l, target);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void gan_loss_fwd_kernel(int size, const T* logits,
                                                                Targets targets, GanLoss kind,
                                                                T* loss, T* d, T* dlogits) {
  const int group = blockIdx.x;
  const float target = targets.of[group];
  const size_t first = size_t(group) * size;
  float losses = 0.0f, scores = 0.0f;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const Loss one = loss_of(kind, to_float(logits[first + i]), target);
    losses += one.loss;
    scores += one.score;
    dlogits[first + i] = from_float<T>(one.gradient / float(size));
  }
  float* const parts = shared_floats();
  const float loss_sum = sum_block(losses, parts);
  const float d_sum = sum_block(scores, parts + kThreads / kWarp);
  if (threadIdx.x == 0) {
    loss[group] = from_float<T>(loss_sum / float(size));
    d[group] = from_float<T>(d_sum / float(size));
  }
}

}  // namespace

void gan_loss_forward(Queue queue, int groups, int size, Dtype dtype, const void* logits,
                      Targets targets, GanLoss kind, void* loss, void* d, void* dlogits) {
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "gan_loss_forward", gan_loss_fwd_kernel<T>, dim3(groups), kThreads,
           2 * sizeof(float) * kThreads / kWarp, size, static_cast<const T*>(logits), targets, kind,
           static_cast<T*>(loss), static_cast<T*>(d), static_cast<T*>(dlogits));
  });
}

}  // namespace fastgan
