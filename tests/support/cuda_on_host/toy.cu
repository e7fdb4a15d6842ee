// Kernels that are right, and kernels that break one rule each, for the tests of the emulator.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "ptx.cuh"

extern __shared__ float4 fastgan_shared[];

namespace {

using namespace fastgan;

__device__ float* shared_floats() { return reinterpret_cast<float*>(fastgan_shared); }
__device__ int global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// y: each block's part of x, turned round.
template <bool kBarrier>
__global__ void turn(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int first = blockIdx.x * blockDim.x, count = min(int(blockDim.x), n - first);
  const int i = threadIdx.x;
  if (i < count) shared_floats()[i] = x[first + i];
  if (kBarrier) __syncthreads();
  if (i < count) y[first + i] = shared_floats()[count - 1 - i];
}

// y[block]: the sum of its part of x, by warps of `kWidth` lanes and then of their sums.
template <int kWidth, bool kBarrier>
__global__ void __launch_bounds__(1024) add(const float* x, float* y, int n) {
  const int i = global_thread(), lane = threadIdx.x % 32, warps = blockDim.x / 32;
  float sum = i < n ? __ldg(x + i) : 0.0f;
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step, kWidth);
  if (lane == 0) shared_floats()[threadIdx.x / 32] = sum;
  if (kBarrier) __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = lane < warps ? shared_floats()[lane] : 0.0f;
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (lane == 0) y[blockIdx.x] = sum;
}

// y[i]: x[i] of the lane 7 further, by shared memory.
template <bool kSync>
__global__ void neighbour(const float* x, float* y, int) {
  const int i = global_thread(), lane = threadIdx.x % 32;
  float* warp = shared_floats() + threadIdx.x / 32 * 32;
  warp[lane] = x[i];
  if (kSync) __syncwarp();
  y[i] = warp[(lane + 7) % 32];
}

// y[thread]: what each shuffle of a value gives, for operands -40..40.
template <class T, int kWidth>
__global__ void shuffles(const float* x, float* y, int) {
  const unsigned threads = blockDim.x;
  const T value = T(x[threadIdx.x]);
  for (int operand = -40; operand <= 40; ++operand, y += 4 * threads) {
    float* out = y + threadIdx.x;
    out[0] = float(__shfl_sync(0xffffffffu, value, operand, kWidth));
    out[threads] = float(__shfl_up_sync(0xffffffffu, value, operand, kWidth));
    out[2 * threads] = float(__shfl_down_sync(0xffffffffu, value, operand, kWidth));
    out[3 * threads] = float(__shfl_xor_sync(0xffffffffu, value, operand, kWidth));
  }
}

__global__ void ballot(const float* x, float* y, int) {
  const unsigned votes = __ballot_sync(0xffffffffu, x[global_thread()] > 0.0f);
  y[global_thread()] = float(votes & 0xffffff);
}

// The halves of a warp by themselves, then together.
__global__ void halves(const float* x, float* y, int) {
  const int lane = threadIdx.x % 32;
  float value = x[global_thread()];
  if (lane < 16) {
    value = __shfl_xor_sync(0x0000ffffu, value, 1);
    value = __shfl_xor_sync(0x0000ffffu, value, 2);
  } else {
    value = __shfl_xor_sync(0xffff0000u, value, 4);
  }
  y[global_thread()] = __shfl_xor_sync(0xffffffffu, value, 16);
}

__global__ void grid_of_blocks(const float*, float* y, int) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  y[block * threads + thread] = float(thread + 1000 * block);
}

__global__ void unwritten(const float*, float* y, int) {
  y[global_thread()] = shared_floats()[threadIdx.x];
}

enum Lacks { kNothing, kCommit, kWait, kGroup, kBarrier, kOrder };

