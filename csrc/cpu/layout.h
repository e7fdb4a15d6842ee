// Memory layouts that the convolutions share, and the statistics of an output tile.
#pragma once

#include <omp.h>

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace fastgan::FASTGAN_ISA {

// A weight as the transforms read it: 16 neighbouring columns of a line at a time. Lines are the
// channels of the side that is summed over, columns those of the other.
struct WeightLines {
  const float* data;
  ptrdiff_t kh, kw, line, block;

  const float* at(int line_index, int column_block) const {
    return data + line_index * line + column_block * block;
  }
};

// The weight in place, where its columns lie side by side in whole blocks and so do its lines; else
// a copy packed[tap][column block][line][16], padded with zeros. Called by every thread of a team.
inline WeightLines weight_lines(const ConvWeight& w, int cl, int ch, bool high_lines,
                                float* packed) {
  const int lines = high_lines ? ch : cl, columns = high_lines ? cl : ch;
  const ptrdiff_t line_stride = high_lines ? w.stride_ch : w.stride_cl;
  const ptrdiff_t column_stride = high_lines ? w.stride_cl : w.stride_ch;
  if (column_stride == 1 && lines % kBlock == 0 && columns % kBlock == 0)
    return {w.data, w.stride_kh, w.stride_kw, line_stride, kBlock};
  const int line_blocks = ceil_div(lines, kBlock), column_blocks = ceil_div(columns, kBlock);
  const ptrdiff_t block_stride = ptrdiff_t(line_blocks) * kBlock * kBlock;
  const ptrdiff_t tap_stride = block_stride * column_blocks;
#pragma omp for collapse(2) schedule(static)
  for (int n = 0; n < column_blocks; ++n)
    for (int k = 0; k < line_blocks; ++k) {
      const int block_lines = std::min(kBlock, lines - k * kBlock);
      const int block_columns = std::min(kBlock, columns - n * kBlock);
      for (int tap = 0; tap < 16; ++tap) {
        const float* in = w.data + tap / 4 * w.stride_kh + tap % 4 * w.stride_kw +
                          k * kBlock * line_stride + n * kBlock * column_stride;
        float* out = packed + tap * tap_stride + n * block_stride + k * kBlock * kBlock;
        if (block_lines < kBlock || block_columns < kBlock) std::fill_n(out, kBlock * kBlock, 0.0f);
        for (int i = 0; i < block_lines; ++i)
          for (int j = 0; j < block_columns; ++j)
            out[i * kBlock + j] = in[i * line_stride + j * column_stride];
      }
    }
  return {packed, 4 * tap_stride, tap_stride, kBlock, block_stride};
}

FASTGAN_INLINE void widen(Vec x, DoubleVec& out) { out = __builtin_convertvector(x, DoubleVec); }
FASTGAN_INLINE Vec narrow(const DoubleVec& x) { return __builtin_convertvector(x, Vec); }

// A sum of vectors: in float32 over a few terms, those sums in double.
struct Sum {
  static constexpr int kTerms = 16;
  Vec few{};
  DoubleVec total{};

  inline __attribute__((always_inline)) void add(Vec x) { few += x; }
  // To be called after at most kTerms calls of add, and before `total` is read.
  void fold() {
    DoubleVec wide;
    widen(few, wide);
    total += wide;
    few = Vec{};
  }
};

// Count, mean and M2 of what is added, a vector of channels at a time. Sums are taken about the mean
// of the first few values: about zero they would cancel where the mean is large (mean 1e3,
// deviation 1e-2).
class ChannelStats {
 public:
  inline __attribute__((always_inline)) void add(Vec y) {
    if (count_ == 0) shift_ = y;
    const Vec d = y - shift_;
    sum_.add(d);
    squares_.add(d * d);
    if (++count_ % Sum::kTerms == 0 || count_ == kFirst) fold();
  }
  // To out[0], out[stride], out[2 * stride] for `channels` channels.
  void write(float* out, size_t stride, int channels) {
    fold();
    DoubleVec shift;
    widen(shift_, shift);
    const DoubleVec mean = sum_.total / double(count_);
    store_first(out, broadcast(float(count_)), channels);
    store_first(out + stride, narrow(shift + mean), channels);
    store_first(out + 2 * stride, narrow(squares_.total - sum_.total * mean), channels);
  }

 private:
  static constexpr int kFirst = 4;

  void fold() {
    sum_.fold();
    squares_.fold();
    if (count_ == kFirst) {
      DoubleVec before, after;
      widen(shift_, before);
      shift_ = narrow(before + sum_.total / double(count_));
      widen(shift_, after);
      const DoubleVec step = after - before;
      squares_.total += step * (count_ * step - 2.0 * sum_.total);
      sum_.total -= count_ * step;
    }
  }

  int count_ = 0;
  Vec shift_{};
  Sum sum_, squares_;
};

}  // namespace fastgan::FASTGAN_ISA
