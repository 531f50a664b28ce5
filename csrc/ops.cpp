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
#include "reductions.h"

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

class Handles {
 public:
  Handles(StringHandle loss, StableListHandle params) : loss_(loss), params_(params) {}
  ~Handles() { torch_delete_list(params_); }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;

  std::string_view loss() const { return loss_.view(); }

  // Writes the hyper-parameters, which must be as many as the loss has.
  void params(size_t expected, double* values) const {
    size_t count = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(params_, &count));
    if (count != expected) refuse(std::string(loss()) + " has " + std::to_string(expected) + " hyper-parameters");
    for (size_t i = 0; i < count; ++i) {
      StableIValue value;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(params_, i, &value));
      values[i] = torch::stable::detail::to<double>(value);
    }
  }

 private:
  Text loss_;
  StableListHandle params_;
};

constexpr int kMostParams = 2;

void read_loss(const Handles& handles, SoftmaxLoss* loss, double* params) {
  const std::string_view name = handles.loss();
  if (name == "cross_entropy") {
    *loss = SoftmaxLoss::cross_entropy;
  } else if (name == "nllr") {
    *loss = SoftmaxLoss::nllr;
  } else if (name == "crl") {
    *loss = SoftmaxLoss::crl;
  } else {
    refuse("not a softmax loss: " + std::string(name));
  }
  handles.params(*loss == SoftmaxLoss::crl ? 2 : 0, params);
}

void read_loss(const Handles& handles, LogisticLoss* loss, double* params) {
  const std::string_view name = handles.loss();
  if (name == "lr") {
    *loss = LogisticLoss::lr;
  } else if (name == "ss_lr") {
    *loss = LogisticLoss::ss_lr;
  } else {
    refuse("not a logistic loss: " + std::string(name));
  }
  handles.params(*loss == LogisticLoss::ss_lr ? 1 : 0, params);
}

int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

DType dtype_of(const Tensor& tensor, const char* name) {
  const int32_t dtype = torch_dtype(tensor);
  if (dtype == aoti_torch_dtype_float32()) return DType::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::float16;
  if (dtype == aoti_torch_dtype_float64()) return DType::float64;
  refuse(std::string(name) + " must be float16, bfloat16, float32 or float64");
}

Entries entries_of(const Tensor& target) {
  const int32_t dtype = torch_dtype(target);
  constexpr uint64_t all = ~uint64_t{0};
  if (dtype == aoti_torch_dtype_float32()) return {4, 0x3f800000, 0x7fffffff};
  if (dtype == aoti_torch_dtype_float64()) return {8, 0x3ff0000000000000, 0x7fffffffffffffff};
  if (dtype == aoti_torch_dtype_bfloat16()) return {2, 0x3f80, 0x7fff};
  if (dtype == aoti_torch_dtype_float16()) return {2, 0x3c00, 0x7fff};
  if (dtype == aoti_torch_dtype_float8_e4m3fn()) return {1, 0x38, 0x7f};
  if (dtype == aoti_torch_dtype_float8_e5m2()) return {1, 0x3c, 0x7f};
  if (dtype == aoti_torch_dtype_float8_e4m3fnuz()) return {1, 0x40, 0xff};  // whose -0 is NaN
  if (dtype == aoti_torch_dtype_float8_e5m2fnuz()) return {1, 0x40, 0xff};
  if (dtype == aoti_torch_dtype_int64() || dtype == aoti_torch_dtype_uint64()) return {8, 1, all};
  if (dtype == aoti_torch_dtype_int32() || dtype == aoti_torch_dtype_uint32()) return {4, 1, all};
  if (dtype == aoti_torch_dtype_int16() || dtype == aoti_torch_dtype_uint16()) return {2, 1, all};
  if (dtype == aoti_torch_dtype_int8() || dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_bool()) {
    return {1, 1, all};
  }
  refuse("multi-hot targets must be of a dtype that has 0 and 1, and is not complex");
}

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

void check(bool holds, const char* otherwise) {
  if (!holds) refuse(otherwise);
}

