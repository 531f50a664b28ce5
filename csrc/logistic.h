// The logistic family: a row gives the sum of phi(z) over S, and, where a target is a row of its own, that of
// softplus(-z) over its positives.
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
    T max = -kInfinity<T>;
    CompensatedSum sum;
  };

  LogisticForward(const Forward& door, Phi phi)
      : statistics_(door.statistics), multi_hot_(door.problem.target.multi_hot), phi_(phi) {}

  // phi(-inf) = 0, and a NaN stays one.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    using V = VecOf<X>;
    V largest(-kInfinity<T>);
    const CompensatedSum sum(sum_negatives(row, begin, end, positives, [&](V z) {
      largest = max(largest, z);
      return phi_.value(z);
    }));
    return {max_lane(largest), sum};
  }

  static Partial merge(Partial a, Partial b) {
    a.sum.add(b.sum);
    return {a.max < b.max ? b.max : a.max, a.sum};
  }

  void write(int64_t row, const S* logits, Positives positives, Partial partial) const {
    const T negatives = T(partial.sum.total());
    if (multi_hot_) {
      of_many()[row] = {partial.max, negatives, T(positive_sum(logits, positives)), T(positives.count)};
    } else {
      of_one()[row] = {partial.max, negatives,
                       positives.count > 0 ? to_compute(logits[positives.index[0]]) : -kInfinity<T>};
    }
  }

  void ignore(int64_t row) const { of_one()[row] = {0, 0, 0}; }  // only an index is ever ignored

  // Positives are counted all the same: multi-hot rows are normalised over the batch, and the others must not feel this
  // one.
  void spoil(int64_t row, Positives positives) const {
    if (multi_hot_) {
      of_many()[row] = {kNaN<T>, kNaN<T>, kNaN<T>, T(positives.count)};
    } else {
      of_one()[row] = {kNaN<T>, kNaN<T>, kNaN<T>};
    }
  }

 private:
  static double positive_sum(const S* logits, Positives positives) {
    using V = VecOf<S>;
    T z[V::lanes];
    CompensatedSum sum;
    for_each_group<V::lanes>(positives, [&](const int32_t* index, int64_t n) {
      for (int64_t i = 0; i < n; ++i) z[i] = to_compute(logits[index[i]]);
      sum.add(sum_lanes(softplus(V(0) - load_first<V>(z, n, kInfinity<T>))));
    });
    return sum.total();
  }

  LogisticStatistics<T>* of_one() const { return static_cast<LogisticStatistics<T>*>(statistics_); }
  MultiHotStatistics<T>* of_many() const { return static_cast<MultiHotStatistics<T>*>(statistics_); }

  void* statistics_;
  bool multi_hot_;
  Phi phi_;
};

template <class S, class Phi>
class LogisticBackward {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;
  static constexpr bool multi_hot = true;

  struct Gradient {
    Coefficients<T> coefficients;
    V of_negatives, of_positives;
    const Phi& phi;

    FUSED_LOSSES_INLINE V negative(V z) const { return of_negatives * phi.slope(z); }
    FUSED_LOSSES_INLINE V positive(V z) const { return of_positives * sigmoid(V(0) - z); }
  };

  LogisticBackward(const Backward&, Phi phi) : phi_(phi) {}

  Gradient gradient(int64_t, Coefficients<T> coefficients) const {
    return {coefficients, V(coefficients.of_negatives), V(coefficients.of_target), phi_};
  }

 private:
  Phi phi_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
