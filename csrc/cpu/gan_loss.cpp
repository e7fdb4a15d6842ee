// The adversarial loss over groups of the batch, with its gradient and the mean of D(x).
//
// Of binary cross-entropy, with e = exp(-|l|): sigmoid(|l|) = 1 / (1 + e),
// log(1 + e) = 2 · atanh(e / (2 + e)), the latter's argument at most 1/3, where eight terms of its
// series leave less than 1e-9.
#include "activation.h"
#include "kernels.h"
#include "layout.h"

namespace fastgan::FASTGAN_ISA::gan_loss {

// Of logits: the loss, its gradient, and what d is the mean of. NaN stays NaN.
struct Loss {
  Vec loss, gradient, score;
};

FASTGAN_INLINE Loss bce(Vec l, float target) {
  const Vec magnitude = (Vec)((IntVec)l & 0x7FFFFFFF);
  const Vec e = exp_bounded(select(magnitude > 87.0f, broadcast(-87.0f), -magnitude));
  const Vec s = e / (2.0f + e), s2 = s * s;
  Vec series = broadcast(1.0f / 15);
  for (int k = 13; k >= 1; k -= 2) series = series * s2 + 1.0f / k;
  const Vec numerator = select(l >= 0.0f, broadcast(1.0f), e);
  const Vec sigmoid = numerator / (1.0f + e);
  return {select(l > 0.0f, l, Vec{}) - l * target + 2.0f * s * series, sigmoid - target, sigmoid};
}

template <GanLoss kKind>
FASTGAN_INLINE Loss loss_of(Vec l, float target) {
  if constexpr (kKind == GanLoss::kBce) return bce(l, target);
  if constexpr (kKind == GanLoss::kLsgan)
    return {0.5f * (l - target) * (l - target), l - target, l};
  const float sign = 2.0f * target - 1.0f;
  if constexpr (kKind == GanLoss::kHinge) {
    const Vec margin = 1.0f - sign * l;
    return {select(margin <= 0.0f, Vec{}, margin),
            select(margin <= 0.0f, Vec{}, broadcast(-sign)), l};
  }
  return {-sign * l, broadcast(-sign), l};
}

template <GanLoss kKind>
inline void forward(int groups, int64_t count, const float* logits, const float* targets,
                    float* loss, float* d, float* dlogits) {
  for (int g = 0; g < groups; ++g) {
    const float* in = logits + g * count;
    float* out = dlogits + g * count;
    Sum losses, scores;
    for (int64_t i = 0; i < count; i += kVec) {
      const int left = int(std::min<int64_t>(kVec, count - i));
      Loss value = loss_of<kKind>(load_first(in + i, left), targets[g]);
      store_first(out + i, value.gradient / float(count), left);
      for (int j = left; j < kVec; ++j) value.loss[j] = value.score[j] = 0.0f;
      losses.add(value.loss);
      scores.add(value.score);
      if (i / kVec % Sum::kTerms == Sum::kTerms - 1) {
        losses.fold();
        scores.fold();
      }
    }
    losses.fold();
    scores.fold();
    double loss_sum = 0.0, d_sum = 0.0;
    for (int j = 0; j < kVec; ++j) {
      loss_sum += losses.total[j];
      d_sum += scores.total[j];
    }
    loss[g] = float(loss_sum / count);
    d[g] = float(d_sum / count);
  }
}

inline void gan_loss_forward(int groups, int64_t count, const float* logits, const float* targets,
                             GanLoss kind, float* loss, float* d, float* dlogits) {
  switch (kind) {
    case GanLoss::kBce:
      return forward<GanLoss::kBce>(groups, count, logits, targets, loss, d, dlogits);
    case GanLoss::kLsgan:
      return forward<GanLoss::kLsgan>(groups, count, logits, targets, loss, d, dlogits);
    case GanLoss::kHinge:
      return forward<GanLoss::kHinge>(groups, count, logits, targets, loss, d, dlogits);
    case GanLoss::kWasserstein:
      return forward<GanLoss::kWasserstein>(groups, count, logits, targets, loss, d, dlogits);
  }
}

}  // namespace fastgan::FASTGAN_ISA::gan_loss
