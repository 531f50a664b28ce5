// What the doors (ops.cpp) and the kernels (one copy per instruction set) say to each other: plain structs of pointers,
// sizes and strides, and a table of functions. Nothing here depends on torch.
#pragma once

// All that the kernels take from the standard library. These headers must be read before an isa_*.cpp asks the compiler
// for an instruction set: what they hold is compiled for every machine.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "sums.h"

// For what must not become a call: vectors and sums have to stay in registers. (A call passes the two registers of an
// AVX2 vector through memory, at five times the cost of exp itself.)
#if defined(__GNUC__)
#define FUSED_LOSSES_INLINE inline __attribute__((always_inline))
#define FUSED_LOSSES_NOINLINE __attribute__((noinline))
#else
#define FUSED_LOSSES_INLINE inline
#define FUSED_LOSSES_NOINLINE
#endif

namespace fused_losses {

enum class DType : int { float32, bfloat16, float16, float64 };

enum class Family : int { softmax, logistic };
enum class Reduction : int { none, sum, mean };

// A row of the table of losses, which stands at the foot of formulas.h.
struct Formula {
  const char* name;
  Family family;
  int num_params;
};

constexpr int kMostParams = 2;

// What psi is made of: fused_losses/margin.py, MarginTerms.
struct Margin {
  bool present;
  double cos, sin, cosine, beyond, scale, offset;
};

// What is done with a row: fused_losses/losses.py, LossSpec.
struct Spec {
  int formula;  // its row in the table
  Family family;
  double params[kMostParams];
  bool takes_means;  // alpha is given
  double alpha;
  int64_t k;     // 0: all negatives; else the k hardest
  bool ignores;  // ignore_index is given
  int64_t ignore_index;
  int64_t first_class, all_classes;
  bool compact;
  bool labels;  // the target is a list of labels for each row
  double label_smoothing;
  Margin margin;

  int64_t slots() const { return k == 0 ? 0 : compact ? k : 1; }  // picks that are kept of a row
};

// The entries of a multi-hot target, of whatever dtype: their bytes, the bits of 1, and the bits that are 0 in a zero.
struct Entries {
  int bytes;
  uint64_t one, magnitude;
};

// (rows,) int64 class indices; or (rows, places) lists of them, each ascending, with -1 in the places behind its last;
// or (rows, classes) multi-hot of any dtype. An index counts the classes of all shards.
struct Target {
  const void* data;
  int64_t stride;  // from row to row
  bool multi_hot, labels;
  Entries entries;
  int64_t places, place_stride;  // of a list; 1 and 0 otherwise

  int64_t label(int64_t row, int64_t place = 0) const {
    return static_cast<const int64_t*>(data)[row * stride + place * place_stride];
  }
  int64_t most_positives(int64_t classes) const { return multi_hot ? classes : places; }  // of a row
  int64_t statistics_columns() const { return multi_hot ? 4 : labels ? 3 + places : 3; }
  int64_t coefficients_columns() const { return labels ? 2 + places : 2; }
  bool ignored(int64_t row, const Spec& spec) const {
    return !multi_hot && spec.ignores && label(row) == spec.ignore_index;
  }
};

// What is kept of a row, and what its gradient is made of, in the compute dtype: float64 for float64 logits, float32
// for all others. The numbers are explained in fused_losses/finish.py. Lists of labels have one number more of the row
// as a whole, for label smoothing, in front of those of the labels: rows.h.
template <class T>
struct SoftmaxStatistics {
  T max, log_sum, target;
};
template <class T>
struct LogisticStatistics {
  T max, negatives, target;
};
template <class T>
struct MultiHotStatistics {
  T max, negatives, positives, num_positives;
};

struct Problem {
  // logits (rows, classes); row i starts at logits + i * logits_stride elements. Null only in a backward that needs
  // none. They are the classes [spec.first_class, spec.first_class + classes): the target of a row may be elsewhere.
  const void* logits;
  int64_t logits_stride;
  int64_t rows, classes;
  Target target;
  Spec spec;
};

// picks: compact (rows, k), every picked negative; threshold (rows, 1), the last one taken; all negatives (rows, 0).
struct Forward {
  Problem problem;
  void* statistics;     // (rows, target.statistics_columns())
  int32_t* pick_index;  // -1 in an empty slot
  void* pick_logit;     // dtype of the logits; -inf in an empty slot
  // Out: the first multi-hot entry that is neither 0 nor 1, as row * classes + class; the results are void then.
  std::atomic<int64_t> bad_entry{INT64_MAX};
};

struct Finish {
  int64_t rows;
  const void* statistics;  // (rows, target.statistics_columns())
  Target target;
  const void* weight;     // of the classes, (all classes,), or of lists of labels, (rows, places); or null
  int64_t weight_stride;  // from class to class, from row to row; labels lie side by side
  Reduction reduction;
  Spec spec;
  void* loss;          // (rows,) without a reduction, else one number
  void* coefficients;  // (rows, target.coefficients_columns())

