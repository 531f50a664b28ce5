"""The linear layer's functions as ops, opaque to the compiler, which would unroll their loops over chunks."""

import torch

from . import flops, linear_certified, ops, reference
from . import linear_rows as rows
from .linear_rows import gradient_shapes, seen_shapes
from .losses import LossSpec

_LAYER = "Tensor input, Tensor weight, Tensor? bias, Tensor? norms, Tensor target, int chunk_bytes"
_SEEN = "Tensor statistics, Tensor pick_index, Tensor pick_logit"
_BACKWARD = f"(Tensor coefficients, {_SEEN}, {_LAYER}, bool[] wanted, {ops.SPEC})"
_GRADIENTS = "Tensor dinput, Tensor dweight, Tensor dbias"


def _backward_shapes(
    coefficients, statistics, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, wanted, *spec,
):  # fmt: skip
    return gradient_shapes(input, weight, bias, wanted)


def _sparse_shapes(
    coefficients, statistics, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, wanted, *spec,
):  # fmt: skip
    _, want_weight, want_bias = wanted
    want_bias = want_bias and not rows.one_bias(bias)
    picked = torch.library.get_ctx().new_dynamic_size() if want_weight or want_bias else 0
    dinput, dweight, dbias = gradient_shapes(input, weight, bias, wanted)
    if want_weight:
        dweight = dweight.new_empty((picked, *weight.shape[1:]))
    if want_bias:
        dbias = dbias.new_empty((picked,))
    return dinput, dweight, dbias, target.new_empty((picked,))


def _at_once_shapes(share, label_weight, input, weight, bias, norms, target, chunk_bytes, wanted, *spec):
    statistics = reference.empty_statistics(input, target, LossSpec(*spec))
    return torch.empty_like(share), statistics, *gradient_shapes(input, weight, bias, wanted)


class_norms = ops.define(
    "class_norms(Tensor weight) -> Tensor",
    rows.class_norms,
    lambda weight: weight.new_empty(weight.shape[:1], dtype=reference.compute_dtype(weight.dtype)),
)
linear_forward = ops.define(f"linear_forward({_LAYER}, {ops.SPEC}) -> ({_SEEN})", rows.linear_forward, seen_shapes)
linear_forward_picks = ops.define(
    f"linear_forward_picks({_LAYER}, bool? certified, {ops.SPEC}) -> ({_SEEN})",
    linear_certified.linear_forward_picks,
    lambda input, weight, bias, norms, target, chunk_bytes, certified, *spec: seen_shapes(
        input, weight, bias, norms, target, chunk_bytes, *spec
    ),
)
linear_at_once = ops.define(
    f"linear_at_once(Tensor share, Tensor? label_weight, {_LAYER}, bool[] wanted, {ops.SPEC}) "
    f"-> (Tensor values, Tensor statistics, {_GRADIENTS})",
    rows.linear_at_once,
    _at_once_shapes,
)
linear_backward = ops.define(f"linear_backward{_BACKWARD} -> ({_GRADIENTS})", rows.linear_backward, _backward_shapes)
linear_backward_picks = ops.define(
    f"linear_backward_picks{_BACKWARD} -> ({_GRADIENTS})", rows.linear_backward_picks, _backward_shapes
)
linear_backward_sparse = ops.define(
    f"linear_backward_sparse{_BACKWARD} -> ({_GRADIENTS}, Tensor picked)", rows.linear_backward_sparse, _sparse_shapes
)
flops.register_when_imported()
