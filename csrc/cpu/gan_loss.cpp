// Binary cross-entropy on logits over groups of the batch. A batch of logits is a few hundred
// numbers: plain, sequential, in double.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace fastgan::FASTGAN_ISA::gan_loss {

inline void bce_forward(int groups, int64_t count, const float* logits, const float* targets, float* loss,
                 float* d, float* dlogits) {
  for (int g = 0; g < groups; ++g) {
    double loss_sum = 0.0, d_sum = 0.0;
    for (int64_t i = g * count; i < (g + 1) * count; ++i) {
      const double l = logits[i], e = std::exp(-std::fabs(l));
      const double sigmoid = (l >= 0.0 ? 1.0 : e) / (1.0 + e);
      loss_sum += std::max(l, 0.0) - l * targets[g] + std::log1p(e);
      d_sum += sigmoid;
      dlogits[i] = float((sigmoid - targets[g]) / count);
    }
    loss[g] = float(loss_sum / count);
    d[g] = float(d_sum / count);
  }
}

}  // namespace fastgan::FASTGAN_ISA::gan_loss
