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

template <class S, class Loss>
class SoftmaxForward {
 public:
  using T = Compute<S>;

  struct Partial {
    T max = -kInfinity<T>;
    double sum = 0;  // of exp(z - max)
  };

  SoftmaxForward(const Forward& door, Loss loss) : door_(door), loss_(loss) {}

  // NaN and +inf among the logits make the sum NaN, which stays.
  template <class X>
  Partial over(const X* row, int64_t begin, int64_t end, Positives positives) const {
    using V = VecOf<X>;
    Partial partial;
    V largest(partial.max), sum(0);
    for_each_negative(row, begin, end, positives, [&](V z) { largest = max(largest, z); });
    partial.max = max_lane(largest);
    const V shift(partial.max == -kInfinity<T> ? T(0) : partial.max);
    for_each_negative<kPiece>(row, begin, end, positives, [&](V z) { sum = sum + exp_nonpositive(z - shift); });
    partial.sum = sum_lanes(sum);
    return partial;
  }

  static Partial merge(Partial a, Partial b) {
    if (a.max < b.max) return merge(b, a);
    if (b.sum == 0) return a;
    const T shift = b.max == a.max ? T(0) : b.max - a.max;
    a.sum += shift == 0 ? b.sum : b.sum * std::exp(static_cast<double>(shift));
    return a;
  }

  void finish(int64_t row, const S* logits, Positives positives, Partial partial) const {
    SoftmaxState<T> state{partial.max, T(std::log(partial.sum)), -kInfinity<T>};
    if (partial.max == -kInfinity<T> && partial.sum == 0) state.max = 0;
    if (partial.sum != partial.sum) state.max = state.log_sum = kNaN<T>;
    if (positives.count > 0) state.target = to_compute(logits[positives.index[0]]);
    if (state.target == kInfinity<T>) state.target = kNaN<T>;
    write(row, loss_.value(state.margin()), state);
  }

  void ignore(int64_t row) const { write(row, 0, {0, 0, 0}); }
  void spoil(int64_t row, Positives) const { write(row, kNaN<T>, {kNaN<T>, kNaN<T>, kNaN<T>}); }

 private:
  void write(int64_t row, T value, SoftmaxState<T> state) const {
    static_cast<T*>(door_.result)[row] = value;
    static_cast<SoftmaxState<T>*>(door_.state)[row] = state;
  }

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
    T target_gradient;
    V minus_gradient, max, log_sum;

    FUSED_LOSSES_INLINE V negative(V z) const { return minus_gradient * exp_nonpositive((z - max) - log_sum); }
    T positive(T) const { return target_gradient; }
  };

  SoftmaxBackward(const Backward& door, Loss loss) : door_(door), loss_(loss) {}

  Gradient gradient(int64_t row) const {
    const SoftmaxState<T> state = static_cast<const SoftmaxState<T>*>(door_.state)[row];
    const T c = static_cast<const T*>(door_.grad)[row * door_.grad_row_stride] * loss_.slope(state.margin());
    const T log_sum = state.log_sum == -kInfinity<T> ? T(0) : state.log_sum;  // all of S is masked: exp(-inf - 0)
    return {c != c, state.target, c, V(-c), V(state.max), V(log_sum)};
  }

 private:
  const Backward& door_;
  Loss loss_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
