// The k hardest negatives of a row: the k largest logits that are not positives, equal logits in the order of their class
// index. Exact for every input.
//
// 1. block_maxima   one pass over the row keeps the maximum of every block of logits (and looks for NaN);
// 2. find_cut       the w-th largest of those maxima is a proven lower bound of the w-th largest logit, w = k + positives;
// 3. collect        a second pass, over a row that is now in cache, keeps what reaches that bound: little more than w logits;
// 4. keep_largest   positives leave, and the same search among the few that are left finds the edge exactly.
//
// Logits are compared as floating-point numbers, so +0 = -0. The search works on integers in the same order, so it ends.
#pragma once

#include "simd.h"
#include "target.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

#if defined(__GNUC__)
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
inline int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
#else
inline int count_bits(uint32_t word) {
  int n = 0;
  for (; word != 0; word &= word - 1) ++n;
  return n;
}
inline int lowest_bit(uint64_t word) {
  int n = 0;
  for (; (word & 1) == 0; word >>= 1) ++n;
  return n;
}
#endif

// Integers in the order of the numbers: neighbours differ by 1, and -0 has the key of +0.
template <class T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class K>
inline K fold_sign(K bits) {
  return bits >= 0 ? bits : bits ^ std::numeric_limits<K>::max();
}
template <class T>
inline Key<T> key_of(T value) {
  return fold_sign(bit_cast<Key<T>>(value + T(0)));
}
template <class T>
inline T value_of(Key<T> key) {
  return bit_cast<T>(fold_sign(key));
}
// z >= next_above(t) says z > t; next_above(inf) is a NaN, which nothing reaches.
template <class T>
inline T next_above(T value) {
  return value_of<T>(key_of(value) + 1);
}

// Logits and their class indices, ascending in the index. Arrays have room for a vector more than they hold.
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

// Cuts n numbers, none of them NaN, so that at least w and at most w + slack are kept; n >= w >= 1. With slack 0, exactly w.
template <class T, class V = VecOf<T>>
inline Cut<T> find_cut(T* value, int64_t n, int64_t w, int64_t slack) {
  V largest(-kInfinity<T>), smallest(kInfinity<T>);
  for (int i = 0; i < V::lanes; ++i) value[n + i] = value[n - 1];
  for (int64_t i = 0; i < n; i += V::lanes) {
    largest = max(largest, V::load(value + i));
    smallest = min(smallest, V::load(value + i));
  }
  for (int i = 0; i < V::lanes; ++i) value[n + i] = kNaN<T>;  // reaches no threshold

  // reaching(low) >= w > reaching(high), as counts of numbers that reach the value of the key
  Key<T> low = key_of(-max_lane(V(0) - smallest)), high = key_of(max_lane(largest)) + 1;
  int64_t at_low = n, at_high = 0;
  for (int round = 0; at_low > w + slack && high - 1 > low; ++round) {
    Key<T> middle = low + static_cast<Key<T>>((static_cast<std::make_unsigned_t<Key<T>>>(high) - low) / 2);
    if (round % 2 == 0) {  // what a straight line between the two counts says, if it lies between
      const T from = value_of<T>(low), to = value_of<T>(high - 1);
      const Key<T> guess = key_of(from + (to - from) * (T(at_low - w) / T(at_low - at_high)));
      if (guess > low && guess < high) middle = guess;
    }
    const int64_t reaching = count_reaching(value, n, value_of<T>(middle));
    if (reaching >= w) {
      low = middle, at_low = reaching;
    } else {
      high = middle, at_high = reaching;
    }
  }
  const T edge = value_of<T>(low);
  return at_low <= w + slack ? Cut<T>{edge, n, edge} : Cut<T>{edge, w - at_high, next_above(edge)};
}

