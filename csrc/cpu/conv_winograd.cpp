// 4x4 stride-2 pad-1 convolutions by Winograd's minimal filtering, in all three directions.
//
// A tile is m x m pixels of the low side and the (m+1) x (m+1) coefficients of each of the four
// parities of the high side that they touch. In the transform domain, at each of P = (m+1)^2 points
// p, with q the parity and everything blocked by 16 channels:
//
//     dgrad: M[p][q] = V[p] · U[p][q]           V = low(L)    H = high_adjoint(M)
//     fprop: V[p] = sum over q of M[p][q] · U[p][q]'   M = high(H)   L = low_adjoint(V)
//     wgrad: dU[p][q] = V[p]' · M[p][q]         dW = weight_adjoint(dU)
//
// Where the side is no multiple of m, the last tile of a row or column is partial: its last value is
// 0, and so is V at infinity, which is that value. The lines of V and M are ordered so that the
// tiles that matter at a point follow one another, and only those are multiplied.
//
// The batch is cut into subs of whole images; a sub is a tile of the statistics as well. One chunk
// of subs at a time is transformed into scratch (which the last-level cache holds), and then worked
// off in items, each of a few channel blocks of one sub, whose products stay in the core's own
// cache until they are transformed back.
#include <omp.h>

#include "activation.h"
#include "gemm.h"
#include "kernels.h"
#include "layout.h"
#include "winograd.h"

namespace fastgan::FASTGAN_ISA::winograd {

// Bytes of transformed tensors that a chunk may take.
constexpr size_t kChunkBytes = 8 << 20;
// Lines of weights, of 16 channels each, that an item transforms at a time.
constexpr int kWeightLines = 128;
// Blocks of low channels in an item of wgrad, which has one block of high channels.
constexpr int kWgradBlocks = 4;
// Lines that wgrad sums over at a time.
constexpr int kSumLines = 256;
// Floats of a column block of an item's own weights.
constexpr size_t kOwnBlock = size_t(kWeightLines) * kBlock;

struct Sub {
  int index, image, images;
};

// Floats from one plane of `lines` cache lines to the next: an odd number of lines, so that the
// planes a transform writes side by side do not fall into the same cache sets.
constexpr size_t plane(size_t lines) { return (lines | 1) * kBlock; }

template <int m>
struct Plan {
  static constexpr int n1 = m + 1, points = n1 * n1;
  ConvShape s;
  int tiles_y, tiles_x, tiles, cl_blocks, ch_blocks;
  int full_y, full_x;  // of the tiles, those that are not partial
  int images_per_sub, subs_per_group, groups;
  int subs, subs_per_chunk;
  size_t line_block;  // floats of a channel block's lines in V and M, those of a chunk
  // Of the scratch: what all threads share, and each one's products and weights of an item.
  size_t zero_floats, v_floats, m_floats, packed_floats, u_floats, product_floats, weight_floats;

  Plan(ConvShape shape, int groups_) : s(shape), groups(groups_) {
    tiles_y = ceil_div(s.h, m);
    tiles_x = ceil_div(s.w, m);
    tiles = tiles_y * tiles_x;
    full_y = s.h / m;
    full_x = s.w / m;
    cl_blocks = ceil_div(s.cl, kBlock);
    ch_blocks = ceil_div(s.ch, kBlock);
    images_per_sub = conv_images_per_stats_tile(s, groups);
    subs_per_group = ceil_div(s.n / groups, images_per_sub);
    subs = subs_per_group * groups;
    const size_t tile_bytes = sizeof(float) * kBlock * points * (cl_blocks + 4 * ch_blocks);
    const size_t sub_bytes = tile_bytes * tiles * images_per_sub;
    subs_per_chunk = std::clamp<int>(kChunkBytes / sub_bytes, 1, subs);
    line_block = plane(tiles * images_per_sub * subs_per_chunk);
    v_floats = points * line_block * cl_blocks;
    m_floats = points * line_block * ch_blocks * 4;
    packed_floats = size_t(16) * cl_blocks * ch_blocks * kBlock * kBlock;
    u_floats = reuses_weights() ? points * (4 * packed_floats / 16 + kBlock) : 0;
    zero_floats = size_t(std::max(cl_blocks, ch_blocks)) * kBlock;
    product_floats = points * plane(std::max(kNB * tiles * images_per_sub,
                                             4 * kWgradBlocks * kBlock));
    weight_floats = reuses_weights() ? 0 : points * plane(kNB * kWeightLines);
  }
  // Where many subs use the same transformed weights they are worth keeping; where there are few,
  // each item transforms what it needs, and nothing leaves its cache.
  bool reuses_weights() const { return subs >= 4; }
  size_t scratch_floats(int threads) const {
    return zero_floats + v_floats + m_floats + packed_floats + u_floats +
           threads * (product_floats + weight_floats);
  }

