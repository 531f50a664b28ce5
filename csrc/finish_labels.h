// The finish of rows with several labels, with one that is smoothed, or with a margin: what
// fused_losses/finish_labels.py and fused_losses/margin.py say, for V::lanes rows at a time. Formulas run over the
// rows, place by place; what is added up over a row's labels is added in double.
#pragma once

#include "finish.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// What a margin makes of a label's logit, and its slope.
struct Psi {
  double value, slope;

  Psi(const Margin& margin, double z) : value(z), slope(1) {
    if (!margin.present || z == -kInfinity<double>) return;
    const double cos = margin.cos, sin = margin.sin;
    double turned = (z - margin.offset) / margin.scale;
    if (sin != 0 || cos != 1) {
      const double u = turned < -1 ? -1 : turned > 1 ? 1 : turned;
      const double sine = std::sqrt((1 - u) * (1 + u)), least = 1.0 / 2048;
      if (sin > 0 && u < -cos) {
        turned = u - margin.beyond;
      } else if (sin < 0 && u > cos) {
        turned = 1, slope = 0;
      } else {
        turned = u * cos - sine * sin, slope = cos + u / (sine > least ? sine : least) * sin;
      }
    }
    value = margin.scale * (turned - margin.cosine) + margin.offset;
  }
};

// Numbers of V::lanes rows and all their places, place by place.
template <class V>
class Places {
 public:
  using T = typename V::Scalar;

  explicit Places(int64_t places) : data_(places * V::lanes) {}

  T& at(int64_t place, int64_t lane) { return data_[place * V::lanes + lane]; }
  V load(int64_t place) { return V::load(data_.get() + place * V::lanes); }
  void store(int64_t place, V v) { v.store(data_.get() + place * V::lanes); }

 private:
  Buffer<T> data_;
};

// The labels of V::lanes rows, and what smoothing adds.
template <class V>
class LabelBlock {
 public:
  using T = typename V::Scalar;

  LabelBlock(const Finish& door, RowTable<const T> statistics, int64_t first, int64_t n)
      : places(statistics.labels()), z(places), weight(places), slope(places), present_(places * V::lanes) {
    const Spec& spec = door.spec;
    for (int64_t lane = 0; lane < V::lanes; ++lane) {
      for (int64_t place = 0; place < places; ++place) {
        z.at(place, lane) = -kInfinity<T>, weight.at(place, lane) = 0, has(place, lane) = false;
      }
      max[lane] = of_negatives[lane] = smoothing[lane] = 0, terms[lane] = 1;
      if (lane >= n) continue;
      const int64_t row = first + lane;
      const T* numbers = statistics[row];
      max[lane] = numbers[0], of_negatives[lane] = numbers[1];
      const double from = spec.family == Family::softmax ? static_cast<double>(numbers[0]) : 0;
      double of_labels = 0, above = 0, total = 0;
      bool masked = false;  // which makes the loss +inf, as torch's
      int64_t count = 0;
      for (int64_t place = 0; place < places; ++place) {
        if (door.target.labels && door.target.label(row, place) < 0) continue;
        const Psi psi(spec.margin, static_cast<double>(statistics.of_labels(row)[place]));
        const T w = door.weight_of_label<T>(row, place);
        z.at(place, lane) = static_cast<T>(psi.value), weight.at(place, lane) = w;
        slope.at(place, lane) = static_cast<T>(psi.slope);
        has(place, lane) = true;
        const double difference = psi.value - from;
        masked |= psi.value == -kInfinity<double>;
        of_labels += w == 0 ? 0 : w * difference, above += difference, total += w, ++count;
      }
      terms[lane] = static_cast<T>(count + door.chosen_negatives(count));
      if (spec.label_smoothing == 0) continue;
      const double mean = (static_cast<double>(numbers[2]) + above) / terms[lane];
      smoothing[lane] = masked ? kInfinity<double> : spec.label_smoothing * (of_labels + (total - 1) * from - mean);
    }
  }

