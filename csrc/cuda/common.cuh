// What the kernels share: 16-byte vectors of any dtype, activations, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

// All of a block's shared memory; each launch says how much there is.
extern __shared__ float4 fastgan_shared[];

namespace fastgan {

__device__ __forceinline__ float* shared_floats() {
  return reinterpret_cast<float*>(fastgan_shared);
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N elements that are read or written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// So many elements are 16 bytes, the widest access that there is.
template <class T>
constexpr int kWidest = 16 / int(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* at) {
  return *reinterpret_cast<const Vector<T, N>*>(at);
}

template <int N, class T>
__device__ __forceinline__ void store(T* at, const Vector<T, N>& values) {
  *reinterpret_cast<Vector<T, N>*>(at) = values;
}

__device__ __forceinline__ float value(PerChannel values, int channel) {
  switch (values.dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(values.data)[channel]);
    case Dtype::kFloat16:
      return to_float(static_cast<const __half*>(values.data)[channel]);
    default:
      return static_cast<const float*>(values.data)[channel];
  }
}

__device__ __forceinline__ float value_or(PerChannel values, int channel, float otherwise) {
  return values.data ? value(values, channel) : otherwise;
}

// Of N channels in a row, the first a multiple of N.
template <class T, int N>
__device__ __forceinline__ void values_of(const void* data, int channel, float (&out)[N]) {
  constexpr int kAtOnce = N < kWidest<T> ? N : kWidest<T>;
#pragma unroll
  for (int i = 0; i < N; i += kAtOnce) {
    const auto some = load<kAtOnce>(static_cast<const T*>(data) + channel + i);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) out[i + j] = to_float(some.at[j]);
  }
}

template <int N>
__device__ __forceinline__ void values_or(PerChannel values, int channel, float otherwise,
                                          float (&out)[N]) {
  if (!values.data) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = otherwise;
  } else if (values.dtype == Dtype::kBFloat16) {
    values_of<__nv_bfloat16>(values.data, channel, out);
  } else if (values.dtype == Dtype::kFloat16) {
    values_of<__half>(values.data, channel, out);
  } else {
    values_of<float>(values.data, channel, out);
  }
}

__device__ __forceinline__ void set_value(PerChannel values, int channel, float x) {
  switch (values.dtype) {
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(values.data)[channel] = from_float<__nv_bfloat16>(x);
      break;
    case Dtype::kFloat16:
      static_cast<__half*>(values.data)[channel] = from_float<__half>(x);
      break;
    default:
      static_cast<float*>(values.data)[channel] = x;
  }
}

// NaN stays NaN.
__device__ __forceinline__ float activate(Act act, float z) {
  switch (act.kind) {
    case Activation::kRelu:
      return z < 0.0f ? 0.0f : z;
    case Activation::kLeakyRelu:
      return z < 0.0f ? z * act.negative_slope : z;
    case Activation::kTanh:
      return tanhf(z);
    default:
      return z;
  }
}

// act'(z) from y = act(z); for relu and leaky_relu y may be z.
__device__ __forceinline__ float activation_gradient(Act act, float y) {
  switch (act.kind) {
    case Activation::kRelu:
      return y <= 0.0f ? 0.0f : 1.0f;
    case Activation::kLeakyRelu:
      return y > 0.0f ? 1.0f : act.negative_slope;
    case Activation::kTanh:
      return 1.0f - y * y;
    default:
      return 1.0f;
  }
}

// What is written of N results, and is left in their place: activated, and rounded to T.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> activated(Act act, float* results) {
  Vector<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    out.at[i] = from_float<T>(activate(act, results[i]));
    results[i] = to_float(out.at[i]);
  }
  return out;
}

// Calls `f` with a null pointer to the type that `dtype` stands for.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
    default:
      throw std::invalid_argument("not a floating dtype");
  }
}

// Calls `f` with the type and, as a constant, how many elements are accessed at once: the widest
// where `size` elements, the shortest run of them, are a multiple of it, else one.
template <class F>
void with_vectors(Dtype dtype, int64_t size, F f) {
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (size % kWidest<T> == 0)
      f(null, std::integral_constant<int, kWidest<T>>{});
    else
      f(null, std::integral_constant<int, 1>{});
  });
}

// Puts a kernel on the queue's stream, and throws where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(Queue queue, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = queue.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next that asks is told of it
  throw std::runtime_error(std::string(name) + ": launching a grid of " + std::to_string(grid.x) +
                           " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                           " blocks of " + std::to_string(threads) + " threads with " +
                           std::to_string(shared) + " bytes of shared memory failed: " +
                           cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

}  // namespace fastgan
