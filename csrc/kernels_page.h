// All kernels of one instruction set. Included once by each isa_*.cpp, which names the namespace (FUSED_LOSSES_ISA) and
// the vectors to use; from there on every function is compiled for that instruction set.
#include "dispatch.h"
#include "finish_labels.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

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
  with_storage(dtype, [&](auto storage) { backward_stored_as<decltype(storage)>(door); });
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
