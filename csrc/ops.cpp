// The doors of the CPU wing: arguments are checked, outputs allocated, and the kernels of the best instruction set
// called.
//
// The schema stands in fused_losses/ops.py; what the arguments mean, in fused_losses/reference.py. Built against the
// LibTorch stable ABI: one shared object serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "kernels.h"

namespace fused_losses {

using torch::stable::Tensor;

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

struct InstructionSet {
  std::string_view name;
  const Kernels* kernels;
};

InstructionSet best_instruction_set() {
  if (kernels_avx512 != nullptr && runs_avx512()) return {"avx512", kernels_avx512};
  if (kernels_avx2 != nullptr && runs_avx2()) return {"avx2", kernels_avx2};
  return {"baseline", kernels_baseline};
}

InstructionSet& chosen() {
  static InstructionSet set = best_instruction_set();
  return set;
}

// -------------------------------------------------------------------------------------------------------- arguments

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }  // ValueError in Python

// Strings and lists arrive as handles that the callee owns. (torch's own conversion of a string leaks it.)
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  ~Text() { torch_delete_string(handle_); }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;

  std::string_view view() const {
    const char* text = nullptr;
    size_t length = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &text));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    return {text, length};
  }

 private:
  StringHandle handle_;
};

// Numbers, in a list that the callee owns.
class Numbers {
 public:
  explicit Numbers(StableListHandle handle) : handle_(handle) {}
  ~Numbers() { torch_delete_list(handle_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  size_t size() const {
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(handle_, &size));
    return size;
  }
  double operator[](size_t i) const {
    StableIValue value;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle_, i, &value));
    return torch::stable::detail::to<double>(value);
  }

 private:
  StableListHandle handle_;
};

void check(bool holds, const char* otherwise) {
  if (!holds) refuse(otherwise);
}

// The arguments that every door takes last.
Spec read_spec(StringHandle loss_handle, StableListHandle params_handle, std::optional<double> alpha, int64_t k,
               std::optional<int64_t> ignore_index, int64_t first_class, int64_t all_classes, bool compact) {
  const Text loss(loss_handle);
  const Numbers params(params_handle);
  const Kernels& kernels = *chosen().kernels;
  Spec spec{};
  while (spec.formula < kernels.num_formulas && loss.view() != kernels.formulas[spec.formula].name) ++spec.formula;
  if (spec.formula == kernels.num_formulas) refuse("not a loss: " + std::string(loss.view()));
  const Formula& formula = kernels.formulas[spec.formula];
  spec.family = formula.family;
  const size_t num_params = params.size();
  if (num_params != static_cast<size_t>(formula.num_params)) {
    refuse(std::string(formula.name) + " has " + std::to_string(formula.num_params) + " hyper-parameters");
  }
  for (size_t i = 0; i < num_params; ++i) spec.params[i] = params[i];
  spec.takes_means = alpha.has_value();
  spec.alpha = alpha.value_or(1);
  spec.k = k;
  spec.ignores = ignore_index.has_value();
  spec.ignore_index = ignore_index.value_or(0);
  spec.first_class = first_class;
  spec.all_classes = all_classes;
  spec.compact = compact && k > 0;
  check(k >= 0, "k must not be negative");
  check(first_class >= 0, "first_class must not be negative");
  check(all_classes >= 1, "there must be at least one class");
  return spec;
}

Reduction reduction_of(std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "sum") return Reduction::sum;
  if (name == "mean") return Reduction::mean;
  refuse("not a reduction: " + std::string(name));
}

int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

DType dtype_of(const Tensor& tensor) {
  const int32_t dtype = torch_dtype(tensor);
  if (dtype == aoti_torch_dtype_float32()) return DType::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::float16;
  if (dtype == aoti_torch_dtype_float64()) return DType::float64;
  if (dtype == aoti_torch_dtype_int64()) return DType::int64;
  if (dtype == aoti_torch_dtype_int32()) return DType::int32;
  if (dtype == aoti_torch_dtype_int16()) return DType::int16;
  if (dtype == aoti_torch_dtype_int8()) return DType::int8;
  if (dtype == aoti_torch_dtype_uint8()) return DType::uint8;
  if (dtype == aoti_torch_dtype_bool()) return DType::boolean;
  refuse("unsupported dtype");
}