// y: each tile of x turned round, or zeros from n on. Threads copy kWidth floats of each tile, and
// kStages - 1 tiles ahead.
template <int kStages, int kWidth, Lacks kLacks>
__global__ void pipeline(const float* x, float* y, int n) {
  const int tile = kWidth * blockDim.x, tiles = (n + tile - 1) / tile, own = kWidth * threadIdx.x;
  const auto fetch = [&](int i) {
    const int at = i * tile + own;
    const bool real = at < n;
    // What is not real is not read.
    const void* const from = real ? x + at : reinterpret_cast<const float*>(1);
    if (i < tiles) copy_async<4 * kWidth>(shared_floats() + i % kStages * tile + own, from, real);
    if (kLacks != kCommit) commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  for (int i = 0; i < tiles; ++i) {
    if (kLacks != kWait) wait_for_copies<kStages - 2 + (kLacks == kGroup)>();
    if (kLacks == kOrder) fetch(i + kStages - 1);
    if (kLacks != kBarrier) __syncthreads();
    if (kLacks != kOrder) fetch(i + kStages - 1);
    for (int j = threadIdx.x; j < tile; j += blockDim.x)
      y[i * tile + j] = shared_floats()[i % kStages * tile + tile - 1 - j];
  }
}

// y: what a copy has of a number that changes before the copy is waited for.
__global__ void copies_what_changes(const float* x, float* y, int) {
  float* const from = y + global_thread();
  *from = x[global_thread()];
  copy_async<4>(shared_floats() + threadIdx.x, from, true);
  commit_copies();
  *from = 9.0f;
  wait_for_copies<0>();
  *from = shared_floats()[threadIdx.x];
}

// y: what a block has of the copies that the block before did not wait for.
__global__ void leaves_copies(const float* x, float* y, int) {
  wait_for_copies<0>();
  y[global_thread()] = shared_floats()[threadIdx.x];
  __syncthreads();
  copy_async<4>(shared_floats() + threadIdx.x, x, true);
  commit_copies();
}

// y: the registers that a warp gets of 32 rows, which are in shared memory in another order.
template <bool kTransposed, bool kSync>
__global__ void matrices(const float* x, float* y, int) {
  char* const rows = reinterpret_cast<char*>(shared_floats());
  const int lane = threadIdx.x;
  std::memcpy(rows + 16 * lane, x + 4 * lane, 16);
  if (kSync) __syncwarp();
  uint32_t registers[4];
  load_matrices<kTransposed>(rows + (5 * lane + 3) % 32 * 16, registers);
  std::memcpy(y + 4 * lane, registers, sizeof registers);
}

// y: the sums; x: for each lane what it holds of A, of B, and of the sums before.
template <class T>
__global__ void products(const float* x, float* y, int) {
  uint32_t a[4], b[2];
  float sums[4];
  const float* const own = x + 10 * global_thread();
  std::memcpy(a, own, sizeof a);
  std::memcpy(b, own + 4, sizeof b);
  std::memcpy(sums, own + 6, sizeof sums);
  multiply_add<T>(a, b, sums);
  std::memcpy(y + 4 * global_thread(), sums, sizeof sums);
}

// What the emulator refuses, from here on.

__global__ void some_at_barrier(const float*, float*, int) {
  if (threadIdx.x < 64) __syncthreads();  // refused: some_at_barrier
}

__global__ void two_barriers(const float*, float*, int) {
  if (threadIdx.x < 32) {
    __syncthreads();  // refused: two_barriers
  } else {
    __syncthreads();
  }
}

__global__ void barrier_and_shuffle(const float* x, float* y, int) {
  if (threadIdx.x % 32 == 5) __syncthreads();
  y[0] = __shfl_sync(0xffffffffu, x[0], 0);  // refused: barrier_and_shuffle
  if (threadIdx.x % 32 != 5) __syncthreads();
}

__global__ void returned_lane(const float* x, float* y, int) {
  if (threadIdx.x % 32 == 31) return;
  y[0] = __shfl_down_sync(0xffffffffu, x[0], 1);  // refused: returned_lane
}

__global__ void all_lanes(const float* x, float* y, int) {
  y[0] = __shfl_down_sync(0xffffffffu, x[0], 1);  // refused: all_lanes
}

__global__ void lane_outside_its_mask(const float* x, float* y, int) {
  y[0] = __shfl_sync(0x0000ffffu, x[0], 0);  // refused: lane_outside_its_mask
}

__global__ void reads_outside_its_mask(const float* x, float* y, int) {
  if (threadIdx.x % 32 < 16)
    y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[0], 16);  // refused: reads_outside_its_mask
}

__global__ void other_masks(const float* x, float* y, int) {
  const unsigned mask = threadIdx.x % 2 ? 0xffffffffu : 0xfffffffeu | (threadIdx.x == 0);
  y[threadIdx.x] = __shfl_sync(mask, x[0], 1);  // refused: other_masks
}

__global__ void two_shuffles(const float* x, float* y, int) {
  if (threadIdx.x < 16)
    y[threadIdx.x] = __shfl_sync(0xffffffffu, x[0], 0);  // refused: two_shuffles
  else
    y[threadIdx.x] = __shfl_sync(0xffffffffu, x[0], 0);
}

__global__ void width_of_five(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_sync(0xffffffffu, x[0], 0, 5);  // refused: width_of_five
}

