"""The ``torch.autograd.Function`` of all losses from logits: a door forward, a door backward.

Only a few numbers per row cross from forward to backward, and the logits where the form needs them.
"""

import torch
from torch import Tensor

from . import ops
from .merge import merge, nothing, offered


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
    that does; hence the statistics leave forward as a second output, which does.
    """
    if not torch.is_grad_enabled():  # the engine's own word for create_graph=False
        return gradient
    return _SecondDerivative.apply(gradient.detach(), *through)


class LossFromLogits(torch.autograd.Function):
    """Any loss: logits (rows, classes), target (rows,) or multi-hot (rows, classes) -> loss, statistics."""

    @staticmethod
    def forward(ctx, logits, target, weight, reduction, spec):
        loss, coefficients, statistics, pick_index, pick_logit = ops.forward(logits, target, weight, reduction, *spec)
        kept = None if spec.compact and target.dim() == 1 else logits
        ctx.save_for_backward(coefficients, kept, target, statistics, pick_index, pick_logit)
        ctx.num_classes, ctx.spec = logits.shape[1], spec
        ctx.set_materialize_grads(False)  # the statistics have none
        return loss, statistics

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        coefficients, kept, target, statistics, pick_index, pick_logit = ctx.saved_tensors
        dlogits = ops.backward(
            grad, coefficients, kept, target, statistics, pick_index, pick_logit, ctx.num_classes, *ctx.spec
        )  # fmt: skip
        return once(dlogits, statistics, grad), None, None, None, None


class StatisticsFromLogits(torch.autograd.Function):
    """What a forward door sees of whole rows, (rows, 3 | 4), differentiable by all but m: by l or neg, which lead to
    the negatives of S, and by z_y or pos, which lead to the positives.

    logits: (rows, classes), those of the shard if there is one; target: as at the doors, of all shards.
    """

    @staticmethod
    def forward(ctx, logits, target, spec, shard):
        mine = spec if shard is None else offered(shard, spec)
        if logits.shape[1] == 0:
            seen = nothing(logits.shape[0], logits, target, mine)
        else:
            seen = ops.forward(logits, target, None, "none", *mine)[2:]
        if shard is not None:
            seen = merge(shard, seen, target, spec)
        kept = None if mine.compact and target.dim() == 1 else logits
        ctx.save_for_backward(kept, target, *seen)
        ctx.num_classes, ctx.spec = logits.shape[1], mine
        return seen[0]

    @staticmethod
    def backward(ctx, grad):
        kept, target, statistics, pick_index, pick_logit = ctx.saved_tensors
        if ctx.num_classes == 0:
            dlogits = pick_logit.new_empty((statistics.shape[0], 0))
        else:
            dlogits = ops.backward(
                grad.new_ones(()), coefficients_of(grad, target), kept, target, statistics, pick_index, pick_logit,
                ctx.num_classes, *ctx.spec,
            )  # fmt: skip
        return once(dlogits, statistics, grad), None, None, None


def coefficients_of(grad: Tensor, target: Tensor) -> Tensor:
    """The coefficients c and t (rows, 2) from the gradient of the statistics (rows, 3 | 4). d pos / d z is
    -sigma(-z)."""
    return grad[:, 1:3] if target.dim() == 1 else torch.stack((grad[:, 1], -grad[:, 2]), dim=1)


class Finish(torch.autograd.Function):
    """statistics (rows, 3 | 4), target -> loss: N numbers, where they come from several doors."""

    @staticmethod
    def forward(ctx, statistics, target, weight, reduction, spec):
        loss, coefficients = ops.finish(statistics, target, weight, reduction, *spec)
        ctx.save_for_backward(statistics, target, coefficients)
        return loss

    @staticmethod
    def backward(ctx, grad):
        statistics, target, coefficients = ctx.saved_tensors
        to_second, to_third = (coefficients * grad.reshape(-1, 1)).unbind(1)
        zeros = torch.zeros_like(to_second)
        if target.dim() == 1:
            dstatistics = torch.stack((zeros, to_second, to_third), dim=1)
        else:
            dstatistics = torch.stack((zeros, to_second, -to_third, zeros), dim=1)
        return once(dstatistics, statistics, grad), None, None, None, None
