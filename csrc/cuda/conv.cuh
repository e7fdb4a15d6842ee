// Matrix products on tensor cores, C [m, n] = A [m, k] * B [k, n], for convolutions of any size: of
// C each block makes a tile, whose operands come from memory some stages ahead of their use.
//
// A stage is 64 bytes of k. An operand lies in it as it lies in memory, along k or across it, in
// segments of 16 bytes whose order is swizzled: no access meets another in a bank, neither as the
// copies arrive nor as the fragments are read.
//
// What is copied is known to a source. It says how the threads share an operand's copies, `Copies`,
// and by `stage(k)`, of the stage that begins at k, where the elements of each copy i are.
#pragma once

#include <algorithm>
#include <cstring>

#include "moments.cuh"
#include "ptx.cuh"

namespace fastgan {

constexpr int kSegmentBytes = 16;
constexpr int kStageBytes = 64;
// A product of small matrices takes 32 bytes of k.
constexpr int kStageProducts = kStageBytes / 32;
// So much of a block's shared memory there is without asking for more.
constexpr int kMostShared = 48 << 10;
constexpr int kMostStages = 4;
// The sides of a product of small matrices.
constexpr int kMmaRows = 16, kMmaColumns = 8;

template <class T>
constexpr int kStageDepth = kStageBytes / int(sizeof(T));

// Quotients of numbers from 0 to 2^31 - 1 by a multiplication (Granlund, Montgomery 1994).
struct Divisor {
  unsigned divisor, factor;
  int shift = 0;

