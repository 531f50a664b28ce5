// The classes that may be among the k hardest negatives of the rows of a linear layer, from products in bfloat16, and
// their exact logits. The proof of what is done here, and its symbols, stand in fused_losses/linear_certified.py.
//
// 1. round_classes   some classes at a time, as they lie in memory: to bfloat16, with the length of what that lost;
// 2. multiply        these classes with 64 rows: the products stay in registers;
// 3. take            classes whose upper bound exceeds the threshold of a row are written down, few in the long run;
// 4. keep_possible   a row's list is full: its threshold becomes the w-th largest lower bound, w = k + labels;
// 5. finish          the lists of all pieces of the classes are cut once more, and what is left gets its exact logit.
//
// Lanes are rows, so that classes need no transposition: the input is rearranged once.
#pragma once

#include "select.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

constexpr int64_t kLanes = 16;
constexpr int64_t kPairLanes = 32;              // features that one vector of pairs holds
constexpr int64_t kClasses = 48;                // classes that are rounded at a time
constexpr int64_t kMostProducts = 24 * kLanes;  // of a tile, in registers
constexpr int64_t kPieceOfClasses = 4096;       // a thread takes no fewer
// Of norms that the bound holds for; the least is above what cosines divide by at the least.
constexpr float kLeastSquare = 0x1p-78f, kMostSquare = 0x1p120f;
constexpr float kUp = 1.001f;  // more than what float32 sums of 2^18 squares may be off

// Vectors of rows with their length and the length of what rounding lost.
struct Rounded {
  uint16_t* bits;  // (vectors, padded features)
  float *square, *lost_square;
};

// One vector of n features to bfloat16, with zeros behind them.
FUSED_LOSSES_INLINE void round_to_bf16(const float* from, int64_t n, uint16_t* to, float* square, float* lost_square) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, lost[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto step = [&](int64_t i, __m512 low, __m512 high) {
    const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(to + i, pairs);
    const __m512 both[2] = {low, high};
    const __m256i halves[2] = {_mm512_castsi512_si256(pairs), _mm512_extracti64x4_epi64(pairs, 1)};
    for (int h = 0; h < 2; ++h) {
      const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[h]), 16));
      const __m512 off = _mm512_sub_ps(both[h], rounded);
      sum[h] = _mm512_fmadd_ps(both[h], both[h], sum[h]);
      lost[h] = _mm512_fmadd_ps(off, off, lost[h]);
    }
  };
  int64_t i = 0;
  for (; i + kPairLanes <= n; i += kPairLanes) step(i, _mm512_loadu_ps(from + i), _mm512_loadu_ps(from + i + kLanes));
  if (i < n) {
    const uint32_t inside = (uint32_t{1} << (n - i)) - 1;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), from + i);
    const auto upper = static_cast<__mmask16>(inside >> 16);
    step(i, low, upper == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(upper, from + i + kLanes));
  }
  *square = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  *lost_square = _mm512_reduce_add_ps(_mm512_add_ps(lost[0], lost[1]));
}

inline bool all_zero(const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (from[i] != 0) return false;
  }
  return true;
}

// Whether the bound holds for a vector: its norm is neither so small nor so large that products underflow or overflow.
inline bool in_range(float square, const float* from, int64_t n) {
  if (square >= kLeastSquare) return square <= kMostSquare;
  return square == 0 && all_zero(from, n);
}

// The products of RV vectors of rows, x (pairs, RV, lanes), with CT classes, w (CT, pairs), to (CT, RV, lanes).
template <int RV, int CT>
inline void multiply(const uint32_t* x, const uint32_t* w, int64_t pairs, float* to) {
  __m512 z[CT][RV];
#pragma GCC unroll 24
  for (int c = 0; c < CT; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < RV; ++v) z[c][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh of_rows[RV];
#pragma GCC unroll 4
    for (int v = 0; v < RV; ++v) of_rows[v] = (__m512bh)_mm512_loadu_si512(x + (p * RV + v) * kLanes);
#pragma GCC unroll 24
    for (int c = 0; c < CT; ++c) {
      const __m512bh of_class = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[c * pairs + p]));
#pragma GCC unroll 4
      for (int v = 0; v < RV; ++v) z[c][v] = _mm512_dpbf16_ps(z[c][v], of_rows[v], of_class);
    }
  }
