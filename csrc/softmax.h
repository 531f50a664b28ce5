// The softmax family: a row is remembered as the largest logit of S, the log-sum of S above it, and the target's logit.
#pragma once

#include "formulas.h"
#include "walk.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class T>
struct SoftmaxState {
  T max, log_sum, target;

  // The log-odds of the target among the target and S. Never via max + log_sum, which loses digits at large offsets.
  T margin() const { return (target - max) - log_sum; }
};

// body(row, margins of n rows from there on, n)
template <class T, class Body>
FUSED_LOSSES_INLINE void for_margins(const SoftmaxState<T>* states, int64_t begin, int64_t end, const Body& body) {
  using V = VecOf<T>;
  T margin[V::lanes] = {};
  for (int64_t row = begin; row < end; row += V::lanes) {
    const int64_t n = end - row < V::lanes ? end - row : V::lanes;
    for (int64_t i = 0; i < n; ++i) margin[i] = states[row + i].margin();
    body(row, V::load(margin), n);
  }
}

template <class S, class Loss>
class SoftmaxForward {
 public:
  using T = Compute<S>;

  struct Partial {
    T max = -kInfinity<T>;
    CompensatedSum sum;  // of exp(z - max)
  };

  SoftmaxForward(const Forward& door, Loss loss) : door_(door), loss_(loss) {}

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

  void finish(int64_t row, const S* logits, Positives positives, Partial partial) const {
    const double sum = partial.sum.total();
    SoftmaxState<T> state{partial.max, T(std::log(sum)), -kInfinity<T>};
    if (partial.max == -kInfinity<T> && sum == 0) state.max = 0;
    if (sum != sum) state.max = state.log_sum = kNaN<T>;
    if (positives.count > 0) state.target = to_compute(logits[positives.index[0]]);
    if (state.target == kInfinity<T>) state.target = kNaN<T>;
    states()[row] = state;
  }

  void ignore(int64_t row) const { states()[row] = {0, 0, 0}; }
  void spoil(int64_t row, Positives) const { states()[row] = {kNaN<T>, kNaN<T>, kNaN<T>}; }

  // The values of rows, many at a time: one by one they would cost as much as 500 of their logits.
  void finish_rows(int64_t begin, int64_t end, const TargetReader& targets) const {
    T* value = static_cast<T*>(door_.result);
    for_margins(states(), begin, end, [&](int64_t row, VecOf<S> d, int64_t n) {
      store_first(value + row, loss_.value(d), n);
    });
    for (int64_t row = begin; row < end; ++row) {
      if (targets.ignored(row)) value[row] = 0;
    }
  }

 private:
  SoftmaxState<T>* states() const { return static_cast<SoftmaxState<T>*>(door_.state); }

  const Forward& door_;
  Loss loss_;
};

template <class S, class Loss>
class SoftmaxBackward {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;

  struct Gradient {
    bool spoilt;
    T target_logit;
    V of_margin, max, log_sum;

    FUSED_LOSSES_INLINE V negative(V z) const {
      return (V(0) - of_margin) * exp_nonpositive((z - max) - log_sum);
    }
    V positive(V) const { return of_margin; }
  };

  SoftmaxBackward(const Backward& door, Loss loss) : door_(door), loss_(loss) {}

  // of_margin (rows,): d(objective) / d(margin)
  void prepare(int64_t begin, int64_t end, T* of_margin) const {
    const T* grad = static_cast<const T*>(door_.grad);
    for_margins(states(), begin, end, [&](int64_t row, V d, int64_t n) {
      store_first(of_margin + (row - begin), loss_.slope(d), n);
    });
    for (int64_t row = begin; row < end; ++row) of_margin[row - begin] *= grad[row * door_.grad_row_stride];
  }

  Gradient gradient(int64_t row, T of_margin) const {
    const SoftmaxState<T> state = states()[row];
    const T log_sum = state.log_sum == -kInfinity<T> ? T(0) : state.log_sum;  // all of S is masked: exp(-inf - 0)
    return {of_margin != of_margin, state.target, V(of_margin), V(state.max), V(log_sum)};
  }

 private:
  const SoftmaxState<T>* states() const { return static_cast<const SoftmaxState<T>*>(door_.state); }

  const Backward& door_;
  Loss loss_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
