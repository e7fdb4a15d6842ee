// Sums that are cut into parts, so that all of a device is busy, each part with a share of its own.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace fastgan {

// Into how many parts to cut sums of `depth` products for `tiles` of rows x columns, of `size`
// results in all, each part of at least `least` products: as many as take the shortest, by the FLOP
// of the busiest of the multiprocessors and the bytes of the shares, which are written and read.
inline int parts_of(int depth, int tiles, int rows, int columns, int64_t size, int multiprocessors,
                    int least) {
  // FLOP for each byte, which a GPU with tensor cores does in the time that it moves one.
  constexpr int64_t kIntensity = 160;
  const int most = std::min(ceil_div(4 * multiprocessors, tiles), depth / least);
  int best = 1;
  int64_t shortest = INT64_MAX;
  for (int parts = 1; parts <= std::max(most, 1); ++parts) {
    const int64_t turns = ceil_div(int64_t(tiles) * parts, int64_t(multiprocessors));
    const int64_t flop = 2 * turns * multiprocessors * rows * columns * ceil_div(depth, parts);
    const int64_t shares = parts > 1 ? kIntensity * 2 * int64_t(sizeof(float)) * parts * size : 0;
    if (flop + shares >= shortest) continue;
    shortest = flop + shares;
    best = parts;
  }
  return best;
}

// dweight = the sum of `parts` shares of `size` elements, in order.
void add_parts(Queue, const float* shares, int parts, int size, Dtype, void* dweight);

}  // namespace fastgan
