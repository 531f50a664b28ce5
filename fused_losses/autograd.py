"""One ``torch.autograd.Function`` per family: a door forward, the reduction on N values, a door backward.

Only state per row crosses from forward to backward, and the logits where the form needs them. The reductions stand here and
not in the kernels: they are the same for every loss and device and touch N numbers.
"""

import torch
from torch import Tensor

from . import ops


def _row_weight(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor | None:
    """w[y] of each row, (rows,), 0 where ignored."""
    if weight is None:
        return None
    inside = target.clamp(0, weight.shape[0] - 1)  # a bad target's row is NaN already: only never read outside
    return weight.to(dtype)[inside].masked_fill(target == ignore_index, 0)


def _divisor(target: Tensor, row_weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor | int | None:
    """What mean divides by: the weights, or the number of rows, not ignored."""
    if reduction != "mean":
        return None
    if row_weight is not None:
        return row_weight.sum()
    return (target != ignore_index).sum() if target.dim() == 1 else target.shape[0]


def _reduce(values: Tensor, row_weight: Tensor | None, divisor: Tensor | int | None, reduction: str) -> Tensor:
    if row_weight is not None:
        values = values * row_weight
    if reduction == "none":
        return values
    return values.sum() if divisor is None else values.sum() / divisor


def _grad_of_values(grad: Tensor, row_weight: Tensor | None, divisor: Tensor | int | None) -> Tensor:
    """What ``_reduce`` passes on to the values: (rows,), or a scalar that holds for every row."""
    if divisor is not None:
        grad = grad / divisor
    return grad if row_weight is None else grad * row_weight


class _SecondDerivative(torch.autograd.Function):
    """The identity on dlogits under ``create_graph=True``; its backward raises.

    ``once_differentiable`` would not do: it lets dlogits pass as a constant when the upstream gradient is one, and a gradient
    penalty would silently lose its gradient.
    """

    @staticmethod
    def forward(ctx, dlogits):
        return dlogits.view_as(dlogits)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("the losses of fused_losses are differentiable once: second derivatives are not supported")


def _once(dlogits: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiled graph refuses by itself
        return dlogits
    return _SecondDerivative.apply(dlogits.detach().requires_grad_())


class SoftmaxLoss(torch.autograd.Function):
    """CE, NLLR, CRL: logits (rows, classes), target (rows,) -> loss."""

    @staticmethod
    def forward(ctx, logits, target, weight, formula, params, k, ignore_index, reduction):
        num_classes = logits.shape[1]
        compact = ops.keeps_picks(num_classes, k, multi_hot=False)
        value, state, *picks = ops.softmax_forward(logits, target, formula, params, k, ignore_index, compact)
        row_weight = _row_weight(target, weight, ignore_index, value.dtype)
        divisor = _divisor(target, row_weight, ignore_index, reduction)

        ctx.save_for_backward(None if compact else logits, target, state, *picks)
        ctx.reduction = row_weight, divisor
        ctx.door_arguments = formula, params, k, ignore_index, num_classes, compact
        return _reduce(value, row_weight, divisor, reduction)

    @staticmethod
    def backward(ctx, grad):
        logits, target, state, *picks = ctx.saved_tensors
        with torch.no_grad():
            grad = _grad_of_values(grad, *ctx.reduction).expand(state.shape[0])
            dlogits = ops.softmax_backward(grad, logits, target, state, *picks, *ctx.door_arguments)
        return _once(dlogits), *[None] * 7


class LogisticLoss(torch.autograd.Function):
    """LR, HS-LR, SS-LR: logits (rows, classes), target (rows,) or multi-hot (rows, classes) -> loss.

    alpha None takes plain sums over positives and negatives; a number takes means: over the row for index targets, over the
    batch for multi-hot targets, as the authors normalise.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, formula, params, alpha, k, ignore_index, reduction):
        rows, num_classes = logits.shape
        multi_hot = target.dim() == 2
        compact = ops.keeps_picks(num_classes, k, multi_hot)
        sums, state, *picks = ops.logistic_forward(logits, target, formula, params, k, ignore_index, compact)
        pos, neg = sums.unbind(1)

        scale_pos, scale_neg = 1.0, 1.0
        if alpha is not None and multi_hot:
            num_positives = state[:, 1]
            num_negatives = num_classes - num_positives
            chosen = num_negatives.clamp(max=k) if k > 0 else num_negatives
            scale_pos = rows / num_positives.sum().clamp(min=1)
            scale_neg = alpha * rows / chosen.sum().clamp(min=1)
            pos = pos * scale_pos
        elif alpha is not None:
            scale_neg = alpha / max(1, min(k or num_classes, num_classes - 1))
        values = pos + neg * scale_neg
        row_weight = _row_weight(target, weight, ignore_index, values.dtype)
        divisor = _divisor(target, row_weight, ignore_index, reduction)

        ctx.save_for_backward(None if compact and not multi_hot else logits, target, state, *picks)
        ctx.reduction = row_weight, divisor
        ctx.scales = scale_pos, scale_neg
        ctx.door_arguments = formula, params, k, ignore_index, num_classes, compact
        return _reduce(values, row_weight, divisor, reduction)

    @staticmethod
    def backward(ctx, grad):
        logits, target, state, *picks = ctx.saved_tensors
        scale_pos, scale_neg = ctx.scales
        with torch.no_grad():
            grad = _grad_of_values(grad, *ctx.reduction)
            grad_sums = torch.stack((grad * scale_pos, grad * scale_neg), dim=-1).expand(state.shape[0], 2)
            dlogits = ops.logistic_backward(grad_sums, logits, target, state, *picks, *ctx.door_arguments)
        return _once(dlogits), *[None] * 8