// Whether a tensor is what a pointer into it relies on: on this machine, of this rank, and all of it in its storage,
// which can be freed under a tensor that keeps its sizes.
void check_tensor(const Tensor& tensor, int64_t rank, const char* name) {
  if (!tensor.is_cpu()) refuse("all tensors must be on the CPU, which " + std::string(name) + " is not");
  if (tensor.dim() != rank) refuse(std::string(name) + " must be of rank " + std::to_string(rank));
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset(), bytes = 0;
  for (int64_t d = 0; d < rank; ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (last >= bytes / static_cast<int64_t>(tensor.element_size())) {
    refuse("the storage of " + std::string(name) + " is smaller than the tensor");
  }
}

void check_class_indices(const Problem& problem) {
  const int64_t* target = static_cast<const int64_t*>(problem.target);
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t y = target[row * problem.target_stride];
    if ((y >= 0 && y < problem.all_classes) || y == problem.ignore_index) continue;
    throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds. (row " + std::to_string(row) + ", " +
                            std::to_string(problem.all_classes) + " classes)");
  }
}

// What a class index can say.
struct Labels {
  int64_t ignore_index;
  int64_t first_class;
  std::optional<int64_t> all_classes;
};

// What forward and backward have in common: the target, k, and the logits if there are any. The tensors must outlive
// it.
Problem make_problem(const Tensor* logits, const Tensor& target, int64_t rows, int64_t classes, const double* params,
                     int64_t k, const Labels& labels, bool compact, bool may_be_multi_hot) {
  check(classes >= 1 && classes < INT32_MAX, "logits need at least one class, and fewer than 2^31 - 1");
  check(k >= 0 && k <= INT32_MAX, "k must be 0 or more, and fewer than 2^31");
  Problem problem{};
  if (logits != nullptr) {
    problem.logits = logits->const_data_ptr();
    problem.logits_stride = logits->stride(0);
  }
  problem.rows = rows;
  problem.classes = classes;
  problem.target = target.const_data_ptr();
  problem.multi_hot = target.dim() == 2;
  problem.ignore_index = labels.ignore_index;
  problem.first_class = labels.first_class;
  check(labels.first_class >= 0 && labels.first_class <= INT64_MAX - classes, "first_class must not be negative");
  problem.all_classes = labels.all_classes.value_or(labels.first_class + classes);
  check(problem.all_classes >= labels.first_class + classes, "the classes from first_class on exceed all_classes");
  problem.params = params;
  problem.k = k;
  problem.compact = compact && k > 0;
  check(target.size(0) == rows, "target must have as many rows as the logits");
  problem.target_stride = target.stride(0);
  if (problem.multi_hot) {
    check(may_be_multi_hot, "multi-hot targets are for the logistic family only");
    check(target.size(1) == classes, "multi-hot targets must have the shape of the logits");
    problem.entries = entries_of(target);
  } else {
    check(torch_dtype(target) == aoti_torch_dtype_int64(), "target must be int64 class indices (rows,)");
    check_class_indices(problem);
  }
  return problem;
}

// ------------------------------------------------------------------------------------------------------------ doors

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Loss>
ForwardResult forward(void (*kernel)(Loss, DType, Forward&), const Tensor& any_logits, const Tensor& any_target,
                      const Handles& handles, int64_t k, const Labels& labels, bool compact) {
  constexpr bool is_logistic = std::is_same_v<Loss, LogisticLoss>;
  double params[kMostParams] = {};
  Loss loss;
  read_loss(handles, &loss, params);

  check_tensor(any_logits, 2, "logits");
  check_tensor(any_target, any_target.dim() == 2 ? 2 : 1, "target");
  const DType dtype = dtype_of(any_logits, "logits");
  const Tensor logits = with_contiguous_rows(any_logits);
  const Tensor target = any_target.dim() == 2 ? with_contiguous_rows(any_target) : any_target;
  const int64_t rows = logits.size(0), classes = logits.size(1);

  Forward door{make_problem(&logits, target, rows, classes, params, k, labels, compact, is_logistic)};
  const int32_t compute = torch_dtype(compute_dtype(dtype));
  const int64_t slots = k == 0 ? 0 : compact ? k : 1;
  Tensor result = is_logistic ? empty({rows, 2}, compute) : empty({rows}, compute);
  Tensor state = empty({rows, is_logistic ? 2 : 3}, compute);
  Tensor pick_index = empty({rows, slots}, aoti_torch_dtype_int32());
  Tensor pick_logit = empty({rows, slots}, torch_dtype(dtype));
  door.result = result.mutable_data_ptr();
  door.state = state.mutable_data_ptr();
  door.pick_index = static_cast<int32_t*>(pick_index.mutable_data_ptr());
  door.pick_logit = pick_logit.mutable_data_ptr();
  kernel(loss, dtype, door);

  if (const int64_t entry = door.bad_entry; entry != INT64_MAX) {
    refuse("multi-hot targets must be 0 or 1, which row " + std::to_string(entry / classes) + ", class " +
           std::to_string(entry % classes) + " is not; soft targets are not supported");
  }
  return {std::move(result), std::move(state), std::move(pick_index), std::move(pick_logit)};
}

