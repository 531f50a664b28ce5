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
// Where w is so large a part of the row that blocks would have a logit or two, 4 has all of it instead.
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

// The ends of the numbers in [low, high), of which there are some. NaN is none of them.
template <class T>
struct Range {
  T smallest, largest;
};

template <class T, class V = VecOf<T>>
inline Range<T> range_within(const T* value, int64_t n, T low, T high) {
  const V from(low), to(high), highest(kInfinity<T>), lowest(-kInfinity<T>);
  V least = highest, most = lowest;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const V z = V::load(value + i);
    least = min(select(z >= from, z, highest), least);
    most = max(select(z >= to, lowest, z), most);
  }
  return {-max_lane(V(0) - least), max_lane(most)};
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
  T too_high = kNaN<T>;  // what at_high numbers reach
  for (int round = 0; at_low > w + slack && high - 1 > low; ++round) {
    Key<S> middle = low + static_cast<Key<S>>((static_cast<std::make_unsigned_t<Key<S>>>(high) - low) / 2);
    if (round % 2 == 0) {  // what a straight line between the two counts says, if it lies between
      const T from = value_of<S>(low), to = value_of<S>(high - 1);
      const Key<S> guess = key_of<S>(from + (to - from) * (T(at_low - w) / T(at_low - at_high)));
      if (guess > low && guess < high) middle = guess;
    }
    const int64_t reaching = count_reaching(value, n, value_of<S>(middle));
    const bool parted = reaching != at_low && reaching != at_high;
    if (reaching >= w) {
      low = middle, at_low = reaching;
    } else {
      high = middle, at_high = reaching, too_high = value_of<S>(middle);
    }
    if (!parted) {  // nothing lies on one side of the middle, and the numbers may lie as far apart as they like
      const Range<T> within = range_within(value, n, value_of<S>(low), too_high);
      // Never outwards: where subnormal numbers count as zero, keys do not order what comparisons find equal.
      const Key<S> smallest_key = key_of<S>(within.smallest), largest_key = key_of<S>(within.largest);
      if (smallest_key > low) low = smallest_key;
      if (largest_key + 1 < high) high = largest_key + 1;
    }
  }
  return {value_of<S>(low), at_low <= w + slack ? n : w - at_high};
}

// find_cut without slack for very many numbers: a sample says between which two the cut must almost surely lie, and
// only what is between them is searched. scratch: room for all of them.
template <class S, class T = Compute<S>, class V = VecOf<S>>
inline Cut<T> find_cut_of_many(T* value, int64_t n, int64_t w, T* scratch) {
  constexpr int64_t every = 8;
  int64_t sampled = 0;
  for (int64_t i = 0; i + V::lanes <= n; i += every * V::lanes, sampled += V::lanes) {
    V::load(value + i).store(scratch + sampled);
  }
  // A rank in the sample strays by at most half the root of its size, as a standard deviation.
  const int64_t rank = w * sampled / n, off = static_cast<int64_t>(1.5 * std::sqrt(static_cast<double>(sampled)));
  const auto edge_at = [&](int64_t least) { return find_cut<S>(scratch, sampled, least, off).edge; };
  const T low = rank + off < sampled ? edge_at(rank + off) : -kInfinity<T>;
  const T high = rank > 2 * off ? edge_at(rank - 2 * off) : kInfinity<T>;

  const V from(low), to(high);
  int64_t above = 0, between = 0;
  for (int i = 0; i < V::lanes; ++i) value[n + i] = kNaN<T>;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const V z = V::load(value + i);
    const uint32_t exceeds = bits(z > to), inside = bits(z >= from) & ~exceeds;
    compress(inside, z, scratch + between);
    above += count_bits(exceeds), between += count_bits(inside);
  }
  if (above < w && w <= above + between) return find_cut<S>(scratch, between, w - above, 0);
  return find_cut<S>(value, n, w, 0);
}

constexpr int64_t kMany = 4096;

