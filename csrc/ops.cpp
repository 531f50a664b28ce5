// The doors of the CPU backend: arguments are checked, outputs allocated, and the kernels of the best instruction set
// called.
//
// The schema stands in fused_losses/ops.py; what the arguments mean, in fused_losses/reference.py. Built against the
// LibTorch stable ABI: one shared object serves every torch from 2.10 on.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace fused_losses {

void parallel_for(int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

uint32_t num_threads() { return torch::stable::get_num_threads(); }

namespace {

// ------------------------------------------------------------------------------------------------- instruction sets

bool runs_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
  return false;
#endif
}

bool runs_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool runs_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

struct InstructionSet {
  std::string_view name;
  const Kernels* kernels;
  const KernelsOfBFloat16* of_bfloat16;  // or null

  void backward(DType dtype, Backward& door) const {
    const bool apart = of_bfloat16 != nullptr && dtype == DType::bfloat16;
    apart ? of_bfloat16->backward(door) : kernels->backward(dtype, door);
  }
};

// Those that this machine and this build have, the best first.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
  const auto add = [&](std::string_view name, const Kernels* kernels, const KernelsOfBFloat16* of_bfloat16 = nullptr) {
    if (kernels != nullptr) sets.push_back({name, kernels, of_bfloat16});
  };
  if (runs_avx512_bf16() && kernels_avx512bf16 != nullptr) add("avx512bf16", kernels_avx512, kernels_avx512bf16);
  if (runs_avx512()) add("avx512", kernels_avx512);
  if (runs_avx2()) add("avx2", kernels_avx2);
  add("baseline", kernels_baseline);
  return sets;
}

InstructionSet& chosen() {
  static InstructionSet set = instruction_sets().front();
  return set;
}

// ------------------------------------------------------------------------------------------------------------ doors

using FinishResult = std::tuple<Tensor, Tensor>;
using StatisticsResult = std::tuple<Tensor, Tensor, Tensor>;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of the classes, (all classes,), or of the labels, (rows, P) with labels side by side: a copy if need be.
std::optional<Tensor> read_weight(const std::optional<Tensor>& weight, const Tensor& target, DType compute,
                                  const Spec& spec) {
  if (!weight.has_value()) return std::nullopt;
  check(!is_multi_hot(target, spec), "weight works with class indices and labels only");
  check_tensor(*weight, spec.labels ? 2 : 1, "weight");
  const bool fits = spec.labels ? weight->size(0) == target.size(0) && weight->size(1) == target.size(1)
                                : weight->size(0) == spec.all_classes;
  check(fits && dtype_of(*weight, "weight") == compute,
        "weight must be (all classes,), or (rows, P) with labels, of the compute dtype");
  return spec.labels ? with_contiguous_rows(*weight) : *weight;
}

// statistics: contiguous
FinishResult finish_rows(const Tensor& statistics, const Target& target, const std::optional<Tensor>& weight,
                         Reduction reduction, const Spec& spec) {
  check(!spec.margin.present || !target.multi_hot, "a margin works with class indices and labels only");
  const DType compute = dtype_of(statistics, "statistics");
  Finish door{};
  door.rows = statistics.size(0);
  door.statistics = statistics.const_data_ptr();
  door.target = target;
  if (weight.has_value()) {
    door.weight = weight->const_data_ptr();
    door.weight_stride = weight->stride(0);
  }
  door.reduction = reduction;
  door.spec = spec;
  Tensor loss =
      reduction == Reduction::none ? empty({door.rows}, torch_dtype(compute)) : empty({}, torch_dtype(compute));
  Tensor coefficients = empty({door.rows, target.coefficients_columns()}, torch_dtype(compute));
  door.loss = loss.mutable_data_ptr();
  door.coefficients = coefficients.mutable_data_ptr();
  chosen().kernels->finish(compute, door);
  return {std::move(loss), std::move(coefficients)};
}