  bool& has(int64_t place, int64_t lane) { return present_[place * V::lanes + lane]; }

  // Values, and the rows' coefficients: c, b where there are lists, and what of_label(place, lane) is, for psi, and
  // smoothing make of a label's.
  template <class OfLabel>
  void write(RowTable<T> coefficients, int64_t first, int64_t n, const Finish& door, const double* of_loss,
             const T* to_negatives, T* value, const OfLabel& of_label) {
    const double eps = door.spec.label_smoothing;
    for (int64_t lane = 0; lane < n; ++lane) {
      const int64_t row = first + lane;
      value[lane] = static_cast<T>(of_loss[lane] + smoothing[lane]);
      coefficients[row][0] = to_negatives[lane];
      if (door.target.labels) coefficients[row][1] = static_cast<T>(eps == 0 ? 0 : -eps / terms[lane]);
      for (int64_t place = 0; place < places; ++place) {
        double t = 0;
        if (has(place, lane)) {
          t = of_label(place, lane);
          if (eps != 0) t += eps * (weight.at(place, lane) - 1 / static_cast<double>(terms[lane]));
          t *= slope.at(place, lane);
        }
        coefficients.of_labels(row)[place] = static_cast<T>(t);
      }
    }
  }

  int64_t places;
  Places<V> z, weight, slope;  // psi(z_p), -inf in an empty place; w_p; psi'(z_p)
  T max[V::lanes], of_negatives[V::lanes];
  T terms[V::lanes];  // how many logits smoothing takes its mean of
  double smoothing[V::lanes];

 private:
  Buffer<bool> present_;
};

template <class T>
inline T weighted(T w, T value) {
  return w == 0 && std::isinf(value) ? T(0) : w * value;  // a label of weight 0 counts nothing
}

template <class V, class Loss>
class SoftmaxLabelRows {
 public:
  using T = typename V::Scalar;

  SoftmaxLabelRows(const Finish& door, RowTable<const T> statistics, Loss loss)
      : door_(door), statistics_(statistics), loss_(loss) {}

  void operator()(int64_t first, int64_t n, T* value, RowTable<T> coefficients) const {
    LabelBlock<V> block(door_, statistics_, first, n);
    const int64_t places = block.places;
    const V nothing(-kInfinity<T>), zero(0), one(1);

    // Relative to the largest of all logits: never m + l in one number, which loses digits at large offsets.
    const V m = V::load(block.max), l = V::load(block.of_negatives);
    V top = select(l > nothing, m, nothing);
    for (int64_t p = 0; p < places; ++p) top = max(top, block.z.load(p));
    top = select(top > nothing, top, zero);
    const V rest = (m - top) + l;
    Places<V> before(places), total(places), of_d(places);
    V sum = nothing;
    for (int64_t p = 0; p < places; ++p) {
      block.z.store(p, block.z.load(p) - top);
      before.store(p, sum);
      sum = logaddexp(sum, block.z.load(p));
    }
    double values[V::lanes] = {};
    V of_negatives = zero;
    sum = nothing;
    for (int64_t p = places - 1; p >= 0; --p) {
      const V z = block.z.load(p), all = logaddexp(logaddexp(before.load(p), sum), rest), d = z - all;  // L_p, d_p
      T value_of_d[V::lanes], slope_of_d[V::lanes];
      loss_.value(d).store(value_of_d);
      loss_.slope(d).store(slope_of_d);
      for (int64_t lane = 0; lane < V::lanes; ++lane) {
        const T w = block.weight.at(p, lane);
        of_d.at(p, lane) = block.has(p, lane) ? w * slope_of_d[lane] : T(0);
        if (block.has(p, lane)) values[lane] += weighted(w, value_of_d[lane]);
      }
      total.store(p, all);
      of_negatives = of_negatives - of_d.load(p) * select(nothing >= all, one, exp_nonpositive(rest - all));
      sum = logaddexp(sum, z);
    }
    T to_negatives[V::lanes];
    of_negatives.store(to_negatives);
    Places<V> of_z(places);
    for (int64_t q = 0; q < places; ++q) {
      const V z = block.z.load(q);
      V gradient = of_d.load(q);
      for (int64_t p = 0; p < places; ++p) {
        if (p == q) continue;
        gradient = gradient - of_d.load(p) * select(z > nothing, exp_nonpositive(z - total.load(p)), zero);
      }
      of_z.store(q, gradient);
    }
    block.write(coefficients, first, n, door_, values, to_negatives, value,
                [&](int64_t place, int64_t lane) { return of_z.at(place, lane); });
  }

