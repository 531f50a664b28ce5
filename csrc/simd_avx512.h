// Sixteen floats in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include "simd_storage.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct Float16 {
  using Scalar = float;
  static constexpr int lanes = 16;
  static constexpr bool masked = true;

  struct Mask {
    __mmask16 m;
  };

  __m512 v;

  Float16() = default;
  Float16(__m512 value) : v(value) {}
  explicit Float16(float s) : v(_mm512_set1_ps(s)) {}

  static Float16 load(const float* p) { return _mm512_loadu_ps(p); }
  static Float16 load(const BFloat16* p) {
    const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(s), 16));
  }
  static Float16 load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // Lanes without a bit are neither read nor written; `fill` stands in for what is not read.
  static Float16 load_masked(const float* p, uint32_t bits, Float16 fill) {
    return _mm512_mask_loadu_ps(fill.v, static_cast<__mmask16>(bits), p);
  }
  static Float16 load_masked(const BFloat16* p, uint32_t bits, Float16 fill) {
    const __m256i s = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), p);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(s), 16);
    return _mm512_mask_mov_ps(fill.v, static_cast<__mmask16>(bits), _mm512_castsi512_ps(wide));
  }
  static Float16 load_masked(const Half* p, uint32_t bits, Float16 fill) {
    const __m256i s = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), p);
    return _mm512_mask_mov_ps(fill.v, static_cast<__mmask16>(bits), _mm512_cvtph_ps(s));
  }
  void store_masked(float* p, uint32_t bits) const { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), v); }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const {
#if defined(FUSED_LOSSES_AVX512_BF16)  // 0 for what is below the normal numbers
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    const __m512i b = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    __m512i up = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
    up = _mm512_mask_add_epi32(up, odd, b, _mm512_set1_epi32(0x8000));
    const __m512i s = _mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, up, 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(s));
#endif
  }
  void store(Half* p) const {
    const __m256i s = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s);
  }
};

// Free functions, not friends: GCC compiles what is defined as a friend without the instruction set asked for.
inline uint32_t bits(Float16::Mask mask) { return mask.m; }

inline Float16 operator+(Float16 a, Float16 b) { return _mm512_add_ps(a.v, b.v); }
inline Float16 operator-(Float16 a, Float16 b) { return _mm512_sub_ps(a.v, b.v); }
inline Float16 operator*(Float16 a, Float16 b) { return _mm512_mul_ps(a.v, b.v); }
inline Float16 fma(Float16 a, Float16 b, Float16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Float16 max(Float16 a, Float16 b) { return _mm512_max_ps(a.v, b.v); }
inline Float16 min(Float16 a, Float16 b) { return _mm512_min_ps(a.v, b.v); }
inline Float16 round(Float16 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Float16 scale(Float16 a, Float16 n) { return _mm512_scalef_ps(a.v, n.v); }

inline Float16 exponent(Float16 a) { return _mm512_getexp_ps(a.v); }

inline Float16 reciprocal(Float16 a) {
  const __m512 x = _mm512_rcp14_ps(a.v);  // one Newton step: x + x * (1 - a * x)
  return _mm512_fmadd_ps(x, _mm512_fnmadd_ps(a.v, x, _mm512_set1_ps(1.0f)), x);
}

inline Float16::Mask operator>=(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Float16::Mask operator>(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Float16::Mask unordered(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline Float16 select(Float16::Mask mask, Float16 a, Float16 b) { return _mm512_mask_mov_ps(b.v, mask.m, a.v); }
inline Float16 minus_abs(Float16 a) { return _mm512_or_ps(a.v, _mm512_set1_ps(-0.0f)); }
inline Float16 replaced(Float16 a, int64_t lane, float by) {
  return _mm512_mask_mov_ps(a.v, static_cast<__mmask16>(1u << lane), _mm512_set1_ps(by));
}

inline float max_lane(Float16 a) { return _mm512_reduce_max_ps(a.v); }

template <>
class Sum<Float16> {
 public:
  Sum() : low_(_mm512_setzero_pd()), high_(_mm512_setzero_pd()) {}  // GCC would write it without the instruction set

  void add(Float16 a) {
    low_ = _mm512_add_pd(low_, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high_ = _mm512_add_pd(high_, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low_, high_)); }

 private:
  __m512d low_, high_;
};

// What the set bits choose, written one after another. These write, and may read, 16 elements whatever the bits.
inline void compress(uint32_t chosen, Float16 v, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(chosen), v.v));
}
inline void compress(uint32_t chosen, const int32_t* from, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), _mm512_loadu_si512(from)));
}

// first + the number of every set bit.
inline void compress_numbers(uint32_t chosen, int32_t first, int32_t* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i number = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), number));
}

// The bits of 16 words: which are not zero.
inline uint32_t nonzero(const uint16_t* word) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(word));
  return _mm256_test_epi16_mask(w, w);
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