#pragma GCC unroll 24
  for (int c = 0; c < CT; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < RV; ++v) _mm512_storeu_ps(to + (c * RV + v) * kLanes, z[c][v]);
  }
}

// The candidates of one row from one piece of the classes, ascending. With kRoom behind them.
struct List {
  float *lower, *upper;
  int32_t* index;
  int64_t count;  // -1: there were too many
  int64_t full;   // so many are cut
};

// Keeps what may be among the w largest, if there are as many: all whose upper bound exceeds the w-th largest lower
// bound, and of those whose upper bound equals it the ones that w others do not precede. Returns that lower bound.
inline float keep_possible(List& list, int64_t w, float* scratch) {
  std::memcpy(scratch, list.lower, list.count * sizeof(float));
  const float edge = find_cut<float>(scratch, list.count, w, w / 8).edge;
  const FloatVec at(edge);
  int64_t kept = 0, reaching = 0;
  for (int64_t i = 0; i < list.count; i += kLanes) {
    const uint32_t inside = list.count - i < kLanes ? (1u << (list.count - i)) - 1 : 0xffff;
    const FloatVec lower = FloatVec::load(list.lower + i), upper = FloatVec::load(list.upper + i);
    const uint32_t above = bits(upper > at) & inside, reaching_here = bits(lower >= at) & inside;
    uint32_t taken = above;
    for (uint32_t equal = bits(upper >= at) & inside & ~above; equal != 0; equal &= equal - 1) {
      const uint32_t lane = equal & (~equal + 1);  // w of those before it leave no place for this one
      if (reaching + count_bits(reaching_here & (lane - 1)) < w) taken |= lane;
    }
    compress(taken, lower, list.lower + kept);
    compress(taken, upper, list.upper + kept);
    compress(taken, list.index + i, list.index + kept);
    kept += count_bits(taken);
    reaching += count_bits(reaching_here);
  }
  list.count = kept;
  return edge;
}

class CandidateSearcher {
 public:
  explicit CandidateSearcher(const CandidateSearch& search)
      : search_(search),
        rows_(search.problem.rows),
        classes_(search.problem.classes),
        features_((search.features + kPairLanes - 1) / kPairLanes * kPairLanes),
        pairs_(features_ / 2),
        vectors_((rows_ + kLanes - 1) / kLanes),
        enough_(search.problem.spec.k + search.problem.target.places),
        room_(search.most + 2 * enough_ + 64 + kRoom),
        pieces_(most_pieces()),
        input_(vectors_ * kLanes * pairs_),
        of_residual_(vectors_ * kLanes),
        of_norm_(vectors_ * kLanes),
        hopeless_(vectors_ * kLanes),
        lists_(pieces_ * rows_),
        numbers_(pieces_ * rows_ * room_ * 2),
        indices_(pieces_ * rows_ * room_) {}

