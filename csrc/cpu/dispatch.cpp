// Picks the instruction set at run time: one binary serves every CPU of its architecture.
#include <cstring>

#include "kernels.h"

namespace fastgan {

const Kernels* find_kernels(const char* isa) {
  if (!std::strcmp(isa, kernels_baseline.isa)) return &kernels_baseline;
#if defined(FASTGAN_X86)
  __builtin_cpu_init();
  if (!std::strcmp(isa, kernels_avx2.isa) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return &kernels_avx2;
  if (!std::strcmp(isa, kernels_avx512.isa) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return &kernels_avx512;
#endif
  return nullptr;
}

const Kernels& best_kernels() {
  const Kernels* best = &kernels_baseline;
  for (const char* isa : kIsas)
    if (const Kernels* kernels = find_kernels(isa)) best = kernels;
  return *best;
}

}  // namespace fastgan
