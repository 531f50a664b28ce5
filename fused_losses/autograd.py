"""The ``torch.autograd.Function`` of all losses from logits: a door forward, a door backward.

Only a few numbers per row cross from forward to backward, and the logits where the form needs them.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .finish_labels import LabelOdds, label_odds
from .losses import LossSpec
from .margin import MarginTerms, first_label
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


def is_differentiated(logits: Tensor) -> bool:
    """Whether a Function is to stand around the ops: also in forward mode, which it refuses, and in a graph."""
    if torch.compiler.is_compiling() or (logits.requires_grad and torch.is_grad_enabled()):
        return True
    return forward_ad.unpack_dual(logits).tangent is not None


class LossFromLogits(torch.autograd.Function):
    """Any loss: logits (rows, classes), target (rows,), multi-hot (rows, classes) or labels (rows, P) -> loss,
    statistics."""

    @staticmethod
    def forward(ctx, logits, target, weight, reduction, spec):
        given = spec.given()
        loss, coefficients, statistics, pick_index, pick_logit = ops.forward(logits, target, weight, reduction, *given)
        kept = None if spec.compact and not spec.multi_hot(target) else logits
        ctx.save_for_backward(coefficients, kept, target, statistics, pick_index, pick_logit)
        ctx.last_arguments = logits.shape[1], *given
        ctx.set_materialize_grads(False)  # the statistics have none
        return loss, statistics

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        coefficients, kept, target, statistics, pick_index, pick_logit = ctx.saved_tensors
        dlogits = ops.backward(
            grad, coefficients, kept, target, statistics, pick_index, pick_logit, *ctx.last_arguments
        )
        return once(dlogits, statistics, grad), None, None, None, None


class StatisticsFromLogits(torch.autograd.Function):
    """What a forward door sees of whole rows, (rows, 3 | 4 | 3 + P), differentiable by all but m: by l, neg or s,
    which lead to the negatives of S, and by z_y, z_p or pos, which lead to the positives.

    logits: (rows, classes), those of the shard if there is one; target: as at the doors, of all shards.
    """

    @staticmethod
    def forward(ctx, logits, target, spec, shard):
        mine = spec if shard is None else offered(shard, spec)
        if logits.shape[1] == 0:
            seen = nothing(logits.shape[0], logits, target, mine)
        else:
            seen = ops.statistics(logits, target, *mine)
        if shard is not None:
            seen = merge(shard, seen, target, spec)
        kept = None if mine.compact and not spec.multi_hot(target) else logits
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
                grad.new_ones(()), coefficients_of(grad, target, ctx.spec), kept, target, statistics, pick_index,
                pick_logit, ctx.num_classes, *ctx.spec,
            )  # fmt: skip
        return once(dlogits, statistics, grad), None, None, None


def coefficients_of(grad: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
    """The coefficients of the rows from the gradient of their statistics. d pos / d z is -sigma(-z)."""
    return torch.stack((grad[:, 1], -grad[:, 2]), dim=1) if spec.multi_hot(target) else grad[:, 1:]


class WithMargin(torch.autograd.Function):
    """Statistics with psi(z_p) for z_p; differentiable by them, and by scale and offset where these are tensors."""

    @staticmethod
    def forward(ctx, statistics, scale, offset, terms, spec):
        first = first_label(spec)
        psi, slope, by_scale = terms.psi(statistics[:, first:])
        ctx.first = first
        ctx.save_for_backward(statistics, slope, by_scale)
        return torch.cat((statistics[:, :first], psi), dim=1)

    @staticmethod
    def backward(ctx, grad):
        statistics, slope, by_scale = ctx.saved_tensors
        of_psi = grad[:, ctx.first :]
        by_z = torch.cat((grad[:, : ctx.first], of_psi * slope), dim=1)
        _, wants_scale, wants_offset, *_ = ctx.needs_input_grad
        dscale = once((of_psi * by_scale).sum(), statistics, grad) if wants_scale else None
        doffset = once((of_psi * (1 - slope)).sum(), statistics, grad) if wants_offset else None
        return once(by_z, statistics, grad), dscale, doffset, None, None


def with_margin(statistics: Tensor, terms: MarginTerms | None, spec: LossSpec) -> Tensor:
    if terms is None:
        return statistics
    return WithMargin.apply(statistics, terms.scale, terms.offset, terms, spec)


class LabelLogOdds(torch.autograd.Function):
    """d_p of the labels (rows, P), 0 in empty places, differentiable by the statistics: for the user's own losses."""

    @staticmethod
    def forward(ctx, statistics, labels):
        present = labels >= 0
        odds = label_odds(statistics, present)
        ctx.save_for_backward(statistics, present, *odds)
        return odds.d.masked_fill(~present, 0)

    @staticmethod
    def backward(ctx, of_d):
        statistics, present, *odds = ctx.saved_tensors
        c, t = LabelOdds(*odds).gradient(of_d.masked_fill(~present, 0))
        zeros = torch.zeros_like(c)
        dstatistics = torch.cat((torch.stack((zeros, c, zeros), dim=1), t), dim=1)
        return once(dstatistics, statistics, of_d), None


class Finish(torch.autograd.Function):
    """statistics (rows, 3 | 4 | 3 + P), target -> loss: N numbers, where they come from several doors."""

    @staticmethod
    def forward(ctx, statistics, target, weight, reduction, spec):
        loss, coefficients = ops.finish(statistics, target, weight, reduction, *spec)
        ctx.save_for_backward(statistics, coefficients)
        ctx.multi_hot = spec.multi_hot(target)  # not the spec: the compiler cannot carry its numbers across
        return loss

    @staticmethod
    def backward(ctx, grad):
        statistics, coefficients = ctx.saved_tensors
        scaled = coefficients * grad.reshape(-1, 1)
        zeros = torch.zeros_like(scaled[:, :1])
        if ctx.multi_hot:
            dstatistics = torch.cat((zeros, scaled[:, :1], -scaled[:, 1:], zeros), dim=1)
        else:
            dstatistics = torch.cat((zeros, scaled), dim=1)
        return once(dstatistics, statistics, grad), *(None,) * 4
