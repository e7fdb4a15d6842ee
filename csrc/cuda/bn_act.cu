// Batch norm + activation over groups of the batch, on NHWC tensors seen as [rows, channels].
//
// Either way takes two launches. The first reduces tiles of rows; in the second every block merges
// those tiles again for its own channels, which costs less than a launch between them would, and
// then goes over its rows. A block has 32 channels, which lanes read 16 bytes at a time.
#include <algorithm>

#include "moments.cuh"

namespace fastgan {
namespace {

constexpr int kThreads = 512;
constexpr int kMostChannels = 32;
// Rows that a thread has on their way at a time, of one tensor and of two.
constexpr int kUnroll = 4, kUnrollTwo = 2;
// Rows of a thread that are worth a block, and a tile to merge.
constexpr int kLeastRows = 2;
// Tiles that a group is cut into: what each block of the second launch has to merge.
constexpr int kMostTiles = 64;
constexpr int kStatsBlocks = 1024;
// A block of the second launch that merges should have much else to do.
constexpr int kMergingBlocks = 512;
constexpr int kBlocks = 4096;

// The channels of a block, a power of two and at least one vector; in vectors, `lanes`.
struct Columns {
  int width, lanes, blocks;
};

Columns columns_of(int channels, int vector) {
  int width = vector;
  while (width < channels && width < kMostChannels) width *= 2;
  return {width, width / vector, ceil_div(channels, width)};
}

int vector_of(int channels, Dtype dtype) {
  const int widest = dtype == Dtype::kFloat32 ? kWidest<float> : kWidest<__half>;
  return channels % widest == 0 ? widest : 1;
}

// Where a thread begins: its first channel, and its place among the rows that a block has at once.
struct Place {
  int channel, row, rows;
};

template <int N>
__device__ __forceinline__ Place place(int lanes) {
  return {(int(blockIdx.y) * lanes + int(threadIdx.x) % lanes) * N, int(threadIdx.x) / lanes,
          kThreads / lanes};
}

// Per channel, of a thread's N channels.
template <int N>
struct Normal {
  float mean[N], invstd[N], scale[N], bias[N];

  __device__ void load(const float* means, const float* invstds, PerChannel weight,
                       PerChannel biases, int channel) {
    values_or(weight, channel, 1.0f, scale);
    values_or(biases, channel, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      mean[i] = means[i];
      invstd[i] = invstds[i];
      scale[i] *= invstds[i];
    }
  }
  // Before the activation: one expression for both passes, which see the same side of a kink.
  __device__ __forceinline__ float z(int i, float x) const {
    return fmaf(x - mean[i], scale[i], bias[i]);
  }
  __device__ __forceinline__ float xhat(int i, float x) const { return (x - mean[i]) * invstd[i]; }
  // dL/dz from dL/dy.
  __device__ __forceinline__ float dz(int i, float x, float dy, Act act) const {
    const float at = z(i, x);
    return dy * activation_gradient(act, act.kind == Activation::kTanh ? activate(act, at) : at);
  }
};

// Calls f(row, x) for rows of a tile, several loads ahead; f(row, x, dy) of two tensors.
template <int N, class T, class F>
__device__ __forceinline__ void for_rows(int begin, int end, int step, size_t first, int channels,
                                         const T* x, F f) {
  for (int row = begin; row < end; row += kUnroll * step) {
    Vector<T, N> xs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * step < end) xs[u] = load<N>(x + first + size_t(row + u * step) * channels);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * step < end) f(row + u * step, xs[u]);
  }
}

template <int N, class T, class F>
__device__ __forceinline__ void for_rows_of_two(int begin, int end, int step, size_t first,
                                                int channels, const T* x, const T* dy, F f) {
  for (int row = begin; row < end; row += kUnrollTwo * step) {
    Vector<T, N> xs[kUnrollTwo], dys[kUnrollTwo];
#pragma unroll
    for (int u = 0; u < kUnrollTwo; ++u)
      if (row + u * step < end) {
        const size_t at = first + size_t(row + u * step) * channels;
        xs[u] = load<N>(x + at);
        dys[u] = load<N>(dy + at);
      }
#pragma unroll
    for (int u = 0; u < kUnrollTwo; ++u)
      if (row + u * step < end) f(row + u * step, xs[u], dys[u]);
  }
}

