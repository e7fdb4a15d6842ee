// low [pixels, cl] = windows of high [pixels, taps · ch] · weight^T [taps · ch, cl].
#include "conv.cuh"

namespace fastgan {
namespace {

// B: a row of the weight for each column, along k.
template <class T, class COPIES, bool WHOLE>
struct Rows {
  using Copies = COPIES;
  const T* weight;
  int first, count, depth;

  __device__ __forceinline__ auto stage(int k) const {
    const bool some = WHOLE || k + Copies::element() < depth;
    return [this, k, some](int i) {
      const int row = first + Copies::line(i);
      const int own = Copies::line(i) * depth + Copies::element();
      return From<T>{weight + (int64_t(first) * depth + k) + own, some && row < count};
    };
  }
};

struct Divisors {
  Divisor pixels, w, ch, kernel_w;
};

template <class T, int PASSES, class Tile, class Widths>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile, PASSES, Widths>)
    conv_fprop_kernel(const T* high, const T* weight, T* low, ConvShape s, Target out,
                      Divisors by) {
  using CopiesA = Copies<Operand<T, Tile::kRows, true>, Widths::kA, Tile::kThreads>;
  using CopiesB = Copies<Operand<T, Tile::kColumns, true>, Widths::kB, Tile::kThreads>;
  const int across = ceil_div(out.columns, Tile::kColumns);
  const TileOf tile = tile_of(blockIdx.x, gridDim.x / across, across);
  const int first_column = tile.column * Tile::kColumns;
  const RowsOf rows = rows_of<Tile>(out, tile.row);
  const int depth = s.kernel_h * s.kernel_w * s.ch;

  Windows<T, CopiesA, Widths::kWhole> windows{
      high, depth, s.high_w * s.ch, s.ch, by.ch, by.kernel_w, {}, {}};
#pragma unroll
  for (int i = 0; i < CopiesA::kCount; ++i) {
    const int line = CopiesA::line(i);
    const Quotient image = divide(rows.first + line, by.pixels), at = divide(image.rest, by.w);
    const int y = at.whole * s.stride - s.padding, x = at.rest * s.stride - s.padding;
    windows.at[i] = ((image.whole * s.high_h + y) * s.high_w + x) * s.ch;
    if (line < rows.left)
      windows.inside[i] = bits(-y, s.high_h - y) | bits(-x, s.high_w - x) << kMostTaps;
  }
  const Rows<T, CopiesB, Widths::kWhole> weights{weight, first_column, s.cl, depth};
  Sums<Tile> sums;
  multiply_tile<PASSES, Tile>(windows, weights, 0, ceil_div(depth, kStageDepth<T>), sums);
  const auto place = [&](int row) { return row < rows.left ? (rows.first + row) * s.cl : -1; };
  finish_tile<T, Tile>(sums, out, rows.first, first_column, 0, place, low);
}

}  // namespace

int conv_fprop_stats_tiles(ConvShape shape, int groups) {
  const ConvShape s = as_product(shape);
  const int rows = s.n / groups * s.h * s.w;
  return groups * ceil_div(rows, slot_rows_of(s, int64_t(groups) * rows));
}

void conv_fprop(Queue queue, ConvShape shape, Dtype dtype, MmaSides sides, bool tf32,
                const void* high, const void* weight, ConvEpilogue end, void* low) {
  const ConvShape s = as_product(shape);
  const int rows = s.n / end.groups * s.h * s.w, depth = s.kernel_h * s.kernel_w * s.ch;
  const Divisors by{Divisor(s.h * s.w), Divisor(s.w), Divisor(s.ch), Divisor(s.kernel_w)};
  with_passes(dtype, tf32, [&](auto* null, auto passes) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int W = kWidest<T>;
    const auto run = [&](auto tile, auto widths) {
      using Tile = decltype(tile);
      const Target out = target_of<Tile>("conv_fprop", s, rows, s.cl, s.cl, 1, end);
      launch(queue, "conv_fprop",
             conv_fprop_kernel<T, decltype(passes)::value, Tile, decltype(widths)>,
             dim3(unsigned(end.groups) * out.group_tiles * ceil_div(s.cl, Tile::kColumns)),
             Tile::kThreads, kConvShared<Tile, T>, static_cast<const T*>(high),
             static_cast<const T*>(weight), static_cast<T*>(low), s, out, by);
    };
    // Of the weight's rows, and of a tap's channels, which are the images' and k's.
    if (depth % W) return run(Small{}, Widths<1, 1, false>{});
    if (s.ch % W) return run(Small{}, Widths<1, W, false>{});
    if (s.ch % kStageDepth<T>) return run(Small{}, Widths<W, W, false>{});
    with_tile(sides, [&](auto tile) { run(tile, Widths<W, W, true>{}); });
  });
}

}  // namespace fastgan
