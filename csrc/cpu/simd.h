// Vectors of floats at the width of the instruction set this file is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define FASTGAN_ISA avx512
#define FASTGAN_VECTOR_LENGTH 16
#elif defined(__AVX2__)
#define FASTGAN_ISA avx2
#define FASTGAN_VECTOR_LENGTH 8
#else
#define FASTGAN_ISA baseline
#define FASTGAN_VECTOR_LENGTH 4
#endif

#define FASTGAN_INLINE static inline __attribute__((always_inline))

namespace fastgan::FASTGAN_ISA {

constexpr int kVec = FASTGAN_VECTOR_LENGTH;
// Channels are laid out in blocks of 16 whatever the instruction set: one cache line.
constexpr int kBlock = 16;
constexpr int kVecsPerBlock = kBlock / kVec;

typedef float Vec __attribute__((vector_size(kVec * 4)));
typedef double DoubleVec __attribute__((vector_size(kVec * 8)));
typedef int32_t IntVec __attribute__((vector_size(kVec * 4)));
typedef float UnalignedVec __attribute__((vector_size(kVec * 4), aligned(4), may_alias));

FASTGAN_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
FASTGAN_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
FASTGAN_INLINE Vec broadcast(float x) { return x - Vec{}; }

// The first `n` floats at `p`, zeros after them; nothing past them is read.
FASTGAN_INLINE Vec load_first(const float* p, int n) {
  if (n >= kVec) return load(p);
  Vec v{};
  if (n > 0) std::memcpy(&v, p, n * sizeof(float));
  return v;
}

FASTGAN_INLINE void store_first(float* p, Vec v, int n) {
  if (n >= kVec) {
    store(p, v);
  } else if (n > 0) {
    std::memcpy(p, &v, n * sizeof(float));
  }
}

FASTGAN_INLINE Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace fastgan::FASTGAN_ISA
