// 4x4 stride-2 pad-1 convolutions between an image of 1 to 4 channels and many channels, directly.
//
// With so few channels on the high side, the taps of a row of the kernel, 4·ch floats, lie next to
// one another in NHWC memory. So all three are products with the same small matrix of windows:
//
//     fprop: L[pixel][cl]  = sum over (kh, tap) of window[pixel][kh][tap] · W[kh][tap][cl]
//     wgrad: dW[kh][tap][cl] = sum over pixels of window[pixel][kh][tap] · L[pixel][cl]
//     dgrad: P[pixel][kh][tap] = sum over cl of L[pixel][cl] · W[cl][kh][tap], overlapped into H
//
// tap = kw·ch + c. Windows are read in place from rows that are copied with a pixel of zeros at
// either end.
#include <omp.h>

#include "activation.h"
#include "gemm.h"
#include "kernels.h"
#include "layout.h"

namespace fastgan::FASTGAN_ISA::thin {

// Parts of the batch whose weight gradients are summed apart and then in order, so that the sum
// does not depend on the number of threads.
constexpr int kSlots = 16;

struct Plan {
  ConvShape s;
  int taps;        // of a row of the kernel: 4 · ch
  int cl_blocks;
  size_t row;      // floats of a padded row of the image
  size_t low_row;  // floats of a channel block of a row of the low side
  // dgrad lays the taps of `rows_per_block` rows of the kernel into one block of 16.
  int rows_per_block, tap_blocks;