template <class Loss>
Tensor backward(void (*kernel)(Loss, DType, Backward&), const Tensor& grad,
                const std::optional<Tensor>& any_logits, const Tensor& any_target, const Tensor& any_state,
                const Tensor& any_pick_index, const Tensor& any_pick_logit, const Handles& handles, int64_t k,
                const Labels& labels, int64_t classes, bool compact) {
  constexpr bool is_logistic = std::is_same_v<Loss, LogisticLoss>;
  double params[kMostParams] = {};
  Loss loss;
  read_loss(handles, &loss, params);

  const bool multi_hot = any_target.dim() == 2, needs_logits = k == 0 || !compact || multi_hot;
  check_tensor(grad, is_logistic ? 2 : 1, "grad");
  check_tensor(any_target, multi_hot ? 2 : 1, "target");
  check_tensor(any_state, 2, "state");
  check_tensor(any_pick_index, 2, "pick_index");
  check_tensor(any_pick_logit, 2, "pick_logit");
  check(any_logits.has_value() || !needs_logits, "backward needs the logits here");
  const DType dtype = dtype_of(any_pick_logit, "pick_logit");
  const int64_t rows = any_state.size(0), slots = k == 0 ? 0 : compact ? k : 1;
  check(dtype_of(grad, "grad") == compute_dtype(dtype) && dtype_of(any_state, "state") == compute_dtype(dtype),
        "grad and state must have the compute dtype: float64 for float64 logits, else float32");
  check(torch_dtype(any_pick_index) == aoti_torch_dtype_int32(), "pick_index must be int32");
  check(any_state.size(1) == (is_logistic ? 2 : 3), "state must be what forward returned");
  for (const Tensor* picks : {&any_pick_index, &any_pick_logit}) {
    check(picks->size(0) == rows && picks->size(1) == slots, "picks must be what forward returned");
  }
  check(grad.size(0) == rows && (!is_logistic || grad.size(1) == 2),
        "grad must have the shape of what forward returned");
  if (any_logits.has_value()) {
    check_tensor(*any_logits, 2, "logits");
    check(any_logits->size(0) == rows && any_logits->size(1) == classes && dtype_of(*any_logits, "logits") == dtype,
          "logits must be those of forward");
  }

  const std::optional<Tensor> logits =
      needs_logits ? std::optional<Tensor>(with_contiguous_rows(*any_logits)) : std::nullopt;
  const Tensor state = packed(any_state);
  const Tensor pick_index = packed(any_pick_index), pick_logit = packed(any_pick_logit);
  const Tensor target = multi_hot ? with_contiguous_rows(any_target) : any_target;

  Backward door{};
  door.problem = make_problem(logits.has_value() ? &*logits : nullptr, target, rows, classes, params, k, labels,
                              compact, is_logistic);
  door.grad = grad.const_data_ptr();
  door.grad_row_stride = grad.stride(0);
  door.grad_column_stride = is_logistic ? grad.stride(1) : 0;
  door.state = state.const_data_ptr();
  door.pick_index = static_cast<const int32_t*>(pick_index.const_data_ptr());
  door.pick_logit = pick_logit.const_data_ptr();
  Tensor dlogits = empty({rows, classes}, torch_dtype(dtype));
  door.dlogits = dlogits.mutable_data_ptr();
  kernel(loss, dtype, door);

  if (const int64_t row = door.bad_row; row != INT64_MAX) {
    throw std::out_of_range("Picks must be classes or -1, which those of row " + std::to_string(row) +
                            " are not. (" + std::to_string(classes) + " classes)");
  }
  return dlogits;
}

ForwardResult softmax_forward(const Tensor& logits, const Tensor& target, StringHandle loss, StableListHandle params,
                              int64_t k, int64_t ignore_index, bool compact, int64_t first_class,
                              std::optional<int64_t> all_classes) {
  return forward(chosen().kernels->softmax_forward, logits, target, Handles(loss, params), k,
                 Labels{ignore_index, first_class, all_classes}, compact);
}

