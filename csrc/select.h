// The k hardest negatives of a row: the k largest logits that are not positives, equal logits in the order of their
// class index. Exact for every input.
//
// 1. block_maxima   one pass over the row keeps the maximum of every block of logits (and looks for NaN);
// 2. find_cut       the w-th largest of those maxima is a proven lower bound of the w-th largest logit, w = k +
// positives;
// 3. collect        a second pass, over a row that is now in cache, keeps what reaches that bound: little more than w
// logits;
// 4. keep_largest   positives leave, and the same search among the few that are left finds the edge exactly.
//
// Logits are compared as floating-point numbers, so +0 = -0. The search works on integers in the same order, so it
// ends.
#pragma once

#include "simd.h"
#include "target.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

#if defined(__GNUC__)
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
#else
inline int count_bits(uint32_t word) {
  int n = 0;
  for (; word != 0; word &= word - 1) ++n;
  return n;
}
#endif

// The n lowest set bits.
inline uint32_t lowest_bits(uint32_t word, int64_t n) {
  if (count_bits(word) <= n) return word;
  uint32_t lowest = 0;
  for (; n > 0; --n, word &= word - 1) lowest |= word & (~word + 1);
  return lowest;
}

// Integers in the order of the numbers of storage type S: neighbours differ by 1, and -0 has the key of +0. Numbers
// that were widened from 16 bits end in zeros, which the key leaves out.
template <class S>
constexpr int kUnusedBits = std::is_same_v<S, BFloat16> ? 16
                            : std::is_same_v<S, Half>   ? 13
                                                        : 0;
template <class S>
using Key = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;

template <class K>
inline K fold_sign(K bits) {
  return bits >= 0 ? bits : bits ^ std::numeric_limits<K>::max();
}
template <class S>
inline Key<S> key_of(Compute<S> value) {
  return fold_sign(bit_cast<Key<S>>(value + 0)) >> kUnusedBits<S>;
}
template <class S>
inline Compute<S> value_of(Key<S> key) {
  constexpr Key<S> unused = (Key<S>(1) << kUnusedBits<S>)-1;
  return bit_cast<Compute<S>>(fold_sign(key * (unused + 1) + (key < 0 ? unused : 0)));
}
// z >= next_above(t) says z > t; next_above(inf) is a NaN, which nothing reaches.
template <class S>
inline Compute<S> next_above(Compute<S> value) {
  return value_of<S>(key_of<S>(value) + 1);
}

// Logits and their class indices, ascending in the index. Both arrays have kRoom elements more than they hold.
constexpr int kRoom = 16;

template <class T>
struct Candidates {
  T* logit;
  int32_t* index;
  int64_t count;
};

// Where to cut some numbers: kept are all that exceed the edge and the first `at_edge` of those that equal it.
template <class T>
struct Cut {
  T edge;
  int64_t at_edge;
  T later;  // a number that comes after the kept ones must reach this to rank among them
};

template <class T, class V = VecOf<T>>
inline int64_t count_reaching(const T* value, int64_t n, T threshold) {
  const V t(threshold);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += V::lanes) count += count_bits(bits(V::load(value + i) >= t));
  return count;
}

template <class T, class V = VecOf<T>>
inline T smallest(const T* value, int64_t n) {
  V least(kInfinity<T>);
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) least = min(least, V::load(value + i));
  if (i < n) least = min(least, load_first<V>(value + i, n - i, kInfinity<T>));
  return -max_lane(V(0) - least);
}

// Cuts n numbers of storage type S, none of them NaN, so that at least w and at most w + slack are kept; n >= w >= 1.
// With slack 0, exactly w.
template <class S, class T = Compute<S>, class V = VecOf<S>>
inline Cut<T> find_cut(T* value, int64_t n, int64_t w, int64_t slack) {
  V largest(-kInfinity<T>), smallest(kInfinity<T>);
  for (int i = 0; i < V::lanes; ++i) value[n + i] = value[n - 1];
  for (int64_t i = 0; i < n; i += V::lanes) {
    largest = max(largest, V::load(value + i));
    smallest = min(smallest, V::load(value + i));
  }
  for (int i = 0; i < V::lanes; ++i) value[n + i] = kNaN<T>;  // reaches no threshold

  // reaching(low) >= w > reaching(high), as counts of numbers that reach the value of the key
  Key<S> low = key_of<S>(-max_lane(V(0) - smallest)), high = key_of<S>(max_lane(largest)) + 1;
  int64_t at_low = n, at_high = 0;
  for (int round = 0; at_low > w + slack && high - 1 > low; ++round) {
    Key<S> middle = low + static_cast<Key<S>>((static_cast<std::make_unsigned_t<Key<S>>>(high) - low) / 2);
    if (round % 2 == 0) {  // what a straight line between the two counts says, if it lies between
      const T from = value_of<S>(low), to = value_of<S>(high - 1);
      const Key<S> guess = key_of<S>(from + (to - from) * (T(at_low - w) / T(at_low - at_high)));
      if (guess > low && guess < high) middle = guess;
    }
    const int64_t reaching = count_reaching(value, n, value_of<S>(middle));
    if (reaching >= w) {
      low = middle, at_low = reaching;
    } else {
      high = middle, at_high = reaching;
    }
  }
  const T edge = value_of<S>(low);
  return at_low <= w + slack ? Cut<T>{edge, n, edge} : Cut<T>{edge, w - at_high, next_above<S>(edge)};
}

