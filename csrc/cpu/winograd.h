// The one-dimensional transforms of Winograd's F(m, 2) (Winograd 1980; the points by Toom and Cook).
//
// One parity of a 4x4 stride-2 convolution is, in each dimension, a product of polynomials: m values
// x of the low side times 2 taps w give m + 1 coefficients c of the high side, of which the last one
// of a tile adds to the first one of the next. Evaluated at m + 1 points the product is elementwise:
//
//     c = high_adjoint(low(x) * weight(w))
//
// and the adjoints of the same maps give the other two convolutions:
//
//     x = low_adjoint(weight(w) * high(c)),    w = weight_adjoint(low(x) * high(c))
//
// Points: m = 2: 0, 1, inf; m = 3: 0, 1, -1, inf; m = 4: 0, 1, -1, 2, inf. The interpolation's
// denominators are in `weight`. c[0] is the product at 0 and c[m] that at infinity alone.
#pragma once

#include "simd.h"

namespace fastgan::FASTGAN_ISA {

template <int m>
struct Transform;

template <>
struct Transform<2> {
  FASTGAN_INLINE void low(const Vec* x, Vec* v) {
    v[0] = x[0];
    v[1] = x[0] + x[1];
    v[2] = x[1];
  }
  FASTGAN_INLINE void low_adjoint(const Vec* v, Vec* x) {
    x[0] = v[0] + v[1];
    x[1] = v[1] + v[2];
  }
  FASTGAN_INLINE void high(const Vec* c, Vec* p) {
    p[0] = c[0] - c[1];
    p[1] = c[1];
    p[2] = c[2] - c[1];
  }
  FASTGAN_INLINE void high_adjoint(const Vec* p, Vec* c) {
    c[0] = p[0];
    c[1] = p[1] - p[0] - p[2];
    c[2] = p[2];
  }
  FASTGAN_INLINE void weight(Vec w0, Vec w1, Vec* u) {
    u[0] = w0;
    u[1] = w0 + w1;
    u[2] = w1;
  }
  FASTGAN_INLINE void weight_adjoint(const Vec* u, Vec& w0, Vec& w1) {
    w0 = u[0] + u[1];
    w1 = u[1] + u[2];
  }
};

template <>
struct Transform<3> {
  FASTGAN_INLINE void low(const Vec* x, Vec* v) {
    const Vec even = x[0] + x[2];
    v[0] = x[0];
    v[1] = even + x[1];
    v[2] = even - x[1];
    v[3] = x[2];
  }
  FASTGAN_INLINE void low_adjoint(const Vec* v, Vec* x) {
    const Vec sum = v[1] + v[2];
    x[0] = v[0] + sum;
    x[1] = v[1] - v[2];
    x[2] = sum + v[3];
  }
  FASTGAN_INLINE void high(const Vec* c, Vec* p) {
    p[0] = c[0] - c[2];
    p[1] = c[2] + c[1];
    p[2] = c[2] - c[1];
    p[3] = c[3] - c[1];
  }
  FASTGAN_INLINE void high_adjoint(const Vec* p, Vec* c) {
    c[0] = p[0];
    c[1] = p[1] - p[2] - p[3];
    c[2] = p[1] + p[2] - p[0];
    c[3] = p[3];
  }
  FASTGAN_INLINE void weight(Vec w0, Vec w1, Vec* u) {
    u[0] = w0;
    u[1] = (w0 + w1) * 0.5f;
    u[2] = (w0 - w1) * 0.5f;
    u[3] = w1;
  }
  FASTGAN_INLINE void weight_adjoint(const Vec* u, Vec& w0, Vec& w1) {
    w0 = u[0] + (u[1] + u[2]) * 0.5f;
    w1 = u[3] + (u[1] - u[2]) * 0.5f;
  }
};

template <>
struct Transform<4> {
  FASTGAN_INLINE void low(const Vec* x, Vec* v) {
    const Vec even = x[0] + x[2], odd = x[1] + x[3];
    v[0] = x[0];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = x[0] + 2.0f * x[1] + 4.0f * x[2] + 8.0f * x[3];
    v[4] = x[3];
  }
  FASTGAN_INLINE void low_adjoint(const Vec* v, Vec* x) {
    const Vec sum = v[1] + v[2], difference = v[1] - v[2];
    x[0] = v[0] + sum + v[3];
    x[1] = difference + 2.0f * v[3];
    x[2] = sum + 4.0f * v[3];
    x[3] = difference + 8.0f * v[3] + v[4];
  }
  FASTGAN_INLINE void high(const Vec* c, Vec* p) {
    const Vec t = c[3] - c[1];
    p[0] = c[0] - c[2] + 0.5f * t;
    p[1] = c[3] - c[2] - 2.0f * c[1];
    p[2] = c[3] - 3.0f * c[2] + 2.0f * c[1];
    p[3] = t;
    p[4] = c[4] - c[2] - 2.0f * t;
  }
  FASTGAN_INLINE void high_adjoint(const Vec* p, Vec* c) {
    const Vec s = p[3] - 2.0f * p[4] + 0.5f * p[0];
    c[0] = p[0];
    c[1] = 2.0f * (p[2] - p[1]) - s;
    c[2] = -p[0] - p[1] - 3.0f * p[2] - p[4];
    c[3] = p[1] + p[2] + s;
    c[4] = p[4];
  }
  FASTGAN_INLINE void weight(Vec w0, Vec w1, Vec* u) {
    u[0] = w0;
    u[1] = (w0 + w1) * -0.5f;
    u[2] = (w1 - w0) * (1.0f / 6);
    u[3] = (w0 + 2.0f * w1) * (1.0f / 6);
    u[4] = w1;
  }
  FASTGAN_INLINE void weight_adjoint(const Vec* u, Vec& w0, Vec& w1) {
    const Vec a = u[1] * -0.5f, b = u[2] * (1.0f / 6), c = u[3] * (1.0f / 6);
    w0 = u[0] + a - b + c;
    w1 = u[4] + a + b + 2.0f * c;
  }
};

}  // namespace fastgan::FASTGAN_ISA
