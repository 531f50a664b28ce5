// The walk over rows and over the classes of a row, the same for every loss. It knows which logits are negatives, which
// are picked and which thread works where; what is added up or written for a logit comes from a family (softmax.h,
// logistic.h).
//
// A row is cut into pieces of a fixed number of classes, whose statistics are merged in order. So the bits of a result
// do not depend on the number of threads, be there a thread for several rows or several threads for a row.
#pragma once

#include "rows.h"
#include "select.h"
#include "simd.h"
#include "target.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

constexpr int64_t kPiece = 4096;   // classes: 16 KB of float32 stay in the first cache
constexpr int64_t kGrain = 16384;  // logits: less than this is not worth waking a thread
constexpr int64_t kWake = 32768;   // logits that a thread is through with while the others wake, and meet again

// How many of the rows, from the first on, have a thread of their own. The others, fewer than there are threads, are
// shared by all of them, one after another, where that takes less time than a round in which some have none.
inline int64_t rows_alone(int64_t rows, int64_t classes) {
  const int64_t threads = num_threads(), left = rows % threads;
  const int64_t sharing = classes / kGrain < threads ? classes / kGrain : threads;
  return left * (classes + kWake * sharing) < classes * sharing ? rows - left : rows;
}

// Calls visit(vector) for the negatives among row[begin, end). Lanes of positives and past the end hold `fill`, which
// must add nothing: -inf, a masked class, unless what is added up is the logits themselves.
// visit_run(address), if there is one, is called for kRun vectors that lie one behind the other and hold nothing else,
// as long as there are so many; pause() after the last of the others, and before there are more than kRun of them.
constexpr int kRun = 8;

struct Nothing {
  void operator()() const {}
};

template <class S, class Visit, class VisitRun = Nothing, class Pause = Nothing>
FUSED_LOSSES_INLINE void for_each_negative(const S* row, int64_t begin, int64_t end, Positives positives,
                                           const Visit& visit, const VisitRun& visit_run = {}, const Pause& pause = {},
                                           Compute<S> fill = -kInfinity<Compute<S>>) {
  using V = VecOf<S>;
  int64_t p = 0, i = begin;
  while (p < positives.count && positives.index[p] < begin) ++p;
  while (i < end) {
    const int64_t stop = p < positives.count && positives.index[p] < end ? positives.index[p] : end;
    if constexpr (!std::is_same_v<VisitRun, Nothing>) {
      for (; i + kRun * V::lanes <= stop; i += kRun * V::lanes) visit_run(row + i);
    }
    for (; i + V::lanes <= stop; i += V::lanes) visit(V::load(row + i));
    if (i >= end) return pause();
    // A vector with a positive or with the end in it
    V z = i + V::lanes <= end ? V::load(row + i) : load_first<V>(row + i, end - i, fill);
    for (; p < positives.count && positives.index[p] < i + V::lanes; ++p) {
      z = replaced(z, positives.index[p] - i, fill);  // behind the end it stands already
    }
    visit(z);
    i += V::lanes;
    pause();
  }
}

// What a sum of terms comes to. A term is a vector, or something that stands for one, has a + and a total of its own.
template <class V>
FUSED_LOSSES_INLINE V total(V sum) {
  return sum;
}

// The sum of term(vector) over the same vectors. Lanes hand over to double after kRun terms, which are added in halves:
// one term beside a large sum is rounded to a unit of it, and many equal ones all in the same direction. (A sum of four
// equal numbers is exact.)
// kAhead: fetch what lies that many classes ahead, for a second look at a piece while the next one is still in memory.
template <int64_t kAhead = 0, class S, class Term>
FUSED_LOSSES_INLINE double sum_negatives(const S* row, int64_t begin, int64_t end, Positives positives,
                                         const Term& term, Compute<S> fill = -kInfinity<Compute<S>>) {
  using V = VecOf<S>;
  constexpr int half = kRun / 2;
  Sum<V> sum;
  using Terms = decltype(term(V(0)));
  Terms rest(0);
  const auto sum_half = [&](const S* p) {
    if (kAhead > 0) prefetch(p + kAhead);
    Terms run = term(V::load(p));
    for (int j = 1; j < half; ++j) {
      if (kAhead > 0) prefetch(p + j * V::lanes + kAhead);
      run = run + term(V::load(p + j * V::lanes));
    }
    return run;
  };
  for_each_negative(
      row, begin, end, positives, [&](V z) { rest = rest + term(z); },
      [&](const S* p) {
        const Terms first = sum_half(p);
        sum.add(total(first + sum_half(p + half * V::lanes)));
      },
      [&] {
        sum.add(total(rest));
        rest = Terms(0);
      },
      fill);
  return sum.total();
}