  Sub sub(int i) const {
    const int group = i / subs_per_group, j = i % subs_per_group;
    const int images = s.n / groups;
    return {i, group * images + j * images_per_sub,
            std::min(images_per_sub, images - j * images_per_sub)};
  }

  // The lines of a sub: tiles partial in x alone, whole ones, partial in y alone, in both.
  int line(const Sub& sub, int image, int ty, int tx) const {
    const int partial_x = tiles_x - full_x, partial_y = tiles_y - full_y;
    const int whole_begin = sub.images * full_y * partial_x;
    const int partial_y_begin = whole_begin + sub.images * full_y * full_x;
    if (ty < full_y)
      return tx < full_x ? whole_begin + (image * full_y + ty) * full_x + tx
                         : image * full_y + ty;
    return tx < full_x ? partial_y_begin + image * full_x + tx
                       : partial_y_begin + sub.images * partial_y * full_x + image;
  }

  // The lines that matter at point p = i · (m + 1) + j, of which the last i and j are infinity.
  std::pair<int, int> lines_at(const Sub& sub, int p) const {
    const int whole_begin = sub.images * full_y * (tiles_x - full_x);
    const int whole_end = whole_begin + sub.images * full_y * full_x;
    const int partial_y_end = whole_end + sub.images * (tiles_y - full_y) * full_x;
    const bool infinite_y = p / n1 == m, infinite_x = p % n1 == m;
    return {infinite_x ? whole_begin : 0, infinite_y   ? whole_end
                                          : infinite_x ? partial_y_end
                                                       : sub.images * tiles};
  }
};

// Pixel addresses around a tile; those outside the image point at zeros.
template <int m>
struct LowWindow {
  const float* pixel[m][m];
  LowWindow(const ConvShape& s, const float* low, const float* zeros, int image, int ty, int tx) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < m; ++j) {
        const int y = ty * m + i, x = tx * m + j;
        pixel[i][j] =
            y < s.h && x < s.w ? low + ((size_t(image) * s.h + y) * s.w + x) * s.cl : zeros;
      }
  }
};

template <int m>
struct HighWindow {
  static constexpr int side = 2 * (m + 1);
  const float* pixel[side][side];
  HighWindow(const ConvShape& s, const float* high, const float* zeros, int image, int ty, int tx) {
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) {
        const int y = 2 * m * ty - 1 + i, x = 2 * m * tx - 1 + j;
        const bool inside = y >= 0 && y < 2 * s.h && x >= 0 && x < 2 * s.w;
        pixel[i][j] =
            inside ? high + ((size_t(image) * 2 * s.h + y) * 2 * s.w + x) * s.ch : zeros;
      }
  }
};

// Calls f(c, left) for each vector of the channels, `left` a compile-time constant in all whole ones.
template <typename F>
FASTGAN_INLINE void for_each_vector(int channels, int blocks, F f) {
  int c = 0;
  for (; c + kVec <= channels; c += kVec) f(c, std::integral_constant<int, kVec>{});
  for (; c < blocks * kBlock; c += kVec) f(c, channels - c);
}