  void run() {
    round_input();
    for (int64_t i = 0; i < pieces_ * rows_; ++i) {
      float* numbers = numbers_.get() + i * room_ * 2;
      lists_[i] = {numbers, numbers + room_, indices_.get() + i * room_, hopeless_[i % rows_] ? -1 : 0,
                   2 * enough_ + 64};
    }
    parallel(pieces_, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) walk(piece);
    });
    parallel(rows_, 1, [&](int64_t first, int64_t last) {
      Found found(room_ * pieces_ + kRoom, features_);
      TargetReader targets(search_.problem);
      for (int64_t row = first; row < last; ++row) finish(row, targets, found);
    });
  }

 private:
  int64_t most_pieces() const {
    const int64_t most = (classes_ + kPieceOfClasses - 1) / kPieceOfClasses, threads = num_threads();
    return threads < most ? threads : most;
  }

  const float* input(int64_t row) const { return search_.input + row * search_.input_stride; }
  const float* weight(int64_t j) const { return search_.weight + j * search_.weight_stride; }

  // The input to bfloat16 as (groups of four vectors of rows, pairs, vectors, lanes), and what the bound takes of it.
  void round_input() {
    std::memset(input_.get(), 0, vectors_ * kLanes * pairs_ * sizeof(uint32_t));
    Buffer<uint16_t> rounded(features_);
    const float slack = static_cast<float>(search_.features + 16) * 0x1p-22f;
    for (int64_t row = 0; row < vectors_ * kLanes; ++row) {
      of_residual_[row] = of_norm_[row] = 0;
      hopeless_[row] = row >= rows_;
      if (row >= rows_ || search_.problem.target.ignored(row, search_.problem.spec)) continue;
      float square, lost_square;
      round_to_bf16(input(row), search_.features, rounded.get(), &square, &lost_square);
      hopeless_[row] = !in_range(square, input(row), search_.features);
      if (hopeless_[row]) continue;
      const float norm = std::sqrt(square) * kUp, lost = std::sqrt(lost_square) * kUp;
      const auto share = static_cast<float>(search_.share_of_bound);
      of_residual_[row] = norm * share;
      of_norm_[row] = (lost + slack * (norm + lost)) * kUp * share;
      const int64_t vector = row / kLanes, group = vector / 4, in_group = of_group(group);
      uint32_t* to = input_.get() + group * 4 * kLanes * pairs_ + vector % 4 * kLanes + row % kLanes;
      for (int64_t p = 0; p < pairs_; ++p) std::memcpy(to + p * in_group * kLanes, rounded.get() + 2 * p, 4);
    }
  }

  int64_t of_group(int64_t group) const { return vectors_ - group * 4 < 4 ? vectors_ - group * 4 : 4; }

  // What the bound takes of some classes, and what makes logits of their products.
  struct OfClasses {
    float residual[kClasses], norm[kClasses], constant[kClasses], inverse[kClasses], bias[kClasses];
  };

  void round_classes(int64_t first, int64_t count, uint16_t* to, OfClasses* of) const {
    float square[kClasses] = {}, lost_square[kClasses] = {};
    for (int64_t c = 0; c < count; ++c) {
      round_to_bf16(weight(first + c), search_.features, to + c * features_, square + c, lost_square + c);
      of->bias[c] = search_.bias == nullptr ? 0 : search_.bias[(first + c) * search_.bias_stride];
    }
    for (int64_t c = 0; c < kClasses; ++c) {  // without a branch, for the compiler to make vectors of
      const float norm = std::sqrt(square[c]), lost = std::sqrt(lost_square[c]) * kUp;
      const float inverse = !search_.cosine || norm == 0 ? 1 : 1 / norm, size = std::fabs(of->bias[c]);
      of->inverse[c] = inverse;
      of->residual[c] = lost * inverse;
      of->norm[c] = (norm * kUp + lost) * inverse * kUp;
      of->constant[c] = size < kInfinity<float> ? size * 0x1p-22f : 0;
    }
    for (int64_t c = 0; c < count; ++c) {
      if (!in_range(square[c], weight(first + c), search_.features)) of->residual[c] = kInfinity<float>;
    }
  }

  void walk(int64_t piece) {
    const int64_t begin = classes_ * piece / pieces_, end = classes_ * (piece + 1) / pieces_;
    Buffer<uint16_t> rounded(kClasses * features_);
    Buffer<float> threshold(vectors_ * kLanes), scratch(room_ + kRoom), products(kMostProducts);
    std::memset(rounded.get(), 0, kClasses * features_ * sizeof(uint16_t));
    for (int64_t row = 0; row < vectors_ * kLanes; ++row) {  // everything exceeds NaN, and no number infinity
      threshold[row] = hopeless_[row] ? kInfinity<float> : kNaN<float>;
    }
    Piece at{lists_.get() + piece * rows_, threshold.get(), scratch.get(), products.get()};
    OfClasses of;
    for (int64_t first = begin; first < end; first += kClasses) {
      const int64_t count = end - first < kClasses ? end - first : kClasses;
      round_classes(first, count, rounded.get(), &of);
      const auto* w = reinterpret_cast<const uint32_t*>(rounded.get());
      for (int64_t group = 0; group * 4 < vectors_; ++group) {
        switch (of_group(group)) {
          case 4: multiply_and_take<4, 6>(at, group, w, first, count, of); break;
          case 3: multiply_and_take<3, 8>(at, group, w, first, count, of); break;
          case 2: multiply_and_take<2, 12>(at, group, w, first, count, of); break;
          default: multiply_and_take<1, 24>(at, group, w, first, count, of);
        }
      }
    }
  }

  struct Piece {
    List* lists;  // (rows,)
    float *threshold, *scratch, *products;
  };

  template <int RV, int CT>
  void multiply_and_take(const Piece& at, int64_t group, const uint32_t* w, int64_t first, int64_t count,
                         const OfClasses& of) {
    static_assert(RV * CT * kLanes <= kMostProducts && kClasses % CT == 0);
    const int64_t first_row = group * 4 * kLanes,
                  last_row = first_row + RV * kLanes < rows_ ? first_row + RV * kLanes : rows_;
    bool alive = false;
    for (int64_t row = first_row; row < last_row; ++row) alive |= at.lists[row].count >= 0;
    if (!alive) return;
    const uint32_t* x = input_.get() + first_row * pairs_;
    for (int64_t tile = 0; tile < count; tile += CT) {
      if (group == 0) prefetch(first + kClasses + tile, CT);
      multiply<RV, CT>(x, w + tile * pairs_, pairs_, at.products);
      for (int64_t c = tile; c < tile + CT && c < count; ++c) {
        const __m512 inverse = _mm512_set1_ps(of.inverse[c]), bias = _mm512_set1_ps(of.bias[c]);
        const __m512 residual = _mm512_set1_ps(of.residual[c]), norm = _mm512_set1_ps(of.norm[c]);
        const __m512 constant = _mm512_set1_ps(of.constant[c]);
        for (int64_t v = 0; v < RV; ++v) {
          const int64_t row = first_row + v * kLanes;
          const __m512 product = _mm512_loadu_ps(at.products + ((c - tile) * RV + v) * kLanes);
          const __m512 z = _mm512_fmadd_ps(product, inverse, bias);
          const __m512 of_norm = _mm512_fmadd_ps(_mm512_loadu_ps(of_norm_.get() + row), norm, constant);
          const __m512 bound = _mm512_fmadd_ps(_mm512_loadu_ps(of_residual_.get() + row), residual, of_norm);
          const __m512 upper = _mm512_add_ps(z, bound);
          const __mmask16 above = _mm512_cmp_ps_mask(upper, _mm512_loadu_ps(at.threshold + row), _CMP_NLE_UQ);
          if (above != 0) take(at, row, above, first + c, _mm512_sub_ps(z, bound), upper);
        }
      }
    }
  }

  // Brings classes that are rounded next from memory while others are multiplied.
  void prefetch(int64_t first, int64_t count) const {
    for (int64_t j = first; j < first + count && j < classes_; ++j) {
      for (int64_t i = 0; i < search_.features; i += kLanes)
        _mm_prefetch(reinterpret_cast<const char*>(weight(j) + i), _MM_HINT_T0);
    }
  }

  // Writes class j down for the rows of the set bits. What is NaN may be anything.
  FUSED_LOSSES_NOINLINE void take(const Piece& at, int64_t first_row, uint32_t rows, int64_t j, __m512 lowers,
                                  __m512 uppers) {
    float lower[kLanes], upper[kLanes];
    _mm512_storeu_ps(lower, lowers);
    _mm512_storeu_ps(upper, uppers);
    for (; rows != 0; rows &= rows - 1) {
      const int lane = __builtin_ctz(rows);
      const int64_t row = first_row + lane;
      if (row >= rows_) return;
      List& list = at.lists[row];
      if (list.count < 0) continue;
      list.lower[list.count] = lower[lane] == lower[lane] ? lower[lane] : -kInfinity<float>;
      list.upper[list.count] = upper[lane] == upper[lane] ? upper[lane] : kInfinity<float>;
      list.index[list.count++] = static_cast<int32_t>(j);
      if (list.count < list.full) continue;
      at.threshold[row] = keep_possible(list, enough_, at.scratch);
      list.full = list.count + enough_ / 2 + 64;
      if (list.count > search_.most + search_.problem.target.places) {
        list.count = -1;
        at.threshold[row] = kInfinity<float>;
      }
    }
  }

  // Memory for what all pieces have found of a row.
  struct Found {
    Found(int64_t room, int64_t features) : lower(room), upper(room), scratch(room), input(features), index(room) {}
    Buffer<float> lower, upper, scratch;
    Buffer<double> input;
    Buffer<int32_t> index;
  };

  void finish(int64_t row, TargetReader& targets, Found& found) {
    const Problem& problem = search_.problem;
    const int64_t places = problem.target.places, most = search_.most;
    double* x = found.input.get();
    for (int64_t i = 0; i < features_; ++i) x[i] = i < search_.features ? input(row)[i] : 0;
    for (int64_t place = 0; place < places; ++place) {
      const auto here =
          static_cast<uint64_t>(problem.target.label(row, place)) - static_cast<uint64_t>(problem.spec.first_class);
      const bool is_here = here < static_cast<uint64_t>(classes_);
      search_.label_logit[row * places + place] = is_here ? logit(x, static_cast<int64_t>(here)) : -kInfinity<float>;
    }
    List all{found.lower.get(), found.upper.get(), found.index.get(), 0, 0};
    const int64_t count = negatives_of(row, targets, found.scratch.get(), all) && all.count <= most ? all.count : -1;
    search_.count[row] = static_cast<int32_t>(count);
    int32_t* index = search_.index + row * most;
    float* logits = search_.logit + row * most;
    for (int64_t i = 0; i < most; ++i) {
      index[i] = i < count ? all.index[i] : -1;
      logits[i] = i < count ? logit(x, index[i]) : -kInfinity<float>;
    }
  }

  // What the pieces have found of a row: labels leave, and the rest is cut as if there were one piece. False if a piece
  // has found too many.
  bool negatives_of(int64_t row, TargetReader& targets, float* scratch, List& all) {
    Positives positives;
    targets.read(row, &positives);
    int64_t label = 0;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const List& part = lists_[piece * rows_ + row];
      if (part.count < 0) return false;
      for (int64_t i = 0; i < part.count; ++i) {
        while (label < positives.count && positives.index[label] < part.index[i]) ++label;
        if (label < positives.count && positives.index[label] == part.index[i]) continue;
        all.lower[all.count] = part.lower[i], all.upper[all.count] = part.upper[i];
        all.index[all.count++] = part.index[i];
      }
    }
    const int64_t k = search_.problem.spec.k;
    if (all.count > k) keep_possible(all, k, scratch);
    return true;
  }

  // The logit of class j, summed in double, where the products are exact. x: the row in double, with zeros behind it.
  template <bool cosine>
  float logit(const double* x, int64_t j) const {
    const float* w = weight(j);
    __m512d sum[4], square[4];
    for (int h = 0; h < 4; ++h) sum[h] = square[h] = _mm512_setzero_pd();
    const auto step = [&](int h, int64_t i, __m256 of_class) {
      const __m512d wide = _mm512_cvtps_pd(of_class);
      sum[h] = _mm512_fmadd_pd(_mm512_loadu_pd(x + i), wide, sum[h]);
      if (cosine) square[h] = _mm512_fmadd_pd(wide, wide, square[h]);
    };
    int64_t i = 0;
    for (; i + 32 <= search_.features; i += 32) {
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h) step(h, i + 8 * h, _mm256_loadu_ps(w + i + 8 * h));
    }
    for (; i < search_.features; i += 8) {
      const int64_t left = search_.features - i;
      step(0, i, _mm256_maskz_loadu_ps(static_cast<__mmask8>(left < 8 ? (1 << left) - 1 : 255), w + i));
    }
    const auto total = [](const __m512d(&of)[4]) {
      return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(of[0], of[1]), _mm512_add_pd(of[2], of[3])));
    };
    double z = total(sum);
    if (cosine) {
      const double norm = std::sqrt(total(square));
      z /= norm < search_.least_norm ? search_.least_norm : norm;
    }
    return static_cast<float>(search_.bias == nullptr ? z : z + search_.bias[j * search_.bias_stride]);
  }
  float logit(const double* x, int64_t j) const { return search_.cosine ? logit<true>(x, j) : logit<false>(x, j); }

  const CandidateSearch& search_;
  int64_t rows_, classes_, features_, pairs_, vectors_, enough_, room_, pieces_;
  Buffer<uint32_t> input_;
  Buffer<float> of_residual_, of_norm_;
  Buffer<bool> hopeless_;
  Buffer<List> lists_;
  Buffer<float> numbers_;
  Buffer<int32_t> indices_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
