// Vectors of floating-point lanes: what every instruction set must offer, and the elementary functions written on top
// of it.
//
// A vector type V has V::Scalar, V::Mask and V::lanes, the operators + - *, and
//     V(s)                       s in every lane
//     V::load(p)  v.store(p)     p points to V::Scalar, BFloat16 or Half; no alignment needed
//     fma(a, b, c)               a * b + c, rounded once where the hardware can
//     max(a, b)  min(a, b)       b where either is NaN: the lane that may hold NaN goes second
//     round(v)                   to the nearest integer, ties to even, |v| < 2^22
//     scale(v, n)                v * 2^n for integer-valued |n| < 250, in double < 2000, rounded once
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
#include "simd_double_avx512.h"
#include "simd_pair.h"
#elif defined(FUSED_LOSSES_AVX2)
#include "simd_avx2.h"
#include "simd_double_avx2.h"
#include "simd_pair.h"
#endif
#include "simd_plain.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

#if defined(FUSED_LOSSES_AVX512)
using FloatVec = Float16;
using DoubleVec = Pair<Double8>;
#elif defined(FUSED_LOSSES_AVX2)
using FloatVec = Float16;
using DoubleVec = Pair<Pair<Double4> >;
#else
using FloatVec = Plain<float, 16>;
using DoubleVec = Plain<double, 16>;
#endif

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

// exp_nonpositive and log1p within 2^-16, for results of 16 bits.

FUSED_LOSSES_INLINE FloatVec exp_nonpositive_16(FloatVec v) {
  const FloatVec x = max(FloatVec(-105.0f), v) * FloatVec(1.44269504088896341f), n = round(x), r = x - n;
  // (2^r - 1) / r, weighted minimax
  FloatVec q = FloatVec(0.00958285315972765f);
  q = fma(q, r, FloatVec(0.05590642497257184f));
  q = fma(q, r, FloatVec(0.24024098611035416f));
  q = fma(q, r, FloatVec(0.6931241933751289f));
  return scale(fma(q, r, FloatVec(1.0f)), n);
}

FUSED_LOSSES_INLINE FloatVec log1p_16(FloatVec e) {
  // log(1 + e) / e, weighted minimax
  FloatVec q = FloatVec(-0.02386913306379368f);
  q = fma(q, e, FloatVec(0.10122223680887804f));
  q = fma(q, e, FloatVec(-0.21004864520985133f));
  q = fma(q, e, FloatVec(0.32520666209082794f));
  q = fma(q, e, FloatVec(-0.4993613617207495f));
  return e * fma(q, e, FloatVec(0.9999915980302249f));
}

// exp, exp_nonpositive and log1p in double. exp_nonpositive is right up to 709.

FUSED_LOSSES_INLINE DoubleVec exp_nonpositive(DoubleVec v) {
  v = max(DoubleVec(-746.0), v);
  const DoubleVec n = round(v * DoubleVec(1.4426950408889634));
  DoubleVec r = fma(n, DoubleVec(-0.6931471803691238), v);
  r = fma(n, DoubleVec(-1.9082149292705877e-10), r);
  DoubleVec q = DoubleVec(2.510038549551032e-08);
  q = fma(q, r, DoubleVec(2.7620088445409746e-07));
  q = fma(q, r, DoubleVec(2.7557268459997064e-06));
  q = fma(q, r, DoubleVec(2.4801521295954376e-05));
  q = fma(q, r, DoubleVec(0.00019841269863053618));
  q = fma(q, r, DoubleVec(0.0013888888917213717));
  q = fma(q, r, DoubleVec(0.008333333333330062));
  q = fma(q, r, DoubleVec(0.04166666666662413));
  q = fma(q, r, DoubleVec(0.16666666666666669));
  q = fma(q, r, DoubleVec(0.5000000000000001));
  q = fma(q, r, DoubleVec(1.0));
  return scale(fma(q, r, DoubleVec(1.0)), n);
}

FUSED_LOSSES_INLINE DoubleVec exp(DoubleVec v) { return exp_nonpositive(min(DoubleVec(710.0), v)); }

FUSED_LOSSES_INLINE DoubleVec log1p(DoubleVec e) {
  // 2 artanh(s), s = e / (2 + e): a polynomial in s^2, at most 1/9, of half the degree that one in e would have
  const DoubleVec half = e * DoubleVec(0.5), s = half * reciprocal(DoubleVec(1.0) + half), u = s * s;
  DoubleVec q = DoubleVec(0.08082022805971766);
  q = fma(q, u, DoubleVec(0.04400369243072337));
  q = fma(q, u, DoubleVec(0.06000536404795356));
  q = fma(q, u, DoubleVec(0.06657072104827468));
  q = fma(q, u, DoubleVec(0.07692785032479312));
  q = fma(q, u, DoubleVec(0.09090894718066429));
  q = fma(q, u, DoubleVec(0.11111111358713932));
  q = fma(q, u, DoubleVec(0.1428571428355438));
  q = fma(q, u, DoubleVec(0.20000000000007292));
  q = fma(q, u, DoubleVec(0.3333333333333333));
  const DoubleVec twice = s + s;
  return fma(twice, q * u, twice);
}

// log(1 + p) for p in [0, 2^20], in double 2^31, small p at full precision; NaN for NaN.
template <class V>
FUSED_LOSSES_INLINE V log1p_of_product(V p) {
  // 1 + p = 2^n (1 + r). The terms of r have no more bits than p: it is exact.
  const V n = exponent(V(1) + p), shift = V(0) - n;
  const V r = scale(p, shift) + (scale(V(1), shift) - V(1));
  return fma(n, V(static_cast<typename V::Scalar>(0.6931471805599453)), log1p(r));
}

// What a result that is stored as S is made of: 16 bits tell no more.
template <class S>
struct StoredAs {
  template <class V>
  static FUSED_LOSSES_INLINE V exp_nonpositive(V v) {
    if constexpr (sizeof(S) == 2) return exp_nonpositive_16(v);
    return FUSED_LOSSES_ISA::exp_nonpositive(v);
  }
  template <class V>
  static FUSED_LOSSES_INLINE V log1p(V e) {
    if constexpr (sizeof(S) == 2) return log1p_16(e);
    return FUSED_LOSSES_ISA::log1p(e);
  }
};

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

// Into the caches from the second one on, or from the first. Never faults: the address may lie behind the last row.
template <bool kFirst = false>
FUSED_LOSSES_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, kFirst ? 3 : 2);
#else
  (void)p;
#endif
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
