"""How a linear layer and a loss are computed together without ever holding the logits of the whole batch.

The batch is walked in chunks of rows whose logits fit a byte budget. Three ways lead to the gradients, chosen by
``gathers_picks`` and ``_gradients_with_forward``:

- over the k hardest, k a small share of the classes: forward keeps (index, logit) pairs; backward touches N * (k + 1) rows of the weight;
- a scalar loss over many classes: each chunk's gradient follows its forward at once (three matmuls of N x C x D instead of four), and
  backward only multiplies by the upstream scalar;
- otherwise (one upstream gradient per row, or float16, whose gradients would underflow before the scaler's factor is known): backward
  computes the chunk's logits again.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .autograd import once
from .reductions import reduction_of, term_scales


def gathers_picks(num_classes: int, k: int, multi_hot: bool) -> bool:
    """Whether backward gathers the picked classes; a larger share is cheaper as a dense matmul."""
    return 0 < k <= num_classes // 16 and not multi_hot


def _gradients_with_forward(reduction: str, dtype: torch.dtype) -> bool:
    return reduction != "none" and dtype != torch.float16


# --- chunks of rows ---------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """z = x w^T + bias, or x w^T / |w| with norms."""

    weight: Tensor  # (classes, features)
    bias: Tensor | None  # (classes,)
    norms: Tensor | None  # (classes,)

    def chunks(self, input: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits, one chunk at a time, always in the same memory."""
        buffer = input.new_empty((min(chunk_rows, input.shape[0]), self.weight.shape[0]))
        for start in range(0, input.shape[0], chunk_rows):
            rows = slice(start, min(start + chunk_rows, input.shape[0]))
            z = buffer[: rows.stop - rows.start]
            if self.bias is None:
                torch.mm(input[rows], self.weight.t(), out=z)
            else:
                torch.addmm(self.bias, input[rows], self.weight.t(), out=z)
            if self.norms is not None:
                z /= self.norms
            yield rows, z