// Keeps w of the candidates, in order. Returns Cut::later.
template <class S, class T = Compute<S>, class V = VecOf<S>>
inline T keep_largest(Candidates<T>& candidates, int64_t w) {
  const Cut<T> cut = find_cut<S>(candidates.logit, candidates.count, w, 0);
  const V edge(cut.edge);
  int64_t kept = 0, at_edge = cut.at_edge;
  for (int64_t i = 0; i < candidates.count; i += V::lanes) {  // what find_cut left behind the last one is NaN
    const V z = V::load(candidates.logit + i);
    const uint32_t above = bits(z > edge);
    const uint32_t equal = lowest_bits(bits(z >= edge) & ~above, at_edge);
    at_edge -= count_bits(equal);
    compress(above | equal, z, candidates.logit + kept);
    compress(above | equal, candidates.index + i, candidates.index + kept);
    kept += count_bits(above | equal);
  }
  candidates.count = kept;
  return cut.later;
}

template <class T>
inline void drop_positives(Candidates<T>& candidates, Positives positives) {
  int64_t kept = 0, next = 0;
  const auto keep_until = [&](int64_t end) {
    std::memmove(candidates.logit + kept, candidates.logit + next, (end - next) * sizeof(T));
    std::memmove(candidates.index + kept, candidates.index + next, (end - next) * sizeof(int32_t));
    kept += end - next;
    next = end;
  };
  for (int64_t p = 0; p < positives.count; ++p) {
    int64_t begin = next, end = candidates.count;  // the first candidate in [next, count) not below the positive
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (candidates.index[middle] < positives.index[p]) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    if (begin == candidates.count) break;
    if (candidates.index[begin] != positives.index[p]) continue;
    keep_until(begin);
    ++next;
  }
  keep_until(candidates.count);
  candidates.count = kept;
}

// Writes the maxima of the blocks of row[begin, end), and says whether a NaN was met. A block is `length` vectors long
// and one lane wide, so every group of `length` vectors gives V::lanes maxima; a block with no logits has -inf.
template <class S, class V = VecOf<S>>
inline bool block_maxima(const S* row, int64_t begin, int64_t end, int64_t length, Compute<S>* maxima) {
  const V lowest(-kInfinity<Compute<S>>);
  uint32_t nan = 0;
  for (int64_t i = begin; i < end; maxima += V::lanes) {
    V largest = lowest;
    const int64_t group_end = i + length * V::lanes;
    for (; i + 2 * V::lanes <= (group_end < end ? group_end : end); i += 2 * V::lanes) {
      const V a = V::load(row + i), b = V::load(row + i + V::lanes);
      nan |= bits(unordered(a, b));
      largest = max(largest, max(a, b));
    }
    for (; i < (group_end < end ? group_end : end); i += V::lanes) {
      const V a = i + V::lanes <= end ? V::load(row + i) : load_first<V>(row + i, end - i, -kInfinity<Compute<S>>);
      nan |= bits(unordered(a, a));
      largest = max(largest, a);
    }
    largest.store(maxima);
  }
  return nan != 0;
}

constexpr int64_t kSplit = 32768;  // classes that one thread takes of a row at a time when threads share a row
constexpr int64_t kChunk = 4096;   // classes that collect looks through at a time

// Appends the logits of row[begin, end) that reach the threshold. Once there are well over `enough` of them, keeps the
// `enough` largest and raises the threshold: so ties, or a threshold that says little, cost a bounded amount each.
// Which logits reach it cannot be predicted, so nothing branches on that; `dense` says that most vectors will have
// some.
template <class S, class V = VecOf<S>>
inline void collect(const S* row, int64_t begin, int64_t end, Compute<S> threshold, int64_t enough, bool dense,
                    Candidates<Compute<S>>& candidates) {
  uint16_t reaching[kChunk / V::lanes + kRoom];  // bit i of word v: lane i of vector v
  int32_t chosen[kChunk / V::lanes + kRoom];     // the vectors to look into
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t chunk_end = chunk + kChunk < end ? chunk + kChunk : end;
    const V t(threshold);
    int64_t vectors = 0, i = chunk;
    for (; i + V::lanes <= chunk_end; i += V::lanes) {
      reaching[vectors++] = static_cast<uint16_t>(bits(V::load(row + i) >= t));
    }
    if (i < chunk_end) {
      const uint32_t inside = (1u << (chunk_end - i)) - 1;
      const V z = load_first<V>(row + i, chunk_end - i, -kInfinity<Compute<S>>);
      reaching[vectors++] = static_cast<uint16_t>(bits(z >= t) & inside);
    }
    const auto take = [&](int64_t v) {
      const int64_t at = chunk + v * V::lanes;
      const V z = at + V::lanes <= end ? V::load(row + at) : load_first<V>(row + at, end - at, 0);
      compress(reaching[v], z, candidates.logit + candidates.count);
      compress_numbers(reaching[v], static_cast<int32_t>(at), candidates.index + candidates.count);
      candidates.count += count_bits(reaching[v]);
    };
    if (dense) {
      for (int64_t v = 0; v < vectors; ++v) take(v);
    } else {
      for (int j = 0; j < kRoom; ++j) reaching[vectors + j] = 0;
      int64_t count = 0;
      for (int64_t v = 0; v < vectors; v += 16) {
        const uint32_t some = nonzero(reaching + v);
        compress_numbers(some, static_cast<int32_t>(v), chosen + count);
        count += count_bits(some);
      }
      for (int64_t j = 0; j < count; ++j) take(chosen[j]);
    }
    if (candidates.count > 2 * enough + kChunk) threshold = keep_largest<S>(candidates, enough);
  }
}