// Keeps w of the candidates, in order. Returns the edge, which a later number must exceed to rank among them.
// scratch: room for all of them, or null.
template <class S, class T = Compute<S>, class V = VecOf<S>>
inline T keep_largest(Candidates<T>& candidates, int64_t w, T* scratch = nullptr) {
  const Cut<T> cut = scratch != nullptr && candidates.count >= kMany
                         ? find_cut_of_many<S>(candidates.logit, candidates.count, w, scratch)
                         : find_cut<S>(candidates.logit, candidates.count, w, 0);
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
  return cut.edge;
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

// Raises the maxima of some columns, one beside the other: of each by kRun vectors from `row` on and, for kTwice, as
// many from `stride` elements behind. Says whether a NaN was met.
template <int kRun, bool kTwice, class S, class V = VecOf<S>>
inline bool raise_maxima(const S* row, int64_t stride, int64_t columns, Compute<S>* maxima) {
  constexpr int64_t kAhead = 1024;  // classes: rows come from memory, and the maxima between them hide that from it
  uint32_t nan = 0;
  for (int64_t c = 0; c < columns; ++c, row += kRun * V::lanes, maxima += V::lanes) {
    V largest = V::load(maxima);
    if constexpr (kTwice) {
      for (int v = 0; v < kRun; ++v) {
        const V a = V::load(row + v * V::lanes), b = V::load(row + stride + v * V::lanes);
        nan |= bits(unordered(a, b));
        largest = max(largest, max(a, b));
      }
    } else if constexpr (kRun > 1) {
      for (int v = 0; v < kRun; ++v) prefetch<true>(row + kAhead + v * V::lanes);
      for (int v = 0; v < kRun; v += 2) {
        const V a = V::load(row + v * V::lanes), b = V::load(row + (v + 1) * V::lanes);
        nan |= bits(unordered(a, b));
        largest = max(largest, max(a, b));
      }
    } else {
      const V z = V::load(row);
      nan |= bits(unordered(z, z));
      largest = max(largest, z);
    }
    largest.store(maxima);
  }
  return nan != 0;
}

// Deals the vectors of a row out to columns, in turn and kRun at a time, and raises the maxima of the columns
// [first, last) by theirs. Says whether a NaN was met.
template <int kRun, class S, class V = VecOf<S>>
inline bool deal_out(const S* row, int64_t classes, int64_t columns, int64_t first, int64_t last, Compute<S>* maxima) {
  constexpr int64_t run = kRun * V::lanes;
  const int64_t runs = classes / run, stride = columns * run;
  bool nan = false;
  int64_t begin = 0;
  if constexpr (kRun == 1) {
    for (; runs - begin >= 2 * columns; begin += 2 * columns) {
      nan |= raise_maxima<kRun, true>(row + (begin + first) * run, stride, last - first, maxima + first * V::lanes);
    }
  }
  for (; begin < runs; begin += columns) {
    const int64_t end = runs - begin < last ? runs - begin : last;
    if (end <= first) break;
    nan |= raise_maxima<kRun, false>(row + (begin + first) * run, stride, end - first, maxima + first * V::lanes);
  }
  const int64_t c = runs % columns;
  if (first <= c && c < last) {  // what is left is less than a run
    const V lowest(-kInfinity<Compute<S>>);
    V largest = lowest;
    for (int64_t i = runs * run; i < classes; i += V::lanes) {
      const V z =
          i + V::lanes <= classes ? V::load(row + i) : load_first<V>(row + i, classes - i, -kInfinity<Compute<S>>);
      nan |= bits(unordered(z, z)) != 0;
      largest = max(largest, z);
    }
    max(V::load(maxima + c * V::lanes), largest).store(maxima + c * V::lanes);
  }
  return nan;
}

// Writes the maxima of the blocks in columns [first, last) of a row, and says whether a NaN was met. A block is a lane
// of a column, and so lies all over the row: the largest logits, which often are neighbours, are in as many blocks as
// can be. A block with no logits has -inf.
template <class S, class V = VecOf<S>>
inline bool block_maxima(const S* row, int64_t classes, int64_t columns, int64_t first, int64_t last,
                         Compute<S>* maxima) {
  for (int64_t c = first; c < last; ++c) V(-kInfinity<Compute<S>>).store(maxima + c * V::lanes);
  const int64_t length = classes / (columns * V::lanes);  // neighbours in a block are few beside its length
  if (length >= 16 && columns <= 2) return deal_out<8>(row, classes, columns, first, last, maxima);
  if (length >= 32) return deal_out<4>(row, classes, columns, first, last, maxima);
  if (length >= 8) return deal_out<2>(row, classes, columns, first, last, maxima);
  return deal_out<1>(row, classes, columns, first, last, maxima);
}

// Makes candidates of row[begin, end), and says whether a NaN was met.
template <class S, class V = VecOf<S>>
inline bool take_all(const S* row, int64_t begin, int64_t end, Candidates<Compute<S>> candidates) {
  uint32_t nan = 0;
  for (int64_t i = begin; i < end; i += V::lanes) {
    const V z = i + V::lanes <= end ? V::load(row + i) : load_first<V>(row + i, end - i, -kInfinity<Compute<S>>);
    nan |= bits(unordered(z, z));
    z.store(candidates.logit + i);
    for (int lane = 0; lane < V::lanes; ++lane) candidates.index[i + lane] = static_cast<int32_t>(i + lane);
  }
  return nan != 0;
}

constexpr int64_t kSplit = 32768;  // classes that one thread takes of a row at a time when threads share a row
constexpr int64_t kChunk = 4096;   // classes that collect looks through at a time
constexpr int64_t kFirstChunk = 512;
constexpr int64_t kColumns = 64;  // of block maxima, for each of the threads that share a row

// Appends the chosen ones of the logits z of the classes from `at` on.
template <class V, class T>
FUSED_LOSSES_INLINE void append(uint32_t chosen, V z, int64_t at, Candidates<T>& candidates) {
  compress(chosen, z, candidates.logit + candidates.count);
  compress_numbers(chosen, static_cast<int32_t>(at), candidates.index + candidates.count);
  candidates.count += count_bits(chosen);
}

// What at least `enough` logits of a row reach.
template <class T>
struct Bound {
  T least;
  bool shared;  // by many: most of the row may equal it
};

// Appends the logits of row[begin, end) that reach the bound. Once there are `enough`, another one must exceed it; once
// there are well over so many, keeps the `enough` largest and raises the bound: so ties, or a bound that says little,
// cost a bounded amount each.
// Which logits reach it cannot be predicted, so nothing branches on that; `dense` says that most vectors will have
// some.
template <class S, class V = VecOf<S>>
inline void collect(const S* row, int64_t begin, int64_t end, Bound<Compute<S>> bound, int64_t enough, bool dense,
                    Candidates<Compute<S>>& candidates) {
  uint16_t reaching[kChunk / V::lanes + kRoom];  // bit i of word v: lane i of vector v
  int32_t chosen[kChunk / V::lanes + kRoom];     // the vectors to look into
  bool exceed = false;                           // another one must
  for (int64_t chunk = begin, chunk_end; chunk < end; chunk = chunk_end) {
    chunk_end = chunk + (bound.shared && chunk == begin ? kFirstChunk : kChunk);
    if (chunk_end > end) chunk_end = end;
    const V t(bound.least);
    Candidates<Compute<S>> taken = candidates;  // in registers
    const int64_t whole = (chunk_end - chunk) / V::lanes, rest = chunk + whole * V::lanes;
    const auto rest_of_row = [&] { return load_first<V>(row + rest, chunk_end - rest, -kInfinity<Compute<S>>); };
    const uint32_t in_rest = rest < chunk_end ? bits(rest_of_row() >= t) & ((1u << (chunk_end - rest)) - 1) : 0;
    if (dense) {
      for (int64_t i = chunk; i < rest; i += V::lanes) {
        const V z = V::load(row + i);
        append(bits(z >= t), z, i, taken);
      }
    } else {
      for (int64_t v = 0; v < whole; ++v) {
        reaching[v] = static_cast<uint16_t>(bits(V::load(row + chunk + v * V::lanes) >= t));
      }
      for (int j = 0; j < kRoom; ++j) reaching[whole + j] = 0;
      int64_t count = 0;
      for (int64_t v = 0; v < whole; v += 16) {
        const uint32_t some = nonzero(reaching + v);
        compress_numbers(some, static_cast<int32_t>(v), chosen + count);
        count += count_bits(some);
      }
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = chunk + chosen[j] * V::lanes;
        append(reaching[chosen[j]], V::load(row + at), at, taken);
      }
    }
    if (in_rest != 0) append(in_rest, rest_of_row(), rest, taken);
    candidates.count = taken.count;
    if (candidates.count > 2 * enough + kChunk) {
      bound.least = keep_largest<S>(candidates, enough);
      exceed = false;
    }
    if (!exceed && candidates.count >= enough) {
      bound.least = next_above<S>(bound.least);
      exceed = true;
    }
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
        least_columns_(split             ? kColumns * pieces()
                       : classes_ < 8192 ? 1
                                         : 4),
        maxima_(most_maxima(split)),
        logit_(candidate_room(split)),
        index_(candidate_room(split)) {}

  // The hardest negatives of the row; false if it holds a NaN. They live until the next call.
  bool select(const S* row, Positives positives, Candidates<T>* picks) {
    const int64_t enough = k_ + positives.count, columns = columns_for(enough);
    *picks = {logit_.get(), index_.get(), 0};
    if (columns == 0) {
      if (take_all(row, 0, classes_, *picks)) return false;
      picks->count = classes_;
    } else {
      if (block_maxima(row, classes_, columns, 0, columns, maxima_.get())) return false;
      collect(row, 0, classes_, bound_of(enough, columns), enough, dense(enough), *picks);
    }
    finish(picks, positives);
    return true;
  }

  // The same, with all threads on the one row.
  bool select_split(const S* row, Positives positives, Candidates<T>* picks) {
    const int64_t enough = k_ + positives.count, columns = columns_for(enough);
    const int64_t pieces = this->pieces(), room = kSplit + kRoom;
    const auto end_of = [&](int64_t p) { return (p + 1) * kSplit < classes_ ? (p + 1) * kSplit : classes_; };
    Buffer<bool> nan(pieces);
    const auto any_nan = [&](const auto& body) {  // body(p) of any piece
      parallel(pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) nan[p] = body(p);
      });
      bool any = false;
      for (int64_t p = 0; p < pieces; ++p) any |= nan[p];
      return any;
    };

    *picks = {logit_.get(), index_.get(), 0};
    if (columns == 0) {
      if (any_nan([&](int64_t p) { return take_all(row, p * kSplit, end_of(p), *picks); })) return false;
      picks->count = classes_;
    } else {
      if (any_nan([&](int64_t p) {
            return block_maxima(row, classes_, columns, p * columns / pieces, (p + 1) * columns / pieces,
                                maxima_.get());
          })) {
        return false;
      }
      const Bound<T> bound = bound_of(enough, columns);
      Buffer<int64_t> counts(pieces);
      parallel(pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) {
          Candidates<T> part{logit_.get() + p * room, index_.get() + p * room, 0};
          collect(row, p * kSplit, end_of(p), bound, enough, dense(enough), part);
          counts[p] = part.count;
        }
      });
      for (int64_t p = 0; p < pieces; ++p) {
        std::memmove(picks->logit + picks->count, picks->logit + p * room, counts[p] * sizeof(T));
        std::memmove(picks->index + picks->count, picks->index + p * room, counts[p] * sizeof(int32_t));
        picks->count += counts[p];
      }
    }
    finish(picks, positives);
    return true;
  }

 private:
  // Whether so many are wanted that the maxima of blocks, a logit or two each, would not be worth their time.
  bool takes_all(int64_t enough) const { return 7 * enough > 4 * classes_; }

  // Columns with two blocks for every logit wanted, as far as there are vectors for them; 0 to take all logits.
  int64_t columns_for(int64_t enough) const {
    if (takes_all(enough)) return 0;
    const int64_t vectors = classes_ / V::lanes, two_each = (2 * enough + V::lanes - 1) / V::lanes;
    const int64_t wanted = two_each < least_columns_ ? least_columns_ : two_each;
    return wanted < vectors ? wanted : vectors < 1 ? 1 : vectors;
  }

  bool dense(int64_t enough) const { return enough > classes_ / 12; }

  Bound<T> bound_of(int64_t enough, int64_t columns) {
    const int64_t maxima = columns * V::lanes;
    if (enough > maxima) return {-kInfinity<T>, true};
    const Cut<T> cut = find_cut<S>(maxima_.get(), maxima, enough, enough / 8);
    return {cut.edge, cut.at_edge < maxima};
  }

  void finish(Candidates<T>* picks, Positives positives) {
    drop_positives(*picks, positives);
    if (picks->count > k_) keep_largest<S>(*picks, k_, maxima_.get());
  }

  int64_t pieces() const { return (classes_ + kSplit - 1) / kSplit; }

  int64_t candidate_room(bool split) const {
    if (split) return classes_ + pieces() * kRoom;
    return (takes_all(most_) ? classes_ : collect_capacity(classes_, most_)) + kRoom;
  }

  int64_t most_maxima(bool split) const {
    const int64_t maxima = columns_for(takes_all(most_) ? 4 * classes_ / 7 : most_) * V::lanes + kRoom;
    const int64_t candidates = candidate_room(split);  // for which they leave their room
    return maxima > candidates ? maxima : candidates;
  }

  int64_t classes_, k_;
  int64_t most_;  // the most logits ever wanted of a row: k and all positives
  int64_t least_columns_;
  Buffer<T> maxima_, logit_;
  Buffer<int32_t> index_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
