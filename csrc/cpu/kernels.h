// What every instruction set's build of the kernels offers, and the table that picks one.
//
// Tensors are float32, NHWC and dense; weights say where their elements lie by strides. Nothing
// here knows of torch: the caller allocates every output, and `scratch` is memory of at least the
// size that the matching *_scratch function returns. No function keeps state. Results depend on
// the shapes and, where it says so, on the number of threads; never on scheduling.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fastgan {

enum class Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2, kTanh = 3 };
enum class GanLoss : int { kBce = 0, kLsgan = 1, kHinge = 2, kWasserstein = 3 };

constexpr float kTanhPolynomial[5] = {-0.33333271741867065f, 0.13331152498722076f,
                                      -0.053714100271463394f, 0.02055170387029648f,
                                      -0.005603899713605642f};

// The two sides of a 4x4 stride-2 pad-1 convolution: low [n, h, w, cl], high [n, 2h, 2w, ch].
struct ConvShape {
  int n, h, w, cl, ch;
};

// Weight [cl, ch, 4, 4] as torch holds it, strides in elements.
struct ConvWeight {
  const float* data;
  ptrdiff_t stride_cl, stride_ch, stride_kh, stride_kw;
};

// What follows a convolution in the same pass. `stats`, if not null, takes for every tile of the
// output the triple (count, mean, M2) of each channel: [tiles, 3, channels], see conv_stats_tiles.
struct ConvEpilogue {
  const float* bias;  // [channels] or null
  Activation activation;
  float negative_slope;
  float* stats;
  int groups;  // equal parts of the batch; no tile crosses from one to the next
};

// The matrix that a batch norm sees: `rows` rows of `channels` in each of `groups` parts.
struct BatchNormShape {
  int groups;
  int64_t rows;
  int channels;
};

struct Kernels {
  const char* isa;

  // Winograd for 4x4 stride 2 pad 1, tiles of m x m (2, 3 or 4) on the low side.
  size_t (*winograd_scratch)(int m, ConvShape, int groups, int threads);
  void (*winograd_fprop)(int m, ConvShape, const float* high, ConvWeight, float* low, ConvEpilogue,
                         float* scratch, int threads);
  void (*winograd_dgrad)(int m, ConvShape, const float* low, ConvWeight, float* high, ConvEpilogue,
                         float* scratch, int threads);
  // dweight is [cl, 4, 4, ch], dense.
  void (*winograd_wgrad)(int m, ConvShape, const float* low, const float* high, float* dweight,
                         float* scratch, int threads);

  // Direct, for 4x4 stride 2 pad 1 with 1 to 4 channels on the high side.
  size_t (*thin_scratch)(ConvShape, int threads);
  void (*thin_fprop)(ConvShape, const float* high, ConvWeight, float* low, ConvEpilogue,
                     float* scratch, int threads);
  void (*thin_dgrad)(ConvShape, const float* low, ConvWeight, float* high, ConvEpilogue,
                     float* scratch, int threads);
  void (*thin_wgrad)(ConvShape, const float* low, const float* high, float* dweight,
                     float* scratch, int threads);

  // (count, mean, M2) of tiles of `tile_rows` rows of x, to every `tile_stride`-th triple of stats
  // [groups * tiles * tile_stride, 3, channels]; the others get a count of zero.
  void (*bn_stats)(BatchNormShape, int64_t tile_rows, int tile_stride, const float* x,
                   float* stats, int threads);
  // Merges `tiles` triples a group in order: mean and biased var, both [groups, channels].
  void (*bn_merge)(int groups, int tiles, int channels, const float* stats, float* mean,
                   float* var);
  // y = act((x - mean) · invstd · weight + bias); invstd is [groups, channels].
  void (*bn_apply)(BatchNormShape, const float* x, const float* mean, const float* invstd,
                   const float* weight, const float* bias, Activation, float negative_slope,
                   float* y, int threads);
  // dx, dweight, dbias of bn_apply; where `training`, mean and invstd are functions of x.
  // partial: [groups * (bn_tiles + 1), 2, channels] of scratch.
  void (*bn_backward)(BatchNormShape, const float* dy, const float* x, const float* mean,
                      const float* invstd, const float* weight, const float* bias, Activation,
                      float negative_slope, bool training, float* partial, float* dx,
                      float* dweight, float* dbias, int threads);

  // dx = dy · act'(x) with y = act(x).
  void (*act_backward)(int64_t count, const float* dy, const float* y, Activation,
                       float negative_slope, float* dx, int threads);

  // loss[g], d[g] and dlogits = d loss[g] / d logit; d is the mean sigmoid for kBce and logit for
  // the others.
  void (*gan_loss_forward)(int groups, int64_t count, const float* logits, const float* targets,
                           GanLoss kind, float* loss, float* d, float* dlogits);
};

// Tiles of (count, mean, M2) that a convolution's epilogue writes; those of one group follow one
// another, and every group has as many.
int conv_fprop_stats_tiles(ConvShape, int groups);
int conv_dgrad_stats_tiles(ConvShape, int groups);
int conv_images_per_stats_tile(ConvShape, int groups);
// Rows of a tile in the batch norm's own reductions, and tiles of each group.
int64_t bn_tile_rows(BatchNormShape);
int bn_tiles(BatchNormShape);

extern const Kernels kernels_baseline;
#if defined(FASTGAN_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Slowest first.
constexpr const char* kIsas[] = {"baseline", "avx2", "avx512"};

// The kernels named `isa`, one of kIsas; null if there are none or the CPU cannot.
const Kernels* find_kernels(const char* isa);
// The fastest that the CPU can run.
const Kernels& best_kernels();

}  // namespace fastgan
