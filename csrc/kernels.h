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
#else
#define FUSED_LOSSES_INLINE inline
#endif

namespace fused_losses {

enum class DType : int { float32, bfloat16, float16, float64, int64, int32, int16, int8, uint8, boolean };

enum class SoftmaxLoss : int { cross_entropy, nllr, crl };
enum class LogisticLoss : int { lr, ss_lr };

struct Problem {
  // logits (rows, classes); row i starts at logits + i * logits_stride elements. Null only in a backward that needs
  // none.
  const void* logits;
  int64_t logits_stride;
  int64_t rows, classes;

  // target (rows,) int64 class indices, or (rows, classes) multi-hot of any dtype. An index names one of all_classes,
  // of which the logits hold [first_class, first_class + classes): the positive of a row may be elsewhere.
  const void* target;
  int64_t target_stride;
  DType target_dtype;
  bool multi_hot;
  int64_t ignore_index;
  int64_t first_class, all_classes;

  const double* params;  // the hyper-parameters of the loss, in the order of its signature
  int64_t k;             // 0: all negatives; else the k hardest
  bool compact;
};

// state: softmax (rows, 3) = max, log-sum, target logit; logistic (rows, 2) = target logit, number of positives.
// picks: compact (rows, k), every picked negative; threshold (rows, 1), the last one taken; all negatives (rows, 0).
// "compute dtype" is float64 for float64 logits and float32 for all others.
struct Forward {
  Problem problem;
  void* result;         // compute dtype: softmax value (rows,), logistic sums (rows, 2)
  void* state;          // compute dtype
  int32_t* pick_index;  // -1 in an empty slot
  void* pick_logit;     // dtype of the logits; -inf in an empty slot
  // Out: the first multi-hot entry that is neither 0 nor 1, as row * classes + class; the results are void then.
  std::atomic<int64_t> bad_entry{INT64_MAX};
};

struct Backward {
  Problem problem;
  const void* grad;  // compute dtype: softmax (rows,), logistic (rows, 2)
  int64_t grad_row_stride, grad_column_stride;
  const void* state;
  const int32_t* pick_index;
  const void* pick_logit;
  void* dlogits;  // (rows, classes), contiguous, dtype of the logits
};

struct Kernels {
  void (*softmax_forward)(SoftmaxLoss, DType, Forward&);
  void (*softmax_backward)(SoftmaxLoss, DType, const Backward&);
  void (*logistic_forward)(LogisticLoss, DType, Forward&);
  void (*logistic_backward)(LogisticLoss, DType, const Backward&);
  void (*elementary)(const char* name, const float* x, float* y, int64_t n);  // "exp" and "log1p", for the tests
};

// The instruction sets. Each is one translation unit that includes kernels_page.h; null where the compiler cannot build
// it.
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_baseline;

// body(context, begin, end) over pieces of [0, n) of at least `grain` items, on torch's threads. Defined in ops.cpp, so
// that the kernels instantiate no foreign template: the linker keeps one copy of those, and it must run on every
// machine.
void parallel_for(int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t));
uint32_t num_threads();

}  // namespace fused_losses
