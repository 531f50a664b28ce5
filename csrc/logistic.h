// The logistic family: a row gives two sums, softplus(-z) over its positives and phi(z) over S.
#pragma once

#include "formulas.h"
#include "walk.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class S, class Phi>
class LogisticForward {
 public:
  using T = Compute<S>;

  struct Partial {
    double sum = 0;
  };

  LogisticForward(const Forward& door, Phi phi) : door_(door), phi_(phi) {}

  // phi(-inf) = 0, and a NaN stays one.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    using V = VecOf<X>;
    V sum(0);
    for_each_negative(row, begin, end, positives, [&](V z) { sum = sum + phi_.value(z); });
    return {sum_lanes(sum)};
  }

  static Partial merge(Partial a, Partial b) { return {a.sum + b.sum}; }

  void finish(int64_t row, const S* logits, Positives positives, Partial negatives) const {
    double sum = 0;
    for (int64_t p = 0; p < positives.count; ++p) sum += softplus(-to_compute(logits[positives.index[p]]));
    if (sum != sum || negatives.sum != negatives.sum) return spoil(row, positives);
    const bool one = !door_.problem.multi_hot && positives.count > 0;
    write(row, T(sum), T(negatives.sum), one ? to_compute(logits[positives.index[0]]) : T(0), T(positives.count));
  }

  void ignore(int64_t row) const { write(row, 0, 0, 0, 0); }
  // Positives are counted all the same: multi-hot rows are normalised over the batch, and the others must not feel this
  // one.
  void spoil(int64_t row, Positives positives) const { write(row, kNaN<T>, kNaN<T>, kNaN<T>, T(positives.count)); }

 private:
  void write(int64_t row, T positive_sum, T negative_sum, T target_logit, T positives) const {
    T* sums = static_cast<T*>(door_.result) + 2 * row;
    T* state = static_cast<T*>(door_.state) + 2 * row;
    sums[0] = positive_sum, sums[1] = negative_sum;
    state[0] = target_logit, state[1] = positives;
  }

  const Forward& door_;
  Phi phi_;
};

template <class S, class Phi>
class LogisticBackward {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;

  struct Gradient {
    bool spoilt;
    T target_logit;
    T positive_scale;
    V negative_scale;
    const Phi& phi;

    FUSED_LOSSES_INLINE V negative(V z) const { return negative_scale * phi.slope(z); }
    T positive(T z) const { return -positive_scale * sigmoid(-z); }
  };

  LogisticBackward(const Backward& door, Phi phi) : door_(door), phi_(phi) {}

  Gradient gradient(int64_t row) const {
    const T* grad = static_cast<const T*>(door_.grad) + row * door_.grad_row_stride;
    const T target = static_cast<const T*>(door_.state)[2 * row];
    return {target != target, target, grad[0], V(grad[door_.grad_column_stride]), phi_};
  }

 private:
  const Backward& door_;
  Phi phi_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
