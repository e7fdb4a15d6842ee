// Binary cross-entropy on logits over groups of the batch, with its gradient and the mean sigmoid.
//
// With e = exp(-|l|): sigmoid(|l|) = 1 / (1 + e), log(1 + e) = 2 · atanh(e / (2 + e)), the latter's
// argument at most 1/3, where eight terms of its series leave less than 1e-9.
#include "activation.h"
#include "kernels.h"
#include "layout.h"

namespace fastgan::FASTGAN_ISA::gan_loss {

struct Bce {
  Vec loss, sigmoid;
};

FASTGAN_INLINE Bce bce(Vec l, float target) {
  const Vec magnitude = (Vec)((IntVec)l & 0x7FFFFFFF);
  const Vec e = exp_bounded(select(magnitude > 87.0f, broadcast(-87.0f), -magnitude));
  const Vec s = e / (2.0f + e), s2 = s * s;
  Vec series = broadcast(1.0f / 15);
  for (int k = 13; k >= 1; k -= 2) series = series * s2 + 1.0f / k;
  const Vec numerator = select(l >= 0.0f, broadcast(1.0f), e);
  return {select(l > 0.0f, l, Vec{}) - l * target + 2.0f * s * series, numerator / (1.0f + e)};
}

inline void bce_forward(int groups, int64_t count, const float* logits, const float* targets,
                        float* loss, float* d, float* dlogits) {
  for (int g = 0; g < groups; ++g) {
    const float* in = logits + g * count;
    float* out = dlogits + g * count;
    Sum losses, sigmoids;
    for (int64_t i = 0; i < count; i += kVec) {
      const int left = int(std::min<int64_t>(kVec, count - i));
      Bce value = bce(load_first(in + i, left), targets[g]);
      store_first(out + i, (value.sigmoid - targets[g]) / float(count), left);
      for (int j = left; j < kVec; ++j) value.loss[j] = value.sigmoid[j] = 0.0f;
      losses.add(value.loss);
      sigmoids.add(value.sigmoid);
      if (i / kVec % Sum::kTerms == Sum::kTerms - 1) {
        losses.fold();
        sigmoids.fold();
      }
    }
    losses.fold();
    sigmoids.fold();
    double loss_sum = 0.0, d_sum = 0.0;
    for (int j = 0; j < kVec; ++j) {
      loss_sum += losses.total[j];
      d_sum += sigmoids.total[j];
    }
    loss[g] = float(loss_sum / count);
    d[g] = float(d_sum / count);
  }
}

}  // namespace fastgan::FASTGAN_ISA::gan_loss
