// dgrad of 4x4 with stride 2 and padding 1 where the high side has 1 to 4 channels, the image's end
// of a generator: too few columns for a product. A thread makes the 4x4 pixels of the high side
// that belong to 2x2 of the low side, which share 4x4 of their neighbourhood.
#include <algorithm>
#include <numeric>

#include "moments.cuh"

namespace fastgan {
namespace {

constexpr int kTaps = 16;
// A block makes 32x32 pixels of the high side from 16x16 of the low side and one more around them,
// 16 channels of it at a time.
constexpr int kSide = 16;
constexpr int kHalo = kSide + 2;
constexpr int kThreadSide = kSide / 2;
constexpr int kThreads = kThreadSide * kThreadSide;
constexpr int kDepth = 16;
// So that the two rows that half a warp reads, and a channel's vectors as they are written, fall
// into different banks.
constexpr int kPitch = 24, kPlane = kHalo * kPitch + 2;
constexpr int kHighSide = 2 * kSide;

// Elements of a pixel of the weight in shared memory, which are read at once.
template <int CH>
constexpr int kPadded = CH == 3 ? 4 : CH;

template <int CH>
constexpr int kShared =
    std::max(kDepth * (kPlane + kTaps * kPadded<CH>), kHighSide * kHighSide * CH);

template <class T, int CH, int N>
__global__ __launch_bounds__(kThreads, 1) void thin_dgrad_kernel(const T* low, const T* weight,
                                                                 T* high, ConvShape s,
                                                                 ConvEpilogue end, int tiles_y,
                                                                 int tiles_x) {
  const int image = blockIdx.x / (tiles_y * tiles_x);
  const int i0 = blockIdx.x / tiles_x % tiles_y * kSide, j0 = blockIdx.x % tiles_x * kSide;
  const int ty = threadIdx.x / kThreadSide * 2, tx = threadIdx.x % kThreadSide * 2;
  float* const lows = shared_floats();
  float* const weights = lows + kDepth * kPlane;
  constexpr int kPad = kPadded<CH>;
  // [row of the low side, column, class of pixels: 2 · row + column, channel]
  float sums[2][2][4][CH] = {};
  for (int first = 0; first < s.cl; first += kDepth) {
    constexpr int kVectors = kDepth / N;
    for (int e = threadIdx.x; e < kHalo * kHalo * kVectors; e += kThreads) {
      const int a = e % kVectors * N, x = e / kVectors % kHalo, y = e / kVectors / kHalo;
      const int i = i0 + y - 1, j = j0 + x - 1;
      const bool inside = unsigned(i) < unsigned(s.h) && unsigned(j) < unsigned(s.w);
      Vector<T, N> values{};
      if (inside && first + a < s.cl)
        values = load<N>(low + ((int64_t(image) * s.h + i) * s.w + j) * s.cl + first + a);
#pragma unroll
      for (int v = 0; v < N; ++v)
        lows[(a + v) * kPlane + y * kPitch + x] = to_float(values.at[v]);
    }
    for (int e = threadIdx.x; e < kDepth * kTaps * CH; e += kThreads) {
      const int a = e / (kTaps * CH);
      weights[e / CH * kPad + e % CH] =
          first + a < s.cl ? to_float(weight[int64_t(first) * kTaps * CH + e]) : 0.0f;
    }
    __syncthreads();
    for (int a = 0; a < kDepth; ++a) {
      float near[4][4];
#pragma unroll
      for (int y = 0; y < 4; ++y)
#pragma unroll
        for (int x = 0; x < 4; x += 2) {
          const auto pair = load<2>(lows + a * kPlane + (ty + y) * kPitch + tx + x);
          near[y][x] = pair.at[0];
          near[y][x + 1] = pair.at[1];
        }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int u = tap / 4, v = tap % 4;
        const auto w = load<kPad>(weights + (a * kTaps + tap) * kPad);
        // Row 2i + r of the high side meets tap u at row i + (r + 1 - u) / 2 of the low side.
        const int class_ = (u + 1) % 2 * 2 + (v + 1) % 2, y = (4 - u) / 2, x = (4 - v) / 2;
#pragma unroll
        for (int py = 0; py < 2; ++py)
#pragma unroll
          for (int px = 0; px < 2; ++px)
#pragma unroll
            for (int b = 0; b < CH; ++b)
              sums[py][px][class_][b] =
                  fmaf(near[py + y][px + x], w.at[b], sums[py][px][class_][b]);
      }
    }
    __syncthreads();
  }

