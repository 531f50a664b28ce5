// Four doubles in one AVX2 register.
#pragma once

#include "simd_avx2.h"  // to_front

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct Double4 {
  using Scalar = double;
  static constexpr int lanes = 4;
  static constexpr bool masked = false;

  struct Mask {
    __m256d m;
  };

  __m256d v;

  Double4() = default;
  Double4(__m256d value) : v(value) {}
  explicit Double4(double s) : v(_mm256_set1_pd(s)) {}

  static Double4 load(const double* p) { return _mm256_loadu_pd(p); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
};

inline uint32_t bits(Double4::Mask mask) { return static_cast<uint32_t>(_mm256_movemask_pd(mask.m)); }

inline Double4 operator+(Double4 a, Double4 b) { return _mm256_add_pd(a.v, b.v); }
inline Double4 operator-(Double4 a, Double4 b) { return _mm256_sub_pd(a.v, b.v); }
inline Double4 operator*(Double4 a, Double4 b) { return _mm256_mul_pd(a.v, b.v); }
inline Double4 fma(Double4 a, Double4 b, Double4 c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
inline Double4 max(Double4 a, Double4 b) { return _mm256_max_pd(a.v, b.v); }
inline Double4 min(Double4 a, Double4 b) { return _mm256_min_pd(a.v, b.v); }
inline Double4 round(Double4 a) { return _mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// 2^n as a product of two powers: the first is normal for every n in use, the second one rounds. n + 2 * 1023 stands in
// the last bits of a sum; each power takes half of it as its exponent field, and shifting leaves out what is above.
inline Double4 scale(Double4 a, Double4 n) {
  const __m256i biased = _mm256_castpd_si256(_mm256_add_pd(n.v, _mm256_set1_pd(0x1.8p52 + 2 * 1023)));
  const __m256i half = _mm256_srli_epi64(biased, 1), rest = _mm256_sub_epi64(biased, half);
  const __m256d first = _mm256_castsi256_pd(_mm256_slli_epi64(half, 52));
  return _mm256_mul_pd(_mm256_mul_pd(a.v, first), _mm256_castsi256_pd(_mm256_slli_epi64(rest, 52)));
}
inline Double4 exponent(Double4 a) {
  const __m256i biased = _mm256_srli_epi64(_mm256_castpd_si256(a.v), 52);
  const __m256d number = _mm256_or_pd(_mm256_castsi256_pd(biased), _mm256_set1_pd(0x1p52));
  return _mm256_sub_pd(number, _mm256_set1_pd(0x1p52 + 1023));
}
inline Double4 reciprocal(Double4 a) { return _mm256_div_pd(_mm256_set1_pd(1.0), a.v); }

inline Double4::Mask operator>=(Double4 a, Double4 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ)}; }
inline Double4::Mask operator>(Double4 a, Double4 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
inline Double4::Mask unordered(Double4 a, Double4 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q)}; }
inline Double4 select(Double4::Mask mask, Double4 a, Double4 b) { return _mm256_blendv_pd(b.v, a.v, mask.m); }

inline Double4 minus_abs(Double4 a) { return _mm256_or_pd(a.v, _mm256_set1_pd(-0.0)); }
inline Double4 replaced(Double4 a, int64_t lane, double by) {
  const __m256i here = _mm256_cmpeq_epi64(_mm256_set1_epi64x(lane), _mm256_setr_epi64x(0, 1, 2, 3));
  return _mm256_blendv_pd(a.v, _mm256_set1_pd(by), _mm256_castsi256_pd(here));
}

inline double max_lane(Double4 a) {
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

template <>
class Sum<Double4> {
 public:
  Sum() : sum_(_mm256_setzero_pd()) {}

  void add(Double4 a) { sum_ = _mm256_add_pd(sum_, a.v); }
  double total() const {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(sum_), _mm256_extractf128_pd(sum_, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
  }

 private:
  __m256d sum_;
};

inline void compress(uint32_t chosen, Double4 v, double* to) {
  const __m256i front = to_front(_pdep_u32(chosen, 0x55) * 3);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(_mm256_castpd_si256(v.v), front));
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
