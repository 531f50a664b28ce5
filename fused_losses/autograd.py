"""One ``torch.autograd.Function`` per family: a door forward, the reduction on N values, a door backward.

Only state per row crosses from forward to backward, and the logits where the form needs them.
"""

import torch
from torch import Tensor

from . import ops
from .reductions import reduction_of, term_scales


class _SecondDerivative(torch.autograd.Function):
    """The identity on dlogits under ``create_graph=True``; its backward raises.

    ``once_differentiable`` would not do: it lets dlogits pass as a constant when the upstream gradient is one, and a
    gradient penalty would silently lose its gradient. For the same reason a gradient must lead back to what it is the
    gradient of: the engine skips whatever does not, and ``torch.autograd.grad`` of loss + penalty would be that of the
    loss alone.
    """

    @staticmethod
    def forward(ctx, gradient, *through):
        return gradient.detach()  # sparse ones have no views

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("the losses of fused_losses are differentiable once: second derivatives are not supported")


def once(gradient: Tensor, *through: Tensor) -> Tensor:
    """A gradient that refuses to be differentiated, under ``create_graph=True``.

    ``through``: the upstream gradient, and a tensor that leads back to the inputs. In the compact form nothing is kept
    that does; hence the row states leave forward as a second output, which does.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiled graph refuses by itself
        return gradient
    return _SecondDerivative.apply(gradient.detach(), *through)


class SoftmaxLoss(torch.autograd.Function):
    """CE, NLLR, CRL: logits (rows, classes), target (rows,) -> loss, state."""

    @staticmethod
    def forward(ctx, logits, target, weight, formula, params, k, ignore_index, reduction):
        num_classes = logits.shape[1]
        compact = ops.keeps_picks(num_classes, k, multi_hot=False)
        values, state, *picks = ops.softmax_forward(logits, target, formula, params, k, ignore_index, compact)
        ctx.reduction = reduction_of(target, weight, ignore_index, reduction, values.dtype)
        ctx.save_for_backward(None if compact else logits, target, state, *picks)
        ctx.door_arguments = formula, params, k, ignore_index, num_classes, compact
        ctx.set_materialize_grads(False)  # the states have none
        return ctx.reduction.loss(values), state

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        logits, target, state, *picks = ctx.saved_tensors
        grad_rows = ctx.reduction.grad_of_values(grad).expand(state.shape[0])
        dlogits = ops.softmax_backward(grad_rows, logits, target, state, *picks, *ctx.door_arguments)
        return once(dlogits, state, grad), *(None,) * 7


class LogisticLoss(torch.autograd.Function):
    """LR, HS-LR, SS-LR: logits (rows, classes), target (rows,) or multi-hot (rows, classes) -> loss, state."""

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
        ctx.set_materialize_grads(False)  # the states have none
        return ctx.reduction.loss(ctx.scales.values(sums)), state

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 9
        logits, target, state, *picks = ctx.saved_tensors
        grad_rows = ctx.scales.grad_of_sums(ctx.reduction.grad_of_values(grad)).expand(state.shape[0], 2)
        dlogits = ops.logistic_backward(grad_rows, logits, target, state, *picks, *ctx.door_arguments)
        return once(dlogits, state, grad), *(None,) * 8
