// What goes over memory once: the gradient through an activation, and the sum of wgrad's parts.
#include "parts.cuh"

namespace fastgan {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ __launch_bounds__(kThreads) void act_bwd_kernel(int64_t count, const T* dy, const T* y,
                                                           Act act, T* dx) {
  constexpr int N = kWidest<T>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  const auto gradient = [&](T d, T value) {
    return from_float<T>(to_float(d) * activation_gradient(act, to_float(value)));
  };
  if (at + N <= count) {
    const Vector<T, N> ds = load<N>(dy + at), values = load<N>(y + at);
    Vector<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = gradient(ds.at[i], values.at[i]);
    store(dx + at, out);
  } else {
    for (int64_t i = at; i < count; ++i) dx[i] = gradient(dy[i], y[i]);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void add_parts_kernel(const float* shares, int parts,
                                                             int size, T* dweight) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) sum += shares[int64_t(part) * size + i];
  dweight[i] = from_float<T>(sum);
}

}  // namespace

void act_backward(Queue queue, int64_t count, Dtype dtype, const void* dy, const void* y, Act act,
                  void* dx) {
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "act_backward", act_bwd_kernel<T>,
           dim3(unsigned(ceil_div(count, int64_t(kThreads * kWidest<T>)))), kThreads, 0, count,
           static_cast<const T*>(dy), static_cast<const T*>(y), act, static_cast<T*>(dx));
  });
}

void add_parts(Queue queue, const float* shares, int parts, int size, Dtype dtype, void* dweight) {
  with_type(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(queue, "add_parts", add_parts_kernel<T>, dim3(ceil_div(size, kThreads)), kThreads, 0,
           shares, parts, size, static_cast<T*>(dweight));
  });
}

}  // namespace fastgan