ForwardResult logistic_forward(const Tensor& logits, const Tensor& target, StringHandle loss, StableListHandle params,
                               int64_t k, int64_t ignore_index, bool compact, int64_t first_class,
                               std::optional<int64_t> all_classes) {
  return forward(chosen().kernels->logistic_forward, logits, target, Handles(loss, params), k,
                 Labels{ignore_index, first_class, all_classes}, compact);
}

Tensor softmax_backward(const Tensor& grad, const std::optional<Tensor>& logits, const Tensor& target,
                        const Tensor& state, const Tensor& pick_index, const Tensor& pick_logit, StringHandle loss,
                        StableListHandle params, int64_t k, int64_t ignore_index, int64_t num_classes, bool compact,
                        int64_t first_class, std::optional<int64_t> all_classes) {
  return backward(chosen().kernels->softmax_backward, grad, logits, target, state, pick_index, pick_logit,
                  Handles(loss, params), k, Labels{ignore_index, first_class, all_classes}, num_classes, compact);
}

Tensor logistic_backward(const Tensor& grad, const std::optional<Tensor>& logits, const Tensor& target,
                         const Tensor& state, const Tensor& pick_index, const Tensor& pick_logit, StringHandle loss,
                         StableListHandle params, int64_t k, int64_t ignore_index, int64_t num_classes, bool compact,
                         int64_t first_class, std::optional<int64_t> all_classes) {
  return backward(chosen().kernels->logistic_backward, grad, logits, target, state, pick_index, pick_logit,
                  Handles(loss, params), k, Labels{ignore_index, first_class, all_classes}, num_classes, compact);
}

// ------------------------------------------------------------------------------------------------------ whole losses

ReductionKind reduction_of(std::string_view name) {
  if (name == "none") return ReductionKind::none;
  if (name == "sum") return ReductionKind::sum;
  if (name == "mean") return ReductionKind::mean;
  refuse("not a reduction: " + std::string(name));
}

bool is_softmax(std::string_view family) {
  if (family == "softmax") return true;
  if (family == "logistic") return false;
  refuse("not a family of losses: " + std::string(family));
}

// f(T()) for the compute dtype T.
template <class F>
void with_compute(DType dtype, const F& f) {
  dtype == DType::float64 ? f(0.0) : f(0.0f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_forward(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, StringHandle family,
    StringHandle loss, StableListHandle params, std::optional<double> alpha, int64_t k, int64_t ignore_index,
    StringHandle reduction, bool compact) {
  const Text family_text(family), reduction_text(reduction);
  const Handles handles(loss, params);
  const bool softmax = is_softmax(family_text.view()), multi_hot = target.dim() == 2;
  const ReductionKind kind = reduction_of(reduction_text.view());
  if (weight.has_value()) {
    check(!multi_hot, "weight works with class indices only");
    check_tensor(*weight, 1, "weight");
    check(logits.dim() == 2 && weight->size(0) == logits.size(1) &&
              dtype_of(*weight, "weight") == compute_dtype(dtype_of(logits, "logits")),
          "weight must be (classes,), of the compute dtype");
  }
  const Labels labels{ignore_index, 0, std::nullopt};
  auto [terms, state, pick_index, pick_logit] =
      softmax ? forward(chosen().kernels->softmax_forward, logits, target, handles, k, labels, compact)
              : forward(chosen().kernels->logistic_forward, logits, target, handles, k, labels, compact);

  const DType dtype = dtype_of(terms, "terms");
  ReductionProblem problem{};
  problem.rows = terms.size(0);
  problem.columns = terms.dim();
  if (!multi_hot) problem.target = {static_cast<const int64_t*>(target.const_data_ptr()), target.stride(0)};
  problem.ignore_index = ignore_index;
  problem.classes = logits.size(1);
  problem.k = k;
  problem.scaled = alpha.has_value();
  problem.alpha = alpha.value_or(1);
  problem.kind = kind;

  if (softmax && problem.kind == ReductionKind::none && !weight.has_value()) {  // the loss is the terms
    Tensor none = empty({0}, torch_dtype(dtype));
    return {std::move(terms), std::move(none), std::move(state), std::move(pick_index), std::move(pick_logit)};
  }
  Tensor value = problem.kind == ReductionKind::none ? empty({problem.rows}, torch_dtype(dtype))
                                                     : empty({}, torch_dtype(dtype));
  Tensor slopes = softmax ? empty({problem.rows}, torch_dtype(dtype)) : empty({problem.rows, 2}, torch_dtype(dtype));
  with_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    Column<const T> positives{}, weights{};
    if (multi_hot) positives = {static_cast<const T*>(state.const_data_ptr()) + 1, 2};
    if (weight.has_value()) weights = {static_cast<const T*>(weight->const_data_ptr()), weight->stride(0)};
    reduce_terms(problem, static_cast<const T*>(terms.const_data_ptr()), positives, weights,
                 static_cast<T*>(value.mutable_data_ptr()), static_cast<T*>(slopes.mutable_data_ptr()));
  });
  return {std::move(value), std::move(slopes), std::move(state), std::move(pick_index), std::move(pick_logit)};
}

