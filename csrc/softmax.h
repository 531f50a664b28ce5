// The softmax family: a row gives the largest logit of S, the log-sum of S above it and, where label smoothing asks for
// it, how far S lies below it in sum. Nothing here knows a loss.
#pragma once

#include "walk.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class S, bool kSmoothed>
class SoftmaxForward {
 public:
  using T = Compute<S>;

  // Differences, since a sum of logits loses digits at a large offset.
  struct Below {
    CompensatedSum sum;  // of z - max
    double count = 0;    // of all z
  };

  struct Partial {
    T max = -kInfinity<T>;
    CompensatedSum sum;                                   // of exp(z - max)
    std::conditional_t<kSmoothed, Below, Nothing> below;  // short rows feel it where it is not needed
  };

  explicit SoftmaxForward(const Forward& door) : statistics_(door, kNaN<T>) {}

  // NaN and +inf among the logits make the sum NaN, which stays.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    using V = VecOf<X>;
    Partial partial;
    V largest(partial.max);
    for_each_negative(row, begin, end, positives, [&](V z) { largest = max(largest, z); });
    partial.max = max_lane(largest);
    const T level = partial.max == -kInfinity<T> ? T(0) : partial.max;
    const V shift(level);
    partial.sum = CompensatedSum(
        sum_negatives<kPiece>(row, begin, end, positives, [&](V z) { return exp_nonpositive(z - shift); }));
    if constexpr (kSmoothed) {  // a third look at a piece in the first cache
      partial.below = {CompensatedSum(sum_above(row, begin, end, positives, level)),
                       static_cast<double>(count_negatives(begin, end, positives))};
    }
    return partial;
  }

  static Partial merge(Partial a, Partial b) {
    if (a.max < b.max) return merge(b, a);
    if constexpr (kSmoothed) {
      a.below.sum.add(b.below.sum);
      const double lower = static_cast<double>(b.max) - static_cast<double>(a.max);
      if (b.below.count > 0 && b.max < a.max) a.below.sum.add(b.below.count * lower);
      a.below.count += b.below.count;
    }
    if (b.sum.total() == 0) return a;
    a.sum.add(b.sum, b.max == a.max ? 1 : std::exp(static_cast<double>(b.max - a.max)));
    return a;
  }

  void write(int64_t row, const S* logits, Positives positives, const Partial& partial) {
    const double sum = partial.sum.total();
    T max = partial.max;
    if (max == -kInfinity<T> && sum == 0) max = 0;
    if (sum != sum) max = kNaN<T>;
    T below = 0;
    if constexpr (kSmoothed) below = T(partial.below.sum.total());
    statistics_.write(row, logits, positives, max, sum == 0 ? -kInfinity<T> : T(0), below);
    if (sum == 0) return;
    row_[pending_] = row;
    above_1_[pending_++] = sum - 1;  // the largest of S counts 1
    if (pending_ == DoubleVec::lanes) flush();
  }

  // The logarithms of many sums at a time: one by one, each would cost as much as 40 logits.
  void flush() {
    if (pending_ == 0) return;
    double log[DoubleVec::lanes];
    log1p_of_product(load_first<DoubleVec>(above_1_, pending_, 0)).store(log);
    for (int i = 0; i < pending_; ++i) statistics_.add_of_negatives(row_[i], T(log[i]));
    pending_ = 0;
  }

  void ignore(int64_t row) const { statistics_.ignore(row); }
  void spoil(int64_t row, Positives) const { statistics_.spoil(row); }

 private:
  StatisticsWriter<S> statistics_;
  int pending_ = 0;  // rows whose log-sum is to be written yet
  int64_t row_[DoubleVec::lanes] = {};
  double above_1_[DoubleVec::lanes] = {};  // the sum of exp(z - max), less 1
};

template <class S>
class SoftmaxBackward {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;
  static constexpr bool multi_hot = false;

  struct Gradient {
    V of_negatives, of_smoothing, max, log_sum;

    FUSED_LOSSES_INLINE V negative(V z) const {
      return fma(of_negatives, StoredAs<S>::exp_nonpositive((z - max) - log_sum), of_smoothing);
    }
  };

  explicit SoftmaxBackward(const Backward& door)
      : statistics_(static_cast<const T*>(door.statistics), door.problem.target.statistics_columns(),
                    door.problem.target.places) {}

  Gradient gradient(int64_t row, const Scaled<T>& scaled) const {
    const T max = statistics_[row][0], log_sum = statistics_[row][1];
    // without a log-sum all of S is masked: exp(-inf - 0)
    return {V(scaled.of_negatives), V(scaled.of_smoothing), V(max), V(log_sum == -kInfinity<T> ? T(0) : log_sum)};
  }

 private:
  RowTable<const T> statistics_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
