// From the terms of the rows to the loss, and what every term weighs in it. N numbers each: no vectors, no threads.
// What is computed here stands in fused_losses/reductions.py; sums are in double, and compensated.
#pragma once

#include "kernels.h"
#include "sums.h"

namespace fused_losses {

enum class ReductionKind : int { none, sum, mean };

// A column of a tensor.
template <class T>
struct Column {
  T* data;
  int64_t stride;
  T& operator[](int64_t i) const { return data[i * stride]; }
};

struct ReductionProblem {
  int64_t rows, columns;  // columns of terms: 1 (softmax: the value) or 2 (logistic: positives, negatives)
  Column<const int64_t> target;  // class indices; null with multi-hot targets, which know no ignored rows
  int64_t ignore_index;
  int64_t classes, k;
  bool scaled;  // the two terms are means times 1 and alpha, not sums
  double alpha;
  ReductionKind kind;
};

// row_terms (rows, columns), contiguous. positives: how many a row has; null for one each. weight: of the classes, may
// be null. loss: one number, or one per row for kind none. slopes (rows, columns): d(loss) / d(term).
template <class T>
void reduce_terms(const ReductionProblem& p, const T* row_terms, Column<const T> positives, Column<const T> weight,
                  T* loss, T* slopes) {
  double scale[2] = {1, 1};
  if (p.scaled && positives.data == nullptr) {
    const int64_t chosen = p.k > 0 && p.k < p.classes - 1 ? p.k : p.classes - 1;
    scale[1] = p.alpha / static_cast<double>(chosen > 1 ? chosen : 1);
  } else if (p.scaled) {
    double all_positives = 0, all_chosen = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      const double negatives = p.classes - static_cast<double>(positives[i]);
      all_positives += positives[i];
      all_chosen += p.k > 0 && p.k < negatives ? static_cast<double>(p.k) : negatives;
    }
    scale[0] = static_cast<double>(p.rows) / (all_positives > 1 ? all_positives : 1);
    scale[1] = p.alpha * static_cast<double>(p.rows) / (all_chosen > 1 ? all_chosen : 1);
  }

  const auto weight_of = [&](int64_t i) -> double {
    if (p.target.data == nullptr) return 1;
    const int64_t y = p.target[i];
    if (y == p.ignore_index) return 0;
    // a bad target's row is NaN already: only never read outside
    return weight.data == nullptr ? 1 : weight[y < 0 ? 0 : y < p.classes ? y : p.classes - 1];
  };
  double divisor = 1;
  if (p.kind == ReductionKind::mean) {
    CompensatedSum weights;
    for (int64_t i = 0; i < p.rows; ++i) weights.add(weight_of(i));
    divisor = weights.total();
  }

  CompensatedSum total;
  for (int64_t i = 0; i < p.rows; ++i) {
    const double w = weight.data == nullptr ? 1 : weight_of(i);
    double value = 0;
    for (int64_t c = 0; c < p.columns; ++c) {
      value += scale[c] * row_terms[i * p.columns + c];
      slopes[i * p.columns + c] = static_cast<T>(w * scale[c] / divisor);
    }
    if (p.kind == ReductionKind::none) loss[i] = static_cast<T>(w * value);
    total.add(w * value);
  }
  if (p.kind != ReductionKind::none) *loss = static_cast<T>(total.total() / divisor);
}

}  // namespace fused_losses
