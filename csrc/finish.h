// From the statistics of the rows to the loss, and to the coefficients of its gradient: what fused_losses/finish.py
// says, for many rows at a time. (One by one, the formula of a row would cost as much as 500 of its logits.)
#pragma once

#include "formulas.h"
#include "rows.h"
#include "threads.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// --- of n <= V::lanes rows from the first on, before weights and reduction: values, and coefficients of the rows

template <class V>
FUSED_LOSSES_INLINE void write_pairs(V of_negatives, V of_target, int64_t first, int64_t n,
                                     RowTable<typename V::Scalar> coefficients) {
  typename V::Scalar c[V::lanes], t[V::lanes];
  of_negatives.store(c);
  of_target.store(t);
  for (int64_t i = 0; i < n; ++i) coefficients[first + i][0] = c[i], coefficients[first + i][1] = t[i];
}

template <class V, class Loss>
class SoftmaxRows {
 public:
  using T = typename V::Scalar;
  using Statistics = SoftmaxStatistics<T>;

  SoftmaxRows(const Finish& door, Loss loss)
      : statistics_(static_cast<const Statistics*>(door.statistics)), loss_(loss) {}

  FUSED_LOSSES_INLINE void operator()(int64_t first, int64_t n, T* value, RowTable<T> coefficients) const {
    const Statistics* rows = statistics_ + first;
    T log_odds[V::lanes] = {};
    // Never via max + log_sum, which loses digits at large offsets.
    for (int64_t i = 0; i < n; ++i) log_odds[i] = (rows[i].target - rows[i].max) - rows[i].log_sum;
    const V d = V::load(log_odds), slope = loss_.slope(d);
    loss_.value(d).store(value);
    write_pairs(V(0) - slope, slope, first, n, coefficients);
  }

 private:
  const Statistics* statistics_;
  Loss loss_;
};

template <class V>
class LogisticRows {
 public:
  using T = typename V::Scalar;
  using Statistics = LogisticStatistics<T>;

  explicit LogisticRows(const Finish& door) : statistics_(static_cast<const Statistics*>(door.statistics)) {
    if (!door.spec.takes_means) return;
    const int64_t chosen = door.chosen_negatives(1);
    of_negatives_ = static_cast<T>(door.spec.alpha / static_cast<double>(chosen > 1 ? chosen : 1));
  }

  FUSED_LOSSES_INLINE void operator()(int64_t first, int64_t n, T* value, RowTable<T> coefficients) const {
    const Statistics* rows = statistics_ + first;
    T negatives[V::lanes] = {}, target[V::lanes] = {};
    for (int64_t i = 0; i < n; ++i) negatives[i] = rows[i].negatives, target[i] = rows[i].target;
    const V sum = V::load(negatives), z = V::load(target), scale(of_negatives_), nan(kNaN<T>);
    const auto poisoned = unordered(sum, z);
    (softplus(V(0) - z) + scale * sum).store(value);
    write_pairs(select(poisoned, nan, scale), select(poisoned, nan, V(0) - sigmoid(V(0) - z)), first, n, coefficients);
  }

 private:
  const Statistics* statistics_;
  T of_negatives_ = 1;
};

// The sum of what body(begin, end) gives for blocks of the rows. The order of the additions is that of the rows,
// whoever does them.
template <class Body>
inline double sum_over_blocks(int64_t rows, const Body& body) {
  constexpr int64_t kBlock = 1024, kGrain = 4;  // rows; blocks that are worth waking a thread
  if (rows <= kBlock) return body(0, rows).total();
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  Buffer<CompensatedSum> sums(blocks);
  parallel(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      sums[block] = body(block * kBlock, (block + 1) * kBlock < rows ? (block + 1) * kBlock : rows);
    }
  });
  CompensatedSum total;
  for (int64_t block = 0; block < blocks; ++block) total.add(sums[block]);
  return total.total();
}

// The sum of number(row).
template <class Number>
inline double sum_over_rows(int64_t rows, const Number& number) {
  return sum_over_blocks(rows, [&](int64_t begin, int64_t end) {
    CompensatedSum sum;
    for (int64_t row = begin; row < end; ++row) sum.add(number(row));
    return sum;
  });
}

// Means over the terms of the batch, or plain sums.
template <class V>
class MultiHotRows {
 public:
  using T = typename V::Scalar;
  using Statistics = MultiHotStatistics<T>;

