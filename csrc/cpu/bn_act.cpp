// Batch norm + activation over groups of rows, forward and backward, and what else goes row by row.
//
// Reductions run over tiles of rows whose number depends on the shape alone, each summed in float32
// by one thread and merged in order in double: the result does not depend on the thread count.
#include <omp.h>

#include <vector>

#include "activation.h"
#include "kernels.h"
#include "layout.h"

namespace fastgan::FASTGAN_ISA::bn {

struct Tile {
  int group;
  int64_t first, last;
};

inline Tile tile_of(const BatchNormShape& s, int tiles, int64_t tile_rows, int i) {
  const int64_t first = int64_t(i % tiles) * tile_rows, offset = (i / tiles) * s.rows;
  return {i / tiles, offset + first, offset + std::min(first + tile_rows, s.rows)};
}

// Calls f(vectors, c, left) for the channels from c on: so many vectors, of which the last one has
// `left` channels. What f keeps of a channel then stays in registers over the rows.
template <typename F>
FASTGAN_INLINE void for_each_columns(int channels, F f) {
  constexpr int kWide = 4;
  int c = 0;
  for (; c + kWide * kVec <= channels; c += kWide * kVec)
    f(std::integral_constant<int, kWide>{}, c, std::integral_constant<int, kVec>{});
  for (; c < channels; c += kVec) f(std::integral_constant<int, 1>{}, c, channels - c);
}

// y = act(centred · scale + bias), centred = x - mean, for some channels of a group.
template <int kVectors>
struct Affine {
  Vec mean[kVectors], scale[kVectors], bias[kVectors];

  template <typename Left>
  Affine(const BatchNormShape& s, int group, int c, Left left, const float* mean_,
         const float* invstd, const float* weight, const float* bias_) {
    const size_t at = size_t(group) * s.channels + c;
    for (int j = 0; j < kVectors; ++j) {
      mean[j] = load_first(mean_ + at + j * kVec, left);
      scale[j] = load_first(invstd + at + j * kVec, left);
      if (weight) scale[j] *= load_first(weight + c + j * kVec, left);
      bias[j] = bias_ ? load_first(bias_ + c + j * kVec, left) : Vec{};
    }
  }
};

template <Activation kActivation>
void apply(const BatchNormShape& s, const float* x, const float* mean, const float* invstd,
           const float* weight, const float* bias, float slope, float* y, int threads) {
  const int tiles = bn_tiles(s);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int i = 0; i < s.groups * tiles; ++i) {
    const Tile tile = tile_of(s, tiles, bn_tile_rows(s), i);
    for_each_columns(s.channels, [&](auto vectors, int c, auto left) {
      const Affine<vectors> a(s, tile.group, c, left, mean, invstd, weight, bias);
      for (int64_t row = tile.first; row < tile.last; ++row)
        for (int j = 0; j < vectors; ++j) {
          const size_t at = row * s.channels + c + j * kVec;
          const Vec centred = load_first(x + at, left) - a.mean[j];
          store_first(y + at, activate<kActivation>(centred * a.scale[j] + a.bias[j], slope), left);
        }
    });
  }
}

template <Activation kActivation>
void backward(const BatchNormShape& s, const float* dy, const float* x, const float* mean,
              const float* invstd, const float* weight, const float* bias, float slope,
              bool training, float* partial, float* dx, float* dweight, float* dbias,
              int threads) {
  const int tiles = bn_tiles(s), C = s.channels;
  // dz = dy · act'(z), with z recomputed from x: y is not needed.
  const auto dz_at = [&](const auto& a, int j, size_t at, auto left, Vec& centred) {
    centred = load_first(x + at, left) - a.mean[j];
    return activate_backward<kActivation>(
        load_first(dy + at, left),
        activate<kActivation>(centred * a.scale[j] + a.bias[j], slope), slope);
  };
  // Of each group: the means over its rows of dz, and of dz · xhat times invstd.
  float* means = partial + size_t(2) * s.groups * tiles * C;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < s.groups * tiles; ++i) {
      const Tile tile = tile_of(s, tiles, bn_tile_rows(s), i);
      for_each_columns(C, [&](auto vectors, int c, auto left) {
        const Affine<vectors> a(s, tile.group, c, left, mean, invstd, weight, bias);
        Sum sum[vectors], sum_centred[vectors];
        for (int64_t row = tile.first; row < tile.last; row += Sum::kTerms) {
          for (int64_t r = row; r < std::min(row + Sum::kTerms, tile.last); ++r)
            for (int j = 0; j < vectors; ++j) {
              Vec centred;
              const Vec dz = dz_at(a, j, r * C + c + j * kVec, left, centred);
              sum[j].add(dz);
              sum_centred[j].add(dz * centred);
            }
          for (int j = 0; j < vectors; ++j) {
            sum[j].fold();
            sum_centred[j].fold();
          }
        }
        float* out = partial + size_t(i) * 2 * C + c;
        for (int j = 0; j < vectors; ++j) {
          store_first(out + j * kVec, narrow(sum[j].total), left);
          store_first(out + C + j * kVec, narrow(sum_centred[j].total), left);
        }
      });
    }
