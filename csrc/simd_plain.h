// Vectors as arrays of lanes: loops of a fixed length that a compiler turns into what the target has. Serves where no
// instruction set has its own page.
#pragma once

#include "simd_storage.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

template <class T, int kLanes>
struct Plain {
  using Scalar = T;
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int lanes = kLanes;
  static constexpr bool masked = false;

  struct Mask {
    Bits lane[kLanes];  // 0 or -1

    friend uint32_t bits(const Mask& m) {
      uint32_t word = 0;
      for (int i = 0; i < kLanes; ++i) word |= static_cast<uint32_t>(m.lane[i] & 1) << i;
      return word;
    }
  };

  T lane[kLanes];

  Plain() = default;
  explicit Plain(T s) {
    for (T& l : lane) l = s;
  }

  template <class S>
  static Plain load(const S* p) {
    Plain v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = to_compute(p[i]);
    return v;
  }

  template <class S>
  void store(S* p) const {
    for (int i = 0; i < kLanes; ++i) from_compute(p + i, lane[i]);
  }

  // f(a, b) in every lane
  template <class F>
  static Plain map(const Plain& a, const Plain& b, F f) {
    Plain v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = f(a.lane[i], b.lane[i]);
    return v;
  }

  template <class F>
  static Mask test(const Plain& a, const Plain& b, F f) {
    Mask m;
    for (int i = 0; i < kLanes; ++i) m.lane[i] = -static_cast<Bits>(f(a.lane[i], b.lane[i]));
    return m;
  }

  friend Plain operator+(const Plain& a, const Plain& b) {
    return map(a, b, [](T x, T y) { return x + y; });
  }
  friend Plain operator-(const Plain& a, const Plain& b) {
    return map(a, b, [](T x, T y) { return x - y; });
  }
  friend Plain operator*(const Plain& a, const Plain& b) {
    return map(a, b, [](T x, T y) { return x * y; });
  }
  friend Plain max(const Plain& a, const Plain& b) {
    return map(a, b, [](T x, T y) { return x > y ? x : y; });
  }
  friend Plain min(const Plain& a, const Plain& b) {
    return map(a, b, [](T x, T y) { return x < y ? x : y; });
  }
  friend Plain reciprocal(const Plain& a) {
    return map(a, a, [](T x, T) { return 1 / x; });
  }
  friend Plain fma(const Plain& a, const Plain& b, const Plain& c) {
#if defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
    Plain v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return v;
#else  // a call of the library, a hundred times slower
    return a * b + c;
#endif
  }

  friend Mask operator>=(const Plain& a, const Plain& b) {
    return test(a, b, [](T x, T y) { return x >= y; });
  }
  friend Mask operator>(const Plain& a, const Plain& b) {
    return test(a, b, [](T x, T y) { return x > y; });
  }
  friend Mask unordered(const Plain& a, const Plain& b) {
    return test(a, b, [](T x, T y) { return x != x || y != y; });
  }

  friend Plain select(const Mask& m, const Plain& a, const Plain& b) {
    Plain v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = m.lane[i] ? a.lane[i] : b.lane[i];
    return v;
  }

  static constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  // A number that is added to this has no room for a fraction, and stands in the last bits.
  static constexpr T kUnits = static_cast<T>(Bits(3) << (kMantissa - 1));

  friend Plain round(const Plain& v) {
    return map(v, v, [](T x, T) { return (x + kUnits) - kUnits; });
  }

  // 2^n as a product of two powers: the first is normal for every n in use, the second one rounds. n + 2 kBias stands
  // in the last bits of a sum; each power takes half of it as its exponent field, and shifting leaves out what is
  // above.
  friend Plain scale(const Plain& v, const Plain& n) {
    return map(v, n, [](T x, T by) {
      using Word = std::make_unsigned_t<Bits>;
      const Word biased = bit_cast<Word>(by + (kUnits + 2 * kBias)), half = biased >> 1;
      return x * bit_cast<T>(half << kMantissa) * bit_cast<T>((biased - half) << kMantissa);
    });
  }

  friend Plain exponent(const Plain& v) {
    return map(v, v, [](T x, T) {
      const Bits biased = bit_cast<Bits>(x) >> kMantissa & (2 * kBias + 1);
      return bit_cast<T>(bit_cast<Bits>(kUnits) + biased) - (kUnits + kBias);
    });
  }

  friend Plain minus_abs(const Plain& a) {
    return map(a, a, [](T x, T) { return -std::abs(x); });
  }
  friend Plain replaced(Plain v, int64_t i, T by) {
    v.lane[i] = by;
    return v;
  }

  friend T max_lane(const Plain& v) {
    T largest = v.lane[0];
    for (T l : v.lane) largest = l > largest ? l : largest;
    return largest;
  }

  friend void compress(uint32_t chosen, const Plain& v, T* to) {
    for (int i = 0; i < kLanes; ++i) {
      *to = v.lane[i];
      to += chosen >> i & 1;
    }
  }
};

template <class T, int kLanes>
class Sum<Plain<T, kLanes>> {
 public:
  void add(const Plain<T, kLanes>& v) {
    for (int i = 0; i < kLanes; ++i) lane_[i] += v.lane[i];
  }
  double total() const {
    double sum = 0;
    for (double lane : lane_) sum += lane;
    return sum;
  }

 private:
  double lane_[kLanes] = {};
};

#if !defined(FUSED_LOSSES_AVX512) && !defined(FUSED_LOSSES_AVX2)
// What the set bits choose, written one after another. These write, and may read, 16 elements whatever the bits.
inline void compress(uint32_t chosen, const int32_t* from, int32_t* to) {
  for (int i = 0; i < 16; ++i) {
    *to = from[i];
    to += chosen >> i & 1;
  }
}

// first + the number of every set bit.
inline void compress_numbers(uint32_t chosen, int32_t first, int32_t* to) {
  for (int i = 0; i < 16; ++i) {
    *to = first + i;
    to += chosen >> i & 1;
  }
}

// The bits of 16 words: which are not zero.
inline uint32_t nonzero(const uint16_t* word) {
  uint32_t result = 0;
  for (int i = 0; i < 16; ++i) result |= static_cast<uint32_t>(word[i] != 0) << i;
  return result;
}
#endif

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
