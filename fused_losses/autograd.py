"""The ``torch.autograd.Function`` of all losses: a door forward, the reduction of N values, a door backward.

Only state per row crosses from forward to backward, and the logits where the form needs them.
"""

import torch
from torch import Tensor

from . import ops


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
    if not torch.is_grad_enabled():  # the engine's own word for create_graph=False
        return gradient
    return _SecondDerivative.apply(gradient.detach(), *through)


class LossFromLogits(torch.autograd.Function):
    """Any loss of the family: logits (rows, classes), target (rows,) or multi-hot (rows, classes) -> loss, state."""

    @staticmethod
    def forward(ctx, logits, target, weight, family, formula, params, alpha, k, ignore_index, reduction):
        num_classes = logits.shape[1]
        multi_hot = target.dim() == 2
        compact = ops.keeps_picks(logits.device, num_classes, k, multi_hot)
        loss, slopes, state, pick_index, pick_logit = ops.loss_forward(
            logits, target, weight, family, formula, params, alpha, k, ignore_index, reduction, compact
        )
        kept = None if compact and not multi_hot else logits
        ctx.save_for_backward(slopes, kept, target, state, pick_index, pick_logit)
        ctx.door_arguments = family, formula, params, k, ignore_index, num_classes, compact
        ctx.set_materialize_grads(False)  # the states have none
        return loss, state

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        dlogits = ops.loss_backward(grad, *saved, *ctx.door_arguments)
        return once(dlogits, saved[3], grad), *(None,) * 9