// What the walk of a forward door sees of the problem.
StatisticsResult see(const Problem& problem, DType dtype) {
  Forward door{problem};
  const int64_t rows = problem.rows, classes = problem.classes, slots = problem.spec.slots();
  Tensor statistics = empty({rows, problem.target.statistics_columns()}, torch_dtype(compute_dtype(dtype)));
  Tensor pick_index = empty({rows, slots}, aoti_torch_dtype_int32());
  Tensor pick_logit = empty({rows, slots}, torch_dtype(dtype));
  door.statistics = statistics.mutable_data_ptr();
  door.pick_index = static_cast<int32_t*>(pick_index.mutable_data_ptr());
  door.pick_logit = pick_logit.mutable_data_ptr();
  chosen().kernels->forward(dtype, door);

  if (const int64_t entry = door.bad_entry; entry != INT64_MAX) {
    refuse("multi-hot targets must be 0 or 1, which row " + std::to_string(entry / classes) + ", class " +
           std::to_string(entry % classes) + " is not; soft targets are Labels with weights");
  }
  return {std::move(statistics), std::move(pick_index), std::move(pick_logit)};
}

StatisticsResult statistics(const Tensor& any_logits, const Tensor& any_target, StringHandle loss_handle,
                            StableListHandle params, std::optional<double> alpha, int64_t k,
                            std::optional<int64_t> ignore_index, int64_t first_class, int64_t all_classes, bool compact,
                            bool labels, double label_smoothing, StableListHandle margin) {
  const Spec spec = read_spec(*chosen().kernels, loss_handle, params, alpha, k, ignore_index, first_class, all_classes,
                              compact, labels, label_smoothing, margin);
  check_tensor(any_logits, 2, "logits");
  check_target(any_target);
  const DType dtype = dtype_of(any_logits, "logits");
  const Tensor logits = with_contiguous_rows(any_logits), target = with_readable_rows(any_target, spec);
  return see(make_problem(&logits, target, logits.size(0), logits.size(1), spec), dtype);
}

ForwardResult forward(const Tensor& any_logits, const Tensor& any_target, const std::optional<Tensor>& any_weight,
                      StringHandle reduction_handle, StringHandle loss_handle, StableListHandle params,
                      std::optional<double> alpha, int64_t k, std::optional<int64_t> ignore_index, int64_t first_class,
                      int64_t all_classes, bool compact, bool labels, double label_smoothing, StableListHandle margin) {
  const Text reduction_name(reduction_handle);
  const Spec spec = read_spec(*chosen().kernels, loss_handle, params, alpha, k, ignore_index, first_class, all_classes,
                              compact, labels, label_smoothing, margin);
  const Reduction reduction = reduction_of(reduction_name.view());
  check_tensor(any_logits, 2, "logits");
  check_target(any_target);
  const DType dtype = dtype_of(any_logits, "logits");
  const Tensor logits = with_contiguous_rows(any_logits), target = with_readable_rows(any_target, spec);

  const Problem problem = make_problem(&logits, target, logits.size(0), logits.size(1), spec);
  const auto weight = read_weight(any_weight, target, compute_dtype(dtype), spec);
  auto [statistics, pick_index, pick_logit] = see(problem, dtype);
  auto [loss, coefficients] = finish_rows(statistics, problem.target, weight, reduction, spec);
  return {std::move(loss), std::move(coefficients), std::move(statistics), std::move(pick_index),
          std::move(pick_logit)};
}

FinishResult finish(const Tensor& any_statistics, const Tensor& target, const std::optional<Tensor>& any_weight,
                    StringHandle reduction_handle, StringHandle loss_handle, StableListHandle params,
                    std::optional<double> alpha, int64_t k, std::optional<int64_t> ignore_index, int64_t first_class,
                    int64_t all_classes, bool compact, bool labels, double label_smoothing, StableListHandle margin) {
  const Text reduction_name(reduction_handle);
  const Spec spec = read_spec(*chosen().kernels, loss_handle, params, alpha, k, ignore_index, first_class, all_classes,
                              compact, labels, label_smoothing, margin);
  const Reduction reduction = reduction_of(reduction_name.view());
  check_tensor(any_statistics, 2, "statistics");
  check_target(target);
  const DType compute = dtype_of(any_statistics, "statistics");
  check(compute == compute_dtype(compute), "statistics must be float32 or float64");
  const Target read = read_target(target, any_statistics.size(0), spec);
  check(any_statistics.size(1) == read.statistics_columns(),
        "statistics must have 3 columns, 4 with multi-hot targets, 3 + P with labels");
  const auto weight = read_weight(any_weight, target, compute, spec);
  const Tensor statistics = packed(any_statistics);
  return finish_rows(statistics, read, weight, reduction, spec);
}

