// The 16-bit floating-point types as they lie in memory, and the scalar way between storage and compute dtype.
#pragma once

#include "kernels.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_compute(float s) { return s; }
inline double to_compute(double s) { return s; }

inline float to_compute(BFloat16 s) { return bit_cast<float>(static_cast<uint32_t>(s.bits) << 16); }

inline float to_compute(Half s) {
  const uint32_t sign = static_cast<uint32_t>(s.bits & 0x8000) << 16;
  const uint32_t magnitude = s.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude << 13));  // inf, NaN
  // Shift the exponent field into place and let the hardware correct its bias; subnormals come out right too.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline void from_compute(float* s, float v) { *s = v; }
inline void from_compute(double* s, double v) { *s = v; }

// Round to nearest even; what is too large becomes infinite, NaN stays NaN.
inline void from_compute(BFloat16* s, float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  s->bits = static_cast<uint16_t>(v == v ? rounded : 0x7fc0);
}

inline void from_compute(Half* s, float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and up
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // normal: rebias the exponent, round off 13 bits
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {  // subnormal: adding 1/2 lets the hardware round to multiples of 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  }
  s->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
