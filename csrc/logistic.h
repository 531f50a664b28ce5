// The logistic family: a row gives the sum of phi(z) over S; where label smoothing asks for it, that of z; and, where a
// target is a row of its own, that of softplus(-z) over its positives.
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
    CompensatedSum of_logits;  // for label smoothing only
  };

  LogisticForward(const Forward& door, Phi phi)
      : statistics_(door, kInfinity<T>),
        of_many_(door.problem.target.multi_hot ? static_cast<MultiHotStatistics<T>*>(door.statistics) : nullptr),
        smoothed_(door.problem.spec.label_smoothing != 0),
        phi_(phi) {}

  // phi(-inf) = 0, and a NaN stays one.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    using V = VecOf<X>;
    Partial partial;
    V largest(partial.max);
    partial.sum = CompensatedSum(sum_negatives(row, begin, end, positives, [&](V z) {
      largest = max(largest, z);
      return phi_.term(z);
    }));
    partial.max = max_lane(largest);
    if (smoothed_) {  // a second look at a piece in the first cache
      partial.of_logits = CompensatedSum(sum_above(row, begin, end, positives, T(0)));
    }
    return partial;
  }

  static Partial merge(Partial a, const Partial& b) {
    a.sum.add(b.sum);
    a.max = a.max < b.max ? b.max : a.max;
    a.of_logits.add(b.of_logits);
    return a;
  }

  void write(int64_t row, const S* logits, Positives positives, const Partial& partial) const {
    const T negatives = T(partial.sum.total());
    if (of_many_ != nullptr) {
      of_many_[row] = {partial.max, negatives, T(positive_sum(logits, positives)), T(positives.count)};
      return;
    }
    statistics_.write(row, logits, positives, partial.max, negatives, T(partial.of_logits.total()));
  }

  void ignore(int64_t row) const { statistics_.ignore(row); }

  // Positives are counted all the same: multi-hot rows are normalised over the batch, and the others must not feel this
  // one.
  void spoil(int64_t row, Positives positives) const {
    statistics_.spoil(row);
    if (of_many_ != nullptr) of_many_[row].num_positives = T(positives.count);
  }

  void flush() const {}

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

  StatisticsWriter<S> statistics_;
  MultiHotStatistics<T>* of_many_;  // null unless the target is multi-hot
  bool smoothed_;
  Phi phi_;
};

template <class S, class Phi>
class LogisticBackward {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;
  static constexpr bool multi_hot = true;

  struct Gradient {
    V of_negatives, of_smoothing, of_positives;
    const Phi& phi;

    FUSED_LOSSES_INLINE V negative(V z) const { return fma(of_negatives, phi.template slope<S>(z), of_smoothing); }
    FUSED_LOSSES_INLINE V positive(V z) const { return of_positives * sigmoid_stored_as<S>(V(0) - z); }
  };

  LogisticBackward(const Backward&, Phi phi) : phi_(phi) {}

  Gradient gradient(int64_t, const Scaled<T>& scaled) const {
    return {V(scaled.of_negatives), V(scaled.of_smoothing), V(scaled.of_target), phi_};
  }

 private:
  Phi phi_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