__global__ void copies_to_misaligned(const float* x, float*, int) {
  copy_async<8>(shared_floats() + 1, x, true);  // refused: copies_to_misaligned
}

__global__ void copies_from_misaligned(const float* x, float*, int) {
  copy_async<16>(shared_floats(), x + 2, true);  // refused: copies_from_misaligned
}

__global__ void copies_past_shared(const float* x, float*, int) {
  copy_async<4>(shared_floats() + threadIdx.x + 1, x, true);  // refused: copies_past_shared
}

__global__ void copies_before_shared(const float* x, float*, int) {
  copy_async<4>(shared_floats() - 1, x, true);  // refused: copies_before_shared
}

__global__ void copies_to_global(const float* x, float* y, int) {
  copy_async<4>(y, x, false);  // refused: copies_to_global
}

__global__ void matrices_misaligned(const float*, float*, int) {
  uint32_t out[4];
  load_matrices<false>(shared_floats() + 2, out);  // refused: matrices_misaligned
}

__global__ void matrices_past_shared(const float*, float*, int) {
  uint32_t out[4];
  load_matrices<true>(shared_floats() + blockDim.x, out);  // refused: matrices_past_shared
}

__global__ void matrices_without_lane(const float*, float*, int) {
  uint32_t out[4];
  if (threadIdx.x % 32 == 31) return;
  load_matrices<false>(shared_floats(), out);  // refused: matrices_without_lane
}

__global__ void product_without_lane(const float*, float*, int) {
  const uint32_t a[4] = {}, b[2] = {};
  float sums[4] = {};
  if (threadIdx.x % 32 == 3) __syncthreads();
  multiply_add<float>(a, b, sums);  // refused: product_without_lane
}

__global__ void two_products(const float*, float*, int) {
  const uint32_t a[4] = {}, b[2] = {};
  float sums[4] = {};
  if (threadIdx.x < 16)
    multiply_add<__half>(a, b, sums);  // refused: two_products
  else
    multiply_add<__half>(a, b, sums);
}

// What the sanitizers find, from here on.

__global__ void writes_past_end(const float* x, float* y, int n) {
  if (global_thread() <= n) y[global_thread()] = x[0];
}

__global__ void reads_before_start(const float* x, float* y, int) {
  y[global_thread()] = x[global_thread() - 1];
}

__global__ void past_shared(const float*, float* y, int) {
  y[0] = shared_floats()[blockDim.x];
}

__global__ void before_shared(const float*, float* y, int) {
  y[0] = shared_floats()[int(threadIdx.x) - 1];
}

__global__ void misaligned(const float* x, float* y, int) {
  *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x + 1);
}

__global__ void race_in_block(const float* x, float* y, int) {
  if (threadIdx.x % 32 == 0) y[0] = x[threadIdx.x];
}

__global__ void race_in_warp(const float* x, float* y, int) {
  y[threadIdx.x % 31] = x[threadIdx.x];
}

__global__ void race_in_shared(const float* x, float* y, int) {
  shared_floats()[threadIdx.x / 2] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared_floats()[threadIdx.x / 2];
}

// The halves of a warp have no order between them, though both wait.
__global__ void race_of_halves(const float* x, float* y, int) {
  const int lane = threadIdx.x % 32;
  shared_floats()[lane] = x[lane];
  if (lane < 16)
    __syncwarp(0x0000ffffu);
  else
    __syncwarp(0xffff0000u);
  y[lane] = shared_floats()[31 - lane];
}

// A barrier orders what comes before it, not what comes after.
__global__ void race_after_barrier(const float* x, float* y, int) {
  shared_floats()[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) shared_floats()[40] = 1.0f;
  if (threadIdx.x == 40) y[0] = shared_floats()[40];
  __syncthreads();
}

// Each block's first thread writes one number after a barrier.
__global__ void race_of_blocks(const float* x, float* y, int) {
  shared_floats()[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) y[0] = shared_floats()[5];
}

// The block after reads what this one wrote.
__global__ void race_with_block_before(const float* x, float* y, int) {
  y[blockIdx.x * 2 + 2] = x[0];
  y[blockIdx.x * 2 + 1] = y[blockIdx.x * 2];
}