// V[p][cl block][tile] of one tile, all channels.
template <int m>
void transform_low(const Plan<m>& plan, const LowWindow<m>& window, int tile, float* V) {
  using T = Transform<m>;
  constexpr int n1 = m + 1;
  const size_t point = plan.line_block * plan.cl_blocks;
  for_each_vector(plan.s.cl, plan.cl_blocks, [&](int c, auto left) {
    Vec rows[n1][m];
    for (int j = 0; j < m; ++j) {
      Vec x[m], v[n1];
      for (int i = 0; i < m; ++i) x[i] = load_first(window.pixel[i][j] + c, left);
      T::low(x, v);
      for (int i = 0; i < n1; ++i) rows[i][j] = v[i];
    }
    float* out = V + (c / kBlock) * plan.line_block + size_t(tile) * kBlock + c % kBlock;
    for (int i = 0; i < n1; ++i) {
      Vec v[n1];
      T::low(rows[i], v);
      for (int j = 0; j < n1; ++j) store(out + (i * n1 + j) * point, v[j]);
    }
  });
}

// M[p][ch block][q][tile] of one tile, all channels.
template <int m>
void transform_high(const Plan<m>& plan, const HighWindow<m>& window, int tile, float* M) {
  using T = Transform<m>;
  constexpr int n1 = m + 1;
  const size_t point = plan.line_block * plan.ch_blocks * 4;
  for_each_vector(plan.s.ch, plan.ch_blocks, [&](int c, auto left) {
    for (int r = 0; r < 2; ++r)
      for (int q = 0; q < 2; ++q) {
        // Even rows are the window's odd ones, which begins a pixel before the tile.
        Vec rows[n1][n1];
        for (int j = 0; j < n1; ++j) {
          Vec x[n1], v[n1];
          for (int i = 0; i < n1; ++i)
            x[i] = load_first(window.pixel[2 * i + 1 - r][2 * j + 1 - q] + c, left);
          T::high(x, v);
          for (int i = 0; i < n1; ++i) rows[i][j] = v[i];
        }
        float* out = M + ((c / kBlock) * 4 + r * 2 + q) * plan.line_block +
                     size_t(tile) * kBlock + c % kBlock;
        for (int i = 0; i < n1; ++i) {
          Vec v[n1];
          T::high(rows[i], v);
          for (int j = 0; j < n1; ++j) store(out + (i * n1 + j) * point, v[j]);
        }
      }
  });
}

// Calls f(image, ty, tx, line) for every tile of a sub. Called by every thread of a team, which
// shares them out and goes on as it is done.
template <int m, typename F>
void share_tiles(const Plan<m>& plan, const Sub& sub, F f) {
#pragma omp for schedule(dynamic, 4) nowait
  for (int t = 0; t < sub.images * plan.tiles; ++t) {
    const int image = t / plan.tiles;
    const int ty = t % plan.tiles / plan.tiles_x, tx = t % plan.tiles_x;
    f(sub.image + image, ty, tx, plan.line(sub, image, ty, tx));
  }
}

// V of the tiles of a sub, whose lines begin at `first_line`.
template <int m>
void transform_sub_low(const Plan<m>& plan, const Sub& sub, int first_line, const float* low,
                       const float* zeros, float* V) {
  share_tiles(plan, sub, [&](int image, int ty, int tx, int line) {
    transform_low<m>(plan, LowWindow<m>(plan.s, low, zeros, image, ty, tx), first_line + line, V);
  });
}

// M of the tiles of a sub, whose lines begin at `first_line`.
template <int m>
void transform_sub_high(const Plan<m>& plan, const Sub& sub, int first_line, const float* high,
                        const float* zeros, float* M) {
  share_tiles(plan, sub, [&](int image, int ty, int tx, int line) {
    transform_high<m>(plan, HighWindow<m>(plan.s, high, zeros, image, ty, tx), first_line + line,
                      M);
  });
}

// The tap of parity r that multiplies x[o - i], i = 0 or 1: see winograd.h.
constexpr int tap(int r, int i) { return (r == 0 ? 1 : 0) + 2 * i; }

