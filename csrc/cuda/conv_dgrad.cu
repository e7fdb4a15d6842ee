// The pixels of high fall into stride² classes by their place between the strides, and each class
// meets only its own taps, which lie a stride apart. Of each class
//
//   high [pixels, ch] = windows of low [pixels, taps · cl] · weight [taps · cl, ch]
//
// so that nothing is multiplied by an inserted zero.
#include "conv.cuh"

namespace fastgan {
namespace {

// The sides of a class, of the largest of them; and its taps.
struct Classes {
  int h, w, taps_y, taps_x;
};

Classes classes_of(ConvShape s) {
  return {ceil_div(s.high_h, s.stride), ceil_div(s.high_w, s.stride),
          ceil_div(s.kernel_h, s.stride), ceil_div(s.kernel_w, s.stride)};
}

// B: for each k, a tap and a channel of low, a row of the weight.
template <class T, class COPIES, bool WHOLE>
struct TapRows {
  using Copies = COPIES;
  const T* weight;
  ConvShape s;
  int first_y, first_x;  // the class's first tap
  int column, depth;
  Divisor cl, taps_x;

  struct Row {
    int at;
    bool real;
  };

  __device__ __forceinline__ Row row(int k) const {
    const Quotient tap = divide(k, cl), at = divide(tap.whole, taps_x);
    const int u = first_y + at.whole * s.stride, v = first_x + at.rest * s.stride;
    return {((tap.rest * s.kernel_h + u) * s.kernel_w + v) * s.ch,
            (WHOLE || k < depth) && u < s.kernel_h && v < s.kernel_w};
  }

  __device__ __forceinline__ auto stage(int k) const {
    // Where stages are whole, their rows are those of one tap: the same for all threads.
    const Row first = WHOLE ? row(k) : Row{};
    return [this, k, first](int i) {
      const Row own = WHOLE ? first : row(k + Copies::line(i));
      const int line = WHOLE ? Copies::line(i) * s.kernel_h * s.kernel_w * s.ch : 0;
      return From<T>{weight + own.at + (line + column), own.real && column < s.ch};
    };
  }
};

struct Divisors {
  Divisor pixels, w, cl, taps_x;
};

// Along one side, for the class that `first` is the first tap of.
struct Side {
  int high;  // the class's first pixel
  int low;   // where that pixel's first tap reads
  int taps;
};

__device__ __forceinline__ Side side_of(int first, int kernel, const ConvShape& s) {
  const int high = (first + (s.stride - 1) * s.padding) % s.stride;
  return {high, (high + s.padding - first) / s.stride,
          (kernel - first + s.stride - 1) / s.stride};
}

template <class T, int PASSES, class Tile, class Widths>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile, PASSES, Widths>)
    conv_dgrad_kernel(const T* low, const T* weight, T* high, ConvShape s, Target out,
                      Classes classes, Divisors by) {
  using CopiesA = Copies<Operand<T, Tile::kRows, true>, Widths::kA, Tile::kThreads>;
  using CopiesB = Copies<Operand<T, Tile::kColumns, false>, Widths::kB, Tile::kThreads>;
  // The classes of the same rows are neighbours, for they read the same.
  const int count = s.stride * s.stride, class_ = blockIdx.x % count;
  const int across = ceil_div(out.columns, Tile::kColumns);
  const TileOf tile = tile_of(blockIdx.x / count, gridDim.x / count / across, across);
  const int first_column = tile.column * Tile::kColumns;
  const RowsOf rows = rows_of<Tile>(out, tile.row);
  const int depth = classes.taps_y * classes.taps_x * s.cl;
  const int tap_y = class_ / s.stride, tap_x = class_ % s.stride;
  const Side side_y = side_of(tap_y, s.kernel_h, s), side_x = side_of(tap_x, s.kernel_w, s);

  Windows<T, CopiesA, Widths::kWhole> windows{
      low, depth, -s.w * s.cl, -s.cl, by.cl, by.taps_x, {}, {}};
#pragma unroll
  for (int i = 0; i < CopiesA::kCount; ++i) {
    const int line = CopiesA::line(i);
    const Quotient image = divide(rows.first + line, by.pixels), at = divide(image.rest, by.w);
    const int y = at.whole + side_y.low, x = at.rest + side_x.low;
    windows.at[i] = ((image.whole * s.h + y) * s.w + x) * s.cl;
    // Taps read backwards.
    if (line < rows.left)
      windows.inside[i] = bits(y - s.h + 1, min(y + 1, side_y.taps)) |
                          bits(x - s.w + 1, min(x + 1, side_x.taps)) << kMostTaps;
  }
  const TapRows<T, CopiesB, Widths::kWhole> taps{
      weight, s, tap_y, tap_x, first_column + CopiesB::element(), depth, by.cl, by.taps_x};
  Sums<Tile> sums;
  multiply_tile<PASSES, Tile>(windows, taps, 0, ceil_div(depth, kStageDepth<T>), sums);
  const auto place = [&](int row) {
    const Quotient image = divide(rows.first + row, by.pixels), at = divide(image.rest, by.w);
    const int y = at.whole * s.stride + side_y.high, x = at.rest * s.stride + side_x.high;
    const bool real = row < rows.left && y < s.high_h && x < s.high_w;
    return real ? ((image.whole * s.high_h + y) * s.high_w + x) * s.ch : -1;
  };
  const int parts = out.parts / count;
  finish_tile<T, Tile>(sums, out, rows.first, first_column, class_ * parts, place, high);
}

int group_rows(ConvShape s, int groups) {
  const Classes classes = classes_of(s);
  return s.n / groups * classes.h * classes.w;
}

// Of the pixels that a row of the statistics is: a class's, and those that were made channels.
int row_parts(ConvShape shape, ConvShape s) { return s.stride * s.stride * (s.ch / shape.ch); }

}  // namespace

