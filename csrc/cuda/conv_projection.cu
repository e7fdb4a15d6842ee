// A low side of 1x1 without padding: the first layer of a generator, the last of a discriminator.
// With every tap so many more channels of the high side, high [n, k] and weight [cl, k], it is
//
//   fprop: low = high * weight^T    dgrad: high = low * weight    wgrad: weight = low^T * high
//
// Few outputs are dot products, a block each.
#include <algorithm>

#include "product.cuh"

namespace fastgan {
namespace {

constexpr int kDotThreads = 128;
constexpr int kMostDots = 4;
// Of wgrad's sum, what a part has at least.
constexpr int kLeastDepth = 64;

// One block an image, whose row of the high side it reads once for all of low's few channels.
template <class T, int N>
__global__ __launch_bounds__(kDotThreads) void dot_fprop_kernel(const T* high, const T* weight,
                                                                PerChannel bias, Act act, T* low,
                                                                int cl, int k) {
  float sums[kMostDots] = {};
  const T* const row = high + int64_t(blockIdx.x) * k;
  for (int i = threadIdx.x * N; i < k; i += kDotThreads * N) {
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
  for (int warp = 0; warp < kDotThreads / kWarp; ++warp) sum += parts[warp * kMostDots + a];
  low[int64_t(blockIdx.x) * cl + a] =
      from_float<T>(activate(act, sum + value_or(bias, a, 0.0f)));
}

template <class T, int N>
__global__ __launch_bounds__(Square::kThreads) void projection_fprop_kernel(const T* high,
                                                                            const T* weight, T* low,
                                                                            Output out, int k) {
  const Rows rows = rows_of<Square>(out);
  const int first = first_column<Square>(out);
  float sums[Square::kThreadRows][Square::kThreadColumns];
  multiply<Square>(Dense<T, true>{high + int64_t(rows.first) * k, rows.count, k},
                   Dense<T, true>{weight + int64_t(first) * k, out.columns - first, k}, 0, k, sums);
  finish<Square, N>(sums, out, low);
}

template <class T, int N>
__global__ __launch_bounds__(Square::kThreads, 1) void projection_dgrad_kernel(const T* low,
                                                                            const T* weight,
                                                                            T* high, Output out,
                                                                            int cl) {
  const Rows rows = rows_of<Square>(out);
  const int first = first_column<Square>(out);
  float sums[Square::kThreadRows][Square::kThreadColumns];
  multiply<Square>(Dense<T, true>{low + int64_t(rows.first) * cl, rows.count, cl},
                   Dense<T, false>{weight + first, out.columns - first, out.columns}, 0, cl, sums);
  finish<Square, N>(sums, out, high);
}

template <class Tile, class T, int N>
__global__ __launch_bounds__(Tile::kThreads) void projection_wgrad_kernel(
    const T* low, const T* high, float* shares, T* dweight, int n, int cl, int k, int parts) {
  const int across = ceil_div(k, Tile::kColumns), part = blockIdx.y;
  const int row = blockIdx.x / across * Tile::kRows, column = blockIdx.x % across * Tile::kColumns;
  const int run = ceil_div(n, parts), begin = part * run;
  float sums[Tile::kThreadRows][Tile::kThreadColumns];
  multiply<Tile>(Dense<T, false>{low + row, cl - row, cl},
                 Dense<T, false>{high + column, k - column, k}, begin, min(begin + run, n), sums);
  finish_part<Tile, N>(sums, cl, k, part, parts, shares, dweight);
}

int depth_of(ConvShape s) { return s.ch * s.high_h * s.high_w; }

Output output(ConvShape s, int columns, int channels, const ConvEpilogue& end) {
  const int rows = s.n / end.groups;
  return {rows, ceil_div(rows, Square::kRows), columns, channels, end};
}

template <class Tile>
int tiles_of(ConvShape s) {
  return ceil_div(s.cl, Tile::kRows) * ceil_div(depth_of(s), Tile::kColumns);
}

bool flat(ConvShape s) { return s.cl <= Flat::kRows; }

}  // namespace

int projection_fprop_stats_tiles(ConvShape s, int groups) {
  return s.cl <= kMostDots ? 0 : groups * ceil_div(s.n / groups, Square::kRows);
}

int projection_dgrad_stats_tiles(ConvShape s, int groups) {
  return groups * ceil_div(s.n / groups, Square::kRows) * s.high_h * s.high_w;
}

int projection_wgrad_parts(ConvShape s, int multiprocessors) {
  const int tiles = flat(s) ? tiles_of<Flat>(s) : tiles_of<Square>(s);
  return parts_of(s.n, tiles, multiprocessors, kLeastDepth);
}

void projection_fprop(Queue queue, ConvShape s, Dtype dtype, const void* high, const void* weight,
                      ConvEpilogue end, void* low) {
  const int k = depth_of(s);
  if (s.cl <= kMostDots)
    return with_vectors(dtype, k, [&](auto* null, auto vector) {
      using T = std::remove_pointer_t<decltype(null)>;
      launch(queue, "projection_fprop", dot_fprop_kernel<T, decltype(vector)::value>, dim3(s.n),
             kDotThreads, sizeof(float) * kMostDots * kDotThreads / kWarp,
             static_cast<const T*>(high), static_cast<const T*>(weight), end.bias, end.act,
             static_cast<T*>(low), s.cl, k);
    });
  const Output out = output(s, s.cl, s.cl, end);
  with_vectors(dtype, s.cl, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "projection_fprop", projection_fprop_kernel<T, decltype(vector)::value>,
           output_grid<Square>(out, end.groups), Square::kThreads, sizeof(float) * Square::kShared,
           static_cast<const T*>(high), static_cast<const T*>(weight), static_cast<T*>(low), out,
           k);
  });
}

void projection_dgrad(Queue queue, ConvShape s, Dtype dtype, const void* low, const void* weight,
                      ConvEpilogue end, void* high) {
  const int k = depth_of(s);
  const Output out = output(s, k, s.ch, end);
  with_vectors(dtype, k, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "projection_dgrad", projection_dgrad_kernel<T, decltype(vector)::value>,
           output_grid<Square>(out, end.groups), Square::kThreads, sizeof(float) * Square::kShared,
           static_cast<const T*>(low), static_cast<const T*>(weight), static_cast<T*>(high), out,
           s.cl);
  });
}

void projection_wgrad(Queue queue, ConvShape s, Dtype dtype, const void* low, const void* high,
                      int parts, float* sums, void* dweight) {
  const int k = depth_of(s);
  with_vectors(dtype, k, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int N = decltype(vector)::value;
    const auto run = [&](auto* kernel, int tiles, int threads, int shared) {
      launch(queue, "projection_wgrad", kernel, dim3(tiles, parts), threads,
             sizeof(float) * shared, static_cast<const T*>(low), static_cast<const T*>(high), sums,
             static_cast<T*>(dweight), s.n, s.cl, k, parts);
    };
    if (flat(s))
      run(projection_wgrad_kernel<Flat, T, N>, tiles_of<Flat>(s), Flat::kThreads, Flat::kShared);
    else
      run(projection_wgrad_kernel<Square, T, N>, tiles_of<Square>(s), Square::kThreads,
          Square::kShared);
  });
  if (parts > 1) add_parts(queue, sums, parts, s.cl * k, dtype, dweight);
}

}  // namespace fastgan