// U of 16 columns of a line for parity (r, q), to out[p * point].
template <int m>
FASTGAN_INLINE void transform_weight(const WeightLines& weight, int line, int column_block, int r,
                                     int q, float* out, size_t point) {
  using T = Transform<m>;
  constexpr int n1 = m + 1;
  for (int c = 0; c < kBlock; c += kVec) {
    const float* taps = weight.at(line, column_block) + c;
    Vec columns[2][n1];
    for (int j = 0; j < 2; ++j)
      T::weight(load(taps + tap(r, 0) * weight.kh + tap(q, j) * weight.kw),
                load(taps + tap(r, 1) * weight.kh + tap(q, j) * weight.kw), columns[j]);
    for (int i = 0; i < n1; ++i) {
      Vec u[n1];
      T::weight(columns[0][i], columns[1][i], u);
      for (int j = 0; j < n1; ++j) store(out + (i * n1 + j) * point + c, u[j]);
    }
  }
}

// Weights for a sum over the high channels: for one ch block, 4 · 16 lines of (q, ch).
template <int m>
void weights_over_high(const WeightLines& weight, int cl_block, int ch_block, float* U,
                       size_t point) {
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < kBlock; ++i)
      transform_weight<m>(weight, ch_block * kBlock + i, cl_block, q / 2, q % 2,
                          U + (q * kBlock + i) * kBlock, point);
}

// Weights for a sum over the low channels: for one cl block, 16 lines of cl for parity q.
template <int m>
void weights_over_low(const WeightLines& weight, int ch_block, int q, int cl_block, float* U,
                      size_t point) {
  for (int i = 0; i < kBlock; ++i)
    transform_weight<m>(weight, cl_block * kBlock + i, ch_block, q / 2, q % 2, U + i * kBlock,
                        point);
}

// L of one sub and one block of low channels from V at C[p][tile].
template <int m>
void finish_low(const Plan<m>& plan, const Sub& sub, int cl_block, const float* C, size_t point,
                float* low, const ConvEpilogue& epilogue) {
  using T = Transform<m>;
  constexpr int n1 = m + 1;
  const ConvShape& s = plan.s;
  for (int c = cl_block * kBlock; c < std::min((cl_block + 1) * kBlock, s.cl); c += kVec) {
    const int left = s.cl - c;
    const Vec bias = epilogue.bias ? load_first(epilogue.bias + c, left) : Vec{};
    ChannelStats stats;
    for (int t = 0; t < sub.images * plan.tiles; ++t) {
      const int image = t / plan.tiles;
      const int ty = t % plan.tiles / plan.tiles_x, tx = t % plan.tiles_x;
      const float* in = C + size_t(plan.line(sub, image, ty, tx)) * kBlock + c % kBlock;
      Vec rows[m][n1];
      for (int j = 0; j < n1; ++j) {
        Vec v[n1], x[m];
        for (int i = 0; i < n1; ++i) v[i] = load(in + (i * n1 + j) * point);
        T::low_adjoint(v, x);
        for (int i = 0; i < m; ++i) rows[i][j] = x[i];
      }
      const int y0 = ty * m, x0 = tx * m;
      for (int i = 0; i < m && y0 + i < s.h; ++i) {
        Vec x[m];
        T::low_adjoint(rows[i], x);
        float* out =
            low + ((size_t(sub.image + image) * s.h + y0 + i) * s.w + x0) * s.cl + c;
        for (int j = 0; j < m && x0 + j < s.w; ++j) {
          const Vec y = activate(epilogue.activation, x[j] + bias, epilogue.negative_slope);
          if (epilogue.stats) stats.add(y);
          __builtin_prefetch(out + size_t(j + m) * s.cl, 1);
          store_first(out + size_t(j) * s.cl, y, left);
        }
      }
    }
    if (epilogue.stats)
      stats.write(epilogue.stats + size_t(sub.index) * 3 * s.cl + c, s.cl, left);
  }
}

