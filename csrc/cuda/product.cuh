// A matrix product on the ordinary cores, C [m, n] = A [m, k] * B [k, n], of which each block makes
// a tile: for the convolutions whose sums or columns are too few for tensor cores to matter.
//
// What a block multiplies comes by two loaders, which know how A and B lie in memory, and is put
// together in shared memory, in float32. A loader has
//   bool kAlongDepth            whether elements along k are next to each other in memory
//   void prepare(k)             called by all threads, with a barrier after it, every kPrepared k
//   float operator()(i, k)      the element, i counted from the tile's first row or column
#pragma once

#include <algorithm>

#include "moments.cuh"

namespace fastgan {

// kDepth of k at a time; a thread has kThreadRows x kThreadColumns of the tile.
template <int ROWS, int COLUMNS, int THREAD_ROWS, int THREAD_COLUMNS>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS;
  static constexpr int kThreadRows = THREAD_ROWS, kThreadColumns = THREAD_COLUMNS;
  static constexpr int kThreads = (ROWS / THREAD_ROWS) * (COLUMNS / THREAD_COLUMNS);
  static constexpr int kDepth = 16;
  // Four more, so that elements along k fall into different banks.
  static constexpr int kPitchA = ROWS + 4, kPitchB = COLUMNS + 4, kPitch = COLUMNS + 4;
  static constexpr int kOperands = kDepth * (kPitchA + kPitchB), kOutput = ROWS * kPitch;
  // Floats of shared memory: for the operands, and then for the tile of C.
  static constexpr int kShared = kOperands > kOutput ? kOperands : kOutput;
};

using Square = Tile<64, 64, 8, 4>;
// For few rows.
using Flat = Tile<4, 512, 4, 4>;

// How many k a loader prepares at a time.
constexpr int kPrepared = 128;

// The tile's part of a row of `pitch` elements, or of a column of A, one after the other.
template <class T, bool ALONG_DEPTH>
struct Dense {
  static constexpr bool kAlongDepth = ALONG_DEPTH;
  const T* data;  // of the first
  int count;      // of those that there are
  int64_t pitch;  // elements from one k to the next, or from one row or column
  __device__ void prepare(int) {}
  __device__ __forceinline__ float operator()(int i, int k) const {
    if (i >= count) return 0.0f;
    return to_float(ALONG_DEPTH ? data[i * pitch + k] : data[k * pitch + i]);
  }
};

template <int COUNT, class Tile, class Loader>
__device__ __forceinline__ void fetch(float* to, const Loader& from, int k, int end) {
  constexpr int kPitch = COUNT + 4;
#pragma unroll 8
  for (int e = threadIdx.x; e < COUNT * Tile::kDepth; e += Tile::kThreads) {
    const int depth = Loader::kAlongDepth ? e % Tile::kDepth : e / COUNT;
    const int i = Loader::kAlongDepth ? e / Tile::kDepth : e % COUNT;
    to[depth * kPitch + i] = k + depth < end ? from(i, k + depth) : 0.0f;
  }
}

// Sums over k in begin..end-1, of the thread's part of the tile.
template <class Tile, class A, class B>
__device__ __forceinline__ void multiply(
    A a, B b, int begin, int end, float (&sums)[Tile::kThreadRows][Tile::kThreadColumns]) {
  constexpr int kAcross = Tile::kColumns / Tile::kThreadColumns;
  const int row = threadIdx.x / kAcross * Tile::kThreadRows;
  const int column = threadIdx.x % kAcross * Tile::kThreadColumns;
  float* const as = shared_floats();
  float* const bs = as + Tile::kDepth * Tile::kPitchA;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j) sums[i][j] = 0.0f;
  for (int k = begin; k < end; k += Tile::kDepth) {
    if ((k - begin) % kPrepared == 0) {
      a.prepare(k);
      b.prepare(k);
      __syncthreads();
    }
    fetch<Tile::kRows, Tile>(as, a, k, end);
    fetch<Tile::kColumns, Tile>(bs, b, k, end);
    __syncthreads();
#pragma unroll 4
    for (int depth = 0; depth < Tile::kDepth; ++depth) {
      Vector<float, 4> left[Tile::kThreadRows / 4], right[Tile::kThreadColumns / 4];
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows / 4; ++i)
        left[i] = load<4>(as + depth * Tile::kPitchA + row + 4 * i);
#pragma unroll
      for (int j = 0; j < Tile::kThreadColumns / 4; ++j)
        right[j] = load<4>(bs + depth * Tile::kPitchB + column + 4 * j);
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kThreadColumns; ++j)
          sums[i][j] = fmaf(left[i / 4].at[i % 4], right[j / 4].at[j % 4], sums[i][j]);
    }
    __syncthreads();
  }
}

// Puts the tile into shared memory, [kRows, kPitch], with a bias for each of the thread's columns.
template <class Tile>
__device__ __forceinline__ void gather_tile(
    const float (&sums)[Tile::kThreadRows][Tile::kThreadColumns],
    const float (&bias)[Tile::kThreadColumns]) {
  constexpr int kAcross = Tile::kColumns / Tile::kThreadColumns;
  const int row = threadIdx.x / kAcross * Tile::kThreadRows;
  const int column = threadIdx.x % kAcross * Tile::kThreadColumns;
  float* const tile = shared_floats();
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j)
      tile[(row + i) * Tile::kPitch + column + j] = sums[i][j] + bias[j];
  __syncthreads();
}

