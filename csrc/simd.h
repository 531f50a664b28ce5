// Vectors of floating-point lanes: what every instruction set must offer, and the elementary functions written on top
// of it.
//
// A vector type V has V::Scalar, V::Mask and V::lanes, the operators + - *, and
//     V(s)                       s in every lane
//     V::load(p)  v.store(p)     p points to V::Scalar, BFloat16 or Half; no alignment needed
//     fma(a, b, c)               a * b + c, rounded once where the hardware can
//     max(a, b)  min(a, b)       b where either is NaN: the lane that may hold NaN goes second
//     round(v)                   to the nearest integer, ties to even, |v| < 2^22
//     scale(v, n)                v * 2^n for integer-valued |n| < 300, rounded once
//     exponent(v)                the largest n with 2^n <= v, for normal v >= 1; means nothing where v is NaN
//     reciprocal(v)              1 / v for v in [1, 2], 2 ulp
//     a >= b  a > b              Mask; false where either is NaN
//     unordered(a, b)            Mask: where either is NaN
//     select(mask, a, b)         a where the mask is set, else b
//     bits(mask)                 lane i as bit i of a uint32_t
//     minus_abs(v)               -|v|
//     replaced(v, i, s)          v with s in lane i
//     max_lane(v)                of all lanes; means nothing where one is NaN
//     Sum<V>                     .add(v) adds up vectors lane by lane in double, .total() is the sum of all lanes
// and where V::masked says so, load_masked and store_masked, which touch only the lanes of the set bits.
#pragma once

#include "simd_storage.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {
template <class V>
class Sum;
}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses

#if defined(FUSED_LOSSES_AVX512)
#include "simd_avx512.h"
#elif defined(FUSED_LOSSES_AVX2)
#include "simd_avx2.h"
#endif
#include "simd_plain.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

#if defined(FUSED_LOSSES_AVX512) || defined(FUSED_LOSSES_AVX2)
using FloatVec = Float16;
#else
using FloatVec = Plain<float, 16>;
#endif
using DoubleVec = Plain<double, 16>;

// The dtype that the arithmetic on logits of dtype S is done in, and its vector.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <class S>
using VecOf = std::conditional_t<std::is_same_v<S, double>, DoubleVec, FloatVec>;

// e^v within 2 ulp for v <= 0, subnormal results included; 0 for -inf, NaN for NaN. (Rounding may bring v above 0: up
// to 88 it is right as well.)
FUSED_LOSSES_INLINE FloatVec exp_nonpositive(FloatVec v) {
  // Cody and Waite: v = n ln2 + r with |r| <= ln2 / 2. The high part of ln2 has few bits, so that n * high is exact.
  v = max(FloatVec(-105.0f), v);
  const FloatVec n = round(v * FloatVec(1.44269504088896341f));
  FloatVec r = fma(n, FloatVec(-0.693359375f), v);
  r = fma(n, FloatVec(2.12194440054690583e-4f), r);
  // (e^r - 1) / r, weighted minimax
  FloatVec q = FloatVec(0.0013843607830347768f);
  q = fma(q, r, FloatVec(0.008374195905824212f));
  q = fma(q, r, FloatVec(0.041668004723608584f));
  q = fma(q, r, FloatVec(0.1666643079707156f));
  q = fma(q, r, FloatVec(0.4999999419159436f));
  q = fma(q, r, FloatVec(1.0000000322592943f));
  return scale(fma(q, r, FloatVec(1.0f)), n);
}

// The same for every v; inf for inf.
FUSED_LOSSES_INLINE FloatVec exp(FloatVec v) { return exp_nonpositive(min(FloatVec(89.0f), v)); }

// log(1 + e) for e in [0, 1] within 3 ulp; NaN for NaN.
FUSED_LOSSES_INLINE FloatVec log1p(FloatVec e) {
  // (log(1 + e) / e - 1) / e, weighted minimax
  FloatVec q = FloatVec(0.005364812833188255f);
  q = fma(q, e, FloatVec(-0.030065750054055436f));
  q = fma(q, e, FloatVec(0.07920447312885699f));
  q = fma(q, e, FloatVec(-0.13753797595246797f));
  q = fma(q, e, FloatVec(0.19153652977147925f));
  q = fma(q, e, FloatVec(-0.2485716323906367f));
  q = fma(q, e, FloatVec(0.33321322574457907f));
  q = fma(q, e, FloatVec(-0.4999964796202334f));
  return e * fma(q, e, FloatVec(1.0f));
}

// log(1 + p) for p in [0, 2^20], small p at full precision; NaN for NaN.
FUSED_LOSSES_INLINE FloatVec log1p_of_product(FloatVec p) {
  // 1 + p = 2^n (1 + r). The terms of r have no more bits than p: it is exact.
  const FloatVec n = exponent(FloatVec(1) + p), shift = FloatVec(0) - n;
  const FloatVec r = scale(p, shift) + (scale(FloatVec(1), shift) - FloatVec(1));
  return fma(n, FloatVec(0.69314718055994531f), log1p(r));
}

inline DoubleVec exp(DoubleVec v) {
  for (double& lane : v.lane) lane = std::exp(lane);
  return v;
}

inline DoubleVec exp_nonpositive(DoubleVec v) { return exp(v); }

inline DoubleVec log1p(DoubleVec v) {
  for (double& lane : v.lane) lane = std::log1p(lane);
  return v;
}

inline DoubleVec log1p_of_product(DoubleVec p) { return log1p(p); }

template <class V>
FUSED_LOSSES_INLINE double sum_lanes(V v) {
  Sum<V> sum;
  sum.add(v);
  return sum.total();
}

// The parts of a vector, for the end of an array. 0 < n <= V::lanes.

template <class V, class S>
FUSED_LOSSES_INLINE V load_first(const S* p, int64_t n, typename V::Scalar fill) {
  if constexpr (V::masked) {
    return V::load_masked(p, (2u << (n - 1)) - 1, V(fill));
  } else {
    typename V::Scalar lane[V::lanes];
    for (int i = 0; i < V::lanes; ++i) lane[i] = i < n ? to_compute(p[i]) : fill;
    return V::load(lane);
  }
}

template <class V, class S>
FUSED_LOSSES_INLINE void store_first(S* p, V v, int64_t n) {
  if constexpr (V::masked && std::is_same_v<S, typename V::Scalar>) {
    v.store_masked(p, (2u << (n - 1)) - 1);
  } else {
    S lane[V::lanes];
    v.store(lane);
    std::memcpy(p, lane, n * sizeof(S));
  }
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