  explicit Plan(ConvShape shape) : s(shape) {
    taps = 4 * s.ch;
    cl_blocks = ceil_div(s.cl, kBlock);
    row = size_t(2 * s.w + 2) * s.ch + kBlock;
    low_row = size_t(s.w | 1) * kBlock;
    rows_per_block = s.ch <= 2 ? 4 / s.ch : 1;
    tap_blocks = 4 / rows_per_block;
  }
  size_t weight_floats() const { return size_t(16) * 4 * cl_blocks * kBlock; }
  size_t fprop_floats() const { return 4 * row; }
  size_t dgrad_floats() const {
    return cl_blocks * low_row + 2 * tap_blocks * low_row + low_row + row + 2 * kBlock;
  }
  size_t wgrad_floats() const { return 4 * row + cl_blocks * low_row; }
  size_t slot_floats() const { return size_t(4) * taps * cl_blocks * kBlock; }
  size_t thread_floats() const {
    return (std::max({fprop_floats(), dgrad_floats(), wgrad_floats()}) | 15) + 1;
  }
};

// Rows 2·y - 1 to 2·y + 2 of an image, each with a pixel of zeros before and after.
void copy_rows(const Plan& plan, const float* high, int image, int y, float* rows) {
  const size_t floats = size_t(2) * plan.s.w * plan.s.ch;
  for (int k = 0; k < 4; ++k) {
    const int source = 2 * y - 1 + k;
    float* out = rows + k * plan.row;
    if (source < 0 || source >= 2 * plan.s.h)
      std::memset(out, 0, plan.row * sizeof(float));
    else {
      std::memset(out, 0, plan.s.ch * sizeof(float));
      std::memcpy(out + plan.s.ch, high + (size_t(image) * 2 * plan.s.h + source) * floats,
                  floats * sizeof(float));
      std::memset(out + plan.s.ch + floats, 0, plan.s.ch * sizeof(float));
    }
  }
}

// A row of the low side in blocks: out[cl block][pixel][16], zeros past the last channel.
void block_row(const Plan& plan, const float* low, float* out) {
  for (int x = 0; x < plan.s.w; ++x)
    for (int c = 0; c < plan.cl_blocks * kBlock; c += kVec)
      store(out + (c / kBlock) * plan.low_row + x * kBlock + c % kBlock,
            load_first(low + size_t(x) * plan.s.cl + c, plan.s.cl - c));
}

// MR neighbouring pixels' sums over the windows, for NB blocks of low channels.
template <int MR, int NB, int kChannels>
void window_kernel(const float* rows, size_t row, const float* weight, size_t block, Vec* out) {
  using Tile = Accumulators<MR, NB>;
  Tile tile;
  tile.start();
  for (int kh = 0; kh < 4; ++kh) {
#pragma GCC unroll 4
    for (int k = 0; k < 4 * kChannels; ++k)
      tile.template add_product<2 * kChannels>(
          rows + kh * row + k, weight + (kh * 4 * kChannels + k) * kBlock, block);
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < Tile::kVectors; ++j) out[i * Tile::kVectors + j] = tile.r[i][j];
}

using WindowKernel = void (*)(const float*, size_t, const float*, size_t, Vec*);

template <int NB, int kChannels, int... I>
WindowKernel window_kernel_for(int mr, std::integer_sequence<int, I...>) {
  constexpr WindowKernel table[] = {&window_kernel<I + 1, NB, kChannels>...};
  return table[mr - 1];
}

template <int kChannels>
WindowKernel window_kernel_for(int mr, int nb) {
  using Sizes = std::make_integer_sequence<int, kRowsMR>;
  return nb == kNB ? window_kernel_for<kNB, kChannels>(mr, Sizes{})
                   : window_kernel_for<1, kChannels>(mr, Sizes{});
}

template <int kChannels, Activation kActivation>
void fprop(const Plan& plan, const float* high, const float* packed, float* low,
           const ConvEpilogue& epilogue, float* scratch, int threads) {
  const ConvShape& s = plan.s;
  const size_t block = size_t(4) * plan.taps * kBlock;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int image = 0; image < s.n; ++image)
    for (int y = 0; y < s.h; ++y) {
      float* rows = scratch + omp_get_thread_num() * plan.thread_floats();
      copy_rows(plan, high, image, y, rows);
      float* out_row = low + (size_t(image) * s.h + y) * s.w * s.cl;
      for_each_panel(plan.cl_blocks, [&](int n, int nb) {
        for_each_part(s.w, kRowsMR, [&](int first, int count) {
          Vec tile[kRowsMR * kNB * kVecsPerBlock];
          window_kernel_for<kChannels>(count, nb)(rows + size_t(first) * 2 * kChannels, plan.row,
                                                  packed + n * block, block, tile);
          const int vectors = nb * kVecsPerBlock;
          for (int j = 0; j < vectors; ++j) {
            const int c = n * kBlock + j * kVec;
            const Vec bias = epilogue.bias ? load_first(epilogue.bias + c, s.cl - c) : Vec{};
            for (int i = 0; i < count; ++i)
              store_first(out_row + size_t(first + i) * s.cl + c,
                          activate<kActivation>(tile[i * vectors + j] + bias,
                                                epilogue.negative_slope),
                          s.cl - c);
          }
        });
      });
    }
}