  template <class T>
  T weight_of_label(int64_t row, int64_t place) const {
    if (weight == nullptr || !target.labels) return 1;
    return static_cast<const T*>(weight)[row * weight_stride + place];
  }
  // |S| of a row with so many positives
  int64_t chosen_negatives(int64_t positives) const {
    const int64_t negatives = spec.all_classes - positives;
    return spec.k > 0 && spec.k < negatives ? spec.k : negatives;
  }
};

struct Backward {
  Problem problem;
  const void* grad;  // (rows,); one number for all of them has stride 0
  int64_t grad_stride;
  const void* coefficients;  // (rows, target.coefficients_columns())
  const void* statistics;    // (rows, target.statistics_columns())
  const int32_t* pick_index;
  const void* pick_logit;
  void* dlogits;  // (rows, classes), dtype of the logits; memory of its own, or the logits themselves, written over
  int64_t dlogits_stride;
  // Out: the first row with a pick that is neither a class nor an empty slot; the result is void then.
  std::atomic<int64_t> bad_row{INT64_MAX};
};

struct Kernels {
  const Formula* formulas;
  int num_formulas;
  void (*forward)(DType, Forward&);
  void (*finish)(DType, const Finish&);
  void (*backward)(DType, Backward&);
  // "exp", "log1p" and "log1p_of_product" of float32 or float64, "exp_nonpositive_16" and "log1p_16" of float32, for
  // the tests
  void (*elementary)(DType, const char* name, const void* x, void* y, int64_t n);
};

// The classes of a linear layer that may be among the k hardest negatives of a row, each with its exact logit. What is
// proven of them: fused_losses/linear_certified.py. Features are contiguous.
struct CandidateSearch {
  Problem problem;     // without logits; the target is class indices or lists of labels
  const float* input;  // (rows, features)
  int64_t input_stride;
  const float* weight;  // (classes, features)
  int64_t weight_stride;
  int64_t features;
  const float* bias;    // or null
  int64_t bias_stride;  // from class to class; one bias of all has stride 0
  bool cosine;          // input (weight / |weight|)^T, where |weight| is at least least_norm
  double least_norm;
  double share_of_bound;  // 1; less only where a test is to see that it would be wrong
  int64_t most;           // candidates that are kept of a row
  int32_t* count;         // (rows,): how many there are; -1 for a row of which nothing could be proven
  int32_t* index;         // (rows, most), ascending, among the classes at hand; -1 in an empty slot
  float* logit;           // (rows, most), -inf in an empty slot
  float* label_logit;     // (rows, places), -inf for a label that is not among the classes at hand
};

constexpr int64_t kMostFeatures = 1 << 18;  // of a layer that candidates are searched in

// What AVX-512 BF16 adds to the kernels for AVX-512.
struct KernelsOfBFloat16 {
  void (*backward)(Backward&);  // of bfloat16 logits: to round a gradient is one instruction, not six
  void (*search)(const CandidateSearch&);
};

// The instruction sets, each one translation unit; null where the compiler cannot build it.
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_baseline;
extern const KernelsOfBFloat16* const kernels_avx512bf16;

// body(context, begin, end) over pieces of [0, n) of at least `grain` items, on torch's threads. Defined in ops.cpp, so
// that the kernels instantiate no foreign template: the linker keeps one copy of those, and it must run on every
// machine.
void parallel_for(int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t));
uint32_t num_threads();

}  // namespace fused_losses
