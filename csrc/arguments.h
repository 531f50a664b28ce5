// What the doors are given: strings, lists and tensors as plain structs, checked before a pointer is made of them.
//
// Built against the LibTorch stable ABI, like ops.cpp, whose only reader this is.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels.h"

namespace fused_losses {

using torch::stable::Tensor;

namespace {

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }  // ValueError in Python

// ---------------------------------------------------------------------------------------------------------- options

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
Spec read_spec(const Kernels& kernels, StringHandle loss_handle, StableListHandle params_handle,
               std::optional<double> alpha, int64_t k, std::optional<int64_t> ignore_index, int64_t first_class,
               int64_t all_classes, bool compact, bool labels, double label_smoothing) {
  const Text loss(loss_handle);
  const Numbers params(params_handle);
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
  spec.labels = labels;
  spec.label_smoothing = label_smoothing;
  check(k >= 0 && k <= INT32_MAX, "k must be 0 or more, and fewer than 2^31");
  check(first_class >= 0, "first_class must not be negative");
  check(all_classes >= 1, "there must be at least one class");
  check(label_smoothing >= 0 && label_smoothing < 1 && (labels || label_smoothing == 0),
        "label_smoothing must be in [0, 1), and 0 without labels");
  check(!labels || !spec.ignores || spec.ignore_index == -1, "ignore_index must be None or -1 with labels");
  return spec;
}

Reduction reduction_of(std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "sum") return Reduction::sum;
  if (name == "mean") return Reduction::mean;
  refuse("not a reduction: " + std::string(name));
}

// ---------------------------------------------------------------------------------------------------------- tensors

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

void check_target(const Tensor& target) { check_tensor(target, target.dim() == 2 ? 2 : 1, "target"); }

// --------------------------------------------------------------------------------------------------------- problems

bool is_multi_hot(const Tensor& target, const Spec& spec) { return target.dim() == 2 && !spec.labels; }

// The target, which must outlive what is made of it, with contiguous rows if it is multi-hot.
Target read_target(const Tensor& target, int64_t rows, const Spec& spec) {
  Target read{target.const_data_ptr(), target.stride(0), is_multi_hot(target, spec), spec.labels, {}, 1, 0};
  check(target.size(0) == rows, "target must have as many rows as the logits");
  if (read.multi_hot) {
    check(spec.family == Family::logistic, "multi-hot targets are for the logistic family only");
    read.entries = entries_of(target);
    return read;
  }
  const bool int64 = torch_dtype(target) == aoti_torch_dtype_int64();
  if (spec.labels) {
    check(int64 && target.dim() == 2 && target.size(1) >= 1 && target.size(1) <= INT32_MAX,
          "labels must be int64 (rows, P), P >= 1 and fewer than 2^31");
    read.places = target.size(1);
    read.place_stride = target.stride(1);
  } else {
    check(int64, "target must be int64 class indices (rows,)");
  }
  return read;
}

Tensor with_readable_rows(const Tensor& target, const Spec& spec) {
  return is_multi_hot(target, spec) ? with_contiguous_rows(target) : target;
}

[[noreturn]] void refuse_class(int64_t y, int64_t row, const Spec& spec) {
  throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds. (row " + std::to_string(row) + ", " +
                          std::to_string(spec.all_classes) + " classes)");
}

void check_class_indices(const Target& target, int64_t rows, const Spec& spec) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = target.label(row);
    if ((y < 0 || y >= spec.all_classes) && !target.ignored(row, spec)) refuse_class(y, row, spec);
  }
}

void check_lists(const Target& target, int64_t rows, const Spec& spec) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t place = 0; place < target.places; ++place) {
      const int64_t y = target.label(row, place);
      if (y < -1 || y >= spec.all_classes) refuse_class(y, row, spec);
      if (place == 0) continue;
      const int64_t before = target.label(row, place - 1);
      check(y == -1 || (before != -1 && before < y), "labels must be ascending, with -1 behind the last");
    }
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
  } else if (spec.labels) {
    check_lists(problem.target, rows, spec);
  } else {
    check_class_indices(problem.target, rows, spec);
  }
  return problem;
}

}  // namespace
}  // namespace fused_losses
