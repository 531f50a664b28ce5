// What each loss is: its value and its slope. Nothing here knows how a row is walked, and no other page knows a
// formula.
#pragma once

#include "simd.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// log(1 + e^x), sigma(x) and log(e^a + e^b) of one number.
template <class T>
inline T softplus(T x) {
  return (x < 0 ? T(0) : x) + std::log1p(std::exp(-std::abs(x)));
}

template <class T>
inline T sigmoid(T x) {
  const T e = std::exp(-std::abs(x));
  return x < 0 ? e / (1 + e) : 1 / (1 + e);
}

template <class T>
inline T logaddexp(T a, T b) {
  const T larger = a > b ? a : b;
  return larger == -kInfinity<T> ? larger : larger + std::log1p(std::exp(-std::abs(a - b)));
}

// The softmax family: functions of the margin d, the log-odds of the target among the target and S.

template <class T>
struct CrossEntropy {
  explicit CrossEntropy(const double*) {}
  T value(T d) const { return softplus(-d); }
  T slope(T d) const { return -sigmoid(-d); }
};

template <class T>
struct NLLR {
  explicit NLLR(const double*) {}
  T value(T d) const { return -d; }
  T slope(T d) const { return d == d ? T(-1) : d; }
};

// -log p + beta log(alpha + 1 - p), p the probability of the target
template <class T>
struct CRL {
  T alpha, log_alpha, beta;
  explicit CRL(const double* params)
      : alpha(static_cast<T>(params[0])), log_alpha(std::log(alpha)), beta(static_cast<T>(params[1])) {}

  T value(T d) const {
    const T cross_entropy = softplus(-d);
    return beta == 0 ? cross_entropy : cross_entropy + beta * logaddexp(log_alpha, -softplus(d));
  }

  T slope(T d) const {
    const T competing = alpha == 0 ? T(1) : sigmoid(-(log_alpha + softplus(d)));
    return -(sigmoid(-d) + beta * sigmoid(d) * competing);
  }
};

// The logistic family: phi and phi' of a vector of negative logits. Every quantity comes from e = exp(-|z|):
//     softplus(z) = max(z, 0) + log1p(e),   sigma(|z|) = 1 / (1 + e),   sigma(-|z|) = e / (1 + e)

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
FUSED_LOSSES_INLINE V exp_minus_abs(V z) {
  return exp_nonpositive(minus_abs(z));
}

template <class V>
struct Logistic {
  explicit Logistic(const double*) {}
  FUSED_LOSSES_INLINE V value(V z) const { return max(V(0), z) + log1p(exp_minus_abs(z)); }
  FUSED_LOSSES_INLINE V slope(V z) const { return Sigmoid<V>(z, exp_minus_abs(z)).plus; }
};

// sigma(z)^gamma softplus(z). kGamma is 1 or 2, or 0 for a gamma known only at run time (gamma = 0 itself is Logistic).
template <class V, int kGamma>
struct SoftSelection {
  V gamma;
  explicit SoftSelection(const double* params) : gamma(static_cast<typename V::Scalar>(params[0])) {}

  FUSED_LOSSES_INLINE V value(V z) const {
    const V e = exp_minus_abs(z), tail = log1p(e);
    return weight(z, e, tail) * (max(V(0), z) + tail);
  }

  FUSED_LOSSES_INLINE V slope(V z) const {
    // Beyond 1000 sigma(-z) softplus(z) is 0; without the bound it would be 0 * inf at z = inf.
    const V bounded = min(V(1000), z), e = exp_minus_abs(bounded), tail = log1p(e);
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

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
