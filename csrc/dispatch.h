// From what a call says of its losses and dtypes to the types of the kernels.
#pragma once

#include "formulas.h"
#include "kernels.h"
#include "logistic.h"
#include "softmax.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// f(S()) for the storage type S of the dtype.
template <class F>
inline void with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(float());
    case DType::bfloat16: return f(BFloat16());
    case DType::float16: return f(Half());
    default: return f(double());
  }
}

constexpr int row_of(const char* name) {
  for (int row = 0; row < kNumFormulas; ++row) {
    const char *a = kFormulas[row].name, *b = name;
    while (*a != 0 && *a == *b) ++a, ++b;
    if (*a == *b) return row;
  }
  return -1;
}

// f(loss) for a loss of the softmax family.
template <class V, class F>
inline void with_loss(const Spec& spec, const F& f) {
  switch (spec.formula) {
    case row_of("log_odds"): return f(LogOdds<V>(spec.params));
    case row_of("cross_entropy"): return f(CrossEntropy<V>(spec.params));
    case row_of("nllr"): return f(NLLR<V>(spec.params));
    case row_of("crl"): return f(CRL<V>(spec.params));
  }
}

// f(phi) for a loss of the logistic family.
template <class V, class F>
inline void with_phi(const Spec& spec, const F& f) {
  const double gamma = spec.formula == row_of("ss_lr") ? spec.params[0] : 0;
  if (gamma == 0) return f(Logistic<V>(spec.params));
  if (gamma == 1) return f(SoftSelection<V, 1>(spec.params));
  if (gamma == 2) return f(SoftSelection<V, 2>(spec.params));
  return f(SoftSelection<V, 0>(spec.params));
}

template <class S>
inline void backward_stored_as(Backward& door) {
  if (door.problem.spec.family == Family::softmax) {
    return BackwardWalk<S, SoftmaxBackward<S>>(door, SoftmaxBackward<S>(door)).run();
  }
  with_phi<VecOf<S>>(door.problem.spec, [&](auto phi) {
    using Walked = LogisticBackward<S, decltype(phi)>;
    BackwardWalk<S, Walked>(door, Walked(door, phi)).run();
  });
}

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
