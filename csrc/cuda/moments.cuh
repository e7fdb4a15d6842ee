// Count, mean and sum of squared deviations, merged pair by pair (Chan, Golub, LeVeque 1979): plain
// sums of squares cancel where the mean is large.
#pragma once

#include "common.cuh"

namespace fastgan {

struct Moments {
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;
};

__device__ __forceinline__ Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count;
  const float share = count > 0.0f ? b.count / count : 0.0f;
  const float d = b.mean - a.mean;
  return {count, fmaf(d, share, a.mean), a.m2 + b.m2 + d * d * a.count * share};
}

// Of the lanes of a warp that are multiples of `lanes` apart; right in the first `lanes` of them.
__device__ __forceinline__ Moments merge_lanes(Moments own, int lanes) {
  for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
    Moments other;
    other.count = __shfl_down_sync(kAllLanes, own.count, offset);
    other.mean = __shfl_down_sync(kAllLanes, own.mean, offset);
    other.m2 = __shfl_down_sync(kAllLanes, own.m2, offset);
    own = merge(own, other);
  }
  return own;
}

__device__ __forceinline__ float sum_lanes(float own, int lanes) {
  for (int offset = kWarp / 2; offset >= lanes; offset /= 2)
    own += __shfl_down_sync(kAllLanes, own, offset);
  return own;
}

// Statistics lie as [tiles, 3, channels]; `stats` is the tile's first.
__device__ __forceinline__ Moments load_moments(const float* stats, int channels, int channel) {
  return {stats[channel], stats[channels + channel], stats[2 * channels + channel]};
}

__device__ __forceinline__ void store_moments(float* stats, int channels, int channel,
                                              Moments values) {
  stats[channel] = values.count;
  stats[channels + channel] = values.mean;
  stats[2 * channels + channel] = values.m2;
}

}  // namespace fastgan