// Writes `rows` x `columns` of the tile, activated, to where `to` is its first element, and leaves
// in the tile what is written.
template <class Tile, int N, class T>
__device__ __forceinline__ void write_tile(T* to, int64_t pitch, int rows, int columns, Act act) {
  constexpr int kAcross = Tile::kColumns / N;
  float* const tile = shared_floats();
#pragma unroll 1
  for (int e = threadIdx.x; e < Tile::kRows * kAcross; e += Tile::kThreads) {
    const int row = e / kAcross, column = e % kAcross * N;
    if (row >= rows || column >= columns) continue;
    const Vector<T, N> out = activated<T, N>(act, tile + row * Tile::kPitch + column);
    store(to + row * pitch + column, out);
  }
}

// C of a convolution: rows in groups that no tile crosses, and an epilogue.
struct Output {
  int group_rows, group_tiles;  // rows of a group, and tiles of rows
  int columns;
  int channels;  // columns are runs of so many channels
  ConvEpilogue end;
};

// The tile's rows: which they are among all, and how many there are.
struct Rows {
  int tile, first, count;
};

template <class Tile>
__device__ __forceinline__ Rows rows_of(const Output& out) {
  const int tile = blockIdx.x / ceil_div(out.columns, Tile::kColumns);
  const int within = tile % out.group_tiles * Tile::kRows;
  return {tile, tile / out.group_tiles * out.group_rows + within,
          min(out.group_rows - within, Tile::kRows)};
}

template <class Tile>
__device__ __forceinline__ int first_column(const Output& out) {
  return blockIdx.x % ceil_div(out.columns, Tile::kColumns) * Tile::kColumns;
}

// Bias, activation, writing to `to` [rows, columns], and the statistics of what is written.
template <class Tile, int N, class T>
__device__ __forceinline__ void finish(
    const float (&sums)[Tile::kThreadRows][Tile::kThreadColumns], const Output& out, T* to) {
  const Rows rows = rows_of<Tile>(out);
  const int first = first_column<Tile>(out), columns = min(out.columns - first, Tile::kColumns);
  const int own = threadIdx.x % (Tile::kColumns / Tile::kThreadColumns) * Tile::kThreadColumns;
  float bias[Tile::kThreadColumns];
#pragma unroll
  for (int j = 0; j < Tile::kThreadColumns; ++j)
    bias[j] = own + j < columns
                  ? value_or(out.end.bias, (first + own + j) % out.channels, 0.0f)
                  : 0.0f;
  gather_tile<Tile>(sums, bias);
  write_tile<Tile, N>(to + int64_t(rows.first) * out.columns + first, out.columns, rows.count,
                      columns, out.end.act);
  if (!out.end.stats) return;
  __syncthreads();
  const float* const tile = shared_floats();
  const int parts = out.columns / out.channels;
  for (int column = threadIdx.x; column < columns; column += Tile::kThreads) {
    float sum = 0.0f, m2 = 0.0f;
    for (int row = 0; row < rows.count; ++row) sum += tile[row * Tile::kPitch + column];
    const float mean = sum / float(rows.count);
    for (int row = 0; row < rows.count; ++row) {
      const float d = tile[row * Tile::kPitch + column] - mean;
      m2 = fmaf(d, d, m2);
    }
    const int part = (first + column) / out.channels, channel = (first + column) % out.channels;
    store_moments(out.end.stats + (int64_t(rows.tile) * parts + part) * 3 * out.channels,
                  out.channels, channel, {float(rows.count), mean, m2});
  }
}

// Blocks for all tiles.
template <class Tile>
dim3 output_grid(const Output& out, int groups) {
  return dim3(unsigned(groups) * out.group_tiles * ceil_div(out.columns, Tile::kColumns));
}

// A weight gradient [rows, columns] or, of each part of the sum, its share in `sums`.
template <class Tile, int N, class T>
__device__ __forceinline__ void finish_part(
    const float (&sums)[Tile::kThreadRows][Tile::kThreadColumns], int rows, int columns, int part,
    int parts, float* shares, T* dweight) {
  const int across = ceil_div(columns, Tile::kColumns);
  const int row = blockIdx.x / across * Tile::kRows, column = blockIdx.x % across * Tile::kColumns;
  const float none[Tile::kThreadColumns] = {};
  const Act as_it_is{Activation::kNone, 0.0f};
  gather_tile<Tile>(sums, none);
  const int64_t at = int64_t(row) * columns + column;
  if (parts == 1)
    write_tile<Tile, N>(dweight + at, columns, rows - row, columns - column,
                        as_it_is);
  else
    write_tile<Tile, N % 4 ? 1 : 4>(shares + int64_t(part) * rows * columns + at, columns,
                                    rows - row, columns - column, as_it_is);
}

// As many parts as give each of the multiprocessors two blocks, of at least `least` of the sum; one
// where there are blocks enough.
inline int parts_of(int depth, int tiles, int multiprocessors, int least) {
  if (tiles >= multiprocessors) return 1;
  const int wanted = ceil_div(2 * multiprocessors, tiles);
  return std::max(std::min(wanted, depth / least), 1);
}

// dweight = the sum of `parts` shares of `size` elements, in order.
void add_parts(Queue, const float* shares, int parts, int size, Dtype, void* dweight);

}  // namespace fastgan
