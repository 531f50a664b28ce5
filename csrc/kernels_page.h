// All kernels of one instruction set. Included once by each isa_*.cpp, which names the namespace (FUSED_LOSSES_ISA) and
// the vectors to use; from there on every function is compiled for that instruction set.
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

template <class V, class F>
inline void with_loss(SoftmaxLoss loss, const double* params, const F& f) {
  switch (loss) {
    case SoftmaxLoss::cross_entropy: return f(CrossEntropy<V>(params));
    case SoftmaxLoss::nllr: return f(NLLR<V>(params));
    default: return f(CRL<V>(params));
  }
}

template <class V, class F>
inline void with_phi(LogisticLoss loss, const double* params, const F& f) {
  if (loss == LogisticLoss::lr || params[0] == 0) return f(Logistic<V>(params));
  if (params[0] == 1) return f(SoftSelection<V, 1>(params));
  if (params[0] == 2) return f(SoftSelection<V, 2>(params));
  return f(SoftSelection<V, 0>(params));
}

static void softmax_forward(SoftmaxLoss which, DType dtype, Forward& door) {
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    with_loss<VecOf<S>>(which, door.problem.params, [&](auto loss) {
      using Family = SoftmaxForward<S, decltype(loss)>;
      ForwardWalk<S, Family>(door, Family(door, loss)).run();
    });
  });
}

static void softmax_backward(SoftmaxLoss which, DType dtype, Backward& door) {
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    with_loss<VecOf<S>>(which, door.problem.params, [&](auto loss) {
      using Family = SoftmaxBackward<S, decltype(loss)>;
      BackwardWalk<S, Family>(door, Family(door, loss)).run();
    });
  });
}

static void logistic_forward(LogisticLoss which, DType dtype, Forward& door) {
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    with_phi<VecOf<S>>(which, door.problem.params, [&](auto phi) {
      using Family = LogisticForward<S, decltype(phi)>;
      ForwardWalk<S, Family>(door, Family(door, phi)).run();
    });
  });
}

static void logistic_backward(LogisticLoss which, DType dtype, Backward& door) {
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    with_phi<VecOf<S>>(which, door.problem.params, [&](auto phi) {
      using Family = LogisticBackward<S, decltype(phi)>;
      BackwardWalk<S, Family>(door, Family(door, phi)).run();
    });
  });
}

static void elementary(const char* name, const float* x, float* y, int64_t n) {
  const bool is_exp = std::strcmp(name, "exp") == 0;
  for (int64_t i = 0; i < n; i += FloatVec::lanes) {
    const int64_t part = n - i < FloatVec::lanes ? n - i : FloatVec::lanes;
    const FloatVec v = load_first<FloatVec>(x + i, part, 0.0f);
    store_first(y + i, is_exp ? exp(v) : log1p(v), part);
  }
}

static constexpr Kernels kernels{softmax_forward, softmax_backward, logistic_forward, logistic_backward, elementary};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