// H's parity (r, q) of one sub and one block of high channels from M at C[p][tile].
template <int m, int r, int q>
void finish_high(const Plan<m>& plan, const Sub& sub, int ch_block, const float* C, size_t point,
                 float* high, const ConvEpilogue& epilogue) {
  using T = Transform<m>;
  constexpr int n1 = m + 1;
  const ConvShape& s = plan.s;
  for (int c = ch_block * kBlock; c < std::min((ch_block + 1) * kBlock, s.ch); c += kVec) {
    const int left = s.ch - c;
    const Vec bias = epilogue.bias ? load_first(epilogue.bias + c, left) : Vec{};
    ChannelStats stats;
    for (int image = 0; image < sub.images; ++image)
      for (int ty = 0; ty < plan.tiles_y; ++ty) {
        // Even parities take the last coefficient of the tile before, odd ones the first one of the
        // tile after, so that each output is written once, complete.
        Vec carry[m] = {};
        const int neighbour_y = r == 0 ? ty - 1 : ty + 1;
        const bool has_neighbour = neighbour_y >= 0 && neighbour_y < plan.tiles_y;
        for (int step = 0; step < plan.tiles_x; ++step) {
          const int tx = q == 0 ? step : plan.tiles_x - 1 - step;
          const float* in = C + size_t(plan.line(sub, image, ty, tx)) * kBlock + c % kBlock;
          const float* neighbour =
              has_neighbour
                  ? C + size_t(plan.line(sub, image, neighbour_y, tx)) * kBlock + c % kBlock
                  : nullptr;
          Vec rows[m][n1];
          for (int j = 0; j < n1; ++j) {
            Vec p[n1], v[n1];
            for (int i = 0; i < n1; ++i) p[i] = load(in + (i * n1 + j) * point);
            T::high_adjoint(p, v);
            if (has_neighbour)
              v[r == 0 ? 0 : m] += load(neighbour + ((r == 0 ? m : 0) * n1 + j) * point);
            for (int i = 0; i < m; ++i) rows[i][j] = v[i + r];
          }
          for (int i = 0; i < m; ++i) {
            Vec v[n1];
            T::high_adjoint(rows[i], v);
            v[q == 0 ? 0 : m] += carry[i];
            carry[i] = rows[i][q == 0 ? m : 0];
            const int y = ty * m + i;
            if (y >= s.h) continue;
            for (int j = 0; j < m; ++j) {
              const int x = tx * m + j;
              if (x >= s.w) break;
              const Vec out =
                  activate(epilogue.activation, v[j + q] + bias, epilogue.negative_slope);
              if (epilogue.stats) stats.add(out);
              const size_t row = size_t(sub.image + image) * 2 * s.h + 2 * y + r;
              float* to = high + (row * 2 * s.w + 2 * x + q) * s.ch + c;
              __builtin_prefetch(to + (q == 0 ? 2 : -2) * m * s.ch, 1);
              store_first(to, out, left);
            }
          }
        }
      }
    if (epilogue.stats)
      stats.write(epilogue.stats + (size_t(sub.index) * 4 + r * 2 + q) * 3 * s.ch + c, s.ch, left);
  }
}

// Adds the taps' gradient of 16 low and 16 high channels, dU at C[p][q][cl line].
template <int m>
void finish_weight(const Plan<m>& plan, int cl_block, int ch_block, const float* C, size_t point,
                   size_t parity, bool add, float* dweight) {
  using T = Transform<m>;
  constexpr int n1 = m + 1;
  const ConvShape& s = plan.s;
  for (int i = 0; i < std::min(kBlock, s.cl - cl_block * kBlock); ++i)
    for (int c = ch_block * kBlock; c < std::min((ch_block + 1) * kBlock, s.ch); c += kVec) {
      const int left = s.ch - c;
      for (int r = 0; r < 2; ++r)
        for (int q = 0; q < 2; ++q) {
          const float* in = C + (r * 2 + q) * parity + i * kBlock + c % kBlock;
          Vec rows[2][n1];
          for (int j = 0; j < n1; ++j) {
            Vec u[n1];
            for (int k = 0; k < n1; ++k) u[k] = load(in + (k * n1 + j) * point);
            T::weight_adjoint(u, rows[0][j], rows[1][j]);
          }
          for (int k = 0; k < 2; ++k) {
            Vec w[2];
            T::weight_adjoint(rows[k], w[0], w[1]);
            for (int j = 0; j < 2; ++j) {
              float* out = dweight +
                           ((size_t(cl_block) * kBlock + i) * 16 + tap(r, k) * 4 + tap(q, j)) *
                               s.ch + c;
              store_first(out, add ? w[j] + load_first(out, left) : w[j], left);
            }
          }
        }
    }
}

struct Scratch {
  float *zeros, *V, *M, *packed, *U, *items;

