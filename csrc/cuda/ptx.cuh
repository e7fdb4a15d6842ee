// The instructions of a warp that C++ has no name for: asynchronous copies into shared memory, and
// products of small matrices on tensor cores. For sm_80 and later. Built for a CPU, they come from
// its emulator.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastgan {

// For one of the three instructions below.
__device__ __forceinline__ unsigned shared_address(const void* at) {
  return unsigned(__cvta_generic_to_shared(at));
}

// Begins to copy BYTES, 4, 8 or 16 and aligned to as many, to shared memory; zeros where not
// `real`, and then `from` is not read.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
  // Only 16 bytes can pass by the first cache.
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(real ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)),
                 "l"(from), "n"(BYTES), "r"(real ? BYTES : 0)
                 : "memory");
}

// Makes a group of the thread's copies since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits for the thread's own copies, all but those of its last PENDING groups.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 x 16 bytes from shared memory; lanes 8i..8i+7 say where the rows of matrix i
// are. Of each, lane l gets bytes 4 · (l % 4) on of row l / 4; where TRANSPOSED, of its 8 x 8
// elements of 16 bits, those of column l / 4 in rows 2 · (l % 4) and the one after.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&out)[4]) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The bits of `x` rounded to TF32, to nearest and ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

// sums [16, 8] += a [16, k] · b [k, 8] of a warp: k is 16 for 16-bit elements, of which a register
// holds two, and 8 for TF32. How the lanes hold them is PTX's m16n8k16 and m16n8k8, row.col.
template <class T>
__device__ __forceinline__ void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             float (&sums)[4]);

#define FASTGAN_MULTIPLY_ADD(T, KIND)                                                          \
  template <>                                                                                  \
  __device__ __forceinline__ void multiply_add<T>(const uint32_t (&a)[4],                      \
                                                  const uint32_t (&b)[2], float (&sums)[4]) {  \
    asm("mma.sync.aligned." KIND                                                               \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                   \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
FASTGAN_MULTIPLY_ADD(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTGAN_MULTIPLY_ADD(__half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTGAN_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTGAN_MULTIPLY_ADD

}  // namespace fastgan

#else

#include <ptx_on_host.h>

#endif