  // [kHighSide, kHighSide, CH]
  float* const tile = shared_floats();
  const int height = min(s.high_h - 2 * i0, kHighSide), width = min(s.high_w - 2 * j0, kHighSide);
  float bias[CH];
#pragma unroll
  for (int b = 0; b < CH; ++b) bias[b] = value_or(end.bias, b, 0.0f);
#pragma unroll
  for (int pixel = 0; pixel < 16; ++pixel) {
    const int y = pixel / 4, x = pixel % 4;
#pragma unroll
    for (int b = 0; b < CH; ++b)
      tile[((2 * ty + y) * kHighSide + 2 * tx + x) * CH + b] =
          sums[y / 2][x / 2][y % 2 * 2 + x % 2][b] + bias[b];
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x * N; e < kHighSide * kHighSide * CH; e += kThreads * N) {
    const int y = e / (kHighSide * CH), x = e % (kHighSide * CH);
    if (y >= height || x >= width * CH) continue;
    const Vector<T, N> out = activated<T, N>(end.act, tile + e);
    store(high + ((int64_t(image) * s.high_h + 2 * i0 + y) * s.high_w + 2 * j0) * CH + x, out);
  }
  if (!end.stats) return;
  __syncthreads();
  const int count = height * width;
#pragma unroll
  for (int b = 0; b < CH; ++b) {
    float* const parts = tile + kHighSide * kHighSide * CH;
    Moments own;
    for (int p = threadIdx.x; p < count; p += kThreads) {
      const float value = tile[(p / width * kHighSide + p % width) * CH + b];
      own = merge(own, {1.0f, value, 0.0f});
    }
    own = merge_lanes(own, 1);
    if (threadIdx.x % kWarp == 0)
      store_moments(parts, kThreads / kWarp, threadIdx.x / kWarp, own);
    __syncthreads();
    if (threadIdx.x == 0) {
      Moments all;
      for (int warp = 0; warp < kThreads / kWarp; ++warp)
        all = merge(all, load_moments(parts, kThreads / kWarp, warp));
      store_moments(end.stats + int64_t(blockIdx.x) * 3 * CH, CH, b, all);
    }
    __syncthreads();
  }
}

// Calls `f` with the channels of the high side as a constant.
template <class F>
void with_channels(int ch, F f) {
  switch (ch) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

}  // namespace

int thin_dgrad_stats_tiles(ConvShape s, int) {
  return s.n * ceil_div(s.h, kSide) * ceil_div(s.w, kSide);
}

void thin_dgrad(Queue queue, ConvShape s, Dtype dtype, const void* low, const void* weight,
                ConvEpilogue end, void* high) {
  const int tiles_y = ceil_div(s.h, kSide), tiles_x = ceil_div(s.w, kSide);
  // Both the channels that are read and the rows that are written.
  with_vectors(dtype, std::gcd(s.cl, s.high_w * s.ch), [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int N = decltype(vector)::value;
    with_channels(s.ch, [&](auto channels) {
      constexpr int CH = decltype(channels)::value;
      launch(queue, "thin_dgrad", thin_dgrad_kernel<T, CH, N>, dim3(s.n * tiles_y * tiles_x),
             kThreads, sizeof(float) * (kShared<CH> + 3 * kThreads / kWarp),
             static_cast<const T*>(low), static_cast<const T*>(weight), static_cast<T*>(high), s,
             end, tiles_y, tiles_x);
    });
  });
}

}  // namespace fastgan