 private:
  const Finish& door_;
  RowTable<const T> statistics_;
  Loss loss_;
};

// A row of its own, or, with lists and where the loss takes means, means over the terms of the batch.
template <class V>
class LogisticLabelRows {
 public:
  using T = typename V::Scalar;

  LogisticLabelRows(const Finish& door, RowTable<const T> statistics) : door_(door), statistics_(statistics) {
    if (!door.spec.takes_means) return;
    if (!door.target.labels) {
      const int64_t chosen = door.chosen_negatives(1);
      of_negatives_ = static_cast<T>(door.spec.alpha / static_cast<double>(chosen > 1 ? chosen : 1));
      return;
    }
    const auto count = [&](int64_t row) {
      int64_t labels = 0;
      for (int64_t place = 0; place < statistics.labels(); ++place) labels += door.target.label(row, place) >= 0;
      return labels;
    };
    const double rows = static_cast<double>(door.rows);
    const double positives = sum_over_rows(door.rows, [&](int64_t row) { return static_cast<double>(count(row)); });
    const double chosen =
        sum_over_rows(door.rows, [&](int64_t row) { return static_cast<double>(door.chosen_negatives(count(row))); });
    of_positives_ = static_cast<T>(rows / (positives > 1 ? positives : 1));
    of_negatives_ = static_cast<T>(door.spec.alpha * rows / (chosen > 1 ? chosen : 1));
  }

  void operator()(int64_t first, int64_t n, T* value, RowTable<T> coefficients) const {
    LabelBlock<V> block(door_, statistics_, first, n);
    Places<V> sigma(block.places), sigma_of_minus(block.places);
    double values[V::lanes] = {};
    bool poisoned[V::lanes] = {};  // by a NaN among the statistics: inf - inf in a value is none
    T to_negatives[V::lanes];
    for (int64_t p = 0; p < block.places; ++p) {
      const V z = block.z.load(p);
      T as_positive[V::lanes], as_negative[V::lanes];
      softplus(V(0) - z).store(as_positive);
      softplus(z).store(as_negative);
      const Sigmoid<V> both(z, exp_minus_abs(z));
      sigma.store(p, both.plus), sigma_of_minus.store(p, both.minus);
      for (int64_t lane = 0; lane < V::lanes; ++lane) {
        if (!block.has(p, lane)) continue;
        const T w = block.weight.at(p, lane);
        values[lane] += weighted(w, as_positive[lane]) + weighted(1 - w, as_negative[lane]);
        poisoned[lane] |= std::isnan(as_positive[lane]);
      }
    }
    for (int64_t lane = 0; lane < V::lanes; ++lane) {
      const T neg = block.of_negatives[lane];
      values[lane] = of_positives_ * values[lane] + of_negatives_ * neg;
      to_negatives[lane] = poisoned[lane] || std::isnan(neg) ? kNaN<T> : of_negatives_;
    }
    block.write(coefficients, first, n, door_, values, to_negatives, value, [&](int64_t place, int64_t lane) {
      const T w = block.weight.at(place, lane);  // and not sigma - w, which loses the digits of a confident label
      return of_positives_ * ((1 - w) * sigma.at(place, lane) - w * sigma_of_minus.at(place, lane));
    });
  }

 private:
  const Finish& door_;
  RowTable<const T> statistics_;
  T of_positives_ = 1, of_negatives_ = 1;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
