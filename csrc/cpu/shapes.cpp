// What depends on shapes alone, for every instruction set alike.
#include <algorithm>

#include "kernels.h"

namespace fastgan {

namespace {

int ceil_div64(int64_t a, int64_t b) { return int((a + b - 1) / b); }

}  // namespace

// Images of one tile of the statistics: about 2048 pixels of the low side.
int conv_images_per_stats_tile(ConvShape s, int groups) {
  return std::clamp(2048 / (s.h * s.w), 1, std::max(1, s.n / groups));
}

int conv_fprop_stats_tiles(ConvShape s, int groups) {
  return ceil_div64(s.n / groups, conv_images_per_stats_tile(s, groups));
}

int conv_dgrad_stats_tiles(ConvShape s, int groups) { return 4 * conv_fprop_stats_tiles(s, groups); }

// A tile is about 256 KiB: it stays in a core's cache.
int64_t bn_tile_rows(BatchNormShape s) { return std::max(16, 65536 / s.channels); }

int bn_tiles(BatchNormShape s) { return ceil_div64(s.rows, bn_tile_rows(s)); }

}  // namespace fastgan