// One row of the image from two rows of products: a at kernel row a_kh, b at b_kh; null is none.
void overlap_row(const Plan& plan, const float* a, int a_kh, const float* b, int b_kh,
                 const ConvEpilogue& epilogue, float* sums, float* line, float* out) {
  const ConvShape& s = plan.s;
  const auto taps_at = [&](const float* products, int kh) {
    return products + kh / plan.rows_per_block * plan.low_row + kh % plan.rows_per_block * plan.taps;
  };
  const float* pa = a ? taps_at(a, a_kh) : nullptr;
  const float* pb = b ? taps_at(b, b_kh) : nullptr;
  for (int x = 0; x < s.w; ++x)
    for (int k = 0; k < kBlock; k += kVec) {
      Vec v = pa ? load(pa + x * kBlock + k) : Vec{};
      if (pb) v += load(pb + x * kBlock + k);
      store(sums + x * kBlock + k, v);
    }
  // The second half of a pixel's taps falls on the first half of its right neighbour's.
  const int half = 2 * s.ch;
  for (int x = 0; x <= s.w; ++x)
    for (int k = 0; k < half; k += kVec) {
      Vec v = x < s.w ? load(sums + x * kBlock + k) : Vec{};
      if (x > 0) v += load(sums + (x - 1) * kBlock + half + k);
      store(line + x * half + k, v);
    }
  const float* in = line + s.ch;
  const int floats = 2 * s.w * s.ch;
  // Bias per channel, spread over a vector that begins at channel `k % ch`.
  float bias[kVec + 4];
  with_activation(epilogue.activation, [&](auto activation) {
    if (!epilogue.bias) {
      for (int k = 0; k < floats; k += kVec)
        store_first(out + k,
                    activate<decltype(activation)::value>(load(in + k), epilogue.negative_slope),
                    floats - k);
      return;
    }
    for (int i = 0; i < kVec + 4; ++i) bias[i] = epilogue.bias[i % s.ch];
    for (int k = 0; k < floats; k += kVec)
      store_first(out + k,
                  activate<decltype(activation)::value>(load(in + k) + load(bias + k % s.ch),
                                                        epilogue.negative_slope),
                  floats - k);
  });
}

void dgrad(const Plan& plan, const float* low, const float* packed, float* high,
           const ConvEpilogue& epilogue, float* scratch, int threads) {
  const ConvShape& s = plan.s;
  const size_t image_floats = size_t(4) * s.h * s.w * s.ch;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int image = 0; image < s.n; ++image) {
    float* blocked = scratch + omp_get_thread_num() * plan.thread_floats();
    float* products = blocked + plan.cl_blocks * plan.low_row;  // of two rows in turn
    const size_t products_row = plan.tap_blocks * plan.low_row;
    float* sums = products + 2 * products_row;
    float* line = sums + plan.low_row + kBlock;
    float* out = high + image * image_floats;
    const size_t out_row = size_t(2) * s.w * s.ch;
    const float* before = nullptr;
    for (int y = 0; y <= s.h; ++y) {
      float* now = nullptr;
      if (y < s.h) {
        now = products + (y % 2) * products_row;
        block_row(plan, low + (size_t(image) * s.h + y) * s.w * s.cl, blocked);
        multiply_rows(s.w, plan.cl_blocks, plan.tap_blocks, blocked, plan.low_row, packed,
                      size_t(plan.cl_blocks) * kBlock * kBlock, now, plan.low_row, false);
      }
      if (y > 0)
        overlap_row(plan, now, 0, before, 2, epilogue, sums, line, out + (2 * y - 1) * out_row);
      if (y < s.h)
        overlap_row(plan, now, 1, before, 3, epilogue, sums, line, out + 2 * y * out_row);
      before = now;
    }
  }
}

void wgrad(const Plan& plan, const float* low, const float* high, float* dweight, float* scratch,
           int threads) {
  const ConvShape& s = plan.s;
  const int slots = std::min(kSlots, s.n);
  float* sums = scratch + threads * plan.thread_floats();
  const size_t c_block = size_t(4) * plan.taps * kBlock;
#pragma omp parallel num_threads(threads)
  {
    float* rows = scratch + omp_get_thread_num() * plan.thread_floats();
    float* blocked = rows + 4 * plan.row;
    blocked += (16 - (4 * plan.row) % 16) % 16;
#pragma omp for schedule(static)
    for (int slot = 0; slot < slots; ++slot) {
      float* C = sums + slot * plan.slot_floats();
      bool add = false;
      for (int image = slot * s.n / slots; image < (slot + 1) * s.n / slots; ++image)
        for (int y = 0; y < s.h; ++y, add = true) {
          copy_rows(plan, high, image, y, rows);
          block_row(plan, low + (size_t(image) * s.h + y) * s.w * s.cl, blocked);
          for_each_panel(plan.cl_blocks, [&](int n, int nb) {
            for (int kh = 0; kh < 4; ++kh)
              for_each_part(plan.taps, kColumnsMR, [&](int first, int count) {
                columns_kernel_for(count, nb)(
                    rows + kh * plan.row + first, 2 * s.ch, blocked + n * plan.low_row, kBlock,
                    plan.low_row, C + n * c_block + (kh * plan.taps + first) * kBlock, c_block,
                    s.w, add);
              });
          });
        }
    }
    // Slots in order; then from [cl block][kh · taps][16] to [cl][kh][kw][ch].
#pragma omp for schedule(static)
    for (int line = 0; line < plan.cl_blocks * 4 * plan.taps; ++line) {
      const int n = line / (4 * plan.taps), k = line % (4 * plan.taps);
      for (int c = 0; c < kBlock && n * kBlock + c < s.cl; ++c) {
        float sum = 0.0f;
        for (int slot = 0; slot < slots; ++slot)
          sum += sums[slot * plan.slot_floats() + size_t(line) * kBlock + c];
        dweight[size_t(n * kBlock + c) * 4 * plan.taps + k] = sum;
      }
    }
  }
}

