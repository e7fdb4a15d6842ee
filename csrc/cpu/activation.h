// The activations and their derivatives, for epilogues and bn_act alike.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastgan::FASTGAN_ISA {

// exp(x) for x in [-87, 88] to 1 ulp or so: 2^n · exp(r), |r| <= log(2)/2 (Cody & Waite 1980),
// with the Taylor polynomial of degree 7, whose remainder is below 6e-9 there.
FASTGAN_INLINE Vec exp_bounded(Vec x) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The low bits of `shifted` hold n: move it into the exponent.
  const IntVec scale = ((IntVec)shifted + (127 - 0x4B400000)) << 23;
  return p * (Vec)scale;
}

// tanh(x) = sign(x) · (1 - 2 / (exp(2|x|) + 1)); below 0.625, where that cancels, x + x³·P(x²) with
// P fitted to tanh's relative error. NaN stays NaN.
FASTGAN_INLINE Vec tanh(Vec x) {
  const Vec magnitude = (Vec)((IntVec)x & 0x7FFFFFFF);
  const Vec bounded = select(magnitude > 10.0f, broadcast(10.0f), magnitude);
  const Vec large = 1.0f - 2.0f / (exp_bounded(bounded + bounded) + 1.0f);
  const Vec signed_large = (Vec)((IntVec)large | ((IntVec)x & INT32_MIN));
  const Vec s = x * x;
  Vec p = broadcast(kTanhPolynomial[4]);
  for (int i = 3; i >= 0; --i) p = p * s + kTanhPolynomial[i];
  return select(magnitude < 0.625f, x + x * s * p, signed_large);
}

template <Activation kActivation>
FASTGAN_INLINE Vec activate(Vec x, float slope) {
  if constexpr (kActivation == Activation::kRelu) return select(x < 0.0f, Vec{}, x);
  if constexpr (kActivation == Activation::kLeakyRelu) return select(x > 0.0f, x, x * slope);
  if constexpr (kActivation == Activation::kTanh) return tanh(x);
  return x;
}

// dy · act'(x), given y = act(x): each derivative can be read off y.
template <Activation kActivation>
FASTGAN_INLINE Vec activate_backward(Vec dy, Vec y, float slope) {
  if constexpr (kActivation == Activation::kRelu) return select(y <= 0.0f, Vec{}, dy);
  if constexpr (kActivation == Activation::kLeakyRelu) return select(y > 0.0f, dy, dy * slope);
  if constexpr (kActivation == Activation::kTanh) return dy * (1.0f - y * y);
  return dy;
}

FASTGAN_INLINE Vec activate(Activation activation, Vec x, float slope) {
  switch (activation) {
    case Activation::kRelu:
      return activate<Activation::kRelu>(x, slope);
    case Activation::kLeakyRelu:
      return activate<Activation::kLeakyRelu>(x, slope);
    case Activation::kTanh:
      return activate<Activation::kTanh>(x, slope);
    case Activation::kNone:
      break;
  }
  return x;
}

// Calls `f` with the activation as a compile-time constant.
template <typename F>
inline void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kLeakyRelu:
      return f(std::integral_constant<Activation, Activation::kLeakyRelu>{});
    case Activation::kTanh:
      return f(std::integral_constant<Activation, Activation::kTanh>{});
  }
}

}  // namespace fastgan::FASTGAN_ISA