  template <int m>
  Scratch(const Plan<m>& plan, float* scratch) : zeros(scratch) {
    std::fill_n(zeros, plan.zero_floats, 0.0f);
    V = zeros + plan.zero_floats;
    M = V + plan.v_floats;
    packed = M + plan.m_floats;
    U = packed + plan.packed_floats;
    items = U + plan.u_floats;
  }
};

// What an item of one thread works in: products C[p][column block][line], and weights
// U[p][column block][kWeightLines] where they are not kept for all items.
template <int m>
struct Item {
  float *C, *U;
  size_t c_point, c_block, u_point;

  Item(const Plan<m>& plan, const Scratch& scratch, int column_blocks, int lines)
      : C(scratch.items + omp_get_thread_num() * (plan.product_floats + plan.weight_floats)),
        U(C + plan.product_floats),
        c_point(plane(size_t(column_blocks) * lines)),
        c_block(size_t(lines) * kBlock),
        u_point(plane(kNB * kWeightLines)) {}
};

// Transformed weights of the columns of an item: U[p][column block][line].
struct Weights {
  const float* U;
  size_t point, block;
};

// C (+)= A · U at every point, for `nb` column blocks of a sub. Lines that do not matter get zeros.
template <int m>
void multiply_points(const Plan<m>& plan, const Sub& sub, const Item<m>& own, int k_blocks, int nb,
                     const float* A, size_t a_point, const Weights& weights, bool add) {
  const int lines = sub.images * plan.tiles;
  for (int p = 0; p < plan.points; ++p) {
    const auto [begin, end] = plan.lines_at(sub, p);
    float* out = own.C + p * own.c_point;
    multiply_rows(end - begin, k_blocks, nb, A + p * a_point + begin * kBlock, plan.line_block,
                  weights.U + p * weights.point, weights.block, out + begin * kBlock, own.c_block,
                  add);
    for (int n = 0; n < nb && !add; ++n) {
      std::fill_n(out + n * own.c_block, begin * kBlock, 0.0f);
      std::fill_n(out + n * own.c_block + end * kBlock, (lines - end) * kBlock, 0.0f);
    }
  }
}

// The products of an item, over `k_blocks` blocks of summed channels that are `block_lines` lines of
// weights each. With no weights `kept`, make_weights(n, k, U, point) makes those of column block n
// and summed block k, a slice at a time.
template <int m, typename MakeWeights>
void multiply_item(const Plan<m>& plan, const Sub& sub, const Item<m>& own, int k_blocks,
                   int block_lines, int nb, const float* A, size_t a_point, const Weights& kept,
                   MakeWeights make_weights) {
  const int per_block = block_lines / kBlock;
  if (plan.reuses_weights())
    return multiply_points(plan, sub, own, k_blocks * per_block, nb, A, a_point, kept, false);
  const int most = kWeightLines / block_lines;
  for (int k = 0; k < k_blocks; k += most) {
    const int blocks = std::min(most, k_blocks - k);
    for (int n = 0; n < nb; ++n)
      for (int b = 0; b < blocks; ++b)
        make_weights(n, k + b, own.U + n * kOwnBlock + b * block_lines * kBlock, own.u_point);
    multiply_points(plan, sub, own, blocks * per_block, nb, A + k * per_block * plan.line_block,
                    a_point, {own.U, own.u_point, kOwnBlock}, k > 0);
  }
}