__global__ void copies_past_end(const float* x, float*, int) {
  copy_async<16>(shared_floats() + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  commit_copies();
  wait_for_copies<0>();
}

// Lanes that multiply together have no order by that, nor by loading what they multiply.
__global__ void race_over_product(const float* x, float* y, int) {
  uint32_t a[4];
  float sums[4] = {};
  load_matrices<false>(shared_floats(), a);
  shared_floats()[32 + threadIdx.x] = x[threadIdx.x];
  const uint32_t b[2] = {a[0], a[1]};
  multiply_add<__nv_bfloat16>(a, b, sums);
  load_matrices<false>(shared_floats(), a);
  y[threadIdx.x] = shared_floats()[63 - threadIdx.x];
}

struct {
  const char* name;
  void (*kernel)(const float*, float*, int);
} const kKernels[] = {
#define TOY(...) {#__VA_ARGS__, __VA_ARGS__}
    TOY(turn<true>),
    TOY(turn<false>),
    TOY(add<32, true>),
    TOY(add<16, true>),
    TOY(add<32, false>),
    TOY(neighbour<true>),
    TOY(neighbour<false>),
    TOY(shuffles<float, 32>),
    TOY(shuffles<int, 8>),
    TOY(shuffles<double, 16>),
    TOY(shuffles<long long, 1>),
    TOY(ballot),
    TOY(halves),
    TOY(grid_of_blocks),
    TOY(unwritten),
    TOY(pipeline<2, 1, kNothing>),
    TOY(pipeline<3, 2, kNothing>),
    TOY(pipeline<4, 4, kNothing>),
    TOY(pipeline<3, 4, kCommit>),
    TOY(pipeline<3, 4, kWait>),
    TOY(pipeline<3, 4, kGroup>),
    TOY(pipeline<3, 4, kBarrier>),
    TOY(pipeline<3, 4, kOrder>),
    TOY(copies_what_changes),
    TOY(leaves_copies),
    TOY(matrices<false, true>),
    TOY(matrices<true, true>),
    TOY(matrices<false, false>),
    TOY(products<__nv_bfloat16>),
    TOY(products<__half>),
    TOY(products<float>),
    TOY(some_at_barrier),
    TOY(two_barriers),
    TOY(barrier_and_shuffle),
    TOY(returned_lane),
    TOY(all_lanes),
    TOY(lane_outside_its_mask),
    TOY(reads_outside_its_mask),
    TOY(other_masks),
    TOY(two_shuffles),
    TOY(width_of_five),
    TOY(copies_to_misaligned),
    TOY(copies_from_misaligned),
    TOY(copies_past_shared),
    TOY(copies_before_shared),
    TOY(copies_to_global),
    TOY(matrices_misaligned),
    TOY(matrices_past_shared),
    TOY(matrices_without_lane),
    TOY(product_without_lane),
    TOY(two_products),
    TOY(writes_past_end),
    TOY(reads_before_start),
    TOY(past_shared),
    TOY(before_shared),
    TOY(misaligned),
    TOY(race_in_block),
    TOY(race_in_warp),
    TOY(race_in_shared),
    TOY(race_of_halves),
    TOY(race_after_barrier),
    TOY(race_of_blocks),
    TOY(race_with_block_before),
    TOY(copies_past_end),
    TOY(race_over_product),
#undef TOY
};

}  // namespace

#define VISIBLE extern "C" __attribute__((visibility("default")))

// The error of the launch, or -1 and in `message` why it was refused.
VISIBLE int toy_launch(const char* name, const float* x, float* y, int n, const unsigned* grid,
                       const unsigned* block, size_t shared, char* message, size_t message_size) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(block[0], block[1], block[2]);
  config.dynamicSmemBytes = shared;
  for (const auto& [known, kernel] : kKernels) {
    if (std::strcmp(known, name) != 0) continue;
    try {
      return cudaLaunchKernelEx(&config, kernel, x, y, n);
    } catch (const std::runtime_error& error) {
      std::snprintf(message, message_size, "%s", error.what());
      return -1;
    }
  }
  return -2;
}

VISIBLE const char* toy_error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
VISIBLE int toy_last_error() { return cudaGetLastError(); }
VISIBLE int toy_set_device(int device) { return cudaSetDevice(device); }

VISIBLE void toy_to_float(const uint16_t* bits, float* half, float* bfloat16, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    half[i] = __half2float(__half{bits[i]});
    bfloat16[i] = __bfloat162float(__nv_bfloat16{bits[i]});
  }
}

VISIBLE void toy_from_float(const float* x, uint16_t* half, uint16_t* bfloat16, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    half[i] = __float2half_rn(x[i]).bits;
    bfloat16[i] = __float2bfloat16_rn(x[i]).bits;
  }
}

VISIBLE void toy_to_tf32(const float* x, uint32_t* bits, size_t n) {
  for (size_t i = 0; i < n; ++i) bits[i] = to_tf32(x[i]);
}