Tensor loss_backward(const Tensor& grad, const Tensor& slopes, const std::optional<Tensor>& logits,
                     const Tensor& target, const Tensor& state, const Tensor& pick_index, const Tensor& pick_logit,
                     StringHandle family, StringHandle loss, StableListHandle params, int64_t k, int64_t ignore_index,
                     int64_t num_classes, bool compact, int64_t first_class, std::optional<int64_t> all_classes) {
  const Text family_text(family);
  const Handles handles(loss, params);
  const Labels labels{ignore_index, first_class, all_classes};
  const bool softmax = is_softmax(family_text.view());
  const auto door = [&](const Tensor& of_terms) {
    return softmax
               ? backward(chosen().kernels->softmax_backward, of_terms, logits, target, state, pick_index, pick_logit,
                          handles, k, labels, num_classes, compact)
               : backward(chosen().kernels->logistic_backward, of_terms, logits, target, state, pick_index, pick_logit,
                          handles, k, labels, num_classes, compact);
  };
  const int64_t columns = softmax ? 1 : 2;
  check_tensor(grad, grad.dim() == 1 ? 1 : 0, "grad");
  check_tensor(slopes, columns, "slopes");
  check_tensor(state, 2, "state");
  if (grad.dim() == 1 && columns == 1 && slopes.size(0) == 0) return door(grad);
  const DType dtype = dtype_of(slopes, "slopes");
  const int64_t rows = state.size(0);
  check(slopes.size(0) == rows && (columns == 1 || slopes.size(1) == 2), "slopes must be what loss_forward returned");
  check(dtype == DType::float32 || dtype == DType::float64, "slopes must be what loss_forward returned");
  check(dtype_of(grad, "grad") == dtype && (grad.dim() == 0 || grad.size(0) == rows),
        "grad must have the shape and the dtype of the loss");
  const Tensor factors = packed(slopes);
  Tensor of_terms = columns == 1 ? empty({rows}, torch_dtype(dtype)) : empty({rows, 2}, torch_dtype(dtype));
  with_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* of_loss = static_cast<const T*>(grad.const_data_ptr());
    const T* factor = static_cast<const T*>(factors.const_data_ptr());
    T* product = static_cast<T*>(of_terms.mutable_data_ptr());
    const int64_t stride = grad.dim() == 0 ? 0 : grad.stride(0);
    for (int64_t i = 0; i < rows * columns; ++i) product[i] = of_loss[i / columns * stride] * factor[i];
  });
  return door(of_terms);
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
  check(name == "exp" || name == "log1p", "expected exp or log1p");
  check_tensor(x, 1, "x");
  check(torch_dtype(x) == aoti_torch_dtype_float32() && x.is_contiguous(), "expected a contiguous float32 tensor");
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
  m.impl("softmax_forward", TORCH_BOX(&fused_losses::softmax_forward));
  m.impl("softmax_backward", TORCH_BOX(&fused_losses::softmax_backward));
  m.impl("logistic_forward", TORCH_BOX(&fused_losses::logistic_forward));
  m.impl("logistic_backward", TORCH_BOX(&fused_losses::logistic_backward));
  m.impl("loss_forward", TORCH_BOX(&fused_losses::loss_forward));
  m.impl("loss_backward", TORCH_BOX(&fused_losses::loss_backward));
  m.impl("_cpu_elementary", TORCH_BOX(&fused_losses::cpu_elementary));
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&fused_losses::cpu_isa));
}