template <int kChannels>
void fprop_channels(const Plan& plan, const float* high, const float* packed, float* low,
                    const ConvEpilogue& epilogue, float* scratch, int threads) {
  with_activation(epilogue.activation, [&](auto activation) {
    fprop<kChannels, decltype(activation)::value>(plan, high, packed, low, epilogue, scratch,
                                                  threads);
  });
}

size_t scratch(ConvShape s, int threads) {
  const Plan plan(s);
  return plan.weight_floats() + threads * plan.thread_floats() + kSlots * plan.slot_floats();
}

void fprop(ConvShape s, const float* high, ConvWeight w, float* low, ConvEpilogue epilogue,
           float* scratch, int threads) {
  const Plan plan(s);
  // packed[cl block][kh][tap][16]
  for (int cl = 0; cl < plan.cl_blocks * kBlock; ++cl)
    for (int k = 0; k < 4 * plan.taps; ++k) {
      const int kh = k / plan.taps, kw = k % plan.taps / s.ch, c = k % s.ch;
      scratch[(size_t(cl / kBlock) * 4 * plan.taps + k) * kBlock + cl % kBlock] =
          cl < s.cl ? w.data[cl * w.stride_cl + c * w.stride_ch + kh * w.stride_kh +
                             kw * w.stride_kw]
                    : 0.0f;
    }
  float* rest = scratch + plan.weight_floats();
  constexpr decltype(&fprop_channels<1>) by_channels[] = {fprop_channels<1>, fprop_channels<2>,
                                                          fprop_channels<3>, fprop_channels<4>};
  by_channels[s.ch - 1](plan, high, scratch, low, epilogue, rest, threads);
}

void dgrad(ConvShape s, const float* low, ConvWeight w, float* high, ConvEpilogue epilogue,
           float* scratch, int threads) {
  const Plan plan(s);
  // packed[tap block][cl][16]
  const size_t block = size_t(plan.cl_blocks) * kBlock * kBlock;
  std::memset(scratch, 0, plan.tap_blocks * block * sizeof(float));
  for (int kh = 0; kh < 4; ++kh)
    for (int cl = 0; cl < s.cl; ++cl)
      for (int tap = 0; tap < plan.taps; ++tap)
        scratch[kh / plan.rows_per_block * block + size_t(cl) * kBlock +
                kh % plan.rows_per_block * plan.taps + tap] =
            w.data[cl * w.stride_cl + tap % s.ch * w.stride_ch + kh * w.stride_kh +
                   tap / s.ch * w.stride_kw];
  dgrad(plan, low, scratch, high, epilogue, scratch + plan.weight_floats(), threads);
}

void wgrad(ConvShape s, const float* low, const float* high, float* dweight, float* scratch,
           int threads) {
  const Plan plan(s);
  wgrad(plan, low, high, dweight, scratch + plan.weight_floats(), threads);
}

}  // namespace fastgan::FASTGAN_ISA::thin
