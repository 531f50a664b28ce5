"""The ``torch.autograd.Function`` of a linear layer in front of any loss: which way leads to the gradients."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .autograd import coefficients_of, once
from .finish import Reduction, ignored_rows
from .linear_ops import (
    class_norms,
    linear_at_once,
    linear_backward,
    linear_backward_picks,
    linear_backward_sparse,
    linear_forward,
    linear_forward_picks,
)
from .linear_rows import gathers_picks, gradient_shapes, one_bias
from .losses import LossSpec
from .margin import MarginTerms
from .merge import merge, nothing, offered


class LayerSpec(NamedTuple):
    """How the layer is computed, and what is wanted of it."""

    dtype: torch.dtype  # in which the layer computes
    normalize: bool
    chunk_bytes: int  # 0 for the default
    sparse_grad: bool
    certified: bool | None  # None: where it pays
    wanted: list[bool]  # which of input, weight and bias get a gradient

    def layer(self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple:
        """What the ops take: input, weight, bias, norms, target, chunk_bytes. A weight that is normalised is cast after
        that."""
        input = input.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        if self.normalize:
            return input, weight, bias, class_norms(weight), target, self.chunk_bytes
        return input, weight.to(self.dtype), bias, None, target, self.chunk_bytes


# --- the ways ---------------------------------------------------------------------------------------------------------


class Again:
    """Chunks of rows; backward computes their logits once more."""

    @staticmethod
    def forward(layer: tuple, certified: bool | None, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics and picks of the rows, as a forward door sees them. certified: of *picks* alone."""
        return linear_forward(*layer, *spec)

    @staticmethod
    def backward(coefficients: Tensor, seen: list, layer: list, wanted: list[bool], spec: LossSpec) -> tuple:
        """The gradients of input, weight and bias from the rows' coefficients; of no elements where not wanted."""
        return linear_backward(coefficients, *seen, *layer, wanted, *spec)


class Picks:
    """Blocks of classes; backward gathers what the rows have picked. Always compact."""

    @staticmethod
    def forward(layer: tuple, certified: bool | None, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
        return linear_forward_picks(*layer, certified, *spec)

    @staticmethod
    def backward(coefficients: Tensor, seen: list, layer: list, wanted: list[bool], spec: LossSpec) -> tuple:
        return linear_backward_picks(coefficients, *seen, *layer, wanted, *spec)


class SparsePicks(Picks):
    """The same, with gradients of weight and bias that are coalesced COO tensors."""

    @staticmethod
    @torch.no_grad()  # under create_graph=True the graph is recorded here, where no op hides it
    def backward(coefficients: Tensor, seen: list, layer: list, wanted: list[bool], spec: LossSpec) -> tuple:
        dinput, *of_picked, picked = linear_backward_sparse(coefficients, *seen, *layer, wanted, *spec)
        num_classes = layer[1].shape[0]

        def scattered(values: Tensor) -> Tensor:
            size = (num_classes, *values.shape[1:])
            return torch.sparse_coo_tensor(picked[None], values, size, is_coalesced=True, check_invariants=False)

        return (
            dinput,
            *(
                scattered(values) if want and values.dim() > 0 else values  # one bias of all classes has no dimension
                for values, want in zip(of_picked, wanted[1:], strict=True)
            ),
        )


def way_of(num_classes: int, k: int, multi_hot: bool, sparse_grad: bool) -> type[Again | Picks]:
    if sparse_grad:
        return SparsePicks
    return Picks if gathers_picks(num_classes, k, multi_hot) else Again


def gradients_at_once(
    layer: LayerSpec, num_classes: int, target: Tensor, reduction: str, margin: MarginTerms | None, spec: LossSpec
) -> bool:
    """Whether the gradients may follow each chunk's forward: what a row counts must be known from the targets alone.

    Not in float16: its gradients would underflow, for the scaler's factor arrives with backward. Not for the means over
    a batch of many labels, whose terms are counted first, and for margins that are numbers alone.
    """
    way = way_of(num_classes, spec.k, spec.multi_hot(target), layer.sparse_grad)
    counts_terms = target.dim() == 2 and spec.alpha is not None
    possible = not counts_terms and (margin is None or margin.numbers())
    return way is Again and any(layer.wanted) and reduction != "none" and layer.dtype != torch.float16 and possible


# --- autograd ---------------------------------------------------------------------------------------------------------


class LinearStatistics(torch.autograd.Function):
    """``StatisticsFromLogits`` of a linear layer's logits, by *picks* or *again*: input (rows, features), weight
    (classes, features) of the shard if there is one -> statistics (rows, 3 | 4 | 3 + P) of whole rows.

    The layer computes in dtype; the gradients come back in the dtypes of input, weight and bias, those of the last two
    rounded once, from the sums. With a shard the gradient of input is the sum of the ranks', one all-reduce, and so is
    that of one bias of all classes; those of weight and bias stay where the classes are.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, target, layer_spec, spec, shard):
        layer = layer_spec.layer(input, weight, bias, target)
        if shard is None:
            mine = spec._replace(compact=False)
        else:
            mine = offered(shard, spec)
        way = way_of(weight.shape[0], mine.k, spec.multi_hot(target), layer_spec.sparse_grad)
        if way is not Again:
            mine = mine._replace(compact=True)
        if weight.shape[0] == 0:
            seen = nothing(input.shape[0], layer[0], target, mine)
        else:
            seen = way.forward(layer, layer_spec.certified, mine)
        if shard is not None:
            seen = merge(shard, seen, target, spec)
        ctx.way, ctx.layer_spec, ctx.spec, ctx.shard = way, layer_spec, mine, shard
        ctx.save_for_backward(input, weight, bias, *layer[:-1], *seen)
        return seen[0]

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, *saved = ctx.saved_tensors
        layer, seen = (*saved[:5], ctx.layer_spec.chunk_bytes), saved[5:]
        wanted, target = ctx.layer_spec.wanted, saved[4]
        if weight.shape[0] == 0:
            gradients = [part.zero_() for part in gradient_shapes(layer[0], layer[1], layer[2], wanted)]
            if ctx.way is SparsePicks:
                gradients[1:] = (part.to_sparse(1) if part.dim() > 0 else part for part in gradients[1:])
        else:
            gradients = ctx.way.backward(coefficients_of(grad, target, ctx.spec), seen, layer, wanted, ctx.spec)
        if ctx.shard is not None:
            for gradient, want in ((gradients[0], wanted[0]), (gradients[2], wanted[2] and one_bias(bias))):
                if want:
                    dist.all_reduce(gradient, group=ctx.shard.group)
        return *gradients_of((input, weight, bias), gradients, wanted, grad), None, None, None, None


class LinearLossAtOnce(torch.autograd.Function):
    """*at once*: forward gives the gradients too, for an upstream gradient of 1; backward multiplies them.

    -> loss, statistics. The gradients of weight and bias are rounded once more by the upstream gradient, unless that is
    1.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, target, target_weight, reduction, layer_spec, spec):
        layer = layer_spec.layer(input, weight, bias, target)
        rows = reference.empty_statistics(layer[0], target, spec)[:, 0]
        reduced = Reduction.of(target, target_weight, reduction, spec, rows)
        share = reduced.without_ignored(reduced.share())
        label_weight = target_weight if spec.labels else None  # that of classes is in the share
        values, statistics, *gradients = linear_at_once(share, label_weight, *layer, layer_spec.wanted, *spec)
        gradients = in_dtypes_of((input, weight, bias), gradients, layer_spec.wanted)
        if torch.compiler.is_compiling():  # a compiled graph keeps what backward needs by itself
            ctx.prepared = None
        else:
            ctx.prepared, gradients = _Prepared(gradients), ()
        ctx.layer_spec, ctx.spec = layer_spec, spec
        ctx.save_for_backward(input, weight, bias, share, label_weight, *layer[:-1], *gradients)
        ctx.mark_non_differentiable(statistics)
        return reduced.loss(values), statistics

    @staticmethod
    def backward(ctx, grad, _):
        input, weight, bias, share, label_weight, *saved = ctx.saved_tensors
        layer, gradients = (*saved[:5], ctx.layer_spec.chunk_bytes), saved[5:]
        wanted, target = ctx.layer_spec.wanted, saved[4]
        in_place = ctx.prepared is not None
        if in_place:
            gradients = ctx.prepared.take()
            if gradients is None:  # retain_graph=True: an earlier pass has them
                _, _, *gradients = linear_at_once(share, label_weight, *layer, wanted, *ctx.spec)
                gradients = in_dtypes_of((input, weight, bias), gradients, wanted)
        gradients = _times(gradients, grad, ignored_rows(target, ctx.spec), in_place)
        return *leading_back(gradients, (input, weight, bias), grad), *(None,) * 5