// The sum of z - level over the negatives, for label smoothing. Never a part of its callers, whose own loops a compiler
// is to arrange as if it were not there.
template <class S>
FUSED_LOSSES_NOINLINE double sum_above(const S* row, int64_t begin, int64_t end, Positives positives,
                                       Compute<S> level) {
  using V = VecOf<S>;
  const V shift(level);
  return sum_negatives(row, begin, end, positives, [&](V z) { return z - shift; }, level);
}

// How many negatives there are among [begin, end).
inline int64_t count_negatives(int64_t begin, int64_t end, Positives positives) {
  int64_t count = end - begin;
  for (int64_t p = 0; p < positives.count; ++p) count -= positives.index[p] >= begin && positives.index[p] < end;
  return count;
}

inline void lower(std::atomic<int64_t>& least, int64_t value) {
  int64_t now = least.load();
  while (value < now && !least.compare_exchange_weak(now, value)) {
  }
}

// ---------------------------------------------------------------------------------------------------------- forward

// Family:  using Partial               the statistic of some negatives; Partial() is that of none
//          Partial over(const X*, begin, end, positives)      X is S or its compute dtype
//          static Partial merge(Partial, Partial)
//          write(row, const S* logits, positives, Partial)    writes the row's statistics
//          ignore(row), spoil(row, positives)                 the same for an ignored row, for a row with a NaN
//          flush()                                            writes what is left: a thread has a copy of its own
template <class S, class Family>
class ForwardWalk {
 public:
  using T = Compute<S>;
  using Partial = typename Family::Partial;

  ForwardWalk(Forward& door, Family family)
      : door_(door), problem_(door.problem), spec_(door.problem.spec), family_(family) {}

  void run() {
    const int64_t alone = rows_alone(problem_.rows, problem_.classes);
    parallel(alone, 1 + kGrain / problem_.classes, [&](int64_t begin, int64_t end) { visit<false>(begin, end); });
    if (alone < problem_.rows) visit<true>(alone, problem_.rows);
  }

 private:
  template <bool kSplitRow>
  void visit(int64_t first, int64_t last) {
    TargetReader targets(problem_);
    Selector<S> selector(problem_, kSplitRow);
    Family family = family_;
    for (int64_t row = first; row < last; ++row) visit<kSplitRow>(row, targets, selector, family);
    family.flush();
  }

  template <bool kSplitRow>
  void visit(int64_t row, TargetReader& targets, Selector<S>& selector, Family& family) {
    const S* logits = static_cast<const S*>(problem_.logits) + row * problem_.logits_stride;
    Positives positives;
    Candidates<T> picks{nullptr, nullptr, 0};
    if (!targets.read(row, &positives)) return report(row, positives);
    if (targets.ignored(row)) {
      family.ignore(row);
    } else if (spec_.k == 0) {
      family.write(row, logits, positives, over_all<kSplitRow>(logits, positives));
    } else if (kSplitRow ? selector.select_split(logits, positives, &picks)
                         : selector.select(logits, positives, &picks)) {
      family.write(row, logits, positives, over_pieces(picks.logit, picks.count, Positives{nullptr, 0}));
    } else {
      family.spoil(row, positives);
    }
    write_picks(row, picks);
  }

  void report(int64_t row, Positives up_to_bad) {
    lower(door_.bad_entry, row * problem_.classes + up_to_bad.index[up_to_bad.count - 1]);
  }

