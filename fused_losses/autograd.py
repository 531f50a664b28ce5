"""One ``torch.autograd.Function`` per family: a door forward, the reduction on N values, a door backward.

Only state per row crosses from forward to backward, and the logits where the form needs them.
"""

import torch
from torch import Tensor

from . import ops
from .reductions import reduction_of, term_scales


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


def once(dlogits: Tensor) -> Tensor:
    """A gradient that refuses to be differentiated, under ``create_graph=True``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiled graph refuses by itself
        return dlogits
    return _SecondDerivative.apply(dlogits.detach().requires_grad_())


class SoftmaxLoss(torch.autograd.Function):
    """CE, NLLR, CRL: logits (rows, classes), target (rows,) -> loss."""

    @staticmethod
    def forward(ctx, logits, target, weight, formula, params, k, ignore_index, reduction):
        num_classes = logits.shape[1]
        compact = ops.keeps_picks(num_classes, k, multi_hot=False)
        values, state, *picks = ops.softmax_forward(logits, target, formula, params, k, ignore_index, compact)
        ctx.reduction = reduction_of(target, weight, ignore_index, reduction, values.dtype)
        ctx.save_for_backward(None if compact else logits, target, state, *picks)
        ctx.door_arguments = formula, params, k, ignore_index, num_classes, compact
        return ctx.reduction.loss(values)

    @staticmethod
    def backward(ctx, grad):
        logits, target, state, *picks = ctx.saved_tensors
        with torch.no_grad():
            grad = ctx.reduction.grad_of_values(grad).expand(state.shape[0])
            dlogits = ops.softmax_backward(grad, logits, target, state, *picks, *ctx.door_arguments)
        return once(dlogits), *[None] * 7


class LogisticLoss(torch.autograd.Function):
    """LR, HS-LR, SS-LR: logits (rows, classes), target (rows,) or multi-hot (rows, classes) -> loss."""

    @staticmethod
    def forward(ctx, logits, target, weight, formula, params, alpha, k, ignore_index, reduction):
        num_classes = logits.shape[1]
        multi_hot = target.dim() == 2
        compact = ops.keeps_picks(num_classes, k, multi_hot)
        sums, state, *picks = ops.logistic_forward(logits, target, formula, params, k, ignore_index, compact)
        ctx.scales = term_scales(alpha, state[:, 1] if multi_hot else None, num_classes, k)
        ctx.reduction = reduction_of(target, weight, ignore_index, reduction, sums.dtype)
        ctx.save_for_backward(None if compact and not multi_hot else logits, target, state, *picks)
        ctx.door_arguments = formula, params, k, ignore_index, num_classes, compact
        return ctx.reduction.loss(ctx.scales.values(sums))

    @staticmethod
    def backward(ctx, grad):
        logits, target, state, *picks = ctx.saved_tensors
        with torch.no_grad():
            grad = ctx.scales.grad_of_sums(ctx.reduction.grad_of_values(grad)).expand(state.shape[0], 2)
            dlogits = ops.logistic_backward(grad, logits, target, state, *picks, *ctx.door_arguments)
        return once(dlogits), *[None] * 8
