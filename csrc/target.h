// The positives of a row, from a class index or from a multi-hot row.
#pragma once

#include "kernels.h"
#include "simd_storage.h"
#include "threads.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct Positives {
  const int32_t* index;  // ascending
  int64_t count;
};

// body(index, n) for every n <= kMost positives, in order.
template <int kMost, class Body>
FUSED_LOSSES_INLINE void for_each_group(Positives positives, const Body& body) {
  for (int64_t p = 0; p < positives.count; p += kMost) {
    body(positives.index + p, positives.count - p < kMost ? positives.count - p : kMost);
  }
}

// Reads targets row by row. One per thread.
class TargetReader {
 public:
  explicit TargetReader(const Problem& problem)
      : problem_(problem), index_(problem.target.multi_hot ? problem.classes : 1) {}

  bool ignored(int64_t row) const { return problem_.target.ignored(row, problem_.spec); }

  // False if a multi-hot entry is neither 0 nor 1; *positives then holds the classes up to that one. They live until
  // the next call.
  bool read(int64_t row, Positives* positives) {
    *positives = {index_.get(), 0};
    if (!problem_.target.multi_hot) {
      // Unsigned: no difference overflows, and what is not among these classes is larger than any of them.
      const uint64_t here =
          static_cast<uint64_t>(problem_.target.label(row)) - static_cast<uint64_t>(problem_.spec.first_class);
      index_[0] = static_cast<int32_t>(here);
      positives->count = !ignored(row) && here < static_cast<uint64_t>(problem_.classes);
      return true;
    }
    switch (problem_.target.dtype) {
      case DType::float32: return scan<float>(row, positives);
      case DType::float64: return scan<double>(row, positives);
      case DType::bfloat16: return scan<BFloat16>(row, positives);
      case DType::float16: return scan<Half>(row, positives);
      case DType::int64: return scan<int64_t>(row, positives);
      case DType::int32: return scan<int32_t>(row, positives);
      case DType::int16: return scan<int16_t>(row, positives);
      default: return scan<int8_t>(row, positives);  // int8, uint8, bool: 0 and 1 look alike in all three
    }
  }

 private:
  template <class D>
  static bool is_one(D entry) {
    return entry == 1;
  }
  template <class D>
  static bool is_zero(D entry) {
    return entry == 0;
  }
  static bool is_one(BFloat16 entry) { return entry.bits == 0x3f80; }
  static bool is_zero(BFloat16 entry) { return (entry.bits & 0x7fff) == 0; }
  static bool is_one(Half entry) { return entry.bits == 0x3c00; }
  static bool is_zero(Half entry) { return (entry.bits & 0x7fff) == 0; }

  template <class D>
  bool scan(int64_t row, Positives* positives) {
    const D* entry = static_cast<const D*>(problem_.target.data) + row * problem_.target.stride;
    constexpr int64_t kBlock = 64;  // most blocks are all zero, and a compiler vectorises the test of one
    for (int64_t begin = 0; begin < problem_.classes; begin += kBlock) {
      const int64_t n = begin + kBlock < problem_.classes ? kBlock : problem_.classes - begin;
      bool all_zero = true;
      for (int64_t i = 0; i < n; ++i) all_zero &= is_zero(entry[begin + i]);
      if (all_zero) continue;
      for (int64_t i = begin; i < begin + n; ++i) {
        if (is_zero(entry[i])) continue;
        index_[positives->count++] = static_cast<int32_t>(i);
        if (!is_one(entry[i])) return false;
      }
    }
    return true;
  }

  const Problem& problem_;
  Buffer<int32_t> index_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