// Keeps w of the candidates, in order. Returns Cut::later.
template <class T>
inline T keep_largest(Candidates<T>& candidates, int64_t w) {
  const Cut<T> cut = find_cut(candidates.logit, candidates.count, w, 0);
  int64_t kept = 0, at_edge = 0;
  for (int64_t i = 0; i < candidates.count; ++i) {
    const T z = candidates.logit[i];
    candidates.logit[kept] = z;
    candidates.index[kept] = candidates.index[i];
    kept += (z > cut.edge) | ((z == cut.edge) & (at_edge < cut.at_edge));
    at_edge += z == cut.edge;
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

// Writes the maxima of the blocks of row[begin, end), and says whether a NaN was met. A block is `length` vectors long and
// one lane wide, so every group of `length` vectors gives V::lanes maxima; a block with no logits has -inf.
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

constexpr int64_t kCollectChunk = 1024;
constexpr int64_t kSplit = 32768;  // classes that one thread takes of a row at a time when threads share a row

// Appends the logits of row[begin, end) that reach the threshold. Once there are well over `enough` of them, keeps the
// `enough` largest and raises the threshold: so ties, or a threshold that says little, cost a bounded amount each.
template <class S, class V = VecOf<S>>
inline void collect(const S* row, int64_t begin, int64_t end, Compute<S> threshold, int64_t enough,
                    Candidates<Compute<S>>& candidates) {
  constexpr int kWord = 64;
  uint64_t words[kCollectChunk / kWord];
  for (int64_t chunk = begin; chunk < end; chunk += kCollectChunk) {
    const int64_t chunk_end = chunk + kCollectChunk < end ? chunk + kCollectChunk : end;
    const V t(threshold);
    int64_t i = chunk, word = 0;
    for (; i + kWord <= chunk_end; i += kWord, ++word) {
      uint64_t reaching = 0;
      for (int j = 0; j < kWord; j += V::lanes) {
        reaching |= static_cast<uint64_t>(bits(V::load(row + i + j) >= t)) << j;
      }
      words[word] = reaching;
    }
    if (i < chunk_end) {
      words[word] = 0;
      for (int j = 0; i + j < chunk_end; ++j) {
        words[word] |= static_cast<uint64_t>(to_compute(row[i + j]) >= threshold) << j;
      }
      ++word;
    }
    for (int64_t w = 0; w < word; ++w) {
      for (uint64_t rest = words[w]; rest != 0; rest &= rest - 1) {
        const int64_t at = chunk + w * kWord + lowest_bit(rest);
        candidates.logit[candidates.count] = to_compute(row[at]);
        candidates.index[candidates.count++] = static_cast<int32_t>(at);
      }
    }
    if (candidates.count > 2 * enough + kCollectChunk) threshold = keep_largest(candidates, enough);
  }
}

// How many candidates `collect` can hold at a time.
inline int64_t collect_capacity(int64_t classes, int64_t enough) {
  const int64_t most = 2 * enough + 2 * kCollectChunk;
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
        k_(problem.k < classes_ ? problem.k : classes_),
        most_(k_ + (problem.multi_hot ? classes_ : 1)),
        maxima_(classes_ / block_length(most_) + 3 * V::lanes),
        logit_(candidate_room(split)),
        index_(candidate_room(split)) {}

  // The hardest negatives of the row; false if it holds a NaN. They live until the next call.
  bool select(const S* row, Positives positives, Candidates<T>* picks) {
    const int64_t enough = k_ + positives.count, length = block_length(enough);
    if (block_maxima(row, 0, classes_, length, maxima_.get())) return false;
    *picks = {logit_.get(), index_.get(), 0};
    collect(row, 0, classes_, bound(enough, length), enough, *picks);
    finish(picks, positives);
    return true;
  }

  // The same, with all threads on the one row.
  bool select_split(const S* row, Positives positives, Candidates<T>* picks) {
    const int64_t enough = k_ + positives.count, length = block_length(enough), group = length * V::lanes;
    const int64_t piece = (kSplit + group - 1) / group * group, pieces = (classes_ + piece - 1) / piece;
    const int64_t room = collect_capacity(piece, enough) + V::lanes;
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
      collect(row, p * piece, end_of(p), threshold, enough, part);
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

  // At least `enough` logits reach this.
  T bound(int64_t enough, int64_t length) {
    const int64_t group = length * V::lanes, maxima = (classes_ + group - 1) / group * V::lanes;
    return enough < maxima ? find_cut(maxima_.get(), maxima, enough, enough / 8).edge : -kInfinity<T>;
  }

  void finish(Candidates<T>* picks, Positives positives) const {
    drop_positives(*picks, positives);
    if (picks->count > k_) keep_largest(*picks, k_);
  }

  int64_t candidate_room(bool split) const {
    const int64_t pieces = (classes_ + kSplit - 1) / kSplit;
    return split ? classes_ + pieces * V::lanes : collect_capacity(classes_, most_) + V::lanes;
  }

  int64_t classes_, k_;
  int64_t most_;  // the most logits ever wanted of a row: k and all positives
  Buffer<T> maxima_, logit_;
  Buffer<int32_t> index_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