int conv_dgrad_stats_tiles(ConvShape shape, int groups) {
  const ConvShape s = as_product(shape);
  const int rows = group_rows(s, groups);
  return groups * ceil_div(rows, slot_rows_of(s, int64_t(groups) * rows)) * row_parts(shape, s);
}

void conv_dgrad(Queue queue, ConvShape shape, Dtype dtype, MmaSides sides, bool tf32,
                const void* low, const void* weight, ConvEpilogue end, void* high) {
  const ConvShape s = as_product(shape);
  const Classes classes = classes_of(s);
  const int rows = group_rows(s, end.groups);
  const Divisors by{Divisor(classes.h * classes.w), Divisor(classes.w), Divisor(s.cl),
                    Divisor(classes.taps_x)};
  with_passes(dtype, tf32, [&](auto* null, auto passes) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int W = kWidest<T>;
    const auto run = [&](auto tile, auto widths) {
      using Tile = decltype(tile);
      const Target out = target_of<Tile>("conv_dgrad", s, rows, s.ch, shape.ch,
                                         row_parts(shape, s), end);
      launch(queue, "conv_dgrad",
             conv_dgrad_kernel<T, decltype(passes)::value, Tile, decltype(widths)>,
             dim3(unsigned(end.groups) * out.group_tiles * ceil_div(s.ch, Tile::kColumns) *
                  s.stride * s.stride),
             Tile::kThreads, kConvShared<Tile, T>, static_cast<const T*>(low),
             static_cast<const T*>(weight), static_cast<T*>(high), s, out, classes, by);
    };
    if (s.cl % W && s.ch % W) return run(Small{}, Widths<1, 1, false>{});
    if (s.cl % W) return run(Small{}, Widths<1, W, false>{});
    if (s.ch % W) return run(Small{}, Widths<W, 1, false>{});
    if (s.cl % kStageDepth<T>) return run(Small{}, Widths<W, W, false>{});
    with_tile(sides, [&](auto tile) { run(tile, Widths<W, W, true>{}); });
  });
}

}  // namespace fastgan
