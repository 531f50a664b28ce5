// Eight doubles in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include "simd_storage.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct Double8 {
  using Scalar = double;
  static constexpr int lanes = 8;
  static constexpr bool masked = true;

  struct Mask {
    __mmask8 m;
  };

  __m512d v;

  Double8() = default;
  Double8(__m512d value) : v(value) {}
  explicit Double8(double s) : v(_mm512_set1_pd(s)) {}

  static Double8 load(const double* p) { return _mm512_loadu_pd(p); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }

  // Lanes without a bit are neither read nor written; `fill` stands in for what is not read.
  static Double8 load_masked(const double* p, uint32_t bits, Double8 fill) {
    return _mm512_mask_loadu_pd(fill.v, static_cast<__mmask8>(bits), p);
  }
  void store_masked(double* p, uint32_t bits) const { _mm512_mask_storeu_pd(p, static_cast<__mmask8>(bits), v); }
};

inline uint32_t bits(Double8::Mask mask) { return mask.m; }

inline Double8 operator+(Double8 a, Double8 b) { return _mm512_add_pd(a.v, b.v); }
inline Double8 operator-(Double8 a, Double8 b) { return _mm512_sub_pd(a.v, b.v); }
inline Double8 operator*(Double8 a, Double8 b) { return _mm512_mul_pd(a.v, b.v); }
inline Double8 fma(Double8 a, Double8 b, Double8 c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline Double8 max(Double8 a, Double8 b) { return _mm512_max_pd(a.v, b.v); }
inline Double8 min(Double8 a, Double8 b) { return _mm512_min_pd(a.v, b.v); }
inline Double8 round(Double8 a) { return _mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Double8 scale(Double8 a, Double8 n) { return _mm512_scalef_pd(a.v, n.v); }
inline Double8 exponent(Double8 a) { return _mm512_getexp_pd(a.v); }

inline Double8 reciprocal(Double8 a) {
  const __m512d one = _mm512_set1_pd(1.0);
  __m512d x = _mm512_rcp14_pd(a.v);  // two Newton steps: x + x * (1 - a * x)
  x = _mm512_fmadd_pd(x, _mm512_fnmadd_pd(a.v, x, one), x);
  return _mm512_fmadd_pd(x, _mm512_fnmadd_pd(a.v, x, one), x);
}

inline Double8::Mask operator>=(Double8 a, Double8 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Double8::Mask operator>(Double8 a, Double8 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Double8::Mask unordered(Double8 a, Double8 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline Double8 select(Double8::Mask mask, Double8 a, Double8 b) { return _mm512_mask_mov_pd(b.v, mask.m, a.v); }

inline Double8 minus_abs(Double8 a) { return _mm512_or_pd(a.v, _mm512_set1_pd(-0.0)); }
inline Double8 replaced(Double8 a, int64_t lane, double by) {
  return _mm512_mask_mov_pd(a.v, static_cast<__mmask8>(1u << lane), _mm512_set1_pd(by));
}

inline double max_lane(Double8 a) { return _mm512_reduce_max_pd(a.v); }

template <>
class Sum<Double8> {
 public:
  Sum() : sum_(_mm512_setzero_pd()) {}

  void add(Double8 a) { sum_ = _mm512_add_pd(sum_, a.v); }
  double total() const { return _mm512_reduce_add_pd(sum_); }

 private:
  __m512d sum_;
};

inline void compress(uint32_t chosen, Double8 v, double* to) {
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(static_cast<__mmask8>(chosen), v.v));
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
