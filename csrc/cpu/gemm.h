// Products of small blocked matrices that lie in cache.
//
// A blocked matrix of R rows holds its columns in blocks of 16: block b is `rows` lines of 16
// floats. C += A·B comes in two forms, by how A is read:
//   rows: C[r] = sum over k of A[r][k] · B[k], with k along A's blocks (fprop, dgrad);
//   columns: C[r] = sum over t of A[t][r] · B[t], with t along A's lines (wgrad).
// The micro-kernel keeps an MR x NB·16 tile of C in registers and reads A by broadcasts.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace fastgan::FASTGAN_ISA {

#if FASTGAN_VECTOR_LENGTH == 16
constexpr int kRowsMR = 12, kColumnsMR = 8, kNB = 2;
#elif FASTGAN_VECTOR_LENGTH == 8
constexpr int kRowsMR = 6, kColumnsMR = 4, kNB = 1;
#else
constexpr int kRowsMR = 3, kColumnsMR = 2, kNB = 1;
#endif

template <int MR, int NB>
struct Accumulators {
  static constexpr int kVectors = NB * kVecsPerBlock;
  Vec r[MR][kVectors];

  FASTGAN_INLINE size_t offset(int j, size_t block_stride) {
    return (j / kVecsPerBlock) * block_stride + (j % kVecsPerBlock) * kVec;
  }
  inline __attribute__((always_inline)) void start() {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < kVectors; ++j) r[i][j] = Vec{};
  }
  // r[i] += a[i · kStride] · (the line of B at b)
  template <int kStride>
  inline __attribute__((always_inline)) void add_product(const float* a, const float* b,
                                                         size_t b_block) {
    Vec bv[kVectors];
    for (int j = 0; j < kVectors; ++j) bv[j] = load(b + offset(j, b_block));
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec x = broadcast(a[i * kStride]);
      for (int j = 0; j < kVectors; ++j) r[i][j] += x * bv[j];
    }
  }
  // A sum that goes on is added to whole: adding to it term by term would round at its size.
  inline __attribute__((always_inline)) void finish(float* c, size_t c_block, bool add) const {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < kVectors; ++j) {
        float* to = c + i * kBlock + offset(j, c_block);
        store(to, add ? load(to) + r[i][j] : r[i][j]);
      }
  }
};

// A[row i of MR][k] at a[i * 16 + k] in blocks a_block apart; B's lines follow one another.
template <int MR, int NB>
void rows_kernel(const float* a, size_t a_block, const float* b, size_t b_block, float* c,
                 size_t c_block, int k_blocks, bool add) {
  Accumulators<MR, NB> tile;
  tile.start();
  for (int block = 0; block < k_blocks; ++block) {
    // A's next lines are too few in a row, and too far apart, for the hardware to foresee.
    for (int i = 0; i < MR; ++i) __builtin_prefetch(a + 2 * a_block + i * kBlock);
#pragma GCC unroll 4
    for (int k = 0; k < kBlock; ++k)
      tile.template add_product<kBlock>(a + k, b + k * kBlock, b_block);
    a += a_block;
    b += kBlock * kBlock;
  }
  tile.finish(c, c_block, add);
}

// A[t][column i of MR] at a[t * a_line + i]; B's line t at b[t * b_line].
template <int MR, int NB>
void columns_kernel(const float* a, size_t a_line, const float* b, size_t b_line, size_t b_block,
                    float* c, size_t c_block, int lines, bool add) {
  Accumulators<MR, NB> tile;
  tile.start();
#pragma GCC unroll 4
  for (int t = 0; t < lines; ++t)
    tile.template add_product<1>(a + t * a_line, b + t * b_line, b_block);
  tile.finish(c, c_block, add);
}

using RowsKernel = decltype(&rows_kernel<1, 1>);
using ColumnsKernel = decltype(&columns_kernel<1, 1>);

template <int NB, int... I>
constexpr auto rows_table(std::integer_sequence<int, I...>) {
  return std::array<RowsKernel, sizeof...(I)>{&rows_kernel<I + 1, NB>...};
}
template <int NB, int... I>
constexpr auto columns_table(std::integer_sequence<int, I...>) {
  return std::array<ColumnsKernel, sizeof...(I)>{&columns_kernel<I + 1, NB>...};
}

// The kernel for `mr` in 1..MR rows and `nb` in 1..kNB blocks.
inline RowsKernel rows_kernel_for(int mr, int nb) {
  constexpr auto one = rows_table<1>(std::make_integer_sequence<int, kRowsMR>{});
  constexpr auto full = rows_table<kNB>(std::make_integer_sequence<int, kRowsMR>{});
  return nb == kNB ? full[mr - 1] : one[mr - 1];
}
inline ColumnsKernel columns_kernel_for(int mr, int nb) {
  constexpr auto one = columns_table<1>(std::make_integer_sequence<int, kColumnsMR>{});
  constexpr auto full = columns_table<kNB>(std::make_integer_sequence<int, kColumnsMR>{});
  return nb == kNB ? full[mr - 1] : one[mr - 1];
}

// Calls f(first, count) over 0..total in parts of at most `most`, as equal as they can be.
template <typename F>
inline void for_each_part(int total, int most, F f) {
  const int parts = ceil_div(total, most);
  for (int i = 0, first = 0; i < parts; ++i) {
    const int count = (total - first) / (parts - i) + ((total - first) % (parts - i) != 0);
    f(first, count);
    first += count;
  }
}

// Calls f(first, nb) for all column blocks in panels of kNB, those that are left over one by one.
template <typename F>
inline void for_each_panel(int blocks, F f) {
  int first = 0;
  for (; first + kNB <= blocks; first += kNB) f(first, kNB);
  for (; first < blocks; ++first) f(first, 1);
}

// C[rows x n_blocks·16] (+)= A[rows x k_blocks·16] · B. Blocks of A, B, C lie *_block floats apart.
inline void multiply_rows(int rows, int k_blocks, int n_blocks, const float* a, size_t a_block,
                          const float* b, size_t b_block, float* c, size_t c_block, bool add) {
  constexpr int kMost = 16;
  for (; k_blocks > kMost; k_blocks -= kMost) {
    multiply_rows(rows, kMost, n_blocks, a, a_block, b, b_block, c, c_block, add);
    a += kMost * a_block;
    b += kMost * kBlock * kBlock;
    add = true;
  }
  for_each_panel(n_blocks, [&](int n, int nb) {
    for_each_part(rows, kRowsMR, [&](int first, int count) {
      rows_kernel_for(count, nb)(a + first * kBlock, a_block, b + n * b_block, b_block,
                                 c + n * c_block + first * kBlock, c_block, k_blocks, add);
    });
  });
}

}  // namespace fastgan::FASTGAN_ISA
