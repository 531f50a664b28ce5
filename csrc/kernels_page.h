// All kernels of one instruction set. Included once by each isa_*.cpp, which names the namespace (FUSED_LOSSES_ISA) and
// the vectors to use; from there on every function is compiled for that instruction set.
#include "finish_labels.h"
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

static void forward(DType dtype, Forward& door) {
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    if (door.problem.spec.family == Family::softmax) {
      const auto walk = [&](auto family) { ForwardWalk<S, decltype(family)>(door, family).run(); };
      if (door.problem.spec.label_smoothing == 0) return walk(SoftmaxForward<S, false>(door));
      return walk(SoftmaxForward<S, true>(door));
    }
    with_phi<VecOf<S>>(door.problem.spec, [&](auto phi) {
      using Walked = LogisticForward<S, decltype(phi)>;
      ForwardWalk<S, Walked>(door, Walked(door, phi)).run();
    });
  });
}

static void backward(DType dtype, Backward& door) {
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    if (door.problem.spec.family == Family::softmax) {
      return BackwardWalk<S, SoftmaxBackward<S>>(door, SoftmaxBackward<S>(door)).run();
    }
    with_phi<VecOf<S>>(door.problem.spec, [&](auto phi) {
      using Walked = LogisticBackward<S, decltype(phi)>;
      BackwardWalk<S, Walked>(door, Walked(door, phi)).run();
    });
  });
}

template <class T>
inline void finish_in(const Finish& door) {
  using V = VecOf<T>;
  if (door.target.multi_hot) return finish_rows<T>(door, MultiHotRows<V>(door));
  if (door.target.labels || door.spec.margin.present) {
    const RowTable<const T> statistics(static_cast<const T*>(door.statistics), door.target.statistics_columns(),
                                       door.target.places);
    if (door.spec.family == Family::logistic) return finish_rows<T>(door, LogisticLabelRows<V>(door, statistics));
    return with_loss<V>(door.spec, [&](auto loss) {
      finish_rows<T>(door, SoftmaxLabelRows<V, decltype(loss)>(door, statistics, loss));
    });
  }
  if (door.spec.family == Family::logistic) return finish_rows<T>(door, LogisticRows<V>(door));
  with_loss<V>(door.spec, [&](auto loss) { finish_rows<T>(door, SoftmaxRows<V, decltype(loss)>(door, loss)); });
}

static void finish(DType dtype, const Finish& door) {
  dtype == DType::float64 ? finish_in<double>(door) : finish_in<float>(door);
}

template <class T>
inline void elementary_in(const char* name, const T* x, T* y, int64_t n) {
  using V = VecOf<T>;
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const auto map = [&](const auto& f) {
    for (int64_t i = 0; i < n; i += V::lanes) {
      const int64_t part = n - i < V::lanes ? n - i : V::lanes;
      store_first(y + i, f(load_first<V>(x + i, part, 0)), part);
    }
  };
  if (is("exp")) map([](V v) { return exp(v); });
  if (is("log1p")) map([](V v) { return log1p(v); });
  if (is("log1p_of_product")) map([](V v) { return log1p_of_product(v); });
  if constexpr (std::is_same_v<T, float>) {
    if (is("exp_nonpositive_16")) map([](V v) { return exp_nonpositive_16(v); });
    if (is("log1p_16")) map([](V v) { return log1p_16(v); });
  }
}

static void elementary(DType dtype, const char* name, const void* x, void* y, int64_t n) {
  dtype == DType::float64 ? elementary_in(name, static_cast<const double*>(x), static_cast<double*>(y), n)
                          : elementary_in(name, static_cast<const float*>(x), static_cast<float*>(y), n);
}

static constexpr Kernels kernels{kFormulas, kNumFormulas, forward, finish, backward, elementary};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