  template <bool kSplitRow>
  Partial over_all(const S* logits, Positives positives) {
    if (!kSplitRow) return over_pieces(logits, problem_.classes, positives);
    const int64_t classes = problem_.classes, pieces = (classes + kPiece - 1) / kPiece;
    Buffer<Partial> partials(pieces);
    parallel(pieces, kGrain / kPiece, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t stop = (p + 1) * kPiece < classes ? (p + 1) * kPiece : classes;
        partials[p] = family_.over(logits, p * kPiece, stop, positives);
      }
    });
    Partial total;
    for (int64_t p = 0; p < pieces; ++p) total = Family::merge(total, partials[p]);
    return total;
  }

  template <class X>
  Partial over_pieces(const X* logits, int64_t n, Positives positives) const {
    Partial total = family_.over(logits, 0, n < kPiece ? n : kPiece, positives);
    for (int64_t begin = kPiece; begin < n; begin += kPiece) {
      const int64_t end = begin + kPiece < n ? begin + kPiece : n;
      total = Family::merge(total, family_.over(logits, begin, end, positives));
    }
    return total;
  }

  void write_picks(int64_t row, const Candidates<T>& picks) {
    if (spec_.k == 0) return;
    S* logit = static_cast<S*>(door_.pick_logit);
    if (spec_.compact) {
      for (int64_t i = 0; i < spec_.k; ++i) write_pick(row * spec_.k + i, logit, picks, i < picks.count ? i : -1);
      return;
    }
    int64_t last = picks.count - 1;  // in the order of the selection: the smallest logit, of equals the highest index
    if (last >= 0) {
      const T edge = smallest(picks.logit, picks.count);
      while (picks.logit[last] != edge) --last;
    }
    write_pick(row, logit, picks, last);
  }

  void write_pick(int64_t slot, S* logit, const Candidates<T>& picks, int64_t i) {
    door_.pick_index[slot] = i < 0 ? -1 : picks.index[i];
    from_compute(logit + slot, i < 0 ? -kInfinity<T> : picks.logit[i]);
  }

  Forward& door_;
  const Problem& problem_;
  const Spec& spec_;
  const Family family_;
};

// --------------------------------------------------------------------------------------------------------- backward

// Family:  multi_hot                   whether targets may be rows of their own
//          using Gradient              that of one row
//              V negative(V z)         the gradient at negatives with these logits
//              V positive(V z)         at the positives of a multi-hot row, where there are some
//          Gradient gradient(row, Scaled<T>)
template <class S, class Family>
class BackwardWalk {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;
  using Gradient = typename Family::Gradient;

  BackwardWalk(Backward& door, Family family)
      : door_(door),
        problem_(door.problem),
        spec_(door.problem.spec),
        family_(family),
        coefficients_(static_cast<const T*>(door.coefficients), problem_.target.coefficients_columns(),
                      problem_.target.places) {}

  void run() const {
    const int64_t alone = rows_alone(problem_.rows, problem_.classes);
    parallel(alone, 1 + kGrain / problem_.classes, [&](int64_t begin, int64_t end) { write<false>(begin, end); });
    if (alone < problem_.rows) write<true>(alone, problem_.rows);
  }

 private:
  template <bool kSplitRow>
  void write(int64_t first, int64_t last) const {
    TargetReader targets(problem_);
    Buffer<S> at_positives(problem_.target.most_positives(problem_.classes));
    for (int64_t row = first; row < last; ++row) {
      const Scaled<T> scaled = scaled_of(row);
      const Gradient gradient = family_.gradient(row, scaled);
      const Positives positives = read(row, scaled.nan, targets, gradient, at_positives.get());
      const bool ignored = targets.ignored(row);
      if constexpr (kSplitRow) {
        parallel((problem_.classes + kPiece - 1) / kPiece, kGrain / kPiece, [&](int64_t begin, int64_t end) {
          const int64_t stop = end * kPiece < problem_.classes ? end * kPiece : problem_.classes;
          fill(row, begin * kPiece, stop, ignored, scaled.nan, gradient);
        });
      } else {
        fill(row, 0, problem_.classes, ignored, scaled.nan, gradient);
      }
      if (!scaled.nan && !ignored) patch(row, positives, at_positives.get(), gradient);
    }
  }

  const S* logits(int64_t row) const { return static_cast<const S*>(problem_.logits) + row * problem_.logits_stride; }
  S* dlogits(int64_t row) const { return static_cast<S*>(door_.dlogits) + row * door_.dlogits_stride; }

  T grad_of(int64_t row) const { return static_cast<const T*>(door_.grad)[row * door_.grad_stride]; }

  Scaled<T> scaled_of(int64_t row) const {
    const T grad = grad_of(row), *coefficients = coefficients_[row];
    Scaled<T> scaled{coefficients[0] * grad, spec_.label_smoothing == 0 ? T(0) : coefficients[1] * grad,
                     coefficients_.of_labels(row)[0] * grad, false};
    scaled.nan =
        scaled.of_negatives != scaled.of_negatives || (!problem_.target.labels && scaled.of_target != scaled.of_target);
    return scaled;
  }