template <int m>
void fprop(ConvShape shape, const float* high, ConvWeight weight, float* low,
           ConvEpilogue epilogue, float* scratch, int threads) {
  const Plan<m> plan(shape, epilogue.groups);
  const Scratch all(plan, scratch);
  constexpr int block_lines = 4 * kBlock;  // (q, ch) of a ch block
  const size_t u_block = size_t(plan.ch_blocks) * block_lines * kBlock;
  const size_t u_point = plane(u_block * plan.cl_blocks / kBlock);
  const int pairs = ceil_div(plan.cl_blocks, kNB);
#pragma omp parallel num_threads(threads)
  {
    const Item<m> own(plan, all, kNB, plan.tiles * plan.images_per_sub);
    const WeightLines lines =
        weight_lines(weight, shape.cl, shape.ch, /*high_lines=*/true, all.packed);
    if (plan.reuses_weights()) {
#pragma omp for collapse(2) schedule(dynamic)
      for (int n = 0; n < plan.cl_blocks; ++n)
        for (int k = 0; k < plan.ch_blocks; ++k)
          weights_over_high<m>(lines, n, k, all.U + n * u_block + k * block_lines * kBlock,
                               u_point);
    }
    for (int first = 0; first < plan.subs; first += plan.subs_per_chunk) {
      const int last = std::min(first + plan.subs_per_chunk, plan.subs);
      const int image0 = plan.sub(first).image;
      for (int i = first; i < last; ++i)
        transform_sub_high<m>(plan, plan.sub(i), (plan.sub(i).image - image0) * plan.tiles, high,
                              all.zeros, all.M);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int item = 0; item < (last - first) * pairs; ++item) {
        const Sub sub = plan.sub(first + item / pairs);
        const int n0 = item % pairs * kNB, nb = std::min(kNB, plan.cl_blocks - n0);
        multiply_item(plan, sub, own, plan.ch_blocks, block_lines, nb,
                      all.M + size_t(sub.image - image0) * plan.tiles * kBlock,
                      plan.line_block * plan.ch_blocks * 4,
                      {all.U + n0 * u_block, u_point, u_block},
                      [&](int n, int k, float* U, size_t point) {
                        weights_over_high<m>(lines, n0 + n, k, U, point);
                      });
        for (int n = 0; n < nb; ++n)
          finish_low<m>(plan, sub, n0 + n, own.C + n * own.c_block, own.c_point, low, epilogue);
      }
    }
  }
}

template <int m>
void dgrad(ConvShape shape, const float* low, ConvWeight weight, float* high,
           ConvEpilogue epilogue, float* scratch, int threads) {
  const Plan<m> plan(shape, epilogue.groups);
  const Scratch all(plan, scratch);
  constexpr int block_lines = kBlock;  // cl of a cl block; columns are (q, ch block)
  const size_t u_block = size_t(plan.cl_blocks) * block_lines * kBlock;
  const size_t u_point = plane(u_block * plan.ch_blocks * 4 / kBlock);
  const int pairs = ceil_div(plan.ch_blocks, kNB);
#pragma omp parallel num_threads(threads)
  {
    const Item<m> own(plan, all, kNB, plan.tiles * plan.images_per_sub);
    const WeightLines lines =
        weight_lines(weight, shape.cl, shape.ch, /*high_lines=*/false, all.packed);
    if (plan.reuses_weights()) {
#pragma omp for collapse(3) schedule(dynamic)
      for (int q = 0; q < 4; ++q)
        for (int n = 0; n < plan.ch_blocks; ++n)
          for (int k = 0; k < plan.cl_blocks; ++k)
            weights_over_low<m>(
                lines, n, q, k,
                all.U + (q * plan.ch_blocks + n) * u_block + k * block_lines * kBlock, u_point);
    }
    for (int first = 0; first < plan.subs; first += plan.subs_per_chunk) {
      const int last = std::min(first + plan.subs_per_chunk, plan.subs);
      const int image0 = plan.sub(first).image;
      for (int i = first; i < last; ++i)
        transform_sub_low<m>(plan, plan.sub(i), (plan.sub(i).image - image0) * plan.tiles, low,
                             all.zeros, all.V);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int item = 0; item < (last - first) * pairs * 4; ++item) {
        const Sub sub = plan.sub(first + item / (pairs * 4));
        const int q = item % 4;
        const int n0 = item / 4 % pairs * kNB, nb = std::min(kNB, plan.ch_blocks - n0);
        multiply_item(plan, sub, own, plan.cl_blocks, block_lines, nb,
                      all.V + size_t(sub.image - image0) * plan.tiles * kBlock,
                      plan.line_block * plan.cl_blocks,
                      {all.U + (q * plan.ch_blocks + n0) * u_block, u_point, u_block},
                      [&](int n, int k, float* U, size_t point) {
                        weights_over_low<m>(lines, n0 + n, q, k, U, point);
                      });
        for (int n = 0; n < nb; ++n) {
          const auto finish = q == 0   ? &finish_high<m, 0, 0>
                              : q == 1 ? &finish_high<m, 0, 1>
                              : q == 2 ? &finish_high<m, 1, 0>
                                       : &finish_high<m, 1, 1>;
          finish(plan, sub, n0 + n, own.C + n * own.c_block, own.c_point, high, epilogue);
        }
      }
    }
  }
}

