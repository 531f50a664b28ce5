// Two vectors as one of twice the lanes. (As templates, and inlined, so that they are compiled for the instruction set
// of whoever calls them.)
#pragma once

#include "simd_storage.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class H>
struct PairMask {
  typename H::Mask low, high;
};

template <class H>
struct Pair {
  using Scalar = typename H::Scalar;
  using Mask = PairMask<H>;
  static constexpr int half = H::lanes, lanes = 2 * half;
  static constexpr bool masked = H::masked;

  H low, high;

  Pair() = default;
  FUSED_LOSSES_INLINE Pair(H l, H h) : low(l), high(h) {}
  explicit FUSED_LOSSES_INLINE Pair(Scalar s) : low(s), high(s) {}

  static FUSED_LOSSES_INLINE Pair load(const Scalar* p) { return {H::load(p), H::load(p + half)}; }
  FUSED_LOSSES_INLINE void store(Scalar* p) const {
    low.store(p);
    high.store(p + half);
  }

  static FUSED_LOSSES_INLINE Pair load_masked(const Scalar* p, uint32_t bits, Pair fill) {
    return {H::load_masked(p, bits, fill.low), H::load_masked(p + half, bits >> half, fill.high)};
  }
  FUSED_LOSSES_INLINE void store_masked(Scalar* p, uint32_t bits) const {
    low.store_masked(p, bits);
    high.store_masked(p + half, bits >> half);
  }
};

template <class H>
FUSED_LOSSES_INLINE uint32_t bits(PairMask<H> m) {
  return bits(m.low) | bits(m.high) << H::lanes;
}

template <class H>
FUSED_LOSSES_INLINE Pair<H> operator+(Pair<H> a, Pair<H> b) {
  return {a.low + b.low, a.high + b.high};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> operator-(Pair<H> a, Pair<H> b) {
  return {a.low - b.low, a.high - b.high};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> operator*(Pair<H> a, Pair<H> b) {
  return {a.low * b.low, a.high * b.high};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> fma(Pair<H> a, Pair<H> b, Pair<H> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> max(Pair<H> a, Pair<H> b) {
  return {max(a.low, b.low), max(a.high, b.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> min(Pair<H> a, Pair<H> b) {
  return {min(a.low, b.low), min(a.high, b.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> round(Pair<H> a) {
  return {round(a.low), round(a.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> scale(Pair<H> a, Pair<H> n) {
  return {scale(a.low, n.low), scale(a.high, n.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> exponent(Pair<H> a) {
  return {exponent(a.low), exponent(a.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> reciprocal(Pair<H> a) {
  return {reciprocal(a.low), reciprocal(a.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> minus_abs(Pair<H> a) {
  return {minus_abs(a.low), minus_abs(a.high)};
}

template <class H>
FUSED_LOSSES_INLINE PairMask<H> operator>=(Pair<H> a, Pair<H> b) {
  return {a.low >= b.low, a.high >= b.high};
}
template <class H>
FUSED_LOSSES_INLINE PairMask<H> operator>(Pair<H> a, Pair<H> b) {
  return {a.low > b.low, a.high > b.high};
}
template <class H>
FUSED_LOSSES_INLINE PairMask<H> unordered(Pair<H> a, Pair<H> b) {
  return {unordered(a.low, b.low), unordered(a.high, b.high)};
}
template <class H>
FUSED_LOSSES_INLINE Pair<H> select(PairMask<H> m, Pair<H> a, Pair<H> b) {
  return {select(m.low, a.low, b.low), select(m.high, a.high, b.high)};
}

template <class H>
FUSED_LOSSES_INLINE Pair<H> replaced(Pair<H> a, int64_t lane, typename H::Scalar by) {
  if (lane < H::lanes) return {replaced(a.low, lane, by), a.high};
  return {a.low, replaced(a.high, lane - H::lanes, by)};
}

template <class H>
FUSED_LOSSES_INLINE typename H::Scalar max_lane(Pair<H> a) {
  return max_lane(max(a.low, a.high));
}

template <class H>
class Sum<Pair<H>> {
 public:
  FUSED_LOSSES_INLINE Sum() : low_(), high_() {}
  FUSED_LOSSES_INLINE void add(Pair<H> a) {
    low_.add(a.low);
    high_.add(a.high);
  }
  FUSED_LOSSES_INLINE double total() const { return low_.total() + high_.total(); }

 private:
  Sum<H> low_, high_;
};

// What the set bits choose, written one after another.
template <class H>
FUSED_LOSSES_INLINE void compress(uint32_t chosen, Pair<H> v, typename H::Scalar* to) {
  const uint32_t low = chosen & ((1u << H::lanes) - 1);
  compress(low, v.low, to);
  compress(chosen >> H::lanes, v.high, to + __builtin_popcount(low));
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
