// What each loss is: its value and its slope. Nothing here knows how a row is walked, and no other page knows a
// formula.
#pragma once

#include "simd.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// Every quantity comes from e = exp(-|z|):
//     softplus(z) = max(z, 0) + log1p(e),   sigma(|z|) = 1 / (1 + e),   sigma(-|z|) = e / (1 + e)

template <class V>
FUSED_LOSSES_INLINE V exp_minus_abs(V z) {
  return exp_nonpositive(minus_abs(z));
}

template <class V>
struct Sigmoid {
  V plus, minus;  // sigma(z), sigma(-z)
  FUSED_LOSSES_INLINE Sigmoid(V z, V e) {
    const V zero(0), big = reciprocal(V(1) + e), small = e * big;
    plus = select(z >= zero, big, small);
    minus = select(z >= zero, small, big);
  }
};

template <class V>
FUSED_LOSSES_INLINE V softplus(V z) {
  return max(V(0), z) + log1p(exp_minus_abs(z));
}

// A sum of softplus(z), of up to 20 z, takes one logarithm for all: of the product of the 1 + e, at most 2 each. It is
// kept less 1, so that a sum of small e loses nothing.
template <class V>
struct SumOfSoftplus {
  V of_positive, product;
  explicit SumOfSoftplus(typename V::Scalar zero) : of_positive(zero), product(zero) {}
  explicit FUSED_LOSSES_INLINE SumOfSoftplus(V z) : of_positive(max(V(0), z)), product(exp_minus_abs(z)) {}
};

template <class V>
FUSED_LOSSES_INLINE SumOfSoftplus<V> operator+(SumOfSoftplus<V> a, const SumOfSoftplus<V>& b) {
  a.of_positive = a.of_positive + b.of_positive;
  a.product = fma(a.product, b.product, a.product + b.product);
  return a;
}

template <class V>
FUSED_LOSSES_INLINE V total(const SumOfSoftplus<V>& sum) {
  return sum.of_positive + log1p_of_product(sum.product);
}

template <class S, class V>
FUSED_LOSSES_INLINE V sigmoid_stored_as(V z) {
  return Sigmoid<V>(z, StoredAs<S>::exp_nonpositive(minus_abs(z))).plus;
}

template <class V>
FUSED_LOSSES_INLINE V sigmoid(V z) {
  return sigmoid_stored_as<typename V::Scalar>(z);
}

// log(e^a + e^b)
template <class V>
FUSED_LOSSES_INLINE V logaddexp(V a, V b) {
  const V larger = max(a, b);
  return select(larger > V(-kInfinity<typename V::Scalar>), larger + log1p(exp_minus_abs(a - b)), larger);
}

// The softmax family: functions of d, the log-odds of the target among the target and S, of many rows.

template <class V>
struct LogOdds {
  explicit LogOdds(const double*) {}
  FUSED_LOSSES_INLINE V value(V d) const { return d; }
  FUSED_LOSSES_INLINE V slope(V d) const { return select(d >= d, V(1), d); }
};

template <class V>
struct CrossEntropy {
  explicit CrossEntropy(const double*) {}
  FUSED_LOSSES_INLINE V value(V d) const { return softplus(V(0) - d); }
  FUSED_LOSSES_INLINE V slope(V d) const { return V(0) - sigmoid(V(0) - d); }
};

template <class V>
struct NLLR {
  explicit NLLR(const double*) {}
  FUSED_LOSSES_INLINE V value(V d) const { return V(0) - d; }
  FUSED_LOSSES_INLINE V slope(V d) const { return select(d >= d, V(-1), d); }
};

// -log p + beta log(alpha + 1 - p), p the probability of the target
template <class V>
struct CRL {
  using T = typename V::Scalar;
  T alpha, log_alpha, beta;
  explicit CRL(const double* params)
      : alpha(static_cast<T>(params[0])), log_alpha(std::log(alpha)), beta(static_cast<T>(params[1])) {}

  FUSED_LOSSES_INLINE V value(V d) const {
    const V cross_entropy = softplus(V(0) - d);
    return beta == 0 ? cross_entropy : cross_entropy + V(beta) * logaddexp(V(log_alpha), V(0) - softplus(d));
  }

  FUSED_LOSSES_INLINE V slope(V d) const {
    const V competing = alpha == 0 ? V(1) : sigmoid(V(0) - (V(log_alpha) + softplus(d)));
    return V(0) - (sigmoid(V(0) - d) + V(beta) * sigmoid(d) * competing);
  }
};

// The logistic family: phi and phi' of a vector of negative logits. A term is phi, or what stands for it in a sum. A
// slope is for a gradient that is stored as S.

template <class V>
struct Logistic {
  explicit Logistic(const double*) {}
  FUSED_LOSSES_INLINE SumOfSoftplus<V> term(V z) const { return SumOfSoftplus<V>(z); }
  template <class S>
  FUSED_LOSSES_INLINE V slope(V z) const {
    return sigmoid_stored_as<S>(z);
  }
};

// sigma(z)^gamma softplus(z). kGamma is 1 or 2, or 0 for a gamma known only at run time (gamma = 0 itself is Logistic).
template <class V, int kGamma>
struct SoftSelection {
  V gamma;
  explicit SoftSelection(const double* params) : gamma(static_cast<typename V::Scalar>(params[0])) {}

  FUSED_LOSSES_INLINE V term(V z) const {
    const V e = exp_minus_abs(z), tail = log1p(e);
    return weight(z, e, tail) * (max(V(0), z) + tail);
  }

  template <class S>
  FUSED_LOSSES_INLINE V slope(V z) const {
    // A large gamma would multiply what a short logarithm is wrong by.
    using Stored = StoredAs<std::conditional_t<kGamma == 0, typename V::Scalar, S>>;
    // Beyond 1000 sigma(-z) softplus(z) is 0; without the bound it would be 0 * inf at z = inf.
    const V bounded = min(V(1000), z), e = Stored::exp_nonpositive(minus_abs(bounded)), tail = Stored::log1p(e);
    const Sigmoid<V> sigma(bounded, e);
    return weight(bounded, e, tail) * fma(gamma * sigma.minus, max(V(0), bounded) + tail, sigma.plus);
  }

 private:
  FUSED_LOSSES_INLINE V weight(V z, V e, V tail) const {
    if constexpr (kGamma == 0) {  // log sigma(z) = -softplus(-z)
      return exp_nonpositive(V(0) - gamma * (max(V(0), V(0) - z) + tail));
    }
    const V sigma = Sigmoid<V>(z, e).plus;
    return kGamma == 1 ? sigma : sigma * sigma;
  }
};

// The table. A loss is known by its row, which dispatch.h turns into the types above.

constexpr Formula kFormulas[] = {
    {"log_odds", Family::softmax, 0}, {"cross_entropy", Family::softmax, 0}, {"nllr", Family::softmax, 0},
    {"crl", Family::softmax, 2},      {"lr", Family::logistic, 0},           {"ss_lr", Family::logistic, 1},
};
constexpr int kNumFormulas = sizeof(kFormulas) / sizeof(Formula);

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