bool is_floating(DType dtype) { return dtype <= DType::float64; }

// float64 for float64 logits, float32 for all others
DType compute_dtype(DType logits) { return logits == DType::float64 ? DType::float64 : DType::float32; }

int32_t torch_dtype(DType floating) {
  switch (floating) {
    case DType::float32: return aoti_torch_dtype_float32();
    case DType::bfloat16: return aoti_torch_dtype_bfloat16();
    case DType::float16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float64();
  }
}

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[2] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  if (strides[0] == 0) strides[0] = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The tensor itself wherever its rows are contiguous, whatever the stride from row to row.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// The target, which must outlive what is made of it, with contiguous rows if it is multi-hot.
Target read_target(const Tensor& target, int64_t rows, const Spec& spec) {
  const Target read{target.const_data_ptr(), target.dim() > 0 ? target.stride(0) : 0, dtype_of(target),
                    target.dim() == 2};
  check(target.dim() >= 1 && target.size(0) == rows, "target must have as many rows as the logits");
  if (read.multi_hot) {
    check(spec.family == Family::logistic, "multi-hot targets are for the logistic family only");
  } else {
    check(target.dim() == 1 && read.dtype == DType::int64, "target must be int64 class indices (rows,)");
  }
  return read;
}

Tensor with_readable_rows(const Tensor& target) { return target.dim() == 2 ? with_contiguous_rows(target) : target; }

void check_class_indices(const Target& target, int64_t rows, const Spec& spec) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = target.label(row);
    if ((y >= 0 && y < spec.all_classes) || target.ignored(row, spec)) continue;
    throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds. (row " + std::to_string(row) + ", " +
                            std::to_string(spec.all_classes) + " classes)");
  }
}

// What forward and backward have in common: the target, and the logits if there are any. The tensors must outlive it.
Problem make_problem(const Tensor* logits, const Tensor& target, int64_t rows, int64_t classes, const Spec& spec) {
  check(classes >= 1 && classes < INT32_MAX, "logits need at least one class, and fewer than 2^31 - 1");
  check(spec.first_class <= INT64_MAX - classes && spec.first_class + classes <= spec.all_classes,
        "the classes from first_class on exceed all_classes");
  Problem problem{};
  if (logits != nullptr) {
    problem.logits = logits->const_data_ptr();
    problem.logits_stride = logits->stride(0);
  }
  problem.rows = rows;
  problem.classes = classes;
  problem.target = read_target(target, rows, spec);
  problem.spec = spec;
  if (problem.target.multi_hot) {
    check(target.size(1) == classes, "multi-hot targets must have the shape of the logits");
  } else {
    check_class_indices(problem.target, rows, spec);
  }
  return problem;
}

int64_t statistics_columns(const Target& target) { return target.multi_hot ? 4 : 3; }

// ------------------------------------------------------------------------------------------------------------ doors

using FinishResult = std::tuple<Tensor, Tensor>;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

void check_weight(const std::optional<Tensor>& weight, const Target& target, DType compute, const Spec& spec) {
  if (!weight.has_value()) return;
  check(!target.multi_hot, "weight works with class indices only");
  check(weight->dim() == 1 && weight->size(0) == spec.all_classes && dtype_of(*weight) == compute,
        "weight must be (all classes,), of the compute dtype");
}

// statistics: contiguous
FinishResult finish_rows(const Tensor& statistics, const Target& target, const std::optional<Tensor>& weight,
                         Reduction reduction, const Spec& spec) {
  const DType compute = dtype_of(statistics);
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
  Tensor coefficients = empty({door.rows, 2}, torch_dtype(compute));
  door.loss = loss.mutable_data_ptr();
  door.coefficients = coefficients.mutable_data_ptr();
  chosen().kernels->finish(compute, door);
  return {std::move(loss), std::move(coefficients)};
}

