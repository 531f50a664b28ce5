// The softmax family: a row gives the largest logit of S and the log-sum of S above it. Nothing here knows a loss.
#pragma once

#include "walk.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class S>
class SoftmaxForward {
 public:
  using T = Compute<S>;

  struct Partial {
    T max = -kInfinity<T>;
    CompensatedSum sum;  // of exp(z - max)
  };

  explicit SoftmaxForward(const Forward& door) : statistics_(static_cast<SoftmaxStatistics<T>*>(door.statistics)) {}

  // NaN and +inf among the logits make the sum NaN, which stays.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    using V = VecOf<X>;
    Partial partial;
    V largest(partial.max);
    for_each_negative(row, begin, end, positives, [&](V z) { largest = max(largest, z); });
    partial.max = max_lane(largest);
    const V shift(partial.max == -kInfinity<T> ? T(0) : partial.max);
    partial.sum = CompensatedSum(
        sum_negatives<kPiece>(row, begin, end, positives, [&](V z) { return exp_nonpositive(z - shift); }));
    return partial;
  }

  static Partial merge(Partial a, Partial b) {
    if (a.max < b.max) return merge(b, a);
    if (b.sum.total() == 0) return a;
    a.sum.add(b.sum, b.max == a.max ? 1 : std::exp(static_cast<double>(b.max - a.max)));
    return a;
  }

  void write(int64_t row, const S* logits, Positives positives, Partial partial) const {
    const double sum = partial.sum.total();
    SoftmaxStatistics<T> statistics{partial.max, T(std::log(sum)), -kInfinity<T>};
    if (partial.max == -kInfinity<T> && sum == 0) statistics.max = 0;
    if (sum != sum) statistics.max = statistics.log_sum = kNaN<T>;
    if (positives.count > 0) statistics.target = to_compute(logits[positives.index[0]]);
    if (statistics.target == kInfinity<T>) statistics.target = kNaN<T>;
    statistics_[row] = statistics;
  }

  void ignore(int64_t row) const { statistics_[row] = {0, 0, 0}; }
  void spoil(int64_t row, Positives) const { statistics_[row] = {kNaN<T>, kNaN<T>, kNaN<T>}; }

 private:
  SoftmaxStatistics<T>* statistics_;
};

template <class S>
class SoftmaxBackward {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;
  static constexpr bool multi_hot = false;

  struct Gradient {
    Coefficients<T> coefficients;
    V of_negatives, max, log_sum;

    FUSED_LOSSES_INLINE V negative(V z) const { return of_negatives * exp_nonpositive((z - max) - log_sum); }
  };

  explicit SoftmaxBackward(const Backward& door)
      : statistics_(static_cast<const SoftmaxStatistics<T>*>(door.statistics)) {}

  Gradient gradient(int64_t row, Coefficients<T> coefficients) const {
    const SoftmaxStatistics<T> statistics = statistics_[row];
    // all of S is masked: exp(-inf - 0)
    const T log_sum = statistics.log_sum == -kInfinity<T> ? T(0) : statistics.log_sum;
    return {coefficients, V(coefficients.of_negatives), V(statistics.max), V(log_sum)};
  }

 private:
  const SoftmaxStatistics<T>* statistics_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