  // The positives of a row and, in at_positives, the gradients there: known before the row is written, which may be
  // over the logits that they are made of. A row that becomes NaN needs none.
  Positives read(int64_t row, bool nan, TargetReader& targets, const Gradient& gradient, S* at_positives) const {
    Positives positives{nullptr, 0};
    if (nan) return positives;
    targets.read(row, &positives);
    if (!problem_.target.multi_hot) {
      const T grad = grad_of(row), *of_label = coefficients_.of_labels(row) + positives.first_place;
      for (int64_t p = 0; p < positives.count; ++p) from_compute(at_positives + p, of_label[p] * grad);
      return positives;
    }
    if constexpr (Family::multi_hot) {
      for_each_group<V::lanes>(positives, [&](const int32_t* index, int64_t n) {
        T z[V::lanes], gradients[V::lanes];
        for (int64_t i = 0; i < n; ++i) z[i] = to_compute(logits(row)[index[i]]);
        gradient.positive(load_first<V>(z, n, 0)).store(gradients);
        for (int64_t i = 0; i < n; ++i) from_compute(at_positives + (index - positives.index) + i, gradients[i]);
      });
    }
    return positives;
  }

  // Every element of dlogits[row, begin:end), as if there were no positives and no compact picks.
  void fill(int64_t row, int64_t begin, int64_t end, bool ignored, bool nan, const Gradient& gradient) const {
    if (!ignored && nan) {
      constant(row, begin, end, kNaN<T>);
    } else if (ignored || spec_.compact) {
      std::memset(dlogits(row) + begin, 0, (end - begin) * sizeof(S));
    } else if (spec_.k == 0) {
      transform(row, begin, end, [&](V z) { return gradient.negative(z); });
    } else {
      threshold(row, begin, end, gradient);
    }
  }

  // The edge itself is the last of its equals to be picked: up to its index equals count, behind it they do not.
  void threshold(int64_t row, int64_t begin, int64_t end, const Gradient& gradient) const {
    const int64_t edge_index = door_.pick_index[row];
    if (edge_index < 0) return constant(row, begin, end, T(0));
    const V zero(0), edge(to_compute(static_cast<const S*>(door_.pick_logit)[row]));
    const int64_t middle = edge_index + 1 < begin ? begin : edge_index + 1 < end ? edge_index + 1 : end;
    const bool sparse =
        spec_.k < problem_.classes / 32;  // else a branch on a vector without picks costs more than it saves
    transform(row, begin, middle, [&](V z) {
      const auto picked = z >= edge;
      return sparse && bits(picked) == 0 ? zero : select(picked, gradient.negative(z), zero);
    });
    transform(row, middle, end, [&](V z) {
      const auto picked = z > edge;
      return sparse && bits(picked) == 0 ? zero : select(picked, gradient.negative(z), zero);
    });
  }

  // Scatters the compact picks, then the positives. Nothing is written for a pick that is no class: picks come from
  // whoever kept them since forward.
  void patch(int64_t row, Positives positives, const S* at_positives, const Gradient& gradient) const {
    S* out = dlogits(row);
    bool all_classes = true;
    if (spec_.compact) {
      const int32_t* index = door_.pick_index + row * spec_.k;
      const S* logit = static_cast<const S*>(door_.pick_logit) + row * spec_.k;
      S value[V::lanes];
      for (int64_t i = 0; i < spec_.k; i += V::lanes) {
        const int n = static_cast<int>(spec_.k - i < V::lanes ? spec_.k - i : V::lanes);
        gradient.negative(n == V::lanes ? V::load(logit + i) : load_first<V>(logit + i, n, -kInfinity<T>)).store(value);
        for (int j = 0; j < n; ++j) {
          if (is_class(index[i + j])) {
            out[index[i + j]] = value[j];
          } else {
            all_classes &= index[i + j] == -1;
          }
        }
      }
    } else if (spec_.k > 0) {
      all_classes = is_class(door_.pick_index[row]) || door_.pick_index[row] == -1;
    }
    if (!all_classes) lower(door_.bad_row, row);
    for (int64_t p = 0; p < positives.count; ++p) out[positives.index[p]] = at_positives[p];
  }

  bool is_class(int32_t index) const { return static_cast<uint32_t>(index) < static_cast<uint32_t>(problem_.classes); }

  void constant(int64_t row, int64_t begin, int64_t end, T value) const {
    for (int64_t i = begin; i < end; ++i) from_compute(dlogits(row) + i, value);
  }

  template <class F>
  FUSED_LOSSES_INLINE void transform(int64_t row, int64_t begin, int64_t end, const F& f) const {
    const S* in = logits(row);
    S* out = dlogits(row);
    int64_t i = begin;
    for (; i + V::lanes <= end; i += V::lanes) f(V::load(in + i)).store(out + i);
    if (i < end) store_first(out + i, f(load_first<V>(in + i, end - i, -kInfinity<T>)), end - i);
  }

  Backward& door_;
  const Problem& problem_;
  const Spec& spec_;
  Family family_;
  RowTable<const T> coefficients_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
