// Gather, flip and scale uint8 images, NHWC to NHWC.
//
// A block has whole rows of one image. They go through shared memory, so that reads and writes are
// 16 bytes at a time and in order whether the rows are mirrored or not.
#include <algorithm>
#include <numeric>

#include "common.cuh"

namespace fastgan {
namespace {

constexpr int kThreads = 256;
// Bytes that a block has where rows are short.
constexpr int kBytes = 4096;
constexpr int kBytesAtOnce = 16;

// byte / 127.5 - 1, both rounded as an IEEE division rounds: the quotient by the reciprocal is off
// by at most an ulp, which its remainder corrects.
__device__ __forceinline__ float scaled(uint8_t byte) {
  constexpr float kReciprocal = 1.0f / 127.5f;
  const float quotient = float(byte) * kReciprocal;
  return fmaf(fmaf(-quotient, 127.5f, float(byte)), kReciprocal, quotient) - 1.0f;
}

template <class T, int READ, int WRITE>
__global__ __launch_bounds__(kThreads) void augment_fwd_kernel(
    const uint8_t* images, const int64_t* index, const bool* flip, T* y, int w, int c, int size,
    int chunk, int chunks) {
  const int image = blockIdx.x / chunks, begin = blockIdx.x % chunks * chunk;
  const int count = min(chunk, size - begin);
  const int64_t source = index ? index[image] : image;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(fastgan_shared);
  const uint8_t* const from = images + source * size + begin;
  for (int i = threadIdx.x * READ; i < count; i += kThreads * READ)
    store(bytes + i, load<READ>(from + i));
  __syncthreads();
  const bool mirrored = flip && flip[image];
  T* const to = y + int64_t(image) * size + begin;
  for (int i = threadIdx.x * WRITE; i < count; i += kThreads * WRITE) {
    Vector<T, WRITE> out;
#pragma unroll
    for (int j = 0; j < WRITE; ++j) {
      // The same channel of the pixel as far from the other end of the row.
      const int at = i + j, x = mirrored ? at / c % w : 0;
      out.at[j] = from_float<T>(scaled(bytes[mirrored ? at + (w - 1 - 2 * x) * c : at]));
    }
    store(to + i, out);
  }
}

}  // namespace

void augment_forward(Queue queue, int n, int h, int w, int c, const uint8_t* images,
                     const int64_t* index, const bool* flip, Dtype dtype, void* y) {
  const int row = w * c, size = h * row;
  // Rows that are together a multiple of 16 bytes.
  const int step = kBytesAtOnce / std::gcd(kBytesAtOnce, row);
  const bool vectors = size % kBytesAtOnce == 0 && step * row <= kMostRowBytes;
  const int unit = vectors ? step : 1;
  const int chunk = std::max(kBytes / (row * unit), 1) * unit * row, chunks = ceil_div(size, chunk);
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const auto run = [&](auto* kernel) {
      launch(queue, "augment_forward", kernel, dim3(unsigned(n) * chunks), kThreads, chunk, images,
             index, flip, static_cast<T*>(y), w, c, size, chunk, chunks);
    };
    if (vectors)
      run(augment_fwd_kernel<T, kBytesAtOnce, kWidest<T>>);
    else
      run(augment_fwd_kernel<T, 1, 1>);
  });
}

}  // namespace fastgan
