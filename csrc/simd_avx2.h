// Sixteen floats in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include "simd_storage.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct Float16 {
  using Scalar = float;
  static constexpr int lanes = 16;
  static constexpr bool masked = false;

  struct Mask {
    __m256 low, high;
  };

  __m256 low, high;

  Float16() = default;
  Float16(__m256 l, __m256 h) : low(l), high(h) {}
  explicit Float16(float s) : low(_mm256_set1_ps(s)), high(low) {}

  static Float16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Float16 load(const BFloat16* p) { return {widen(load8(p)), widen(load8(p + 8))}; }
  static Float16 load(const Half* p) { return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))}; }

  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  void store(BFloat16* p) const {
    const __m256i packed = _mm256_packus_epi32(narrow(low), narrow(high));  // packs within 128-bit halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  void store(Half* p) const {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, nearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, nearest));
  }

 private:
  template <class S>
  static __m128i load8(const S* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }

  static __m256 widen(__m128i s) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(s), 16)); }

  // bfloat16 bits in the low half of 32-bit lanes, rounded to nearest even
  static __m256i narrow(__m256 v) {
    const __m256i b = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  }
};

// Free functions, not friends: GCC compiles what is defined as a friend without the instruction set asked for.
inline uint32_t bits(Float16::Mask m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.low) | (_mm256_movemask_ps(m.high) << 8));
}

template <int kPredicate>
inline Float16::Mask compare(Float16 a, Float16 b) {
  return {_mm256_cmp_ps(a.low, b.low, kPredicate), _mm256_cmp_ps(a.high, b.high, kPredicate)};
}

inline Float16 operator+(Float16 a, Float16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Float16 operator-(Float16 a, Float16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Float16 operator*(Float16 a, Float16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Float16 max(Float16 a, Float16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Float16 min(Float16 a, Float16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Float16 fma(Float16 a, Float16 b, Float16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Float16 round(Float16 a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}

// 2^n as a product of two powers: the first is normal for every n in use, the second one rounds. n + 2 * 127 stands in
// the last bits of a sum; each power takes half of it as its exponent field, and shifting leaves out what is above.
inline __m256 scale8(__m256 v, __m256 n) {
  const __m256i biased = _mm256_castps_si256(_mm256_add_ps(n, _mm256_set1_ps(0x1.8p23f + 2 * 127)));
  const __m256i half = _mm256_srli_epi32(biased, 1), rest = _mm256_sub_epi32(biased, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(half, 23));
  return _mm256_mul_ps(_mm256_mul_ps(v, first), _mm256_castsi256_ps(_mm256_slli_epi32(rest, 23)));
}
inline Float16 scale(Float16 a, Float16 n) { return {scale8(a.low, n.low), scale8(a.high, n.high)}; }
inline __m256 exponent8(__m256 v) {
  const __m256i biased = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(0xff));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
}
inline Float16 exponent(Float16 a) { return {exponent8(a.low), exponent8(a.high)}; }
inline Float16 reciprocal(Float16 a) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_div_ps(one, a.low), _mm256_div_ps(one, a.high)};
}

inline Float16::Mask operator>=(Float16 a, Float16 b) { return compare<_CMP_GE_OQ>(a, b); }
inline Float16::Mask operator>(Float16 a, Float16 b) { return compare<_CMP_GT_OQ>(a, b); }
inline Float16::Mask unordered(Float16 a, Float16 b) { return compare<_CMP_UNORD_Q>(a, b); }
inline Float16 select(Float16::Mask m, Float16 a, Float16 b) {
  return {_mm256_blendv_ps(b.low, a.low, m.low), _mm256_blendv_ps(b.high, a.high, m.high)};
}

inline Float16 minus_abs(Float16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(a.low, sign), _mm256_or_ps(a.high, sign)};
}
inline Float16 replaced(Float16 a, int64_t lane, float by) {
  const __m256i wanted = _mm256_set1_epi32(static_cast<int32_t>(lane));
  const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpeq_epi32(wanted, number);
  const __m256i high = _mm256_cmpeq_epi32(wanted, _mm256_add_epi32(number, _mm256_set1_epi32(8)));
  const __m256 all = _mm256_set1_ps(by);
  return {_mm256_blendv_ps(a.low, all, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(a.high, all, _mm256_castsi256_ps(high))};
}

inline float max_lane(Float16 a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

template <>
class Sum<Float16> {
 public:
  Sum() : four_(_mm256_setzero_pd()) {}  // GCC would write it without the instruction set

  void add(Float16 a) { four_ = _mm256_add_pd(four_, _mm256_add_pd(to_double(a.low), to_double(a.high))); }
  double total() const {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four_), _mm256_extractf128_pd(four_, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
  }

 private:
  static __m256d to_double(__m256 v) {
    return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  }

  __m256d four_;
};

// The permutation that brings the lanes of the 8 set bits to the front: their numbers are picked from a word of
// nibbles.
inline __m256i to_front(uint32_t chosen) {
  const uint32_t nibbles = _pdep_u32(chosen, 0x11111111) * 0xf;
  const __m256i numbers = _mm256_set1_epi32(static_cast<int32_t>(_pext_u32(0x76543210, nibbles)));
  return _mm256_srlv_epi32(numbers, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
}

inline void compress8(uint32_t low, uint32_t high, __m256i a, __m256i b, void* to) {
  int32_t* p = static_cast<int32_t*>(to);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(a, to_front(low)));
  p += _mm_popcnt_u32(low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(b, to_front(high)));
}

// What the set bits choose, written one after another. These write, and may read, 16 elements whatever the bits.
inline void compress(uint32_t chosen, Float16 v, float* to) {
  compress8(chosen & 0xff, chosen >> 8, _mm256_castps_si256(v.low), _mm256_castps_si256(v.high), to);
}
inline void compress(uint32_t chosen, const int32_t* from, int32_t* to) {
  const __m256i* p = reinterpret_cast<const __m256i*>(from);
  compress8(chosen & 0xff, chosen >> 8, _mm256_loadu_si256(p), _mm256_loadu_si256(p + 1), to);
}

// first + the number of every set bit.
inline void compress_numbers(uint32_t chosen, int32_t first, int32_t* to) {
  const __m256i low = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  compress8(chosen & 0xff, chosen >> 8, low, _mm256_add_epi32(low, _mm256_set1_epi32(8)), to);
}

// The bits of 16 words: which are not zero.
inline uint32_t nonzero(const uint16_t* word) {
  const __m256i zero =
      _mm256_cmpeq_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(word)), _mm256_setzero_si256());
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(zero, zero), 0xd8);
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(packed)) & 0xffff;
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