// The labels of a row and their weights; without its sign, -1 is behind all classes.
template <class T>
void order_row(const int64_t* index, const T* weight, int64_t places, std::vector<std::pair<uint64_t, T>>* labels,
               int64_t* to_index, T* to_weight) {
  labels->clear();
  for (int64_t i = 0; i < places; ++i) {
    labels->emplace_back(static_cast<uint64_t>(index[i]), weight != nullptr && index[i] != -1 ? weight[i] : T(0));
  }
  std::stable_sort(labels->begin(), labels->end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  int64_t taken = 0;
  for (const auto& [label, w] : *labels) {
    if (taken > 0 && to_index[taken - 1] == static_cast<int64_t>(label)) {
      if (to_weight != nullptr) to_weight[taken - 1] += w;
      continue;
    }
    to_index[taken] = static_cast<int64_t>(label);
    if (to_weight != nullptr) to_weight[taken] = w;
    ++taken;
  }
  for (; taken < places; ++taken) {
    to_index[taken] = -1;
    if (to_weight != nullptr) to_weight[taken] = 0;
  }
}

template <class T>
void order_rows(const Tensor& index, const std::optional<Tensor>& weight, const Tensor& to_index,
                const Tensor& to_weight) {
  const int64_t rows = index.size(0), places = index.size(1);
  const auto* from = static_cast<const int64_t*>(index.const_data_ptr());
  const auto* shares = weight.has_value() ? static_cast<const T*>(weight->const_data_ptr()) : nullptr;
  auto* to = static_cast<int64_t*>(to_index.mutable_data_ptr());
  auto* to_shares = weight.has_value() ? static_cast<T*>(to_weight.mutable_data_ptr()) : nullptr;
  std::vector<std::pair<uint64_t, T>> labels;
  for (int64_t first = 0; first < rows * places; first += places) {
    order_row<T>(from + first, shares ? shares + first : nullptr, places, &labels, to + first,
                 to_shares ? to_shares + first : nullptr);
  }
}

std::tuple<Tensor, Tensor> in_order(const Tensor& any_index, const std::optional<Tensor>& any_weight) {
  check_tensor(any_index, 2, "index");
  check(torch_dtype(any_index) == aoti_torch_dtype_int64(), "labels must be int64 (rows, P)");
  const Tensor index = packed(any_index);
  const int64_t rows = index.size(0), places = index.size(1);
  std::optional<Tensor> weight;
  DType dtype = DType::float32;
  if (any_weight.has_value()) {
    check_tensor(*any_weight, 2, "weight");
    dtype = dtype_of(*any_weight, "weight");
    check(any_weight->size(0) == rows && any_weight->size(1) == places && dtype == compute_dtype(dtype),
          "weight must have the labels' shape, in float32 or float64");
    weight = packed(*any_weight);
  }
  Tensor to_index = empty({rows, places}, aoti_torch_dtype_int64());
  Tensor to_weight = empty({weight.has_value() ? rows : 0, places}, torch_dtype(dtype));
  dtype == DType::float64 ? order_rows<double>(index, weight, to_index, to_weight)
                          : order_rows<float>(index, weight, to_index, to_weight);
  return {std::move(to_index), std::move(to_weight)};
}

// The gradient: written over the logits if it is to be in place, where they must allow it, else in memory of its own.
Tensor gradient(const Tensor& grad, const Tensor& any_coefficients, const std::optional<Tensor>& any_logits,
                const Tensor& any_target, const Tensor& any_statistics, const Tensor& any_pick_index,
                const Tensor& any_pick_logit, int64_t classes, const Spec& spec, bool in_place) {
  const bool needs_logits = !spec.compact || is_multi_hot(any_target, spec);
  check_tensor(grad, grad.dim() == 1 ? 1 : 0, "grad");
  check_target(any_target);
  for (const auto& [tensor, name] : {std::pair(&any_coefficients, "coefficients"),
                                     {&any_statistics, "statistics"},
                                     {&any_pick_index, "pick_index"},
                                     {&any_pick_logit, "pick_logit"}}) {
    check_tensor(*tensor, 2, name);
  }
  check(any_logits.has_value() || !needs_logits, "backward needs the logits here");
  const DType dtype = dtype_of(any_pick_logit, "pick_logit"), compute = compute_dtype(dtype);
  const int64_t rows = any_statistics.size(0);
  const auto fits = [&](const Tensor& tensor, int64_t columns) {
    return tensor.size(0) == rows && tensor.size(1) == columns;
  };
  check(dtype_of(grad, "grad") == compute && dtype_of(any_coefficients, "coefficients") == compute &&
            dtype_of(any_statistics, "statistics") == compute,
        "grad, coefficients and statistics must have the compute dtype: float64 for float64 logits, else float32");
  check(grad.dim() == 0 || grad.size(0) == rows, "grad must be one number or (rows,)");
  check(torch_dtype(any_pick_index) == aoti_torch_dtype_int32(), "pick_index must be int32");
  check(fits(any_pick_index, spec.slots()) && fits(any_pick_logit, spec.slots()),
        "picks must be what forward returned");
  if (any_logits.has_value()) {
    check_tensor(*any_logits, 2, "logits");
    check(fits(*any_logits, classes) && dtype_of(*any_logits, "logits") == dtype, "logits must be those of forward");
  }

  const std::optional<Tensor> logits =
      needs_logits ? std::optional<Tensor>(with_contiguous_rows(*any_logits)) : std::nullopt;
  const Tensor target = with_readable_rows(any_target, spec), statistics = packed(any_statistics);
  const Tensor coefficients = packed(any_coefficients);
  const Tensor pick_index = packed(any_pick_index), pick_logit = packed(any_pick_logit);
  Backward door{};
  door.problem = make_problem(logits.has_value() ? &*logits : nullptr, target, rows, classes, spec);
  const Target& read = door.problem.target;
  check(statistics.size(1) == read.statistics_columns(), "statistics must be what forward returned");
  check(fits(coefficients, read.coefficients_columns()), "coefficients must be what forward returned");
  door.grad = grad.const_data_ptr();
  door.grad_stride = grad.dim() == 0 ? 0 : grad.stride(0);
  door.coefficients = coefficients.const_data_ptr();
  door.statistics = statistics.const_data_ptr();
  door.pick_index = static_cast<const int32_t*>(pick_index.const_data_ptr());
  door.pick_logit = pick_logit.const_data_ptr();
  Tensor dlogits = in_place ? *any_logits : empty({rows, classes}, torch_dtype(dtype));
  door.dlogits = dlogits.mutable_data_ptr();
  door.dlogits_stride = dlogits.stride(0);
  chosen().backward(dtype, door);

  if (const int64_t row = door.bad_row; row != INT64_MAX) {
    throw std::out_of_range("Picks must be classes or -1, which those of row " + std::to_string(row) + " are not. (" +
                            std::to_string(classes) + " classes)");
  }
  return dlogits;
}

Tensor backward(const Tensor& grad, const Tensor& coefficients, const std::optional<Tensor>& logits,
                const Tensor& target, const Tensor& statistics, const Tensor& pick_index, const Tensor& pick_logit,
                int64_t classes, StringHandle loss_handle, StableListHandle params, std::optional<double> alpha,
                int64_t k, std::optional<int64_t> ignore_index, int64_t first_class, int64_t all_classes, bool compact,
                bool labels, double label_smoothing, StableListHandle margin) {
  const Spec spec = read_spec(*chosen().kernels, loss_handle, params, alpha, k, ignore_index, first_class, all_classes,
                              compact, labels, label_smoothing, margin);
  return gradient(grad, coefficients, logits, target, statistics, pick_index, pick_logit, classes, spec, false);
}

void backward_in_place(const Tensor& grad, const Tensor& coefficients, const Tensor& logits, const Tensor& target,
                       const Tensor& statistics, const Tensor& pick_index, const Tensor& pick_logit,
                       StringHandle loss_handle, StableListHandle params, std::optional<double> alpha, int64_t k,
                       std::optional<int64_t> ignore_index, int64_t first_class, int64_t all_classes, bool compact,
                       bool labels, double label_smoothing, StableListHandle margin) {
  const Spec spec = read_spec(*chosen().kernels, loss_handle, params, alpha, k, ignore_index, first_class, all_classes,
                              compact, labels, label_smoothing, margin);
  check_tensor(logits, 2, "logits");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check((classes <= 1 || logits.stride(1) == 1) && (rows <= 1 || logits.stride(0) >= classes),
        "logits to be overwritten must be contiguous within rows that share no memory: give a copy of them, "
        "logits.contiguous(), or call backward");
  logits.mutable_data_ptr();  // a copy on write is made before anybody reads them
  gradient(grad, coefficients, logits, target, statistics, pick_index, pick_logit, classes, spec, true);
}

// --------------------------------------------------------------------------------------------------- linear layers

// Whether candidates() serves: this machine has what it is written for, and tests have not asked for less.
bool has_candidates() { return chosen().of_bfloat16 != nullptr; }

using CandidatesResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// count, index, logit, label_logit: kernels.h, CandidateSearch.
CandidatesResult candidates(const Tensor& any_input, const Tensor& any_weight, const std::optional<Tensor>& bias,
                            bool cosine, double least_norm, double share_of_bound, const Tensor& target, int64_t most,
                            StringHandle loss_handle, StableListHandle params, std::optional<double> alpha, int64_t k,
                            std::optional<int64_t> ignore_index, int64_t first_class, int64_t all_classes, bool compact,
                            bool labels, double label_smoothing, StableListHandle margin) {
  const Spec spec = read_spec(*chosen().kernels, loss_handle, params, alpha, k, ignore_index, first_class, all_classes,
                              compact, labels, label_smoothing, margin);
  check(has_candidates(), "candidates are searched with AVX-512 BF16 only");
  check_tensor(any_input, 2, "input");
  check_tensor(any_weight, 2, "weight");
  check_target(target);
  check(!is_multi_hot(target, spec), "candidates are those of class indices and labels");
  check(dtype_of(any_input, "input") == DType::float32 && dtype_of(any_weight, "weight") == DType::float32,
        "input and weight must be float32");
  const Tensor input = with_contiguous_rows(any_input), weight = with_contiguous_rows(any_weight);
  const int64_t rows = input.size(0), classes = weight.size(0), features = input.size(1);
  check(weight.size(1) == features && features >= 1 && features <= kMostFeatures,
        "input and weight must have the same features, from 1 to 2^18");
  check(k >= 1 && most > k && most <= INT32_MAX / 4, "k must be at least 1, and most larger");
  CandidateSearch search{};
  search.problem = make_problem(nullptr, target, rows, classes, spec);
  search.input = static_cast<const float*>(input.const_data_ptr());
  search.input_stride = input.stride(0);
  search.weight = static_cast<const float*>(weight.const_data_ptr());
  search.weight_stride = weight.stride(0);
  search.features = features;
  if (bias.has_value()) {
    check_tensor(*bias, bias->dim() == 0 ? 0 : 1, "bias");
    check(dtype_of(*bias, "bias") == DType::float32 && (bias->dim() == 0 || bias->size(0) == classes),
          "bias must be float32, (classes,) or ()");
    search.bias = static_cast<const float*>(bias->const_data_ptr());
    search.bias_stride = bias->dim() == 0 ? 0 : bias->stride(0);
  }
  search.cosine = cosine;
  search.least_norm = least_norm;
  search.share_of_bound = share_of_bound;
  search.most = most;
  Tensor count = empty({rows}, aoti_torch_dtype_int32()), index = empty({rows, most}, aoti_torch_dtype_int32());
  Tensor logit = empty({rows, most}, aoti_torch_dtype_float32());
  Tensor label_logit = empty({rows, search.problem.target.places}, aoti_torch_dtype_float32());
  search.count = static_cast<int32_t*>(count.mutable_data_ptr());
  search.index = static_cast<int32_t*>(index.mutable_data_ptr());
  search.logit = static_cast<float*>(logit.mutable_data_ptr());
  search.label_logit = static_cast<float*>(label_logit.mutable_data_ptr());
  if (rows > 0) chosen().of_bfloat16->search(search);
  return {std::move(count), std::move(index), std::move(logit), std::move(label_logit)};
}

// -------------------------------------------------------------------------------------------------------- for tests

// Uses the instruction set of this name from now on ("": no change), and returns the name of the one in use.
std::string cpu_isa(const std::string& name) {
  if (!name.empty()) {
    const std::vector<InstructionSet> sets = instruction_sets();
    const auto set =
        std::find_if(sets.begin(), sets.end(), [&](const InstructionSet& other) { return other.name == name; });
    if (set == sets.end()) refuse("this machine or this build has no kernels for " + name);
    chosen() = *set;
  }
  return std::string(chosen().name);
}

// The kernels' own function of this name (kernels.h) of every element.
Tensor cpu_elementary(const std::string& name, const Tensor& x) {
  const bool of_16_bits = name == "exp_nonpositive_16" || name == "log1p_16";
  check(of_16_bits || name == "exp" || name == "log1p" || name == "log1p_of_product",
        "expected exp, log1p, log1p_of_product, exp_nonpositive_16 or log1p_16");
  check_tensor(x, 1, "x");
  const DType dtype = dtype_of(x, "x");
  check(!of_16_bits || dtype == DType::float32, "expected float32");
  check((dtype == DType::float32 || dtype == DType::float64) && x.is_contiguous(),
        "expected a contiguous float32 or float64 tensor");
  Tensor y = torch::stable::empty_like(x);
  chosen().kernels->elementary(dtype, name.c_str(), x.const_data_ptr(), y.mutable_data_ptr(), x.numel());
  return y;
}

}  // namespace
}  // namespace fused_losses

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def("_cpu_isa(str name) -> str");
  m.def("_cpu_elementary(str name, Tensor x) -> Tensor");
  m.def("_cpu_has_candidates() -> bool");
  m.def(
      "_cpu_candidates(Tensor input, Tensor weight, Tensor? bias, bool cosine, float least_norm, "
      "float share_of_bound, Tensor target, int most, str loss, float[] params, float? alpha, SymInt k, SymInt? "
      "ignore_index, SymInt first_class, "
      "SymInt all_classes, bool compact, bool labels=False, float label_smoothing=0.0, float[] margin=[]) "
      "-> (Tensor count, Tensor index, Tensor logit, Tensor label_logit)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("statistics", TORCH_BOX(&fused_losses::statistics));
  m.impl("forward", TORCH_BOX(&fused_losses::forward));
  m.impl("finish", TORCH_BOX(&fused_losses::finish));
  m.impl("backward", TORCH_BOX(&fused_losses::backward));
  m.impl("backward_", TORCH_BOX(&fused_losses::backward_in_place));
  m.impl("in_order", TORCH_BOX(&fused_losses::in_order));
  m.impl("_cpu_elementary", TORCH_BOX(&fused_losses::cpu_elementary));
  m.impl("_cpu_candidates", TORCH_BOX(&fused_losses::candidates));
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&fused_losses::cpu_isa));
  m.impl("_cpu_has_candidates", TORCH_BOX(&fused_losses::has_candidates));
}