  explicit MultiHotRows(const Finish& door) : statistics_(static_cast<const Statistics*>(door.statistics)) {
    if (!door.spec.takes_means) return;
    const Statistics* statistics = statistics_;
    const double rows = static_cast<double>(door.rows), k = static_cast<double>(door.spec.k);
    const double positives = sum_over_rows(door.rows, [&](int64_t row) { return statistics[row].num_positives; });
    const double chosen = sum_over_rows(door.rows, [&](int64_t row) {
      const double negatives = static_cast<double>(door.spec.all_classes) - statistics[row].num_positives;
      return k > 0 && k < negatives ? k : negatives;
    });
    of_positives_ = static_cast<T>(rows / (positives > 1 ? positives : 1));
    of_negatives_ = static_cast<T>(door.spec.alpha * rows / (chosen > 1 ? chosen : 1));
  }

  FUSED_LOSSES_INLINE void operator()(int64_t first, int64_t n, T* value, RowTable<T> coefficients) const {
    const Statistics* rows = statistics_ + first;
    T negatives[V::lanes] = {}, positives[V::lanes] = {};
    for (int64_t i = 0; i < n; ++i) negatives[i] = rows[i].negatives, positives[i] = rows[i].positives;
    const V neg = V::load(negatives), pos = V::load(positives), of_neg(of_negatives_), of_pos(of_positives_);
    const auto poisoned = unordered(neg, pos);
    const V nan(kNaN<T>);
    (of_pos * pos + of_neg * neg).store(value);
    write_pairs(select(poisoned, nan, of_neg), select(poisoned, nan, V(0) - of_pos), first, n, coefficients);
  }

 private:
  const Statistics* statistics_;
  T of_positives_ = 1, of_negatives_ = 1;
};

// --- of the batch

// Whether rows count the weight of their class, and not 1.
inline bool has_class_weights(const Finish& door) { return door.weight != nullptr && !door.target.labels; }

// What a row counts in the loss if it is not ignored: the weight of its class.
template <class T>
inline double weight_of(const Finish& door, int64_t row) {
  const int64_t y = door.target.label(row), last = door.spec.all_classes - 1;
  // The row of a target that is no class is NaN already: only never read outside.
  return static_cast<const T*>(door.weight)[(y < 0 ? 0 : y < last ? y : last) * door.weight_stride];
}

template <class T>
inline double divisor_of(const Finish& door) {
  if (door.reduction != Reduction::mean) return 1;
  if (has_class_weights(door)) {
    return sum_over_rows(
        door.rows, [&](int64_t row) { return door.target.ignored(row, door.spec) ? 0 : weight_of<T>(door, row); });
  }
  int64_t ignored = 0;
  if (!door.target.multi_hot && door.spec.ignores) {
    for (int64_t row = 0; row < door.rows; ++row) ignored += door.target.ignored(row, door.spec);
  }
  return static_cast<double>(door.rows - ignored);
}

template <class T, class Rows>
inline void finish_rows(const Finish& door, const Rows& rows) {
  using V = VecOf<T>;
  const int64_t columns = door.target.coefficients_columns();
  const RowTable<T> coefficients(static_cast<T*>(door.coefficients), columns, door.target.places);
  T* loss = static_cast<T*>(door.loss);
  const bool summed = door.reduction != Reduction::none;
  const bool weighted = has_class_weights(door);
  const double divisor = divisor_of<T>(door), of_one = 1 / divisor;

  const double total = sum_over_blocks(door.rows, [&](int64_t begin, int64_t end) {
    CompensatedSum sum;
    T value[V::lanes];
    for (int64_t first = begin; first < end; first += V::lanes) {
      const int64_t n = end - first < V::lanes ? end - first : V::lanes;
      rows(first, n, value, coefficients);
      double of_rows[V::lanes] = {};  // each in the loss, added up in halves
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = first + i;
        const bool ignored = door.target.ignored(row, door.spec);
        const double weight = weighted && !ignored ? weight_of<T>(door, row) : 1;
        const double counted = ignored ? 0 : weight * value[i];
        const T share = static_cast<T>(weighted ? weight / divisor : of_one);  // of the row in the loss
        for (int64_t j = 0; j < columns; ++j) coefficients[row][j] = ignored ? T(0) : coefficients[row][j] * share;
        of_rows[i] = counted;
        if (!summed) loss[row] = static_cast<T>(counted);
      }
      for (int half = V::lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) of_rows[i] += of_rows[i + half];
      }
      sum.add(of_rows[0]);
    }
    return sum;
  });
  if (summed) *loss = static_cast<T>(total / divisor);
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