class _Prepared:
    """Gradients for the first backward pass, which overwrites them: no step holds the weight's twice."""

    def __init__(self, gradients: list[Tensor | None]):
        self._left = [gradients]

    def take(self) -> list[Tensor | None] | None:
        try:
            return self._left.pop()  # in one step: other threads may ask at the same time
        except IndexError:
            return None


@torch.no_grad()
def _times(gradients: list[Tensor | None], grad: Tensor, ignored: Tensor | None, in_place: bool) -> list[Tensor | None]:
    """The gradients of input, weight and bias, times the upstream gradient.

    An upstream gradient that is not finite makes no zero of an ignored row something else.
    """
    if ignored is not None:
        grad = grad.masked_fill(ignored.all(), 0)  # nothing counts
    if in_place and _can_overwrite(grad):
        gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
    else:
        gradients = [None if gradient is None else gradient * grad for gradient in gradients]
    if gradients[0] is not None and ignored is not None:
        gradients[0] = gradients[0].masked_fill_(ignored[:, None], 0)
    return gradients


def _can_overwrite(grad: Tensor) -> bool:
    """Whether one gradient may be overwritten by its product with grad. Under vmap and ``is_grads_batched=True`` grad
    stands for many; a trace (compiled autograd) knows no memory to save. The product is the same."""
    if torch.compiler.is_compiling():
        return False
    kinds = torch._C._functorch
    return not (kinds.is_legacy_batchedtensor(grad) or kinds.is_batchedtensor(grad))


def in_dtypes_of(tensors, gradients, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, each in the dtype of its tensor."""
    triples = zip(tensors, gradients, wanted, strict=True)
    return [gradient.to(tensor.dtype) if want else None for tensor, gradient, want in triples]


def leading_back(gradients: list[Tensor | None], parameters: tuple, grad: Tensor) -> list[Tensor | None]:
    """The gradients, for a backward of a loss of these parameters that may be asked to record itself."""
    through = [parameter for parameter in parameters if parameter is not None]
    return [None if gradient is None else once(gradient, *through, grad) for gradient in gradients]


def gradients_of(parameters: tuple, gradients, wanted: list[bool], grad: Tensor) -> list[Tensor | None]:
    """What backward answers for input, weight and bias."""
    return leading_back(in_dtypes_of(parameters, gradients, wanted), parameters, grad)
