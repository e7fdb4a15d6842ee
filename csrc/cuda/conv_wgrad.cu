// weight [cl, taps · ch] = low^T [cl, pixels] · windows of high [pixels, taps · ch]. The sum over
// pixels is cut into parts where there are few tiles, whose shares are added up in order.
#include "conv.cuh"
#include "parts.cuh"

namespace fastgan {
namespace {

// Of the sum, what a part has at least: a part of less is mostly the writing of its share.
constexpr int kLeastDepth = 256;

// A: for each k, a pixel of low, its channels.
template <class T, class COPIES>
struct Pixels {
  using Copies = COPIES;
  const T* low;
  int column, cl, end;

  __device__ __forceinline__ auto stage(int k) const {
    const T* const from = low + int64_t(k) * cl;
    return [this, k, from](int i) {
      const int line = Copies::line(i);
      return From<T>{from + (line * cl + column), k + line < end && column < cl};
    };
  }
};

// B: for each k, a pixel of low, what some of its taps read of high.
template <class T, class COPIES>
struct Taps {
  using Copies = COPIES;
  const T* high;
  ConvShape s;
  int u, v, channel;
  bool some;
  int end;
  Divisor pixels, w;

  __device__ __forceinline__ auto stage(int k) const {
    return [this, k](int i) {
      const int pixel = k + Copies::line(i);
      const Quotient image = divide(pixel, pixels), at = divide(image.rest, w);
      const int y = at.whole * s.stride + u, x = at.rest * s.stride + v;
      const bool real = some && pixel < end && unsigned(y) < unsigned(s.high_h) &&
                        unsigned(x) < unsigned(s.high_w);
      return From<T>{high + ((image.whole * s.high_h + y) * s.high_w + x) * s.ch + channel, real};
    };
  }
};

struct Divisors {
  Divisor pixels, w, ch, kernel_w;
};

template <class T, int PASSES, class Tile, class Widths>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile, PASSES, Widths>)
    conv_wgrad_kernel(const T* low, const T* high, float* shares, T* dweight, ConvShape s, int run,
                      Divisors by) {
  using CopiesA = Copies<Operand<T, Tile::kRows, false>, Widths::kA, Tile::kThreads>;
  using CopiesB = Copies<Operand<T, Tile::kColumns, false>, Widths::kB, Tile::kThreads>;
  const int columns = s.kernel_h * s.kernel_w * s.ch, across = ceil_div(columns, Tile::kColumns);
  const TileOf tile = tile_of(blockIdx.x, gridDim.x / across, across);
  const int first_row = tile.row * Tile::kRows, first_column = tile.column * Tile::kColumns;
  const int part = blockIdx.y, begin = part * run, end = min(begin + run, s.n * s.h * s.w);

  const Pixels<T, CopiesA> pixels{low, first_row + CopiesA::element(), s.cl, end};
  const int column = first_column + CopiesB::element();
  const Quotient tap = divide(column, by.ch), at = divide(tap.whole, by.kernel_w);
  const Taps<T, CopiesB> taps{high, s, at.whole - s.padding, at.rest - s.padding, tap.rest,
                              column < columns, end, by.pixels, by.w};
  Sums<Tile> sums;
  multiply_tile<PASSES, Tile>(pixels, taps, begin, ceil_div(end - begin, kStageDepth<T>), sums);
  const auto place = [&](int row) {
    return first_row + row < s.cl ? (first_row + row) * columns : -1;
  };
  if (gridDim.y == 1)
    write_tile<Tile>(sums, dweight, first_column, columns, place, 0);
  else
    write_tile<Tile>(sums, shares + int64_t(part) * s.cl * columns, first_column, columns, place,
                     0);
}

// How many pixels each of `parts` has: whole stages of any dtype.
int run_of(int pixels, int parts) {
  constexpr int kWhole = kStageDepth<__half>;
  return ceil_div(ceil_div(pixels, parts), kWhole) * kWhole;
}

}  // namespace

int conv_wgrad_parts(ConvShape shape, MmaSides sides, int multiprocessors) {
  const ConvShape s = as_product(shape);
  const int pixels = s.n * s.h * s.w, columns = s.kernel_h * s.kernel_w * s.ch;
  const int tiles = ceil_div(s.cl, sides.rows) * ceil_div(columns, sides.columns);
  const int parts = parts_of(pixels, tiles, sides.rows, sides.columns, int64_t(s.cl) * columns,
                             multiprocessors, kLeastDepth);
  // None of them empty.
  return ceil_div(pixels, run_of(pixels, parts));
}

void conv_wgrad(Queue queue, ConvShape shape, Dtype dtype, MmaSides sides, bool tf32,
                const void* low, const void* high, int parts, float* sums, void* dweight) {
  const ConvShape s = as_product(shape);
  const int columns = s.kernel_h * s.kernel_w * s.ch;
  const Divisors by{Divisor(s.h * s.w), Divisor(s.w), Divisor(s.ch), Divisor(s.kernel_w)};
  with_passes(dtype, tf32, [&](auto* null, auto passes) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int W = kWidest<T>;
    const auto run = [&](auto tile, auto widths) {
      using Tile = decltype(tile);
      launch(queue, "conv_wgrad",
             conv_wgrad_kernel<T, decltype(passes)::value, Tile, decltype(widths)>,
             dim3(ceil_div(s.cl, Tile::kRows) * ceil_div(columns, Tile::kColumns), parts),
             Tile::kThreads, kConvShared<Tile, float>, static_cast<const T*>(low),
             static_cast<const T*>(high), sums, static_cast<T*>(dweight), s,
             run_of(s.n * s.h * s.w, parts), by);
    };
    if (s.cl % W && s.ch % W) return run(Small{}, Widths<1, 1, false>{});
    if (s.cl % W) return run(Small{}, Widths<1, W, false>{});
    if (s.ch % W) return run(Small{}, Widths<W, 1, false>{});
    with_tile(sides, [&](auto tile) { run(tile, Widths<W, W, true>{}); });
  });
  if (parts > 1) add_parts(queue, sums, parts, s.cl * columns, dtype, dweight);
}

}  // namespace fastgan