ForwardResult forward(const Tensor& any_logits, const Tensor& any_target, const std::optional<Tensor>& weight,
                      StringHandle reduction_handle, StringHandle loss_handle, StableListHandle params,
                      std::optional<double> alpha, int64_t k, std::optional<int64_t> ignore_index, int64_t first_class,
                      int64_t all_classes, bool compact) {
  const Text reduction_name(reduction_handle);
  const Spec spec = read_spec(loss_handle, params, alpha, k, ignore_index, first_class, all_classes, compact);
  const Reduction reduction = reduction_of(reduction_name.view());
  check(any_logits.dim() == 2, "logits must be (rows, classes)");
  const Tensor logits = with_contiguous_rows(any_logits), target = with_readable_rows(any_target);
  const DType dtype = dtype_of(logits);
  check(is_floating(dtype), "logits must be float16, bfloat16, float32 or float64");
  const int64_t rows = logits.size(0), classes = logits.size(1);

  Forward door{make_problem(&logits, target, rows, classes, spec)};
  const Target& read = door.problem.target;
  check_weight(weight, read, compute_dtype(dtype), spec);
  Tensor statistics = empty({rows, statistics_columns(read)}, torch_dtype(compute_dtype(dtype)));
  Tensor pick_index = empty({rows, spec.slots()}, aoti_torch_dtype_int32());
  Tensor pick_logit = empty({rows, spec.slots()}, torch_dtype(dtype));
  door.statistics = statistics.mutable_data_ptr();
  door.pick_index = static_cast<int32_t*>(pick_index.mutable_data_ptr());
  door.pick_logit = pick_logit.mutable_data_ptr();
  chosen().kernels->forward(dtype, door);

  if (const int64_t entry = door.bad_entry; entry != INT64_MAX) {
    refuse("multi-hot targets must be 0 or 1, which row " + std::to_string(entry / classes) + ", class " +
           std::to_string(entry % classes) + " is not; soft targets are not supported");
  }
  auto [loss, coefficients] = finish_rows(statistics, read, weight, reduction, spec);
  return {std::move(loss), std::move(coefficients), std::move(statistics), std::move(pick_index),
          std::move(pick_logit)};
}

FinishResult finish(const Tensor& any_statistics, const Tensor& target, const std::optional<Tensor>& weight,
                    StringHandle reduction_handle, StringHandle loss_handle, StableListHandle params,
                    std::optional<double> alpha, int64_t k, std::optional<int64_t> ignore_index, int64_t first_class,
                    int64_t all_classes, bool compact) {
  const Text reduction_name(reduction_handle);
  const Spec spec = read_spec(loss_handle, params, alpha, k, ignore_index, first_class, all_classes, compact);
  const Reduction reduction = reduction_of(reduction_name.view());
  const DType compute = dtype_of(any_statistics);
  check(compute == DType::float32 || compute == DType::float64, "statistics must be float32 or float64");
  check(any_statistics.dim() == 2, "statistics must be (rows, 3 or 4)");
  const Target read = read_target(target, any_statistics.size(0), spec);
  check(any_statistics.size(1) == statistics_columns(read), "statistics must have 3 columns, 4 with multi-hot targets");
  check_weight(weight, read, compute, spec);
  const Tensor statistics = packed(any_statistics);
  return finish_rows(statistics, read, weight, reduction, spec);
}

