// What ptx.cuh gives the kernels, for g++. Accesses of theirs are made here, where sanitizers see
// them; what lanes exchange, emulator.cpp exchanges.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cuda_on_host {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool real;
};

// Whether the copy lands now; else it is for end_copy().
bool begin_copy(const Copy& copy, Site site);
void commit_copies();
// The next of the thread's copies that a wait for all but its last `pending` groups waits for.
bool end_copy(uint64_t pending, Copy* copy);

template <int BYTES>
__attribute__((noinline)) void land(const Copy& copy) {
  struct __attribute__((may_alias, aligned(BYTES))) Word {
    char bytes[BYTES];
  };
  *static_cast<Word*>(copy.to) = copy.real ? *static_cast<const Word*>(copy.from) : Word{};
}

// What lanes bring to load_matrices and get from it.
struct MatrixRow {
  uint16_t elements[8];
  uint32_t out[4];
};

// What lanes bring to multiply_add.
struct Product {
  const uint32_t *a, *b;
  float* sums;
};

// Refuses a row that is not 16 bytes of shared memory, aligned to as many.
void check_matrix_row(const void* row, Site site);

template <class T>
constexpr WarpCall multiply_call() {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return WarpCall::kMultiplyBfloat16;
  if constexpr (std::is_same_v<T, __half>) return WarpCall::kMultiplyHalf;
  if constexpr (std::is_same_v<T, float>) return WarpCall::kMultiplyTf32;
}

}  // namespace cuda_on_host

namespace fastgan {

template <int BYTES>
void copy_async(void* to, const void* from, bool real, CUDA_ON_HOST_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "PTX copies 4, 8 or 16 bytes");
  const cuda_on_host::Copy copy{to, from, BYTES, real};
  if (cuda_on_host::begin_copy(copy, {file, line})) cuda_on_host::land<BYTES>(copy);
}

inline void commit_copies() { cuda_on_host::commit_copies(); }

template <int PENDING>
void wait_for_copies() {
  for (cuda_on_host::Copy copy; cuda_on_host::end_copy(PENDING, &copy);) {
    switch (copy.bytes) {
      case 4: cuda_on_host::land<4>(copy); break;
      case 8: cuda_on_host::land<8>(copy); break;
      default: cuda_on_host::land<16>(copy);
    }
  }
}

template <bool TRANSPOSED>
void load_matrices(const void* row, uint32_t (&out)[4], CUDA_ON_HOST_SITE) {
  using cuda_on_host::WarpCall;
  cuda_on_host::check_matrix_row(row, {file, line});
  cuda_on_host::MatrixRow own;
  std::memcpy(own.elements, row, sizeof own.elements);
  cuda_on_host::wait_for_warp(
      TRANSPOSED ? WarpCall::kLoadTransposedMatrices : WarpCall::kLoadMatrices, 0xffffffffu,
      reinterpret_cast<uint64_t>(&own), 0, 32, {file, line});
  std::memcpy(out, own.out, sizeof out);
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  return (bits + 0x1000) & 0xffffe000;
}

template <class T>
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4],
                  CUDA_ON_HOST_SITE) {
  cuda_on_host::Product own{a, b, sums};
  cuda_on_host::wait_for_warp(cuda_on_host::multiply_call<T>(), 0xffffffffu,
                              reinterpret_cast<uint64_t>(&own), 0, 32, {file, line});
}

}  // namespace fastgan
