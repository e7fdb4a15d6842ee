// Arrays as Python hands them over, and what has to be true of them before a kernel sees their
// addresses. Every complaint names the function, the argument, its value and the mend.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fastgan {

using Sizes = std::vector<int64_t>;

// Device memory: strides are in elements.
struct Array {
  void* data;
  Dtype dtype;
  int device;
  Sizes shape, strides;
};

constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16",
                                       "uint8",   "bool",     "int64"};
// The kernels count elements in 32 bits.
constexpr int64_t kMostElements = INT32_MAX;
// The widest access.
constexpr uintptr_t kAlignment = 16;

inline Dtype dtype_named(const std::string& name) {
  for (int i = 0; i < int(std::size(kDtypeNames)); ++i)
    if (name == kDtypeNames[i]) return Dtype(i);
  throw std::invalid_argument("dtype '" + name + "': the kernels know float32, bfloat16, " +
                              "float16, uint8, bool and int64");
}

inline bool floating(Dtype dtype) {
  return dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
}

inline int64_t count_of(const Sizes& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

inline std::string text(const Sizes& sizes) {
  std::string out = "(";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + ")";
}

// The strides of a dense array whose dimensions lie in memory in `order`, the slowest first.
inline Sizes dense_strides(const Sizes& shape, const std::vector<int>& order) {
  Sizes strides(shape.size());
  int64_t step = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    strides[*d] = step;
    step *= shape[*d];
  }
  return strides;
}

// One call: checks its arguments against one another.
class Call {
 public:
  explicit Call(const char* name) : name_(name) {}

  [[noreturn]] void refuse(const std::string& why) const {
    throw std::invalid_argument(std::string(name_) + ": " + why);
  }

  void require(bool condition, const std::string& why) const {
    if (!condition) refuse(why);
  }

  // [n, c, h, w] in the order n, h, w, c, of a floating dtype: that of the first such argument.
  void* images(const char* argument, const Array& a) {
    require(a.shape.size() == 4, named(argument, a) + " is not [N, C, H, W]");
    require(floating(a.dtype),
            named(argument, a) + ": the kernels take float32, bfloat16, float16");
    if (dtype_set_)
      require(a.dtype == dtype_, named(argument, a) + " is not " + kDtypeNames[int(dtype_)] +
                                     " as the others are: convert it");
    dtype_ = a.dtype;
    dtype_set_ = true;
    return dense(argument, a, {0, 2, 3, 1},
                 "in the order N, H, W, C: pass it as "
                 ".contiguous(memory_format=torch.channels_last)");
  }

  void* images(const char* argument, const Array& a, const Sizes& shape) {
    require(a.shape == shape, named(argument, a) + " should be " + text(shape));
    return images(argument, a);
  }

  // Contiguous, of the shape and dtype given.
  void* plain(const char* argument, const Array& a, Dtype dtype, const Sizes& shape,
              int64_t most = kMostElements) {
    require(a.shape == shape, named(argument, a) + " should be " + text(shape));
    require(a.dtype == dtype,
            named(argument, a) + " should be " + kDtypeNames[int(dtype)] + ": convert it");
    std::vector<int> order(a.shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
    return dense(argument, a, order, "contiguous: pass it as .contiguous()", most);
  }

  float* floats(const char* argument, const Array& a, const Sizes& shape) {
    return static_cast<float*>(plain(argument, a, Dtype::kFloat32, shape));
  }

  // [channels] of any floating dtype, or none.
  PerChannel per_channel(const char* argument, const Array* a, int64_t channels) {
    if (!a) return {nullptr, Dtype::kFloat32};
    require(floating(a->dtype),
            named(argument, *a) + ": the kernels take float32, bfloat16, float16");
    return {plain(argument, *a, a->dtype, {channels}), a->dtype};
  }

  Act act(int activation, float negative_slope) const {
    require(0 <= activation && activation <= int(Activation::kTanh),
            "activation " + std::to_string(activation) +
                " should be 0 none, 1 relu, 2 leaky_relu or 3 tanh");
    require(negative_slope >= 0.0f,
            "negative_slope " + std::to_string(negative_slope) + " should not be negative");
    return {Activation(activation), negative_slope};
  }

  Dtype dtype() const { return dtype_; }

  // After all arguments: makes their device current, and leaves it so. Who calls has it current
  // already, perhaps by another CUDA runtime, whose devices this one must not set back.
  Queue on(uintptr_t stream) const {
    int current = -1;
    check(cudaGetDevice(&current));
    if (current != device_) check(cudaSetDevice(device_));
    return {reinterpret_cast<cudaStream_t>(stream)};
  }

 private:
  static std::string named(const char* argument, const Array& a) {
    return std::string(argument) + " " + kDtypeNames[int(a.dtype)] + " " + text(a.shape);
  }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next that asks is told of it
    throw std::runtime_error(std::string(name_) + ": device " + std::to_string(device_) + ": " +
                             cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
  }

  void* dense(const char* argument, const Array& a, const std::vector<int>& order,
              const char* mend, int64_t most = kMostElements) {
    const int64_t count = count_of(a.shape);
    require(count > 0, named(argument, a) + " is empty: skip the call");
    require(count <= most, named(argument, a) + " has more than " + std::to_string(most) +
                               " elements: split the batch");
    const Sizes strides = dense_strides(a.shape, order);
    for (size_t i = 0; i < strides.size(); ++i)
      require(a.shape[i] == 1 || a.strides[i] == strides[i],
              named(argument, a) + " with strides " + text(a.strides) + " is not " + mend);
    return memory(argument, a);
  }

  // What all arguments have in common.
  void* memory(const char* argument, const Array& a) {
    require(a.data != nullptr, named(argument, a) + " has no memory");
    require(reinterpret_cast<uintptr_t>(a.data) % kAlignment == 0,
            named(argument, a) + " does not begin at a multiple of 16 bytes: pass a .clone()");
    if (device_ < 0) device_ = a.device;
    require(a.device == device_,
            named(argument, a) + " is on device " + std::to_string(a.device) +
                ", the arguments before it on device " + std::to_string(device_) + ": move it");
    return a.data;
  }

  const char* name_;
  Dtype dtype_ = Dtype::kFloat32;
  bool dtype_set_ = false;
  int device_ = -1;
};

}  // namespace fastgan