template <int m>
void wgrad(ConvShape shape, const float* low, const float* high, float* dweight, float* scratch,
           int threads) {
  const Plan<m> plan(shape, 1);
  const Scratch all(plan, scratch);
  const int low_items = ceil_div(plan.cl_blocks, kWgradBlocks);
#pragma omp parallel num_threads(threads)
  {
    const Item<m> own(plan, all, 4, kWgradBlocks * kBlock);  // a column block for each parity
    for (int first = 0; first < plan.subs; first += plan.subs_per_chunk) {
      const int last = std::min(first + plan.subs_per_chunk, plan.subs);
      // Sums run over all images of a chunk alike.
      const int image0 = plan.sub(first).image;
      const Sub end = plan.sub(last - 1), chunk{0, image0, end.image + end.images - image0};
      transform_sub_low<m>(plan, chunk, 0, low, all.zeros, all.V);
      transform_sub_high<m>(plan, chunk, 0, high, all.zeros, all.M);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int item = 0; item < low_items * plan.ch_blocks; ++item) {
        const int k0 = item / plan.ch_blocks * kWgradBlocks, n = item % plan.ch_blocks;
        const int kb = std::min(kWgradBlocks, plan.cl_blocks - k0);
        for (int p = 0; p < plan.points; ++p) {
          const auto [begin, end] = plan.lines_at(chunk, p);
          const float* V = all.V + (size_t(p) * plan.cl_blocks + k0) * plan.line_block;
          const float* M = all.M + (size_t(p) * plan.ch_blocks + n) * 4 * plan.line_block;
          for (int k = 0; k < kb; ++k)
            for (int i = 0; i < kBlock; i += kColumnsMR)
              for (int q = 0; q < 4; q += kNB)
                // In parts, as long sums in float32 lose digits.
                for (int t = begin; t == begin || t < end; t += kSumLines)
                  columns_kernel<kColumnsMR, kNB>(
                      V + k * plan.line_block + t * kBlock + i, kBlock,
                      M + q * plan.line_block + t * kBlock, kBlock, plan.line_block,
                      own.C + p * own.c_point + q * own.c_block + (k * kBlock + i) * kBlock,
                      own.c_block, std::min(kSumLines, end - t), t > begin);
        }
        for (int k = 0; k < kb; ++k)
          finish_weight<m>(plan, k0 + k, n, own.C + k * kBlock * kBlock, own.c_point, own.c_block,
                           first > 0, dweight);
      }
    }
  }
}

size_t scratch(int m, ConvShape s, int groups, int threads) {
  switch (m) {
    case 2:
      return Plan<2>(s, groups).scratch_floats(threads);
    case 3:
      return Plan<3>(s, groups).scratch_floats(threads);
    default:
      return Plan<4>(s, groups).scratch_floats(threads);
  }
}

void fprop(int m, ConvShape s, const float* high, ConvWeight weight, float* low,
           ConvEpilogue epilogue, float* scratch, int threads) {
  (m == 2 ? fprop<2> : m == 3 ? fprop<3> : fprop<4>)(s, high, weight, low, epilogue, scratch,
                                                     threads);
}

void dgrad(int m, ConvShape s, const float* low, ConvWeight weight, float* high,
           ConvEpilogue epilogue, float* scratch, int threads) {
  (m == 2 ? dgrad<2> : m == 3 ? dgrad<3> : dgrad<4>)(s, low, weight, high, epilogue, scratch,
                                                     threads);
}

void wgrad(int m, ConvShape s, const float* low, const float* high, float* dweight,
           float* scratch, int threads) {
  (m == 2 ? wgrad<2> : m == 3 ? wgrad<3> : wgrad<4>)(s, low, high, dweight, scratch, threads);
}

}  // namespace fastgan::FASTGAN_ISA::winograd