template <class T, int N>
__global__ __launch_bounds__(kThreads) void bn_stats_kernel(const T* x, float* stats, int rows,
                                                            int tile_rows, int tiles, int channels,
                                                            int lanes) {
  const Place at = place<N>(lanes);
  const int tile = blockIdx.x, start = tile % tiles * tile_rows;
  const int end = min(start + tile_rows, rows);
  // Relative to one of the values, so that a mean is no less precise for being large.
  float count = 0.0f, pivot[N] = {}, mean[N] = {}, m2[N] = {};
  if (at.channel < channels) {
    const size_t first = size_t(tile / tiles) * rows * channels + at.channel;
    const auto pivots = load<N>(x + first + size_t(min(start, rows - 1)) * channels);
#pragma unroll
    for (int i = 0; i < N; ++i) pivot[i] = to_float(pivots.at[i]);
    for_rows<N>(start + at.row, end, at.rows, first, channels, x,
                [&](int, const Vector<T, N>& values) {
                  count += 1.0f;
                  const float share = 1.0f / count;
#pragma unroll
                  for (int i = 0; i < N; ++i) {
                    const float value = to_float(values.at[i]) - pivot[i];
                    const float d = value - mean[i];
                    mean[i] = fmaf(d, share, mean[i]);
                    m2[i] = fmaf(d, value - mean[i], m2[i]);
                  }
                });
  }
  // Of each warp, or of each row of threads where that is longer: [parts, 3, width].
  const int width = lanes * N, run = max(lanes, kWarp), part = threadIdx.x / run;
  const int lane = threadIdx.x % run;
  float* const parts = shared_floats();
  float* const pivots_at = parts + kThreads / run * 3 * width;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Moments all = merge_lanes({count, mean[i], m2[i]}, lanes);
    if (lane < lanes) store_moments(parts + part * 3 * width, width, lane * N + i, all);
    if (threadIdx.x < lanes) pivots_at[threadIdx.x * N + i] = pivot[i];
  }
  __syncthreads();
  const int channel = blockIdx.y * width + threadIdx.x;
  if (threadIdx.x < width && channel < channels) {
    Moments all;
    for (int p = 0; p < kThreads / run; ++p)
      all = merge(all, load_moments(parts + p * 3 * width, width, threadIdx.x));
    if (all.count > 0.0f) all.mean += pivots_at[threadIdx.x];
    store_moments(stats + size_t(tile) * 3 * channels, channels, channel, all);
  }
}

__global__ __launch_bounds__(kThreads) void bn_fold_kernel(const float* stats, float* out,
                                                           int tiles, int run, int folded,
                                                           int channels) {
  const int channel = blockIdx.y * kThreads + threadIdx.x;
  const int group = blockIdx.x / folded, begin = blockIdx.x % folded * run;
  if (channel >= channels) return;
  Moments all;
  for (int tile = begin; tile < min(begin + run, tiles); ++tile)
    all = merge(all, load_moments(stats + (size_t(group) * tiles + tile) * 3 * channels, channels,
                                  channel));
  store_moments(out + size_t(blockIdx.x) * 3 * channels, channels, channel, all);
}

// Merges a group's tiles for the block's channels; right in the first `width` threads.
__device__ __forceinline__ Moments merge_tiles(const float* stats, int tiles, int channels,
                                               int width) {
  const int column = threadIdx.x % width, slice = threadIdx.x / width, slices = kThreads / width;
  const int channel = blockIdx.y * width + column;
  Moments own;
  if (channel < channels)
    for (int tile = slice; tile < tiles; tile += slices)
      own = merge(own, load_moments(stats + size_t(tile) * 3 * channels, channels, channel));
  float* const parts = shared_floats();
  store_moments(parts + slice * 3 * width, width, column, own);
  __syncthreads();
  Moments all;
  if (threadIdx.x < width)
    for (int s = 0; s < slices; ++s)
      all = merge(all, load_moments(parts + s * 3 * width, width, column));
  __syncthreads();
  return all;
}