#pragma omp for schedule(static)
    for (int c = 0; c < C; ++c) {
      double all_dz = 0.0, all_dz_xhat = 0.0;
      for (int g = 0; g < s.groups; ++g) {
        double dz = 0.0, dz_xhat = 0.0;
        for (int i = g * tiles; i < (g + 1) * tiles; ++i) {
          dz += partial[size_t(i) * 2 * C + c];
          dz_xhat += partial[size_t(i) * 2 * C + C + c];
        }
        const double scale = invstd[size_t(g) * C + c];
        dz_xhat *= scale;
        means[size_t(2 * g) * C + c] = float(dz / s.rows);
        means[size_t(2 * g + 1) * C + c] = float(dz_xhat * scale / s.rows);
        all_dz += dz;
        all_dz_xhat += dz_xhat;
      }
      if (dbias) dbias[c] = float(all_dz);
      if (dweight) dweight[c] = float(all_dz_xhat);
    }
    if (dx) {
#pragma omp for schedule(static)
      for (int i = 0; i < s.groups * tiles; ++i) {
        const Tile tile = tile_of(s, tiles, bn_tile_rows(s), i);
        for_each_columns(C, [&](auto vectors, int c, auto left) {
          const Affine<vectors> a(s, tile.group, c, left, mean, invstd, weight, bias);
          Vec mean_dz[vectors] = {}, mean_dz_xhat[vectors] = {};
          if (training)
            for (int j = 0; j < vectors; ++j) {
              const float* in = means + size_t(2) * tile.group * C + c + j * kVec;
              mean_dz[j] = load_first(in, left);
              mean_dz_xhat[j] = load_first(in + C, left);
            }
          for (int64_t row = tile.first; row < tile.last; ++row)
            for (int j = 0; j < vectors; ++j) {
              const size_t at = row * C + c + j * kVec;
              Vec centred;
              const Vec dz = dz_at(a, j, at, left, centred);
              store_first(dx + at, (dz - mean_dz[j] - centred * mean_dz_xhat[j]) * a.scale[j],
                          left);
            }
        });
      }
    }
  }
}

inline void bn_stats(BatchNormShape s, int64_t tile_rows, int tile_stride, const float* x,
                     float* stats, int threads) {
  const int tiles = int((s.rows + tile_rows - 1) / tile_rows), C = s.channels;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int i = 0; i < s.groups * tiles; ++i) {
    const Tile tile = tile_of(s, tiles, tile_rows, i);
    float* out = stats + size_t(i) * tile_stride * 3 * C;
    std::memset(out, 0, size_t(tile_stride) * 3 * C * sizeof(float));
    for_each_columns(C, [&](auto vectors, int c, auto left) {
      ChannelStats sums[vectors];
      for (int64_t row = tile.first; row < tile.last; ++row)
        for (int j = 0; j < vectors; ++j)
          sums[j].add(load_first(x + row * C + c + j * kVec, left));
      for (int j = 0; j < vectors; ++j)
        sums[j].write(out + c + j * kVec, C, left);
    });
  }
}

// Chan, Golub & LeVeque 1979: the merge of two (count, mean, M2).
inline void bn_merge(int groups, int tiles, int channels, const float* stats, float* mean,
                     float* var) {
  std::vector<double> count(channels), mu(channels), m2(channels);
  for (int g = 0; g < groups; ++g) {
    std::fill(count.begin(), count.end(), 0.0);
    std::fill(mu.begin(), mu.end(), 0.0);
    std::fill(m2.begin(), m2.end(), 0.0);
    for (int i = g * tiles; i < (g + 1) * tiles; ++i) {
      const float* tile = stats + size_t(i) * 3 * channels;
      for (int c = 0; c < channels; ++c) {
        const double n = tile[c];
        if (n == 0.0) continue;
        const double total = count[c] + n, delta = tile[channels + c] - mu[c];
        mu[c] += delta * n / total;
        m2[c] += tile[2 * channels + c] + delta * delta * count[c] * n / total;
        count[c] = total;
      }
    }
    for (int c = 0; c < channels; ++c) {
      mean[size_t(g) * channels + c] = float(mu[c]);
      var[size_t(g) * channels + c] = float(m2[c] / count[c]);
    }
  }
}

inline void bn_apply(BatchNormShape s, const float* x, const float* mean, const float* invstd,
                     const float* weight, const float* bias, Activation activation, float slope,
                     float* y, int threads) {
  with_activation(activation, [&](auto a) {
    apply<decltype(a)::value>(s, x, mean, invstd, weight, bias, slope, y, threads);
  });
}

inline void bn_backward(BatchNormShape s, const float* dy, const float* x, const float* mean,
                        const float* invstd, const float* weight, const float* bias,
                        Activation activation, float slope, bool training, float* partial,
                        float* dx, float* dweight, float* dbias, int threads) {
  with_activation(activation, [&](auto a) {
    backward<decltype(a)::value>(s, dy, x, mean, invstd, weight, bias, slope, training, partial,
                                 dx, dweight, dbias, threads);
  });
}

inline void act_backward(int64_t count, const float* dy, const float* y, Activation activation,
                         float slope, float* dx, int threads) {
  with_activation(activation, [&](auto a) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += kVec) {
      const int left = int(std::min<int64_t>(kVec, count - i));
      store_first(dx + i,
                  activate_backward<decltype(a)::value>(load_first(dy + i, left),
                                                        load_first(y + i, left), slope),
                  left);
    }
  });
}

}  // namespace fastgan::FASTGAN_ISA::bn