Tensor backward(const Tensor& grad, const Tensor& any_coefficients, const std::optional<Tensor>& any_logits,
                const Tensor& any_target, const Tensor& any_statistics, const Tensor& any_pick_index,
                const Tensor& any_pick_logit, int64_t classes, StringHandle loss_handle, StableListHandle params,
                std::optional<double> alpha, int64_t k, std::optional<int64_t> ignore_index, int64_t first_class,
                int64_t all_classes, bool compact) {
  const Spec spec = read_spec(loss_handle, params, alpha, k, ignore_index, first_class, all_classes, compact);
  check(any_statistics.dim() == 2, "statistics must be what forward returned");
  const int64_t rows = any_statistics.size(0), slots = spec.slots();
  const bool needs_logits = !spec.compact || any_target.dim() == 2;
  check(any_logits.has_value() || !needs_logits, "backward needs the logits here");

  const DType dtype = dtype_of(any_pick_logit);
  check(is_floating(dtype), "pick_logit must have the dtype of the logits");
  const auto shaped = [&](const Tensor& tensor, int64_t columns) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
  };
  const auto computed = [&](const Tensor& tensor) { return dtype_of(tensor) == compute_dtype(dtype); };
  check(computed(grad) && computed(any_coefficients) && computed(any_statistics),
        "grad, coefficients and statistics must have the compute dtype: float64 for float64 logits, else float32");
  check(shaped(any_coefficients, 2), "coefficients must be what forward returned");
  check(torch_dtype(any_pick_index) == aoti_torch_dtype_int32(), "pick_index must be int32");
  check(shaped(any_pick_index, slots) && shaped(any_pick_logit, slots), "picks must be what forward returned");
  check(grad.dim() == 0 || (grad.dim() == 1 && grad.size(0) == rows), "grad must be one number or (rows,)");
  check(!needs_logits || (shaped(*any_logits, classes) && dtype_of(*any_logits) == dtype),
        "logits must be those of forward");

  const std::optional<Tensor> logits =
      needs_logits ? std::optional<Tensor>(with_contiguous_rows(*any_logits)) : std::nullopt;
  const Tensor target = with_readable_rows(any_target), statistics = packed(any_statistics);
  const Tensor coefficients = packed(any_coefficients);
  const Tensor pick_index = packed(any_pick_index), pick_logit = packed(any_pick_logit);
  Backward door{};
  door.problem = make_problem(logits.has_value() ? &*logits : nullptr, target, rows, classes, spec);
  check(statistics.size(1) == statistics_columns(door.problem.target), "statistics must be what forward returned");
  door.grad = grad.const_data_ptr();
  door.grad_stride = grad.dim() == 0 ? 0 : grad.stride(0);
  door.coefficients = coefficients.const_data_ptr();
  door.statistics = statistics.const_data_ptr();
  door.pick_index = static_cast<const int32_t*>(pick_index.const_data_ptr());
  door.pick_logit = pick_logit.const_data_ptr();
  Tensor dlogits = empty({rows, classes}, torch_dtype(dtype));
  door.dlogits = dlogits.mutable_data_ptr();
  chosen().kernels->backward(dtype, door);
  return dlogits;
}

// -------------------------------------------------------------------------------------------------------- for tests

// Uses the instruction set of this name from now on ("": no change), and returns the name of the one in use.
std::string cpu_isa(const std::string& name) {
  const InstructionSet all[] = {{"avx512", runs_avx512() ? kernels_avx512 : nullptr},
                                {"avx2", runs_avx2() ? kernels_avx2 : nullptr},
                                {"baseline", kernels_baseline}};
  if (!name.empty()) {
    bool found = false;
    for (const InstructionSet& set : all) {
      if (set.name != name || set.kernels == nullptr) continue;
      chosen() = set;
      found = true;
    }
    if (!found) refuse("this machine or this build has no kernels for " + name);
  }
  return std::string(chosen().name);
}

// The kernels' own exp or log1p of every element.
Tensor cpu_elementary(const std::string& name, const Tensor& x) {
  check(dtype_of(x) == DType::float32 && x.is_contiguous(), "expected a contiguous float32 tensor");
  Tensor y = torch::stable::empty_like(x);
  chosen().kernels->elementary(name.c_str(), static_cast<const float*>(x.const_data_ptr()),
                               static_cast<float*>(y.mutable_data_ptr()), x.numel());
  return y;
}

}  // namespace
}  // namespace fused_losses

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def("_cpu_isa(str name) -> str");
  m.def("_cpu_elementary(str name, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("forward", TORCH_BOX(&fused_losses::forward));
  m.impl("finish", TORCH_BOX(&fused_losses::finish));
  m.impl("backward", TORCH_BOX(&fused_losses::backward));
  m.impl("_cpu_elementary", TORCH_BOX(&fused_losses::cpu_elementary));
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&fused_losses::cpu_isa));
}