class _Gradients:
    """The gradients of a layer, summed chunk by chunk; those of weight and bias in float32 for 16-bit logits."""

    def __init__(self, input: Tensor, layer: _Layer, wanted: list[bool]):
        num_classes, num_features = layer.weight.shape
        dtype = reference.compute_dtype(input.dtype)
        want_input, want_weight, want_bias = wanted
        self.x, self.layer = input, layer
        self.input = torch.empty_like(input) if want_input else None
        self.weight = input.new_zeros((num_classes, num_features), dtype=dtype) if want_weight else None
        self.bias = input.new_zeros((num_classes,), dtype=dtype) if want_bias else None
        self.pull = input.new_zeros((num_classes,), dtype=dtype) if want_weight and layer.norms is not None else None

    def add(self, rows: slice, z: Tensor, dz: Tensor) -> None:
        if self.pull is not None:
            self.pull += (dz.to(self.pull.dtype) * z).sum(0)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        if self.layer.norms is not None:
            dz = dz.div_(self.layer.norms)
        if self.input is not None:
            torch.mm(dz, self.layer.weight, out=self.input[rows])
        if self.weight is not None:
            _add_product(self.weight, dz.t(), self.x[rows])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.x.dtype
        if self.pull is not None:
            _pull_back(self.weight, self.layer.weight, self.layer.norms, self.pull)
        none = self.x.new_empty((0,))
        return (
            none if self.input is None else self.input,
            none if self.weight is None else self.weight.to(dtype),
            none if self.bias is None else self.bias.to(dtype),
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _pull_back(dweight: Tensor, weight: Tensor, norms: Tensor, pull: Tensor) -> None:
    """The part of dw that runs through |w|: -(sum over rows of dz * z) * w / |w|^2. Rows alike in all four."""
    dweight.addcmul_(weight.to(dweight.dtype), (pull / norms**2)[:, None], value=-1)


_DOORS = {
    "softmax": (ops.softmax_forward, ops.softmax_backward),
    "logistic": (ops.logistic_forward, ops.logistic_backward),
}


def _linear_forward(
    input, weight, bias, norms, target, family, loss, params, k, ignore_index, compact, chunk_rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward door of the family over all rows."""
    forward, _ = _DOORS[family]
    outputs = _forward_shapes(
        input, weight, bias, norms, target, family, loss, params, k, ignore_index, compact, chunk_rows
    )
    if input.device.type == "cpu" and target.dim() == 1:
        reference.check_target(
            target, weight.shape[0], ignore_index
        )  # with the row's number in the batch, not in the chunk
    for rows, z in _Layer(weight, bias, norms).chunks(input, chunk_rows):
        for whole, part in zip(outputs, forward(z, target[rows], loss, params, k, ignore_index, compact), strict=True):
            whole[rows] = part
    return outputs


def _linear_backward(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, family, loss, params, k, ignore_index, chunk_rows, wanted,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias from grad of the rows: logits chunk by chunk once more."""
    _, backward = _DOORS[family]
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, wanted)
    num_classes = weight.shape[0]
    for rows, z in layer.chunks(input, chunk_rows):
        saved = z, target[rows], state[rows], pick_index[rows], pick_logit[rows]
        gradients.add(rows, z, backward(grad[rows], *saved, loss, params, k, ignore_index, num_classes, False))
    return gradients.result()


def _linear_forward_backward(
    grad, input, weight, bias, norms, target, family, loss, params, k, ignore_index, chunk_rows, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values or sums of the rows, and the gradients of input, weight and bias for grad of the rows."""
    forward, backward = _DOORS[family]
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, wanted)
    num_classes = weight.shape[0]
    values = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if input.device.type == "cpu" and target.dim() == 1:
        reference.check_target(target, num_classes, ignore_index)
    for rows, z in layer.chunks(input, chunk_rows):
        values[rows], *saved = forward(z, target[rows], loss, params, k, ignore_index, False)
        dz = backward(grad[rows], z, target[rows], *saved, loss, params, k, ignore_index, num_classes, False)
        gradients.add(rows, z, dz)
    return values, *gradients.result()


# --- the same as ops: opaque to the compiler, which would unroll the loop over chunks ---------------------------------

_LAYER = "Tensor input, Tensor weight, Tensor? bias, Tensor? norms, Tensor target, "
_LOSS = "str family, str loss, float[] params, int k, int ignore_index, "
_GRADIENTS = "Tensor dinput, Tensor dweight, Tensor dbias)"


def _forward_shapes(input, weight, bias, norms, target, family, loss, params, k, ignore_index, compact, chunk_rows):
    rows = input.shape[0]
    dtype = reference.compute_dtype(input.dtype)
    values = input.new_empty((rows,) if family == "softmax" else (rows, 2), dtype=dtype)
    state = input.new_empty((rows, 3 if family == "softmax" else 2), dtype=dtype)
    return values, state, *ops.empty_picks(input, k, compact)


def _gradient_shapes(input, weight, wanted):
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(input.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


def _backward_shapes(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, family, loss, params, k, ignore_index, chunk_rows, wanted,
):  # fmt: skip
    return _gradient_shapes(input, weight, wanted)


def _forward_backward_shapes(
    grad, input, weight, bias, norms, target, family, loss, params, k, ignore_index, chunk_rows, wanted
):
    return grad.new_empty(grad.shape), *_gradient_shapes(input, weight, wanted)


linear_forward = ops.define(
    f"linear_forward({_LAYER}{_LOSS}bool compact, int chunk_rows) "
    "-> (Tensor values, Tensor state, Tensor pick_index, Tensor pick_logit)",
    _linear_forward,
    _forward_shapes,
)
linear_backward = ops.define(
    "linear_backward(Tensor grad, Tensor state, Tensor pick_index, Tensor pick_logit, "
    f"{_LAYER}{_LOSS}int chunk_rows, bool[] wanted) -> ({_GRADIENTS}",
    _linear_backward,
    _backward_shapes,
)
linear_forward_backward = ops.define(
    f"linear_forward_backward(Tensor grad, {_LAYER}{_LOSS}int chunk_rows, bool[] wanted) -> (Tensor values, {_GRADIENTS}",
    _linear_forward_backward,
    _forward_backward_shapes,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


class LinearRowLoss(torch.autograd.Function):
    """input (rows, features), weight (classes, features), target -> loss."""

    @staticmethod
    def forward(
        ctx, input, weight, bias, target, class_weight, family, formula, params, alpha, k, ignore_index, reduction,
        normalize, chunk_rows, sparse_grad, grad_enabled,
    ):  # fmt: skip
        num_classes = weight.shape[0]
        multi_hot = target.dim() == 2
        dtype = reference.compute_dtype(input.dtype)
        norms = None
        if normalize:
            norms = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).clamp_(min=torch.finfo(dtype).tiny)
        ctx.reduction = reduction_of(target, class_weight, ignore_index, reduction, dtype)
        ctx.scales = None
        if family == "logistic":
            num_positives = (target != 0).sum(1).to(dtype) if multi_hot else None
            ctx.scales = term_scales(alpha, num_positives, num_classes, k)

        gathers = gathers_picks(num_classes, k, multi_hot)
        wanted = [grad_enabled and wanted for wanted in ctx.needs_input_grad[:3]]
        layer = input, weight, bias, norms, target
        loss = family, formula, params, k, ignore_index
        ctx.finished = any(wanted) and not gathers and _gradients_with_forward(reduction, input.dtype)
        if ctx.finished:
            grad = _grad_of_rows(ctx, input.new_ones((), dtype=dtype), input.shape[0])
            values, *gradients = linear_forward_backward(grad, *layer, *loss, chunk_rows, wanted)
            ctx.save_for_backward(*gradients)
        else:
            values, *state = linear_forward(*layer, *loss, gathers, chunk_rows)
            ctx.save_for_backward(*state, *layer)
        ctx.arguments = loss, chunk_rows, wanted
        ctx.gathers, ctx.sparse_grad = gathers, sparse_grad
        return ctx.reduction.loss(values if ctx.scales is None else ctx.scales.values(values))

    @staticmethod
    def backward(ctx, grad):
        loss, chunk_rows, wanted = ctx.arguments
        with torch.no_grad():
            if ctx.finished:
                gradients = [gradient * grad.to(gradient.dtype) for gradient in ctx.saved_tensors]
            else:
                saved = ctx.saved_tensors
                grad = _grad_of_rows(ctx, grad, saved[0].shape[0])
                if ctx.gathers:
                    gradients = _gather_gradients(grad, *saved, *loss, wanted, ctx.sparse_grad)
                else:
                    gradients = linear_backward(grad, *saved, *loss, chunk_rows, wanted)
        gradients = (once(gradient) if want else None for gradient, want in zip(gradients, wanted, strict=True))
        return *gradients, *[None] * 13


def _grad_of_rows(ctx, grad: Tensor, num_rows: int) -> Tensor:
    """What the backward doors take, (rows,) or (rows, 2)."""
    grad = ctx.reduction.grad_of_values(grad)
    if ctx.scales is None:
        return grad.expand(num_rows)
    return ctx.scales.grad_of_sums(grad).expand(num_rows, 2)


def _gather_gradients(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, family, loss, params, k, ignore_index, wanted, sparse_grad,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input, weight and bias through the target and the k picks of each row alone: O(rows * k * features).

    The picks are sorted by class, and each class sums its rows in the order of the batch: no float atomics, the same bits in
    every run.
    """
    num_classes = weight.shape[0]
    z_y = state[:, -1:] if family == "softmax" else state[:, :1]
    z = torch.cat((z_y, pick_logit.to(state.dtype)), dim=1)  # (rows, 1 + k)
    classes = torch.cat((target[:, None], pick_index), dim=1)
    if family == "softmax":
        dz_y, dz = reference.softmax_gradient(grad, state, z[:, 1:], loss, params)
        dz_y = dz_y[:, None]
    else:
        dz_y, dz = reference.logistic_gradient(grad, z_y, z[:, 1:], loss, params)
    dz = torch.cat((dz_y, dz), dim=1)
    nowhere = (classes < 0) | (classes >= num_classes) | (target == ignore_index)[:, None]
    classes = classes.masked_fill(nowhere, num_classes)  # sorted behind every class
    dz = dz.masked_fill(nowhere, 0)
    du = dz if norms is None else dz / norms[classes.clamp(max=num_classes - 1)]  # by x w^T

    want_input, want_weight, want_bias = wanted
    dinput = dweight = dbias = None
    if want_input:
        dinput = F.embedding_bag(
            classes.clamp(max=num_classes - 1), weight, mode="sum", per_sample_weights=du.to(weight.dtype)
        )
        poisoned = (dz_y.isnan() & (target != ignore_index)[:, None]) | state.isnan().any(1, keepdim=True)
        dinput = dinput.masked_fill(poisoned, math.nan)
    if want_weight or want_bias:
        by_class = _ByClass(classes, num_classes, only_picked=sparse_grad)
    if want_weight:
        dweight = by_class.sum_rows(du, input.to(du.dtype))  # (bags, features)
        if norms is not None:
            _pull_back(dweight, by_class.of(weight), by_class.of(norms), by_class.sum(dz * z))
        dweight = by_class.gradient(dweight.to(weight.dtype))
    if want_bias:
        dbias = by_class.gradient(by_class.sum(dz).to(bias.dtype))
    return dinput, dweight, dbias


class _ByClass:
    """The entries of a (rows, slots) matrix of classes, sorted by class and, within a class, in the order of the batch.

    A bag holds the entries of one class: of every class, or only of those that occur. Entries of class num_classes belong nowhere.
    """

    def __init__(self, classes: Tensor, num_classes: int, only_picked: bool):
        sorted_classes, self.order = classes.flatten().sort(stable=True)
        self.row = self.order // classes.shape[1]
        self.num_classes = num_classes
        self.picked = None
        if only_picked:
            bags, counts = sorted_classes.unique_consecutive(return_counts=True)
            self.picked = bags[bags < num_classes]
            self.starts = counts.cumsum(0) - counts
            self.num_bags = self.picked.shape[0]
        else:
            bags = torch.arange(num_classes + 1, device=classes.device, dtype=sorted_classes.dtype)
            self.starts = torch.searchsorted(sorted_classes, bags)
            self.num_bags = num_classes

    def of(self, rows: Tensor) -> Tensor:
        """The rows of a (classes, ...) tensor, one a bag."""
        return rows if self.picked is None else rows[self.picked]

    def sum_rows(self, factors: Tensor, x: Tensor) -> Tensor:
        """Sum of factor * x[row] over each bag, (bags, features), from factors (rows, slots) and x (rows, features)."""
        factors = factors.flatten()[self.order]
        return F.embedding_bag(self.row, x, self.starts, mode="sum", per_sample_weights=factors)[: self.num_bags]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each bag, (bags,), from values (rows, slots)."""
        ends = self.starts.new_full((1,), values.numel())
        offsets = torch.cat((self.starts, ends))
        return torch.segment_reduce(values.flatten()[self.order], "sum", offsets=offsets, initial=0)[: self.num_bags]

    def gradient(self, bags: Tensor) -> Tensor:
        """The gradient of a (classes, ...) tensor from its bags: dense, or sparse where only the classes picked have bags."""
        if self.picked is None:
            return bags
        size = (self.num_classes, *bags.shape[1:])
        return torch.sparse_coo_tensor(self.picked[None], bags, size, is_coalesced=True, check_invariants=False)
