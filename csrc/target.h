// The positives of a row, from a class index, from a list of labels or from a multi-hot row.
#pragma once

#include "kernels.h"
#include "threads.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

struct Positives {
  const int32_t* index;  // ascending
  int64_t count;
  int64_t first_place = 0;  // of a list: where in it the first of them stands, and behind it the others
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
      : problem_(problem), index_(problem.target.most_positives(problem.classes)) {}

  bool ignored(int64_t row) const { return problem_.target.ignored(row, problem_.spec); }

  // False if a multi-hot entry is neither 0 nor 1; *positives then holds the classes up to that one. They live until
  // the next call.
  bool read(int64_t row, Positives* positives) {
    *positives = {index_.get(), 0};
    if (!problem_.target.multi_hot) {
      if (ignored(row)) return true;
      for (int64_t place = 0; place < problem_.target.places; ++place) {
        // Unsigned: no difference overflows, and what is not among these classes is larger than any of them.
        const uint64_t here =
            static_cast<uint64_t>(problem_.target.label(row, place)) - static_cast<uint64_t>(problem_.spec.first_class);
        if (here >= static_cast<uint64_t>(problem_.classes)) continue;
        if (positives->count == 0) positives->first_place = place;
        index_[positives->count++] = static_cast<int32_t>(here);
      }
      return true;
    }
    switch (problem_.target.entries.bytes) {
      case 8: return scan<uint64_t>(row, positives);
      case 4: return scan<uint32_t>(row, positives);
      case 2: return scan<uint16_t>(row, positives);
      default: return scan<uint8_t>(row, positives);
    }
  }

 private:
  // Whether one of the entries is no zero: their bits together, which a compiler turns into one operation for a vector.
  template <class Bits>
  static FUSED_LOSSES_INLINE bool any(const Bits* entry, int64_t n, Bits magnitude) {
    Bits together = 0;
    for (int64_t i = 0; i < n; ++i) together |= entry[i];
    return (together & magnitude) != 0;
  }

  template <class Bits>
  bool scan(int64_t row, Positives* positives) {
    const Entries& entries = problem_.target.entries;
    const Bits* entry = static_cast<const Bits*>(problem_.target.data) + row * problem_.target.stride;
    const Bits one = static_cast<Bits>(entries.one), magnitude = static_cast<Bits>(entries.magnitude);
    constexpr int64_t kBlock = 256, kPart = 32;  // most blocks are all zero, and most parts of the others
    for (int64_t block = 0; block < problem_.classes; block += kBlock) {
      const int64_t left = problem_.classes - block, end = left < kBlock ? problem_.classes : block + kBlock;
      if (left >= kBlock && !any(entry + block, kBlock, magnitude)) continue;
      for (int64_t part = block; part < end; part += kPart) {
        const int64_t stop = part + kPart < end ? part + kPart : end;
        if (stop == part + kPart && !any(entry + part, kPart, magnitude)) continue;
        for (int64_t i = part; i < stop; ++i) {
          if ((entry[i] & magnitude) == 0) continue;
          index_[positives->count++] = static_cast<int32_t>(i);
          if (entry[i] != one) return false;
        }
      }
    }
    return true;
  }

  const Problem& problem_;
  Buffer<int32_t> index_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