template <class T, int N, bool MERGE>
__global__ __launch_bounds__(kThreads) void bn_act_fwd_kernel(
    const T* x, const float* stats, int tiles, float eps, float* mean, float* invstd, float* var,
    PerChannel weight, PerChannel bias, Act act, T* y, int rows, int channels, int lanes) {
  const Place at = place<N>(lanes);
  const int group = blockIdx.z, width = lanes * N;
  const float* means = mean + group * channels + at.channel;
  const float* invstds = invstd + group * channels + at.channel;
  if (MERGE) {
    const Moments all =
        merge_tiles(stats + size_t(group) * tiles * 3 * channels, tiles, channels, width);
    float* const own = shared_floats();
    const int channel = blockIdx.y * width + threadIdx.x;
    if (threadIdx.x < width) {
      const float biased = all.m2 / fmaxf(all.count, 1.0f);
      own[threadIdx.x] = all.mean;
      own[width + threadIdx.x] = 1.0f / sqrtf(biased + eps);
      if (blockIdx.x == 0 && channel < channels) {
        mean[group * channels + channel] = all.mean;
        var[group * channels + channel] = biased;
        invstd[group * channels + channel] = own[width + threadIdx.x];
      }
    }
    __syncthreads();
    means = own + threadIdx.x % lanes * N;
    invstds = means + width;
  }
  if (at.channel >= channels) return;
  Normal<N> normal;
  normal.load(means, invstds, weight, bias, at.channel);
  const size_t first = size_t(group) * rows * channels + at.channel;
  for_rows<N>(blockIdx.x * at.rows + at.row, rows, gridDim.x * at.rows, first, channels, x,
              [&](int row, const Vector<T, N>& values) {
                Vector<T, N> out;
#pragma unroll
                for (int i = 0; i < N; ++i)
                  out.at[i] = from_float<T>(activate(act, normal.z(i, to_float(values.at[i]))));
                store(y + first + size_t(row) * channels, out);
              });
}

template <class T, int N>
__global__ __launch_bounds__(kThreads) void bn_act_bwd_reduce_kernel(
    const T* dy, const T* x, const float* mean, const float* invstd, PerChannel weight,
    PerChannel bias, Act act, float* sums, int rows, int tile_rows, int tiles, int channels,
    int lanes) {
  const Place at = place<N>(lanes);
  const int tile = blockIdx.x, group = tile / tiles, start = tile % tiles * tile_rows;
  const int end = min(start + tile_rows, rows);
  float dbias[N] = {}, dweight[N] = {};
  if (at.channel < channels) {
    Normal<N> normal;
    normal.load(mean + group * channels + at.channel, invstd + group * channels + at.channel,
                weight, bias, at.channel);
    const size_t first = size_t(group) * rows * channels + at.channel;
    for_rows_of_two<N>(start + at.row, end, at.rows, first, channels, x, dy,
                [&](int, const Vector<T, N>& xs, const Vector<T, N>& dys) {
#pragma unroll
                  for (int i = 0; i < N; ++i) {
                    const float value = to_float(xs.at[i]);
                    const float dz = normal.dz(i, value, to_float(dys.at[i]), act);
                    dbias[i] += dz;
                    dweight[i] = fmaf(dz, normal.xhat(i, value), dweight[i]);
                  }
                });
  }
  const int width = lanes * N, run = max(lanes, kWarp), part = threadIdx.x / run;
  const int lane = threadIdx.x % run;
  float* const parts = shared_floats();  // [parts, 2, width]
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float db = sum_lanes(dbias[i], lanes), dw = sum_lanes(dweight[i], lanes);
    if (lane < lanes) {
      parts[part * 2 * width + lane * N + i] = db;
      parts[(part * 2 + 1) * width + lane * N + i] = dw;
    }
  }
  __syncthreads();
  const int channel = blockIdx.y * width + threadIdx.x;
  if (threadIdx.x < width && channel < channels) {
    float db = 0.0f, dw = 0.0f;
    for (int p = 0; p < kThreads / run; ++p) {
      db += parts[p * 2 * width + threadIdx.x];
      dw += parts[(p * 2 + 1) * width + threadIdx.x];
    }
    sums[size_t(tile) * 2 * channels + channel] = db;
    sums[(size_t(tile) * 2 + 1) * channels + channel] = dw;
  }
}

