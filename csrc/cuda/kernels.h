// The host functions that launch the CUDA kernels; bindings.cpp checks what they are given.
//
// Images are NHWC and dense, of one of the floating dtypes; statistics, sums and parts are float32.
// A launcher only puts kernels on the stream of the queue: it allocates nothing, waits for nothing
// and keeps nothing, so that all of them can be captured in a CUDA graph. Results depend on values
// and shapes, never on scheduling: reductions run over fixed parts that are merged in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgan {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kUInt8, kBool, kInt64 };

enum class Activation : int { kNone, kRelu, kLeakyRelu, kTanh };

// An activation and, where it is leaky, its slope below zero.
struct Act {
  Activation kind;
  float negative_slope;
};

// Where kernels go: the device must be current.
struct Queue {
  cudaStream_t stream;
};

// One value for each channel, of any floating dtype; may be null.
struct PerChannel {
  void* data;
  Dtype dtype;
};

// `rows` rows of `channels` in each of `groups` parts.
struct BatchNormShape {
  int groups, rows, channels;
};

// Statistics are (count, mean, M2), M2 being the sum of squared deviations, of tiles of rows:
// [groups * tiles, 3, channels]. Those of one group follow one another.
int bn_tiles(BatchNormShape, Dtype);
void bn_stats(Queue, BatchNormShape, Dtype, const void* x, float* stats, int tiles);
// As many as bn_act_forward merges without help.
int bn_most_tiles();
// Merges runs of a group's `tiles` into bn_most_tiles() or fewer, `folded`.
void bn_fold(Queue, BatchNormShape, const float* stats, int tiles, float* out, int folded);
// y = act((x - mean) * invstd * weight + bias). Where there are `stats`, writes mean, invstd and
// the biased var, [groups, channels], of which it takes mean and invstd otherwise.
void bn_act_forward(Queue, BatchNormShape, Dtype, const void* x, const float* stats, int tiles,
                    float eps, float* mean, float* invstd, float* var, PerChannel weight,
                    PerChannel bias, Act, void* y);
// dx, and dweight, dbias [channels]; where `training`, mean and invstd are functions of x.
// sums: [groups * bn_tiles, 2, channels] of scratch.
void bn_act_backward(Queue, BatchNormShape, Dtype, const void* dy, const void* x, const float* mean,
                     const float* invstd, PerChannel weight, PerChannel bias, bool training, Act,
                     float* sums, void* dx, PerChannel dweight, PerChannel dbias);
// Running statistics move by `momentum` towards those of each group, in order.
void bn_update_running(Queue, int groups, int channels, const float* mean, const float* var,
                       float momentum, float unbiased, PerChannel running_mean,
                       PerChannel running_var);

// One target for each group of logits.
constexpr int kMostTargets = 64;
struct Targets {
  float of[kMostTargets];
};
enum class GanLoss : int { kBce, kLsgan, kHinge, kWasserstein };
// loss and d, [groups], and dlogits = d loss[g] / d logit, of `size` logits in each group. d is the
// mean sigmoid for kBce and logit for the others.
void gan_loss_forward(Queue, int groups, int size, Dtype, const void* logits, Targets, GanLoss,
                      void* loss, void* d, void* dlogits);

// Bytes of one row of an image that fit into a block's shared memory.
constexpr int kMostRowBytes = 32768;
// y [n, h, w, c] of images [.., h, w, c] uint8; index and flip may be null.
void augment_forward(Queue, int n, int h, int w, int c, const uint8_t* images, const int64_t* index,
                     const bool* flip, Dtype, void* y);

// The sides of a convolution: low [n, h, w, cl], high [n, high_h, high_w, ch]; the weight lies in
// memory as [cl, kernel_h, kernel_w, ch].
struct ConvShape {
  int n, h, w, cl, ch, high_h, high_w, kernel_h, kernel_w, stride, padding;
};

// What follows a convolution in the same kernel. `stats` may be null; no tile crosses from one of
// the `groups` parts of the batch to the next.
struct ConvEpilogue {
  PerChannel bias;
  Act act;
  float* stats;
  int groups;
};

// Of any size, on tensor cores, by tiles of `sides`: 128x128, 128x64 or 64x64; by the last of them
// where the channels of a side are no multiple of 16 bytes. float32 is multiplied as TF32, where
// not `tf32` in three passes, which have nearly the rounding of float32.
struct MmaSides {
  int rows, columns;
};
// Along each side of a kernel.
constexpr int kMostTaps = 16;
//
// stats_tiles: of a batch in so many groups. wgrad's sum over pixels is cut into parts, so that a
// device of so many multiprocessors is busy; sums: [parts, size of the weight] of scratch, unused
// where there is one part.
int conv_fprop_stats_tiles(ConvShape, int groups);
int conv_dgrad_stats_tiles(ConvShape, int groups);
int conv_wgrad_parts(ConvShape, MmaSides, int multiprocessors);
void conv_fprop(Queue, ConvShape, Dtype, MmaSides, bool tf32, const void* high, const void* weight,
                ConvEpilogue, void* low);
void conv_dgrad(Queue, ConvShape, Dtype, MmaSides, bool tf32, const void* low, const void* weight,
                ConvEpilogue, void* high);
void conv_wgrad(Queue, ConvShape, Dtype, MmaSides, bool tf32, const void* low, const void* high,
                int parts, float* sums, void* dweight);

// Where few columns make a product not worth it. Thin: 4x4 with stride 2 and padding 1, where high
// is 2h x 2w and has few channels. Dots: h = w = 1 with few channels and a kernel as large as the
// high side, without padding; they have no statistics.
constexpr int kMostThinChannels = 4;
int thin_dgrad_stats_tiles(ConvShape, int groups);
void thin_dgrad(Queue, ConvShape, Dtype, const void* low, const void* weight, ConvEpilogue,
                void* high);
constexpr int kMostDots = 4;
void dot_fprop(Queue, ConvShape, Dtype, const void* high, const void* weight, ConvEpilogue,
               void* low);

// dx = dy * act'(z) from y = act(z), of `count` elements.
void act_backward(Queue, int64_t count, Dtype, const void* dy, const void* y, Act, void* dx);

}  // namespace fastgan