  explicit Divisor(int d) : divisor(d) {
    while ((1u << shift) < divisor) ++shift;
    factor = unsigned((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
};

struct Quotient {
  int whole, rest;
};

__device__ __forceinline__ Quotient divide(int n, const Divisor& d) {
  const unsigned high = unsigned(uint64_t(unsigned(n)) * d.factor >> 32);
  const int whole = int((high + unsigned(n)) >> d.shift);
  return {whole, n - whole * int(d.divisor)};
}

// A tile of C, and how many warps share it.
template <int ROWS, int COLUMNS, int DOWN, int ACROSS>
struct MmaTile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS;
  static constexpr int kDown = DOWN, kAcross = ACROSS, kThreads = DOWN * ACROSS * kWarp;
  static constexpr int kWarpRows = ROWS / DOWN, kWarpColumns = COLUMNS / ACROSS;
  static constexpr int kProductRows = kWarpRows / kMmaRows;
  static constexpr int kProductColumns = kWarpColumns / kMmaColumns;
  static constexpr int kStage = (ROWS + COLUMNS) * kStageBytes;
  static constexpr int kStages =
      kMostShared / kStage < kMostStages ? kMostShared / kStage : kMostStages;
  static_assert(kProductColumns % 2 == 0, "fragments of B are read two at a time");
};

using Large = MmaTile<128, 128, 2, 4>;
using Tall = MmaTile<128, 64, 2, 2>;
using Small = MmaTile<64, 64, 2, 2>;

// How many elements of A and of B are copied at once; and whether stages are WHOLE, so that none
// crosses from one tap to the next and none ends before it is full.
template <int A, int B, bool WHOLE>
struct Widths {
  static constexpr int kA = A, kB = B;
  static constexpr bool kWhole = WHOLE;
};

// Blocks of the large tile that a multiprocessor should have registers for. For two of them, code
// for the latest GPUs lacks one or two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLargeBlocks = 1;
#else
constexpr int kLargeBlocks = 2;
#endif

// Of any tile: several passes and ragged copies take more registers.
template <class Tile, int PASSES, class Widths>
constexpr int kBlocks = PASSES == 3 || !Widths::kWhole ? 256 / Tile::kThreads
                        : Tile::kThreads > 128         ? kLargeBlocks
                                                       : 3;

// What a warp has summed: of each small product four elements a lane.
template <class Tile>
using Sums = float[Tile::kProductRows][Tile::kProductColumns][4];

// `f(j, e, element)` for each: `e` is its number in a product of the j-th column of them.
template <class Tile, class F>
__device__ __forceinline__ void each_sum(Sums<Tile>& sums, F f) {
#pragma unroll
  for (int i = 0; i < Tile::kProductRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kProductColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(j, e, sums[i][j][e]);
}

// Where a warp's part of the tile begins.
template <class Tile>
__device__ __forceinline__ int warp_row() {
  return threadIdx.x / kWarp / Tile::kAcross * Tile::kWarpRows;
}
template <class Tile>
__device__ __forceinline__ int warp_column() {
  return threadIdx.x / kWarp % Tile::kAcross * Tile::kWarpColumns;
}

// EXTENT rows of A, or columns of B, in a stage.
template <class T, int EXTENT, bool ALONG_DEPTH>
struct Operand {
  using Element = T;
  static constexpr bool kAlongDepth = ALONG_DEPTH;
  static constexpr int kLines = ALONG_DEPTH ? EXTENT : kStageDepth<T>;
  static constexpr int kLine = ALONG_DEPTH ? kStageDepth<T> : EXTENT;
  static constexpr int kSegments = kLine / kWidest<T>, kLineBytes = kSegments * kSegmentBytes;
  static constexpr int kBytes = EXTENT * kStageBytes;
  // Lines so many apart are swizzled alike.
  static constexpr int kSwizzled = 8;

  // Of a segment, in bytes.
  static __device__ __forceinline__ int place(int line, int segment) {
    if constexpr (ALONG_DEPTH)
      segment ^= line / 2 % 4;  // eight lines at one segment fall into all banks
    else if constexpr (sizeof(T) == 2)
      segment ^= line % 8;
    else
      segment ^= line % 4 * 2;  // four lines at two segments
    return line * kLineBytes + segment * kSegmentBytes;
  }

  static __device__ __forceinline__ int place_of(int line, int element) {
    return place(line, element / kWidest<T>) + element % kWidest<T> * int(sizeof(T));
  }
};

// How a block's threads share what is copied, N elements at a time: a thread has the same elements
// of every so many lines.
template <class OPERAND, int N, int THREADS>
struct Copies {
  using Operand = OPERAND;
  static constexpr int kWidth = N;
  static constexpr int kAcross = Operand::kLine / N, kDown = THREADS / kAcross;
  static constexpr int kCount = Operand::kLines / kDown;
  static_assert(kAcross * kDown == THREADS && kCount * kDown == Operand::kLines, "");
  static __device__ __forceinline__ int element() { return threadIdx.x % kAcross * N; }
  static __device__ __forceinline__ int line(int i) { return threadIdx.x / kAcross + i * kDown; }
  // Where its elements of that line go.
  static __device__ __forceinline__ int place(int i) {
    if constexpr (kDown % Operand::kSwizzled == 0)
      return Operand::place_of(line(0), element()) + i * kDown * Operand::kLineBytes;
    else
      return Operand::place_of(line(i), element());
  }
};

// N elements in memory, or as many zeros.
template <class T>
struct From {
  const T* at;
  bool real;
};

template <class Source>
__device__ __forceinline__ void fetch(char* to, const Source& source, int k) {
  using Copies = typename Source::Copies;
  using T = typename Copies::Operand::Element;
  constexpr int kBytes = Copies::kWidth * int(sizeof(T));
  const auto stage = source.stage(k);
#pragma unroll
  for (int i = 0; i < Copies::kCount; ++i) {
    const From<T> from = stage(i);
    char* const place = to + Copies::place(i);
    if constexpr (kBytes >= 4)
      copy_async<kBytes>(place, from.at, from.real);
    else
      *reinterpret_cast<T*>(place) = from.real ? *from.at : from_float<T>(0.0f);
  }
}

// The lane's share of 16 rows of A, from `row` on, and of the stage's product number `k`.
template <class A>
__device__ __forceinline__ void load_left(const char* from, int row, int k, uint32_t (&out)[4]) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (A::kAlongDepth) {
    const int place = A::place(lane % 16, 2 * k + lane / 16);
    load_matrices<false>(from + row * A::kLineBytes + place, out);
  } else if constexpr (sizeof(typename A::Element) == 2) {
    const int place = A::place(lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2);
    load_matrices<true>(from + 16 * k * A::kLineBytes + place, out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = A::place_of(lane % 4, row + i % 2 * 8 + lane / 4);
      const int line = 8 * k + i / 2 * 4;
      out[i] = *reinterpret_cast<const uint32_t*>(from + line * A::kLineBytes + place);
    }
  }
}

// Of 16 columns of B, which are two products.
template <class B>
__device__ __forceinline__ void load_right(const char* from, int column, int k,
                                           uint32_t (&out)[4]) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (B::kAlongDepth) {
    const int place = B::place(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
    load_matrices<false>(from + column * B::kLineBytes + place, out);
  } else if constexpr (sizeof(typename B::Element) == 2) {
    const int place = B::place(lane % 16, column / 8 + lane / 16);
    load_matrices<true>(from + 16 * k * B::kLineBytes + place, out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = B::place_of(lane % 4, column + i / 2 * 8 + lane / 4);
      const int line = 8 * k + i % 2 * 4;
      out[i] = *reinterpret_cast<const uint32_t*>(from + line * B::kLineBytes + place);
    }
  }
}

// float32 as TF32 and, in three passes, what is lost by that as TF32 again.
template <int PASSES>
__device__ __forceinline__ void to_tf32(uint32_t (&values)[4], uint32_t (&rests)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float value;
    memcpy(&value, &values[i], sizeof value);
    values[i] = to_tf32(value);
    if constexpr (PASSES == 3) {
      float rounded;
      memcpy(&rounded, &values[i], sizeof rounded);
      rests[i] = to_tf32(value - rounded);
    }
  }
}

template <int PASSES, class Tile, class A, class B>
__device__ __forceinline__ void multiply_stage(const char* a, const char* b, Sums<Tile>& sums) {
  using T = typename A::Element;
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kPairs = Tile::kProductColumns / 2;
#pragma unroll
  for (int k = 0; k < kStageProducts; ++k) {
    uint32_t right[kPairs][4], right_rest[kPairs][4];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      load_right<B>(b, warp_column<Tile>() + 2 * j * kMmaColumns, k, right[j]);
      if constexpr (kFloat) to_tf32<PASSES>(right[j], right_rest[j]);
    }
#pragma unroll
    for (int i = 0; i < Tile::kProductRows; ++i) {
      uint32_t left[4], left_rest[4];
      load_left<A>(a, warp_row<Tile>() + i * kMmaRows, k, left);
      if constexpr (kFloat) to_tf32<PASSES>(left, left_rest);
#pragma unroll
      for (int j = 0; j < Tile::kProductColumns; ++j) {
        const uint32_t own[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        if constexpr (PASSES == 3) {
          const uint32_t rest[2] = {right_rest[j / 2][j % 2 * 2], right_rest[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(left_rest, own, sums[i][j]);
          multiply_add<T>(left, rest, sums[i][j]);
        }
        multiply_add<T>(left, own, sums[i][j]);
      }
    }
  }
}

// Sums over k from `begin` on, of `steps` stages. Shared memory is free again when it returns.
template <int PASSES, class Tile, class SourceA, class SourceB>
__device__ __forceinline__ void multiply_tile(const SourceA& source_a, const SourceB& source_b,
                                              int begin, int steps, Sums<Tile>& sums) {
  using A = typename SourceA::Copies::Operand;
  using B = typename SourceB::Copies::Operand;
  constexpr int kStages = Tile::kStages, kDepth = kStageDepth<typename A::Element>;
  char* const shared = reinterpret_cast<char*>(fastgan_shared);
  each_sum<Tile>(sums, [](int, int, float& sum) { sum = 0.0f; });
  const auto fetch_stage = [&](int step, int stage) {
    // An empty group where there is nothing more, so that groups are counted as stages are.
    if (step < steps) {
      char* const to = shared + stage * Tile::kStage;
      fetch(to, source_a, begin + step * kDepth);
      fetch(to + A::kBytes, source_b, begin + step * kDepth);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch_stage(step, step);
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    // Of all threads' copies; and all have read the stage that is fetched next.
    __syncthreads();
    fetch_stage(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    const char* const from = shared + stage * Tile::kStage;
    multiply_stage<PASSES, Tile, A, B>(from, from + A::kBytes, sums);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  __syncthreads();
}

// C of a convolution: rows in groups that no tile crosses, columns that are runs of channels.
struct Target {
  int group_rows, group_tiles;  // rows of a group, and tiles of rows
  int columns;
  Divisor channels;
  ConvEpilogue end;
  // Statistics are of so many rows; each group has so many of them, in so many parts: the pixels
  // that a row is.
  int slot_rows, slots, parts;
};

// Rows of a tile of statistics: few where there are few, or only the smallest tile can be taken.
constexpr int kManyRows = 32768;
inline int slot_rows_of(ConvShape s, int64_t rows) {
  constexpr int kWhole = kStageDepth<__half>;
  return rows >= kManyRows && s.cl % kWhole == 0 && s.ch % kWhole == 0 ? Tall::kRows : Small::kRows;
}

template <class Tile>
Target target_of(const char* name, ConvShape s, int group_rows, int columns, int channels,
                 int parts, const ConvEpilogue& end) {
  const int slot = slot_rows_of(s, int64_t(end.groups) * group_rows);
  if (end.stats && Tile::kRows < slot)
    throw std::invalid_argument(std::string(name) + ": statistics of " + std::to_string(slot) +
                                " rows need a tile of as many, not of " +
                                std::to_string(Tile::kRows));
  return {group_rows, ceil_div(group_rows, Tile::kRows), columns, Divisor(channels), end,
          slot,       ceil_div(group_rows, slot),        parts};
}

struct TileOf {
  int row, column;
};

// Columns within eight rows of tiles, so that L2 serves both operands.
__device__ __forceinline__ TileOf tile_of(int index, int down, int across) {
  constexpr int kTogether = 8;
  const int first = index / (kTogether * across) * kTogether;
  const int rows = min(down - first, kTogether), within = index % (kTogether * across);
  return {first + within % rows, within / rows};
}

// Of a tile of rows, the first of them all, and how many its group has from there on.
struct RowsOf {
  int first, left;
};

template <class Tile>
__device__ __forceinline__ RowsOf rows_of(const Target& out, int tile) {
  const int in_group = tile % out.group_tiles * Tile::kRows;
  return {tile / out.group_tiles * out.group_rows + in_group, out.group_rows - in_group};
}

// Which rows of the small products a lane has are real: bit 2i for row lane / 4 of product i, and
// the next for the row 8 below it. `place` says where a row of the tile lies, or -1.
template <class Tile, class Place>
__device__ __forceinline__ unsigned real_rows(const Place& place) {
  unsigned real = 0;
#pragma unroll
  for (int i = 0; i < 2 * Tile::kProductRows; ++i) {
    const int row = warp_row<Tile>() + i * 8 + threadIdx.x % kWarp / 4;
    real |= unsigned(place(row) >= 0) << i;
  }
  return real;
}

// Bias and activation; and as T has it, where statistics are of that.
template <class T, class Tile>
__device__ __forceinline__ void finish_sums(Sums<Tile>& sums, const Target& out, int first) {
  if (out.end.bias.data) {
    float bias[Tile::kProductColumns][2];
#pragma unroll
    for (int j = 0; j < Tile::kProductColumns; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column =
            first + warp_column<Tile>() + j * kMmaColumns + threadIdx.x % 4 * 2 + e;
        bias[j][e] = column < out.columns
                         ? value(out.end.bias, divide(column, out.channels).rest)
                         : 0.0f;
      }
    each_sum<Tile>(sums, [&](int j, int e, float& sum) { sum += bias[j][e % 2]; });
  }
  // Asked once, and not for each element.
  const auto apply = [&](Activation kind) {
    const Act act{kind, out.end.act.negative_slope};
    each_sum<Tile>(sums, [&](int, int, float& sum) { sum = activate(act, sum); });
  };
  switch (out.end.act.kind) {
    case Activation::kRelu:
      apply(Activation::kRelu);
      break;
    case Activation::kLeakyRelu:
      apply(Activation::kLeakyRelu);
      break;
    case Activation::kTanh:
      apply(Activation::kTanh);
      break;
    default:
      break;
  }
  if (out.end.stats)
    each_sum<Tile>(sums, [](int, int, float& sum) { sum = to_float(from_float<T>(sum)); });
}

__device__ __forceinline__ float add_rows(float own) {
  // Lanes of the same columns are four apart.
#pragma unroll
  for (int lanes = 4; lanes < kWarp; lanes *= 2) own += __shfl_xor_sync(kAllLanes, own, lanes);
  return own;
}

// Bytes of shared memory that statistics take.
template <class Tile>
constexpr int kMomentsBytes = Tile::kDown * 3 * Tile::kColumns * int(sizeof(float));

// The statistics of the tile's real rows. `slot` is the first of its group's that is the tile's.
template <class Tile>
__device__ __forceinline__ void write_stats(const Sums<Tile>& sums, unsigned real,
                                            const Target& out, int group, int slot, int part,
                                            int first) {
  float* const moments = shared_floats();  // [kDown, 3, kColumns]
  const float count = add_rows(float(__popc(real)));
  const float share = count > 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
  for (int j = 0; j < Tile::kProductColumns; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0.0f, m2 = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kProductRows; ++i)
        if (real >> i & 1) sum += sums[i / 2][j][i % 2 * 2 + e];
      const float mean = add_rows(sum) * share;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kProductRows; ++i) {
        const float d = sums[i / 2][j][i % 2 * 2 + e] - mean;
        if (real >> i & 1) m2 = fmaf(d, d, m2);
      }
      m2 = add_rows(m2);
      const int column = warp_column<Tile>() + j * kMmaColumns + threadIdx.x % 4 * 2 + e;
      if (threadIdx.x % kWarp < 4)
        store_moments(moments + warp_row<Tile>() / Tile::kWarpRows * 3 * Tile::kColumns,
                      Tile::kColumns, column, {count, mean, m2});
    }
  __syncthreads();
  const int together = out.slot_rows / Tile::kWarpRows;
  for (int e = threadIdx.x; e < Tile::kRows / out.slot_rows * Tile::kColumns;
       e += Tile::kThreads) {
    const int own = e / Tile::kColumns, column = e % Tile::kColumns;
    if (slot + own >= out.slots || first + column >= out.columns) continue;
    Moments all;
    for (int i = 0; i < together; ++i)
      all = merge(all, load_moments(moments + (own * together + i) * 3 * Tile::kColumns,
                                    Tile::kColumns, column));
    const Quotient at = divide(first + column, out.channels);
    const int channels = int(out.channels.divisor);
    const int64_t tile = (int64_t(group) * out.slots + slot + own) * out.parts + part + at.whole;
    store_moments(out.end.stats + tile * 3 * channels, channels, at.rest, all);
  }
}

// Elements of a line of what a warp gathers to write, 16 rows at a time: so many that lanes of
// several rows fall into different banks.
template <class Tile>
constexpr int kGathered = Tile::kWarpColumns + 8;
template <class Tile, class T>
constexpr int kGatherBytes =
    Tile::kDown * Tile::kAcross * kMmaRows * kGathered<Tile> * int(sizeof(T));

// Writes 16 rows of a warp's part from where they were gathered.
template <class Tile, int N, class T, class Place>
__device__ __forceinline__ void write_rows(const T* own, T* to, int row, int first, int columns,
                                           const Place& place) {
  constexpr int kAcross = Tile::kWarpColumns / N;
#pragma unroll 4
  for (int e = threadIdx.x % kWarp; e < kMmaRows * kAcross; e += kWarp) {
    const int column = e % kAcross * N, at = place(row + e / kAcross);
    if (at < 0 || first + column >= columns) continue;
    store(to + at + first + column, load<N>(own + e / kAcross * kGathered<Tile> + column));
  }
}

// Writes the tile, whose first column is `first`, by way of what shared memory there is behind
// `used` bytes of it.
template <class Tile, class T, class Place>
__device__ __forceinline__ void write_tile(const Sums<Tile>& sums, T* to, int first, int columns,
                                           const Place& place, int used) {
  const int lane = threadIdx.x % kWarp, row = warp_row<Tile>();
  T* const own = reinterpret_cast<T*>(reinterpret_cast<char*>(fastgan_shared) + used) +
                 threadIdx.x / kWarp * kMmaRows * kGathered<Tile>;
  first += warp_column<Tile>();
#pragma unroll
  for (int i = 0; i < Tile::kProductRows; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kProductColumns; ++j)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const Vector<T, 2> pair{from_float<T>(sums[i][j][2 * below]),
                                from_float<T>(sums[i][j][2 * below + 1])};
        store(own + (lane / 4 + 8 * below) * kGathered<Tile> + j * kMmaColumns + lane % 4 * 2,
              pair);
      }
    __syncwarp();
    if (columns % kWidest<T> == 0)
      write_rows<Tile, kWidest<T>>(own, to, row + i * kMmaRows, first, columns, place);
    else
      write_rows<Tile, 1>(own, to, row + i * kMmaRows, first, columns, place);
  }
}

// Bytes of shared memory of a block that makes a tile and writes it as T.
template <class Tile, class T>
constexpr int kConvShared = std::max(Tile::kStages * Tile::kStage,
                                     kMomentsBytes<Tile> + kGatherBytes<Tile, T>);

// What follows the sums of fprop and dgrad; `part` is that of the statistics.
template <class T, class Tile, class Place>
__device__ __forceinline__ void finish_tile(Sums<Tile>& sums, const Target& out, int first_row,
                                            int first_column, int part, const Place& place, T* to) {
  finish_sums<T, Tile>(sums, out, first_column);
  if (out.end.stats)
    write_stats<Tile>(sums, real_rows<Tile>(place), out, first_row / out.group_rows,
                      first_row % out.group_rows / out.slot_rows, part, first_column);
  write_tile<Tile>(sums, to, first_column, out.columns, place, kMomentsBytes<Tile>);
}

// A low side of 1x1 without padding is a plain product, of which the taps are channels.
inline ConvShape as_product(ConvShape s) {
  if (s.h != 1 || s.w != 1 || s.padding || s.kernel_h != s.high_h || s.kernel_w != s.high_w)
    return s;
  return {s.n, 1, 1, s.cl, s.ch * s.kernel_h * s.kernel_w, 1, 1, 1, 1, 1, 0};
}

// Bits `first` to `last` - 1 of those of a side's taps.
__device__ __forceinline__ unsigned bits(int first, int last) {
  first = max(first, 0);
  last = min(last, kMostTaps);
  return last > first ? (1u << last) - (1u << first) : 0u;
}

// A of fprop and dgrad: each row is a window of images, k is taps and channels. A tap's place is
// `step_y` and `step_x` elements from the one before it.
template <class T, class COPIES, bool WHOLE>
struct Windows {
  using Copies = COPIES;
  const T* images;
  int depth, step_y, step_x;
  Divisor channels, taps_x;
  // Of each line: where the first element of its first tap is, and which taps read within the
  // image, as bits, those of y below those of x.
  int at[Copies::kCount];
  unsigned inside[Copies::kCount];

  __device__ __forceinline__ auto stage(int k) const {
    // Where stages are whole, this is the same for all threads.
    if (!WHOLE) k += Copies::element();
    const bool some = WHOLE || k < depth;
    if (!WHOLE) k = min(k, depth - 1);
    const Quotient tap = divide(k, channels), y = divide(tap.whole, taps_x);
    const unsigned wanted = 1u << y.whole | 1u << (kMostTaps + y.rest);
    const T* const from = images + (y.whole * step_y + y.rest * step_x + tap.rest);
    return [this, from, wanted, some](int i) {
      const int own = WHOLE ? at[i] + Copies::element() : at[i];
      return From<T>{from + own, some && (inside[i] & wanted) == wanted};
    };
  }
};

// Calls `f` with a null pointer to the type, and how many passes multiply it, as a constant.
template <class F>
void with_passes(Dtype dtype, bool tf32, F f) {
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if constexpr (sizeof(T) == 4) {
      if (!tf32) return f(null, std::integral_constant<int, 3>{});
    }
    f(null, std::integral_constant<int, 1>{});
  });
}

// Calls `f` with the tile of these sides: for operands of which 16 bytes are copied at a time, by
// whole stages. For others there is the small tile alone.
template <class F>
void with_tile(MmaSides sides, F f) {
  if (sides.columns == Large::kColumns) return f(Large{});
  if (sides.rows == Tall::kRows) return f(Tall{});
  f(Small{});
}

}  // namespace fastgan
