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
    CompensatedSum sum;
  };

  LogisticForward(const Forward& door, Phi phi) : door_(door), phi_(phi) {}

  // phi(-inf) = 0, and a NaN stays one.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    return {CompensatedSum(sum_negatives(row, begin, end, positives, [&](VecOf<X> z) { return phi_.value(z); }))};
  }

  static Partial merge(Partial a, Partial b) {
    a.sum.add(b.sum);
    return a;
  }

  void finish(int64_t row, const S* logits, Positives positives, Partial negatives) const {
    using V = VecOf<S>;
    T z[V::lanes];
    CompensatedSum positive_sum;
    for_each_group<V::lanes>(positives, [&](const int32_t* index, int64_t n) {
      for (int64_t i = 0; i < n; ++i) z[i] = to_compute(logits[index[i]]);
      positive_sum.add(sum_lanes(softplus(V(0) - load_first<V>(z, n, kInfinity<T>))));
    });
    const double sum = positive_sum.total(), negative_sum = negatives.sum.total();
    if (sum != sum || negative_sum != negative_sum) return spoil(row, positives);
    const bool one = !door_.problem.multi_hot && positives.count > 0;
    write(row, T(sum), T(negative_sum), one ? z[0] : T(0), T(positives.count));
  }

  void ignore(int64_t row) const { write(row, 0, 0, 0, 0); }
  // Positives are counted all the same: multi-hot rows are normalised over the batch, and the others must not feel this
  // one.
  void spoil(int64_t row, Positives positives) const { write(row, kNaN<T>, kNaN<T>, kNaN<T>, T(positives.count)); }
  void finish_rows(int64_t, int64_t, const TargetReader&) const {}

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
    V positive_scale, negative_scale;
    const Phi& phi;

    FUSED_LOSSES_INLINE V negative(V z) const { return negative_scale * phi.slope(z); }
    FUSED_LOSSES_INLINE V positive(V z) const { return (V(0) - positive_scale) * sigmoid(V(0) - z); }
  };

  LogisticBackward(const Backward& door, Phi phi) : door_(door), phi_(phi) {}

  void prepare(int64_t, int64_t, T*) const {}

  Gradient gradient(int64_t row, T) const {
    const T* grad = static_cast<const T*>(door_.grad) + row * door_.grad_row_stride;
    const T target = static_cast<const T*>(door_.state)[2 * row];
    return {target != target, target, V(grad[0]), V(grad[door_.grad_column_stride]), phi_};
  }

 private:
  const Backward& door_;
  Phi phi_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