// How many candidates `collect` can hold at a time.
inline int64_t collect_capacity(int64_t classes, int64_t enough) {
  const int64_t most = 2 * enough + 2 * kChunk;
  return classes < most ? classes : most;
}

// Finds the hardest negatives of one row after another. One per thread, or one for all threads with select_split.
template <class S>
class Selector {
 public:
  using T = Compute<S>;
  using V = VecOf<S>;

  // split: the pieces of a row will be worked on at the same time.
  Selector(const Problem& problem, bool split)
      : classes_(problem.classes),
        k_(problem.spec.k < classes_ ? problem.spec.k : classes_),
        most_(k_ + (problem.target.multi_hot || problem.target.places > classes_ ? classes_ : problem.target.places)),
        maxima_(classes_ / block_length(most_) + 2 * V::lanes + kRoom),
        logit_(candidate_room(split)),
        index_(candidate_room(split)) {}

  // The hardest negatives of the row; false if it holds a NaN. They live until the next call.
  bool select(const S* row, Positives positives, Candidates<T>* picks) {
    const int64_t enough = k_ + positives.count, length = block_length(enough);
    if (block_maxima(row, 0, classes_, length, maxima_.get())) return false;
    *picks = {logit_.get(), index_.get(), 0};
    collect(row, 0, classes_, bound(enough, length), enough, dense(enough), *picks);
    finish(picks, positives);
    return true;
  }

  // The same, with all threads on the one row.
  bool select_split(const S* row, Positives positives, Candidates<T>* picks) {
    const int64_t enough = k_ + positives.count, length = block_length(enough), group = length * V::lanes;
    const int64_t piece = (kSplit + group - 1) / group * group, pieces = (classes_ + piece - 1) / piece;
    const int64_t room = collect_capacity(piece, enough) + kRoom;
    const auto end_of = [&](int64_t p) { return (p + 1) * piece < classes_ ? (p + 1) * piece : classes_; };

    Buffer<bool> nan(pieces);
    const auto each = [pieces](const auto& body) {
      parallel(pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) body(p);
      });
    };
    each([&](int64_t p) {
      nan[p] = block_maxima(row, p * piece, end_of(p), length, maxima_.get() + p * piece / length);
    });
    for (int64_t p = 0; p < pieces; ++p) {
      if (nan[p]) return false;
    }

    const T threshold = bound(enough, length);
    Buffer<int64_t> counts(pieces);
    each([&](int64_t p) {
      Candidates<T> part{logit_.get() + p * room, index_.get() + p * room, 0};
      collect(row, p * piece, end_of(p), threshold, enough, dense(enough), part);
      counts[p] = part.count;
    });
    *picks = {logit_.get(), index_.get(), 0};
    for (int64_t p = 0; p < pieces; ++p) {
      std::memmove(picks->logit + picks->count, picks->logit + p * room, counts[p] * sizeof(T));
      std::memmove(picks->index + picks->count, picks->index + p * room, counts[p] * sizeof(int32_t));
      picks->count += counts[p];
    }
    finish(picks, positives);
    return true;
  }

 private:
  // Blocks short enough that there are at least two for every logit wanted.
  int64_t block_length(int64_t enough) const {
    const int64_t length = classes_ / (2 * enough);
    return length < 1 ? 1 : length;
  }

  bool dense(int64_t enough) const { return enough > classes_ / 24; }

  // At least `enough` logits reach this.
  T bound(int64_t enough, int64_t length) {
    const int64_t group = length * V::lanes, maxima = (classes_ + group - 1) / group * V::lanes;
    return enough < maxima ? find_cut<S>(maxima_.get(), maxima, enough, enough / 8).edge : -kInfinity<T>;
  }

  void finish(Candidates<T>* picks, Positives positives) const {
    drop_positives(*picks, positives);
    if (picks->count > k_) keep_largest<S>(*picks, k_);
  }

  int64_t candidate_room(bool split) const {
    const int64_t pieces = (classes_ + kSplit - 1) / kSplit;
    return split ? classes_ + pieces * kRoom : collect_capacity(classes_, most_) + kRoom;
  }

  int64_t classes_, k_;
  int64_t most_;  // the most logits ever wanted of a row: k and all positives
  Buffer<T> maxima_, logit_;
  Buffer<int32_t> index_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
