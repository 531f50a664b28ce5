// The numbers of a row as they lie in memory, for as many labels as there are: its statistics and its coefficients.
#pragma once

#include "simd.h"
#include "target.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// Statistics or coefficients, (rows, columns): of each row some numbers of the row as a whole, then one for each label.
template <class T>
class RowTable {
 public:
  RowTable(T* data, int64_t columns, int64_t labels) : data_(data), columns_(columns), labels_(labels) {}

  T* operator[](int64_t row) const { return data_ + row * columns_; }
  T* of_labels(int64_t row) const { return data_ + (row + 1) * columns_ - labels_; }
  int64_t labels() const { return labels_; }
  void fill(int64_t row, T value) const {
    for (int64_t i = 0; i < columns_; ++i) (*this)[row][i] = value;
  }

 private:
  T* data_;
  int64_t columns_, labels_;
};

// Writes the statistics of the rows, unless the target is multi-hot.
template <class S>
class StatisticsWriter {
 public:
  using T = Compute<S>;

  // at_infinity: what is written for a label whose logit is +inf.
  StatisticsWriter(const Forward& door, T at_infinity)
      : table_(static_cast<T*>(door.statistics), door.problem.target.statistics_columns(), door.problem.target.places),
        lists_(door.problem.target.labels),
        at_infinity_(at_infinity) {}

  // of_negatives: l or neg. sum: s, which only lists of labels have.
  void write(int64_t row, const S* logits, Positives positives, T max, T of_negatives, T sum) const {
    T* numbers = table_[row];
    numbers[0] = max;
    numbers[1] = of_negatives;
    if (lists_) numbers[2] = sum;
    T* label = table_.of_labels(row);
    for (int64_t place = 0; place < table_.labels(); ++place) label[place] = -kInfinity<T>;
    for (int64_t p = 0; p < positives.count; ++p) {
      const T z = to_compute(logits[positives.index[p]]);
      label[positives.first_place + p] = z == kInfinity<T> ? at_infinity_ : z;
      if (lists_ && z != z) numbers[1] = z;
    }
  }

  void add_of_negatives(int64_t row, T l) const { table_[row][1] += l; }
  void ignore(int64_t row) const { table_.fill(row, 0); }
  void spoil(int64_t row) const { table_.fill(row, kNaN<T>); }

 private:
  RowTable<T> table_;
  bool lists_;
  T at_infinity_;
};

// The coefficients of a row times its upstream gradient.
template <class T>
struct Scaled {
  T of_negatives;
  T of_smoothing;  // what every negative gets besides
  T of_target;     // the first label's
  bool nan;        // and so the row as a whole
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