// Adds up a group's tiles for the block's channels: dbias and dweight, right in the first `width`
// threads.
__device__ __forceinline__ float2 add_tiles(const float* sums, int tiles, int channels, int width) {
  const int column = threadIdx.x % width, slice = threadIdx.x / width, slices = kThreads / width;
  const int channel = blockIdx.y * width + column;
  float2 own = {0.0f, 0.0f};
  if (channel < channels)
    for (int tile = slice; tile < tiles; tile += slices) {
      own.x += sums[size_t(tile) * 2 * channels + channel];
      own.y += sums[(size_t(tile) * 2 + 1) * channels + channel];
    }
  float2* const parts = reinterpret_cast<float2*>(fastgan_shared);
  parts[threadIdx.x] = own;
  __syncthreads();
  float2 all = {0.0f, 0.0f};
  if (threadIdx.x < width)
    for (int s = 0; s < slices; ++s) {
      all.x += parts[s * width + column].x;
      all.y += parts[s * width + column].y;
    }
  __syncthreads();
  return all;
}

template <class T, int N>
__global__ __launch_bounds__(kThreads) void bn_act_bwd_kernel(
    const T* dy, const T* x, const float* mean, const float* invstd, PerChannel weight,
    PerChannel bias, bool training, Act act, const float* sums, int tiles, T* dx,
    PerChannel dweight, PerChannel dbias, int rows, int channels, int groups, int lanes) {
  const Place at = place<N>(lanes);
  const int group = blockIdx.z, width = lanes * N;
  const size_t size = size_t(tiles) * 2 * channels;
  float* const own = shared_floats();  // dbias and dweight of the group, over its rows: [2, width]
  if (training) {
    const float2 all = add_tiles(sums + group * size, tiles, channels, width);
    if (threadIdx.x < width) {
      own[threadIdx.x] = all.x / float(rows);
      own[width + threadIdx.x] = all.y / float(rows);
    }
    __syncthreads();
  }
  float mean_db[N] = {}, mean_dw[N] = {};
  if (training) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      mean_db[i] = own[threadIdx.x % lanes * N + i];
      mean_dw[i] = own[width + threadIdx.x % lanes * N + i];
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && group == 0) {
    float2 all = {0.0f, 0.0f};
    for (int g = 0; g < groups; ++g) {
      const float2 one = add_tiles(sums + g * size, tiles, channels, width);
      all.x += one.x;
      all.y += one.y;
    }
    const int channel = blockIdx.y * width + threadIdx.x;
    if (threadIdx.x < width && channel < channels) {
      set_value(dbias, channel, all.x);
      set_value(dweight, channel, all.y);
    }
  }
  if (at.channel >= channels) return;
  Normal<N> normal;
  normal.load(mean + group * channels + at.channel, invstd + group * channels + at.channel, weight,
              bias, at.channel);
  const size_t first = size_t(group) * rows * channels + at.channel;
  for_rows_of_two<N>(blockIdx.x * at.rows + at.row, rows, gridDim.x * at.rows, first, channels, x,
              dy,
              [&](int row, const Vector<T, N>& xs, const Vector<T, N>& dys) {
                Vector<T, N> out;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                  const float value = to_float(xs.at[i]);
                  const float dz = normal.dz(i, value, to_float(dys.at[i]), act);
                  const float centred =
                      training ? dz - mean_db[i] - normal.xhat(i, value) * mean_dw[i] : dz;
                  out.at[i] = from_float<T>(centred * normal.scale[i]);
                }
                store(dx + first + size_t(row) * channels, out);
              });
}

__global__ __launch_bounds__(kThreads) void bn_running_kernel(int groups, int channels,
                                                              const float* mean, const float* var,
                                                              float momentum, float unbiased,
                                                              PerChannel running_mean,
                                                              PerChannel running_var) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= channels) return;
  float m = value(running_mean, channel), v = value(running_var, channel);
  for (int group = 0; group < groups; ++group) {
    m = fmaf(momentum, mean[group * channels + channel] - m, m);
    v = fmaf(momentum, var[group * channels + channel] * unbiased - v, v);
  }
  set_value(running_mean, channel, m);
  set_value(running_var, channel, v);
}

// Bytes for `values` of each thread.
constexpr size_t per_thread(int values) { return sizeof(float) * kThreads * values; }

// Bytes for `values` of each channel and part of a block's threads.
size_t per_part(Columns columns, int values) {
  return sizeof(float) * kThreads / std::max(columns.lanes, kWarp) * columns.width * values;
}

// Of a block or a tile.
int least_rows(Columns columns) { return kThreads / columns.lanes * kLeastRows; }

dim3 row_grid(BatchNormShape s, Columns columns, int most_blocks) {
  const int most = std::max(most_blocks / (s.groups * columns.blocks), 1);
  return dim3(std::min(ceil_div(s.rows, least_rows(columns)), most), columns.blocks, s.groups);
}

}  // namespace

int bn_most_tiles() { return kMostTiles; }

int bn_tiles(BatchNormShape s, Dtype dtype) {
  const Columns columns = columns_of(s.channels, vector_of(s.channels, dtype));
  const int wanted = std::clamp(kStatsBlocks / (s.groups * columns.blocks), 1, kMostTiles);
  const int tile_rows = ceil_div(s.rows, std::min(wanted, ceil_div(s.rows, least_rows(columns))));
  return ceil_div(s.rows, tile_rows);
}

void bn_stats(Queue queue, BatchNormShape s, Dtype dtype, const void* x, float* stats, int tiles) {
  with_vectors(dtype, s.channels, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int N = decltype(vector)::value;
    const Columns columns = columns_of(s.channels, N);
    launch(queue, "bn_stats", bn_stats_kernel<T, N>, dim3(s.groups * tiles, columns.blocks),
           kThreads, per_part(columns, 3) + sizeof(float) * columns.width,
           static_cast<const T*>(x), stats, s.rows,
           ceil_div(s.rows, tiles), tiles, s.channels, columns.lanes);
  });
}

void bn_fold(Queue queue, BatchNormShape s, const float* stats, int tiles, float* out, int folded) {
  launch(queue, "bn_fold", bn_fold_kernel,
         dim3(s.groups * folded, ceil_div(s.channels, kThreads)), kThreads, 0, stats, out, tiles,
         ceil_div(tiles, folded), folded, s.channels);
}

void bn_act_forward(Queue queue, BatchNormShape s, Dtype dtype, const void* x, const float* stats,
                    int tiles, float eps, float* mean, float* invstd, float* var, PerChannel weight,
                    PerChannel bias, Act act, void* y) {
  with_vectors(dtype, s.channels, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int N = decltype(vector)::value;
    const Columns columns = columns_of(s.channels, N);
    const auto run = [&](auto* kernel, int blocks, size_t shared) {
      launch(queue, "bn_act_forward", kernel, row_grid(s, columns, blocks), kThreads, shared,
             static_cast<const T*>(x), stats, tiles, eps, mean, invstd, var, weight, bias, act,
             static_cast<T*>(y), s.rows, s.channels, columns.lanes);
    };
    if (stats)
      run(bn_act_fwd_kernel<T, N, true>, kMergingBlocks, per_thread(3));
    else
      run(bn_act_fwd_kernel<T, N, false>, kBlocks, 0);
  });
}

void bn_act_backward(Queue queue, BatchNormShape s, Dtype dtype, const void* dy, const void* x,
                     const float* mean, const float* invstd, PerChannel weight, PerChannel bias,
                     bool training, Act act, float* sums, void* dx, PerChannel dweight,
                     PerChannel dbias) {
  with_vectors(dtype, s.channels, [&](auto* null, auto vector) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int N = decltype(vector)::value;
    const Columns columns = columns_of(s.channels, N);
    const int tiles = bn_tiles(s, dtype);
    launch(queue, "bn_act_backward", bn_act_bwd_reduce_kernel<T, N>,
           dim3(s.groups * tiles, columns.blocks), kThreads, per_part(columns, 2),
           static_cast<const T*>(dy), static_cast<const T*>(x), mean, invstd, weight, bias, act,
           sums, s.rows, ceil_div(s.rows, tiles), tiles, s.channels, columns.lanes);
    launch(queue, "bn_act_backward", bn_act_bwd_kernel<T, N>,
           row_grid(s, columns, kMergingBlocks), kThreads, per_thread(2),
           static_cast<const T*>(dy), static_cast<const T*>(x), mean, invstd, weight, bias,
           training, act, static_cast<const float*>(sums), tiles, static_cast<T*>(dx), dweight,
           dbias, s.rows, s.channels, s.groups, columns.lanes);
  });
}

void bn_update_running(Queue queue, int groups, int channels, const float* mean, const float* var,
                       float momentum, float unbiased, PerChannel running_mean,
                       PerChannel running_var) {
  launch(queue, "bn_update_running", bn_running_kernel, dim3(ceil_div(channels, kThreads)),
         kThreads, 0, groups, channels, mean, var, momentum, unbiased, running_mean, running_var);
}

}  // namespace fastgan
