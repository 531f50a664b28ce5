"""A linear layer and any loss of the family in one step, without ever holding the logits of the whole batch.

:func:`linear_cross_entropy` follows ``torch.nn.functional.linear_cross_entropy``. How it is computed:
``linear_autograd.py``, ``linear_rows.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .arguments import (
    FLOATING,
    IGNORE_INDEX,
    Options,
    Reduce,
    as_int64,
    as_integer,
    check_device,
    check_kind,
    check_labels,
    check_margin,
    check_options,
    check_target,
    fingerprint,
    margin_from_logits,
    rows_of,
    told_of,
    told_of_rows,
)
from .finish import RowStatistics, ignored_rows
from .functional import finished, with_numbers_of
from .labels import Labels
from .linear_autograd import LayerSpec, LinearLossAtOnce, LinearStatistics, gradients_at_once
from .linear_checkpoint import name_by_classes, take_own_rows
from .linear_rows import MIB
from .linear_topk import TopK, topk_of_layer
from .losses import CrossEntropy, Loss, OwnSoftmax
from .margin import Margin, MarginTerms
from .modules import CrossEntropyLoss, RowLoss
from .shard import (
    ClassShard,
    check_agreement,
    gather_batch,
    is_dtensor,
    local_of,
    move_rows,
    own_rows_of,
    width_of_shard,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import Unpack

LEARNED_SCALE = 1 / 0.07  # where a learned scale starts


@dataclass(frozen=True)
class LinearLossOptions:
    """How a linear loss is computed; never what it is.

    Args:
        chunk_bytes: budget for the logits that exist at a time, an integer >= 1; at least one row of them (over the k
            hardest, with k at most C / 24: one row of a block of classes; beside it the blocks' picks, up to C / 24 a
            row, 8 bytes each), over which their gradient is written. Default: None, which is 4 MiB, on an accelerator
            256 MiB; over more negatives at least the weight's bytes.
        sparse_grad: the gradients of weight and bias are coalesced sparse COO tensors over the classes picked, as
            ``nn.Embedding(sparse=True)`` gives, for ``torch.optim.SparseAdam`` and for SGD (without momentum: for
            sparse gradients PyTorch's buffer is a list that grows). Needs class indices or ``Labels``, and ``k`` (or
            ``ratio``) below C - 1. On CUDA backward waits for their number: the one synchronisation here. Not under
            ``torch.compile``, nor with weight decay or ``clip_grad_norm_``, which know no sparse gradients: clip by the
            norm of ``weight.grad.coalesce().values()``. Nor inside of ``DistributedDataParallel``, which takes them of
            ``nn.Embedding`` alone, or of ``fully_shard``: leave the classifier out of these, sharded by classes with
            ``shard`` and ``gather_input``. Default: False.
        certified: whether a float32 layer finds the k hardest (k at most C / 24, or any with ``sparse_grad``, and those
            of :meth:`LinearLoss.topk`) by products in bfloat16, with a proven bound of their error; what the bound does
            not exclude gets its logit in float64. The result is that of float64 logits, rounded to float32. None: where
            it pays, on CPUs with AVX-512 BF16 (``show_config()`` says it) and large layers. True: on every CPU and on
            CUDA, where it may be slower; on CUDA forward then waits for the number of rows that nothing was proven of.
            False: never. Layers that compute in another dtype, as under autocast, do not feel it. Beside the budget for
            logits it takes lists of at most 7 k + 200 classes, 12 bytes each, for each of 16 or more rows and each
            thread. Default: None.

    Raises:
        TypeError: chunk_bytes that is no integer; certified that is neither None nor a bool.
        ValueError: chunk_bytes below 1.

    Example:
        >>> options = fl.LinearLossOptions(chunk_bytes=2**20, sparse_grad=True)
        >>> head = fl.LinearLoss(8, 1000, loss=fl.HSLRLoss(k=10), options=options)
        >>> head(torch.randn(1, 8), torch.tensor([7])).backward()
        >>> head.weight.grad.coalesce().values().shape  # the target and the k hardest
        torch.Size([11, 8])
    """

    chunk_bytes: int | None = None
    sparse_grad: bool = False
    certified: bool | None = None

    def __post_init__(self):
        if self.certified is not None and not isinstance(self.certified, bool):
            raise TypeError(f"certified must be None, True or False, got {type(self.certified).__name__}")
        if self.chunk_bytes is None:
            return
        if not hasattr(self.chunk_bytes, "__index__"):
            raise TypeError(f"chunk_bytes must be an integer, got {type(self.chunk_bytes).__name__}")
        object.__setattr__(self, "chunk_bytes", operator.index(self.chunk_bytes))
        if self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, got {self.chunk_bytes}")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Labels,
    *,
    linear_bias: Tensor | None = None,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    check_targets: bool = False,
    normalize: bool = False,
    scale: float | Tensor = 1.0,
    shard: ClassShard | None = None,
    gather_input: bool = False,
    options: LinearLossOptions | None = None,
) -> Tensor:
    """Softmax cross-entropy of ``F.linear(input, linear_weight, linear_bias)``, whose logits are never held as a whole.

    The signature follows ``torch.nn.functional.linear_cross_entropy``; the value and the gradients are those of
    :func:`fused_losses.cross_entropy` of the logits, with one pass over the weight per chunk of rows: see
    :class:`LinearLossOptions` for the memory. Over the k hardest, with k a small share of C, backward reads N * (k + 1)
    rows of the weight and computes no logits.

    Args:
        input: (N, D) or (D,); float16, bfloat16, float32 or float64. Under autocast it is cast with the weight, as
            ``F.linear`` does.
        linear_weight: (C, D), of input's dtype.
        target: class indices (N,), or () for one row, of any integer dtype; or :class:`fused_losses.Labels` with
            weights: soft labels, mixup. (A matrix of all classes' probabilities is refused.)
        linear_bias: (C,), of input's dtype; with ``normalize`` one for all classes, (). Default: None.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        label_smoothing: eps in [0, 1): the target keeps a share 1 - eps, and eps is spread evenly over the target and
            the negatives S, as ``torch.nn.functional.cross_entropy`` does over all C classes. (fast-reid spreads it
            over the C - 1 others: eps C / (C - 1) here.) Not with ``weight``, multi-hot targets, or ``Labels`` without
            weights. Default: 0.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        normalize: cosine logits, ``scale * <input, w_j> / (|input| |w_j|)``, without a normalised copy of the weight.
            An angle of ``margin`` needs it. Default: False.
        scale: finite, > 0; the scale of cosine logits. A number, or a tensor () that may require a gradient. Default:
            1.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            linear_weight (and linear_bias) are those of this rank's classes, or the ``DTensor`` of all that has them;
            input is the same on every rank, whether it requires a gradient too, and so is that gradient; all options
            are the same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same
            order. Default: None.
        gather_input: with ``shard``: input and target are this rank's rows, any number of them, and the loss is that of
            the rows of all ranks, in the order of the ranks. The gradient by input is then multiplied by the number of
            the shard's ranks: ``DistributedDataParallel``, which averages over the ranks the gradients of the network
            in front, then gives that network what one process with all rows would. The gradient by linear_weight is one
            process's already, so the classifier stays outside of it. The ranks' numbers of rows are exchanged first,
            which on CUDA costs a synchronisation. No multi-hot targets. Default: False.
        options: how it is computed: :class:`fused_losses.LinearLossOptions`. Default: None, theirs.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 input.
            Differentiable once, by input, linear_weight, linear_bias and scale. A row with a NaN logit is NaN in the
            loss and in its gradient by input; over the k hardest the weight's gradient is then NaN at the row's target,
            and elsewhere may be.

    Raises:
        TypeError: input, target, the layer or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a scale without
            ``normalize``; ``sparse_grad`` where the gradient is not sparse.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices, input and weight of different dtypes; a call inside of
            ``torch.func``; a second derivative; a sharded or sparse classifier inside of ``DistributedDataParallel``.

    Example:
        >>> x, weight = torch.randn(2, 8), torch.zeros(1000, 8)
        >>> fl.linear_cross_entropy(x, weight, torch.tensor([1, 999]))  # of logits that are all zero: log C
        tensor(6.9078)
    """
    loss_options = Options(k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard)
    layer = _Layer(linear_bias, normalize, scale, gather_input, options)
    return apply(CrossEntropy(), loss_options, input, linear_weight, target, layer)[0]


class LayerOptions(TypedDict, total=False):
    """The arguments of :func:`linear_loss` that say how the layer is computed, for its overloads."""

    linear_bias: Tensor | None
    normalize: bool
    scale: float | Tensor
    shard: ClassShard | None
    gather_input: bool
    options: LinearLossOptions | None


@overload
def linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor | Labels, *, loss: RowLoss,
    return_statistics: Literal[False] = False, **layer: Unpack[LayerOptions],
) -> Tensor: ...  # fmt: skip


@overload
def linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor | Labels, *, loss: RowLoss, return_statistics: Literal[True],
    **layer: Unpack[LayerOptions],
) -> tuple[Tensor, RowStatistics]: ...  # fmt: skip


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Labels,
    *,
    loss: RowLoss,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    scale: float | Tensor = 1.0,
    shard: ClassShard | None = None,
    gather_input: bool = False,
    options: LinearLossOptions | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Any loss of ``F.linear(input, linear_weight, linear_bias)``, whose logits are never held as a whole.

    The function twin of :class:`LinearLoss`. The value and the gradients are those of the loss of the logits; the
    memory is that of :func:`linear_cross_entropy`.

    Args:
        input: (N, D) or (D,); float16, bfloat16, float32 or float64. Under autocast it is cast with the weight, as
            ``F.linear`` does.
        linear_weight: (C, D), of input's dtype.
        target: class indices (N,), or () for one row, of any integer dtype; or what else the loss takes.
        loss: one of the loss modules of this package, used with its options; a shard is the layer's.
        linear_bias: (C,), of input's dtype; with ``normalize`` one for all classes, (). Default: None.
        normalize: cosine logits, ``scale * <input, w_j> / (|input| |w_j|)``, without a normalised copy of the weight.
            An angle of ``margin`` needs it. Default: False.
        scale: finite, > 0; the scale of cosine logits. A number, or a tensor () that may require a gradient. Default:
            1.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            linear_weight (and linear_bias) are those of this rank's classes, or the ``DTensor`` of all that has them;
            input is the same on every rank, whether it requires a gradient too, and so is that gradient; all options
            are the same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same
            order. Default: None.
        gather_input: with ``shard``: input and target are this rank's rows, any number of them, and the loss is that of
            the rows of all ranks, in the order of the ranks. The gradient by input is then multiplied by the number of
            the shard's ranks: ``DistributedDataParallel``, which averages over the ranks the gradients of the network
            in front, then gives that network what one process with all rows would. The gradient by linear_weight is one
            process's already, so the classifier stays outside of it. The ranks' numbers of rows are exchanged first,
            which on CUDA costs a synchronisation. No multi-hot targets. Default: False.
        options: how it is computed: :class:`fused_losses.LinearLossOptions`. Default: None, theirs.
        return_statistics: also give :class:`fused_losses.RowStatistics`, without gradients: training accuracy from
            logits that never exist. With ``gather_input`` they are those of the rows of all ranks. Class indices only;
            for a loss of the logistic family ``log_odds`` is None. Default: False.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 input.
            Differentiable once, by input, linear_weight, linear_bias and scale. A row with a NaN logit is NaN in the
            loss and in its gradient by input; over the k hardest the weight's gradient is then NaN at the row's target,
            and elsewhere may be. With ``return_statistics`` a tuple of it and the :class:`fused_losses.RowStatistics`.

    Raises:
        TypeError: a loss that is no loss module of this package; input, target, the layer or an option of a wrong type
            or dtype.
        ValueError: a loss with a shard of its own; shapes that do not fit; an option out of its range, or two that
            exclude each other; a scale without ``normalize``; ``sparse_grad`` where the gradient is not sparse.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices, input and weight of different dtypes; a call inside of
            ``torch.func``; a second derivative; a sharded or sparse classifier inside of ``DistributedDataParallel``.

    Example:
        >>> x, weight = torch.randn(2, 8), torch.zeros(1000, 8)
        >>> fl.linear_loss(x, weight, torch.tensor([1, 999]), loss=fl.HSLRLoss(k=10))  # (1 + alpha) log 2
        tensor(1.3863)
    """
    _check_loss(loss)
    layer = _Layer(linear_bias, normalize, scale, gather_input, options)
    result, statistics = apply(
        loss.loss, loss.options._replace(shard=shard), input, linear_weight, target, layer, return_statistics
    )
    return result if statistics is None else (result, statistics)


class LinearLoss(nn.Module):
    """A classifier that owns its weight and its loss: ``LinearLoss(D, C, loss=HSLRLoss(ratio=0.01))(input, target)``.

    Called as ``head(input, target)``, it is :func:`linear_loss` with its own weight and bias: input (N, D) or (D,),
    target what the loss takes, a Tensor () or (N,) as the loss reduces. ``head(input, target, return_statistics=True)``
    also gives :class:`fused_losses.RowStatistics`. :meth:`topk`, :meth:`predict` and :meth:`logits` serve,
    :meth:`grown` and :meth:`selected` change the classes.

    ``weight`` (C, D) and ``bias`` (C,) bear the names and the initialisation of ``nn.Linear``: state dicts of the two
    are interchangeable (a class-weight buffer of the loss aside). With ``shard`` they hold this rank's classes, and
    start from the same numbers for the same seed however the classes are sharded; on the CPU from those of one process.
    They are then ``DTensor`` parameters of all classes, (C, D) and (C,), replicated for ()
    (:meth:`ClassShard.dtensor`), which PyTorch's optimizers, ``clip_grad_norm_`` and ``torch.distributed.checkpoint``
    know; in lists of their own, without the network's plain tensors. With ``sparse_grad``, and for borders that
    :meth:`ClassShard.split` would not make, they are plain tensors of this rank's classes, which the state dict names.
    ``load_state_dict`` takes the rows of all classes, of which every rank keeps its own (to ``weight.data = ...`` a
    ``DTensor`` is deaf).

    Args:
        in_features: D, the length of an embedding.
        num_classes: C, of all ranks together.
        loss: one of the loss modules of this package, used with its options; a shard is the layer's. Default: None,
            ``CrossEntropyLoss()``.
        bias: whether the layer has a bias (C,). Default: False.
        normalize: cosine logits, ``scale * <input, w_j> / (|input| |w_j|)``, without a normalised copy of the weight.
            An angle of ``margin`` needs it. Default: False.
        scale: finite, > 0: that of cosine logits; or "learned": the parameter ``log_scale`` is its logarithm, which
            starts at log(1 / 0.07), as CLIP's (arXiv 2103.00020). Default: 1.
        logit_bias: with ``normalize``, a parameter ``bias`` () that all logits have. It starts at -log(C - 1), where
            every class has the probability 1 / C in the losses of the logistic family: these start badly on bare
            cosines. The softmax family does not feel it over all classes. Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            input is the same on every rank, whether it requires a gradient too, and so is that gradient; all options
            are the same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same
            order. Default: None.
        gather_input: with ``shard``: input and target are this rank's rows, any number of them, and the loss is that of
            the rows of all ranks, in the order of the ranks. The gradient by input is then multiplied by the number of
            the shard's ranks: ``DistributedDataParallel``, which averages over the ranks the gradients of the network
            in front, then gives that network what one process with all rows would. The gradient by linear_weight is one
            process's already, so the classifier stays outside of it. The ranks' numbers of rows are exchanged first,
            which on CUDA costs a synchronisation. No multi-hot targets. Default: False.
        options: how it is computed: :class:`fused_losses.LinearLossOptions`. Default: None, theirs.
        device: of the weight, as in ``nn.Linear``. Default: None, PyTorch's.
        dtype: of the weight, as in ``nn.Linear``. Default: None, PyTorch's.

    Raises:
        TypeError: a loss that is no loss module of this package; an option of a wrong type.
        ValueError: an option out of its range, or two that exclude each other; a scale or logit_bias without
            ``normalize``; a bias with it; a shard of another number of classes; a loss with a shard of its own.
        RuntimeError: a sharded classifier inside of ``DistributedDataParallel``, ``fully_shard`` or
            ``FullyShardedDataParallel``, which would mix the classes of the ranks. The errors of a call are those of
            :func:`linear_loss`.

    Example:
        >>> arcface = fl.CrossEntropyLoss(k=100, margin=fl.Margin(angle=0.5))  # over the 100 hardest
        >>> head = fl.LinearLoss(8, 1000, loss=arcface, normalize=True, scale=64.0)
        >>> head(torch.randn(2, 8), torch.tensor([1, 999])).backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])
    """

    scale: Any  # a number, or "learned"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: RowLoss | None = None,
        bias: bool = False,
        normalize: bool = False,
        scale: float | Literal["learned"] = 1.0,
        logit_bias: bool = False,
        shard: ClassShard | None = None,
        gather_input: bool = False,
        options: LinearLossOptions | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if isinstance(scale, str) and scale != "learned":
            raise ValueError(f'scale must be a number or "learned", got {scale!r}')
        if isinstance(scale, Tensor):
            raise TypeError('scale must be a number, or "learned" for a parameter')
        if logit_bias and not normalize:
            raise ValueError("logit_bias belongs to cosine logits: pass normalize=True, or bias=True instead")
        learned = isinstance(scale, str)
        fixed = _check_options(options, bias, normalize, LEARNED_SCALE if isinstance(scale, str) else scale)
        loss = CrossEntropyLoss() if loss is None else loss
        _check_loss(loss)
        classes = num_classes if shard is None else len(shard)
        if shard is not None and shard.num_classes != num_classes:
            raise ValueError(f"the shard is one of {shard.num_classes} classes, expected {num_classes}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.loss = loss
        self.normalize = normalize
        self.scale = "learned" if learned else fixed
        self.shard = shard
        if shard is not None:
            _watch_wrappers()
        self.gather_input = gather_input
        self.options = options

        def parameter(*shape: int) -> nn.Parameter:
            mine = torch.empty(shape, device=device, dtype=dtype)
            sparse_grad = options is not None and options.sparse_grad
            return nn.Parameter(mine if shard is None or sparse_grad or not shard.even else shard.dtensor(mine))

        self.weight = parameter(classes, in_features)
        self.bias = parameter(*([classes] if bias else [])) if bias or logit_bias else None
        self.log_scale = parameter() if learned else None
        self.reset_parameters()

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        if self.shard is not None:
            _watch_wrappers()

    def __setattr__(self, name: str, value) -> None:
        shard = getattr(self, "shard", None)
        if shard is not None and is_dtensor(value) and not (isinstance(value, nn.Parameter) and shard.holds(value)):
            raise RuntimeError(ALREADY_SHARDED)
        super().__setattr__(name, value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as ``nn.Linear`` does; a learned scale and ``logit_bias`` start anew."""

        def draw(parameter: Tensor, uniform: Callable[[Tensor], Tensor]) -> None:
            if self.shard is None:
                uniform(parameter)
            else:
                own_rows_of(self.shard, local_of(self.shard, parameter), uniform)

        draw(self.weight, lambda rows: nn.init.kaiming_uniform_(rows, a=math.sqrt(5)))
        if self.log_scale is not None:
            self.log_scale.fill_(math.log(LEARNED_SCALE))
        if self.bias is not None and self.bias.dim() == 0:
            self.bias.fill_(-math.log(max(1, self.num_classes - 1)))
        elif self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.in_features))
            draw(self.bias, lambda rows: rows.uniform_(-bound, bound))

    def forward(
        self, input: Tensor, target: Tensor | Labels | None = None, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of these rows.

        Args:
            input: (N, D) or (D,); float16, bfloat16, float32 or float64. Under autocast it is cast with the weight, as
                ``F.linear`` does.
            target: class indices (N,), or () for one row, of any integer dtype; or what else the loss takes.
            return_statistics: also give :class:`fused_losses.RowStatistics`, without gradients: training accuracy from
                logits that never exist. With ``gather_input`` they are those of the rows of all ranks. Class indices
                only; for a loss of the logistic family ``log_odds`` is None. Default: False.

        Returns:
            Tensor: as the loss reduces, (), or (N,); with ``return_statistics`` a tuple of it and the
                :class:`fused_losses.RowStatistics`.

        Raises:
            TypeError: no target; also as :func:`linear_loss`, like all other errors.
            RuntimeError: ``sparse_grad`` under ``fully_shard``; also as :func:`linear_loss`.
        """
        if target is None:
            raise TypeError("LinearLoss gives a loss and got no target; for classes call topk(), for logits logits()")
        if self.options is not None and self.options.sparse_grad and hasattr(self, "set_requires_gradient_sync"):
            raise RuntimeError("sparse_grad=True: fully_shard takes no sparse gradients; " + WITHOUT_WRAPPER)
        layer = _Layer(self.bias, self.normalize, self._scale(), self.gather_input, self.options)
        options = self.loss.options._replace(shard=self.shard)
        result, statistics = apply(self.loss.loss, options, input, self.weight, target, layer, return_statistics)
        return result if statistics is None else (result, statistics)

    if TYPE_CHECKING:  # nn.Module's takes and gives anything

        @overload
        def __call__(
            self, input: Tensor, target: Tensor | Labels, return_statistics: Literal[False] = False
        ) -> Tensor: ...

        @overload
        def __call__(
            self, input: Tensor, target: Tensor | Labels, return_statistics: Literal[True]
        ) -> tuple[Tensor, RowStatistics]: ...

        def __call__(
            self, input: Tensor, target: Tensor | Labels, return_statistics: bool = False
        ) -> Tensor | tuple[Tensor, RowStatistics]: ...

    def _scale(self) -> float | Tensor:
        if self.log_scale is None:
            return self.scale
        return local_of(self.shard, self.log_scale).to(reference.compute_dtype(self.log_scale.dtype)).exp()

    def extra_repr(self) -> str:
        cosine = f", normalize=True, scale={self.scale}" if self.normalize else ""
        options = "" if self.options is None else f", options={self.options}"
        layer = f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}"
        shard = "" if self.shard is None else f", shard={self.shard}, gather_input={self.gather_input}"
        return layer + cosine + shard + options

    def grown(self, num_classes: int, optimizer: torch.optim.Optimizer | None = None) -> LinearLoss:
        """The same classifier with more classes behind the old ones: their rows are kept, the new ones are drawn.

        With a shard, every rank calls it, and the classes are split anew (:meth:`ClassShard.split`). After
        ``fully_shard`` every rank calls it too, and the new classifier is whole, to be sharded anew.

        Args:
            num_classes: of the new classifier, at least those of this one.
            optimizer: takes the new parameters in the place of the old ones; of its state, the rows of old classes are
                kept, and those of new ones are 0. Not after ``fully_shard``. Default: None.

        Returns:
            LinearLoss: a new one; this one stays as it is.

        Raises:
            ValueError: fewer classes than now; a loss with class weights, which do not grow.

        Example:
            >>> head = fl.LinearLoss(8, 1000)
            >>> more = head.grown(1200)
            >>> torch.equal(more.weight[:1000], head.weight)
            True
        """
        if num_classes < self.num_classes:
            raise ValueError(f"cannot grow from {self.num_classes} to {num_classes} classes")
        origin = torch.full((num_classes,), -1, device=self.weight.device)
        origin[: self.num_classes] = torch.arange(self.num_classes)
        return self._with_classes(origin, optimizer)

    def selected(self, classes: Tensor, optimizer: torch.optim.Optimizer | None = None) -> LinearLoss:
        """The same classifier of these classes alone, in this order: class i is ``classes[i]`` of this one.

        With a shard, every rank calls it with the same classes; otherwise as :meth:`grown`.

        Args:
            classes: int64 (at least one,), distinct.
            optimizer: takes the new parameters in the place of the old ones; of its state, the rows of old classes are
                kept, and those of new ones are 0. Not after ``fully_shard``. Default: None.

        Returns:
            LinearLoss: a new one; this one stays as it is.

        Raises:
            IndexError: a class out of range.
            ValueError: classes of another dtype or shape, or one twice; a loss with class weights.

        Example:
            >>> head = fl.LinearLoss(8, 1000)
            >>> few = head.selected(torch.tensor([999, 1]))
            >>> torch.equal(few.weight, head.weight[[999, 1]])
            True
        """
        if classes.dim() != 1 or classes.dtype != torch.int64 or classes.numel() == 0:
            raise ValueError(f"expected int64 classes (at least one,), got {classes.dtype}, {tuple(classes.shape)}")
        if classes.min() < 0 or classes.max() >= self.num_classes:
            raise IndexError(f"expected classes from 0 to {self.num_classes - 1}, got one that is not")
        if classes.unique().numel() < classes.numel():
            raise ValueError("expected distinct classes, got one twice")
        return self._with_classes(classes.to(self.weight.device), optimizer)

    @torch.no_grad()
    def _with_classes(self, origin: Tensor, optimizer: torch.optim.Optimizer | None) -> LinearLoss:
        """origin: for each class of the new classifier, which it was, -1 for one that is drawn."""
        if self.loss.weight is not None:
            raise ValueError("a classifier with class weights keeps its classes: the weights are those of each")
        num_classes = origin.shape[0]
        shard = None
        if self.shard is not None:
            shard = ClassShard.split(num_classes, self.shard.group, check_ranks=self.shard.check_ranks)
        one_bias = self.bias is not None and self.bias.dim() == 0
        made = LinearLoss(
            self.in_features, num_classes, loss=self.loss, bias=self.bias is not None and not one_bias,
            normalize=self.normalize, scale=self.scale, logit_bias=one_bias,
            shard=shard, gather_input=self.gather_input, options=self.options, device=self.weight.device,
            dtype=self.weight.dtype,
        )  # fmt: skip

        def moved(old: Tensor, new: Tensor) -> Tensor:
            if self.shard is None and is_dtensor(old):  # of fully_shard
                old = old.full_tensor()
            old, rows = local_of(self.shard, old), local_of(shard, new)
            if old.dim() == 0:
                rows.copy_(old)
            else:
                move_rows(self.shard, old, shard, rows, origin)
            return new

        for (_, old), (_, new) in zip(self.named_parameters(), made.named_parameters(), strict=True):
            moved(old, new)
            if optimizer is not None:
                _take_the_place_of(optimizer, old, new, moved)
        return made

    def logits(self, input: Tensor) -> Tensor:
        """The logits, for evaluation; of this rank's classes, if they are sharded.

        Args:
            input: (N, D), of the weight's dtype.

        Returns:
            Tensor: (N, C), of input's dtype, differentiable.

        Raises:
            TypeError: after ``fully_shard``, unless it is registered as a forward method.

        Example:
            >>> head = fl.LinearLoss(8, 1000, normalize=True, scale=16.0)
            >>> head.logits(torch.randn(2, 8)).shape
            torch.Size([2, 1000])
        """
        weight, bias = self._layer()
        if is_dtensor(weight):
            raise TypeError(
                "logits() after fully_shard: call torch.distributed.fsdp.register_fsdp_forward_method(head, 'logits') "
                "once; outside of registered methods the weight is sharded"
            )
        if not self.normalize:
            return F.linear(input, weight, bias)
        input = _direction(input, self._scale()).to(input.dtype)
        pieces = weight.split(max(1, MIB // max(1, self.in_features)))  # no normalised copy here either
        biases = [None if bias is None else bias.expand(len(w)) for w in pieces]  # the one bias, of each of these
        logits = [F.linear(input, _direction(w, 1.0).to(w.dtype), b) for w, b in zip(pieces, biases, strict=True)]
        return torch.cat(logits, dim=1)

    def topk(self, input: Tensor, k: int) -> TopK:
        """The k classes with the largest logits: exact nearest identities.

        No more logits at a time than ``options.chunk_bytes``; no margin, no smoothing, no gradient. With a shard a
        collective, which gives every rank the same answer among all classes: input is the same on every rank, also with
        ``gather_input``.

        Args:
            input: (N, D) or (D,), of the weight's dtype.
            k: from 1 to C.

        Returns:
            TopK: values and indices (int64), (N, k) each, the largest first, the lowest class first among equals; (k,)
                for one row.

        Raises:
            TypeError: a k that is no integer; input that is not floating.
            ValueError: k out of range; shapes that do not fit.

        Example:
            >>> head = fl.LinearLoss(8, 1000)
            >>> values, identities = head.topk(torch.randn(2, 8), 5)
            >>> identities.shape
            torch.Size([2, 5])
        """
        k = as_integer("k", k)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be from 1 to the {self.num_classes} classes, got {k}")
        weight, bias = self._layer()
        has_bias = bias is not None and bias.dim() > 0
        scale = _check_options(self.options, has_bias, self.normalize, self._scale())
        _check_layer(input, weight, bias, self.normalize, self.shard)
        x = input if input.dim() == 2 else input[None]
        if self.normalize:
            x = _direction(x, scale)
        how = LinearLossOptions() if self.options is None else self.options
        dtype = _dtype_of_linear(input, weight, bias)
        layer_spec = LayerSpec(dtype, self.normalize, how.chunk_bytes or 0, False, how.certified, [False] * 3)
        found = topk_of_layer(x, weight, bias, k, layer_spec, self.shard, self.num_classes)
        return found if input.dim() == 2 else TopK(*(part.squeeze(0) for part in found))

    def predict(self, input: Tensor) -> Tensor:
        """The class with the largest logit: ``topk(input, 1)``.

        Args:
            input: (N, D) or (D,), of the weight's dtype.

        Returns:
            Tensor: int64 (N,); () for one row.

        Raises:
            ValueError: shapes that do not fit.

        Example:
            >>> head = fl.LinearLoss(8, 1000, normalize=True)
            >>> head.predict(head.embeddings()[[3, 999]])  # a class is nearest to itself
            tensor([  3, 999])
        """
        return self.topk(input, 1).indices.squeeze(-1)

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """The classes' vectors as a search index wants them, of this rank's classes if they are sharded.

        Of length 1 with ``normalize``, where the logits are scale times the inner product with a vector of length 1.

        Returns:
            Tensor: (C, D), of the weight's dtype; a copy, without gradient.

        Example:
            >>> head = fl.LinearLoss(8, 1000, normalize=True)
            >>> head.embeddings().norm(dim=1).sub(1).abs().max() < 1e-6
            tensor(True)
        """
        weight, _ = self._layer()
        return _direction(weight, 1.0).to(weight.dtype) if self.normalize else weight.clone()

    def _layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, of this rank's classes if they are sharded."""
        return local_of(self.shard, self.weight), None if self.bias is None else local_of(self.shard, self.bias)

    # --- checkpoints, and what else happens to parameters ---

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard is not None:
            name_by_classes(self.shard, self._parameters, destination, prefix)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        if self.shard is not None:
            copy = local_metadata.get("assign_to_params_buffers", False)
            error_msgs += take_own_rows(self.shard, self._parameters, state_dict, prefix, copy)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.shard is not None:
            for parameter in self._parameters.values():
                if is_dtensor(parameter) and parameter.device_mesh.device_type != parameter.device.type:
                    _put_on_mesh(self.shard, parameter)
        return self


@torch.no_grad()
def _put_on_mesh(shard: ClassShard, parameter: DTensor) -> None:
    """That of the kind of device where it is now; in place, for the optimizer has it too."""
    made = nn.Parameter(shard.dtensor(parameter.to_local()), parameter.requires_grad)
    if is_dtensor(parameter.grad):
        made.grad = shard.dtensor(parameter.grad.to_local())
    torch.utils.swap_tensors(parameter, made)


def _take_the_place_of(
    optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, moved: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Puts new where the optimizer has old; its state, row by row as moved does. What has another shape stays."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            name: moved(value, torch.zeros_like(new, dtype=value.dtype))
            if isinstance(value, Tensor) and value.shape == old.shape and name != "step"  # which is () as well
            else value
            for name, value in state.items()
        }


class _Layer(NamedTuple):
    """What a user says of the layer, besides input and weight."""

    bias: Tensor | None
    normalize: bool
    scale: float | Tensor
    gather_input: bool
    options: LinearLossOptions | None


def apply(
    loss: Loss, options: Options, input: Tensor, linear_weight: Tensor, given: Tensor | Labels, layer: _Layer,
    return_statistics: bool = False,
) -> tuple[Tensor, RowStatistics | None]:  # fmt: skip
    """The one way from a user's arguments to the autograd functions."""
    bias, normalize, scale, gather_input, how = layer
    shard, reduction = options.shard, options.reduction
    check_options(loss, options)
    scale = _check_options(how, isinstance(bias, Tensor) and bias.dim() > 0, normalize, scale)
    how = LinearLossOptions() if how is None else how
    _check_wrapper(linear_weight, how.sparse_grad, shard)
    if how.sparse_grad and shard is not None and is_dtensor(linear_weight):
        raise ValueError(
            "sparse_grad=True: a DTensor has no sparse gradients; make the LinearLoss with these options, or give "
            "plain tensors of this rank's classes"
        )
    linear_weight, bias = local_of(shard, linear_weight), None if bias is None else local_of(shard, bias)
    num_classes = _check_layer(input, linear_weight, bias, normalize, shard)
    dtype = _dtype_of_linear(input, linear_weight, bias)
    one_row = input.dim() == 1
    if shard is not None and shard.unchecked:
        _check_ranks(loss, options, input, given, layer)
    if gather_input:
        input, given, options = _gathered(loss, input, linear_weight, given, options)
    shape = torch.Size((*input.shape[:-1], linear_weight.shape[0]))
    rows = rows_of(loss, shape, dtype, input.device, given, options, num_classes)
    margin = _margin_of_layer(options.margin, normalize, scale, bias, dtype)
    target, weight, _, spec = rows
    multi_hot = spec.multi_hot(target)
    if return_statistics and (isinstance(given, Labels) or multi_hot):
        raise ValueError("return_statistics works with class-index targets only, got multi-hot targets or Labels")
    if how.sparse_grad and (spec.k == 0 or multi_hot):
        got = "multi-hot targets" if multi_hot else f"all {num_classes - 1} negatives"
        raise ValueError(f"sparse_grad needs class indices or Labels, and k (or ratio) below C - 1, got {got}")
    x = input.unsqueeze(0) if one_row else input
    if normalize:
        ignored = ignored_rows(target, spec)
        if ignored is not None:  # what is not finite there would spoil the zeros of its gradient
            x = x.masked_fill(ignored[:, None], 0)
        x = _direction(x, scale)
    wanted = wanted_of(x, linear_weight, bias)
    layer_spec = LayerSpec(dtype, normalize, how.chunk_bytes or 0, how.sparse_grad, how.certified, wanted)
    own = isinstance(loss, OwnSoftmax)
    if shard is None and not own and gradients_at_once(layer_spec, num_classes, target, reduction, margin, spec):
        result, statistics = LinearLossAtOnce.apply(
            x, linear_weight, bias, target, weight, reduction, layer_spec, with_numbers_of(margin, spec)
        )
    else:
        statistics = LinearStatistics.apply(x, linear_weight, bias, target, layer_spec, spec.of_statistics(), shard)
        result = finished(loss, statistics, rows, margin)
    found = RowStatistics.of(statistics.detach(), loss.family) if return_statistics else None
    return result.squeeze(0) if one_row and reduction == "none" else result, found


def _check_ranks(loss: Loss, options: Options, input: Tensor, target: Tensor | Labels, layer: _Layer) -> None:
    assert options.shard is not None
    if not isinstance(target, Tensor | Labels):
        return  # an error of its own follows
    told = told_of(loss, options, target)
    told |= {"dtype of the input": str(input.dtype), "features": input.shape[-1]}
    told |= {"normalize": layer.normalize, "scale": fingerprint(layer.scale), "gather_input": layer.gather_input}
    told["sparse_grad"] = layer.options is not None and layer.options.sparse_grad
    if not layer.gather_input:
        told |= told_of_rows(input, target) | {"input": fingerprint(input)}
    check_agreement(options.shard, told)


def _gathered(
    loss: Loss, input: Tensor, linear_weight: Tensor, target: Tensor | Labels, options: Options
) -> tuple[Tensor, Tensor | Labels, Options]:
    """Input, target and what else has a value for each row: those of all ranks."""
    shape, shard = torch.Size((*input.shape[:-1], linear_weight.shape[0])), options.shard
    if isinstance(target, Labels):
        check_labels(loss, shape, input.device, target, options)
        columns = [target.index.long(), *(() if target.weight is None else (target.weight,))]
    else:
        check_target(loss, shape, input.device, target)
        columns = [as_int64(target, options.ignore_index)]
    if shard is None or input.dim() != 2 or columns[0].dim() != (2 if isinstance(target, Labels) else 1):
        raise ValueError("gather_input needs shard=, input of shape (N, D), and class indices (N,) or Labels (N, P)")
    margin = options.margin
    per_row = {} if margin is None else margin.per_row
    check_margin(margin, input.shape[0], input.device)
    input, columns, of_margin = gather_batch(shard, input, columns, list(per_row.values()))
    if margin is not None and per_row:
        changed: dict[str, Any] = dict(zip(per_row, of_margin, strict=True))
        options = options._replace(margin=replace(margin, **changed))
    return input, Labels(*columns) if isinstance(target, Labels) else columns[0], options


def _margin_of_layer(
    margin: Margin | None, normalize: bool, scale: float | Tensor, bias: Tensor | None, dtype: torch.dtype
) -> MarginTerms | None:
    if margin is None or not normalize:
        return margin_from_logits(margin, dtype)
    if margin.scale is not None:
        raise ValueError("the scale of cosine logits is the layer's: give scale= to it, not to the margin")
    return MarginTerms.of(margin, scale, 0.0 if bias is None else bias, reference.compute_dtype(dtype))


def wanted_of(*parameters: Tensor | None) -> list[bool]:
    """Which of input, weight and bias get a gradient. Asked before forward, where nobody records any more."""
    recorded = torch.is_grad_enabled()
    return [recorded and parameter is not None and parameter.requires_grad for parameter in parameters]


def _check_loss(loss: RowLoss) -> None:
    if not isinstance(loss, RowLoss):
        got = loss.__name__ if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a loss module, like fused_losses.CrossEntropyLoss(), got {got}")
    if loss.shard is not None:
        raise ValueError("give the shard to the linear layer, not to its loss")


def _direction(input: Tensor, scale: float | Tensor) -> Tensor:
    """scale * input / |input|, in the compute dtype."""
    return F.normalize(input.to(reference.compute_dtype(input.dtype)), dim=-1) * scale


def _dtype_of_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype in which F.linear computes: under autocast not theirs, unless that is float64."""

    def seen(tensor: Tensor) -> torch.dtype:
        device_type = tensor.device.type
        if tensor.dtype == torch.float64 or tensor.is_meta or not torch.is_autocast_enabled(device_type):
            return tensor.dtype
        return torch.get_autocast_dtype(device_type)

    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and seen(tensor) != seen(input):
            raise RuntimeError(f"expected input and {name} of one dtype, but got {seen(input)} and {seen(tensor)}")
    return seen(input)


def _check_layer(input: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool, shard: ClassShard | None) -> int:
    """The number of classes, of all shards."""
    tensors = {"input": input, "linear_weight": weight}
    if bias is not None:
        tensors["linear_bias"] = bias
    for name, tensor in tensors.items():
        check_kind(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(f"expected a floating-point {name}, got {tensor.dtype}")
        check_device(name, tensor, input.device)
    if input.dim() not in (1, 2) or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        hint = ": flatten the rows, input.flatten(0, -2) and target.flatten()" if input.dim() > 2 else ""
        raise ValueError(
            "expected input (N, D) or (D,) and linear_weight (C, D), "
            f"got {tuple(input.shape)} and {tuple(weight.shape)}{hint}"
        )
    expected = () if normalize else (weight.shape[0],)
    if bias is not None and bias.shape != expected:
        raise ValueError(f"expected linear_bias of shape {expected}, got {tuple(bias.shape)}")
    if shard is not None:
        return width_of_shard(shard, "linear_weight", weight.shape, weight.shape[0])
    if weight.shape[0] == 0:
        raise ValueError(f"expected at least one class, got linear_weight of shape {tuple(weight.shape)}")
    return weight.shape[0]


ALREADY_SHARDED = (
    "this classifier is sharded by classes already: fully_shard would mix the ranks' classes, DistributedDataParallel "
    "with a device_mesh lose them; wrap the network alone, and leave the classifier out (shard=..., gather_input=True)"
)
WITHOUT_WRAPPER = (
    "leave the classifier out of it, sharded by classes (shard=ClassShard.split(num_classes), gather_input=True), or "
    "give up sparse_grad"
)


WITHOUT_CLASSIFIER = "wrap the network alone, give the classifier shard=... and gather_input=True"


def _ddp_that_holds(weight: Tensor) -> nn.parallel.DistributedDataParallel | None:
    """The DDP whose forward is running, if weight is one of the parameters that it keeps alike."""
    ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return ddp if ddp is not None and _ddp_holds(ddp, ddp.module, weight) else None


def _ddp_holds(ddp: nn.parallel.DistributedDataParallel, module: nn.Module, weight: Tensor) -> bool:
    named = module.named_parameters()
    return any(parameter is weight and name not in ddp.parameters_to_ignore for name, parameter in named)


def _share_classes(ranks: dist.ProcessGroup | None, shard: ClassShard) -> bool:
    """Whether two of these ranks have different classes."""
    of_ranks, of_shard = (dist.get_process_group_ranks(group or dist.group.WORLD) for group in (ranks, shard.group))
    return len(set(of_ranks) & set(of_shard)) > 1


def _check_wrapper(weight: Tensor, sparse_grad: bool, shard: ClassShard | None) -> None:
    """DDP copies the weights of one rank over those of the others, and its reducer would say of sparse gradients that
    they have no storage."""
    ddp = _ddp_that_holds(weight) if sparse_grad or shard is not None else None
    if ddp is None:
        return
    if shard is not None and _share_classes(ddp.process_group, shard):
        raise RuntimeError(
            "DistributedDataParallel holds this sharded classifier, and has copied the classes of one rank over those "
            f"of the others: {WITHOUT_CLASSIFIER}, and draw or load its weight anew"
        )
    if sparse_grad and ddp.require_backward_grad_sync:
        raise RuntimeError(
            "sparse_grad=True: DistributedDataParallel takes sparse gradients of nn.Embedding alone; " + WITHOUT_WRAPPER
        )


def _check_wrapped(wrapper: Any, name: str, module: nn.Module | None) -> None:
    """Of every module that another one takes. DDP takes its own before the ranks compare the shapes of weights, where
    one rank would raise and the others wait; FullyShardedDataParallel when it has made one parameter of all."""
    ddp = name == "module" and isinstance(wrapper, nn.parallel.DistributedDataParallel)
    if module is None or not (ddp or name == "_fsdp_wrapped_module"):
        return
    for part in module.modules():
        if isinstance(part, LinearLoss) and part.shard is not None:
            weight = part.weight
            held = _ddp_holds(wrapper, module, weight) if ddp else weight not in wrapper._ignored_params
            if held and _share_classes(wrapper.process_group, part.shard):
                raise RuntimeError(f"{type(wrapper).__name__} would mix the ranks' classes: {WITHOUT_CLASSIFIER}")


@cache
def _watch_wrappers() -> None:
    """From the first sharded classifier on: PyTorch asks nobody else before it wraps."""
    nn.modules.module.register_module_module_registration_hook(_check_wrapped)


def _check_options(
    options: LinearLossOptions | None, has_bias: bool, normalize: bool, scale: float | Tensor
) -> float | Tensor:
    """The scale. has_bias: one of each class."""
    if options is not None and not isinstance(options, LinearLossOptions):
        raise TypeError(f"options must be LinearLossOptions, got {type(options).__name__}")
    if has_bias and normalize:
        raise ValueError(
            "cosine logits (normalize=True) take no bias of each class: one for all, linear_bias () or logit_bias=True"
        )
    if isinstance(scale, Tensor):
        return _check_scale(scale, normalize)
    if not isinstance(scale, int | float | torch.SymInt | torch.SymFloat):  # to the compiler NumPy's numbers are arrays
        if not hasattr(scale, "__float__"):
            raise TypeError(f"scale must be a number, got {type(scale).__name__}")
        scale = float(scale)
    if not 0 < scale < math.inf:  # math.isfinite knows no symbolic numbers
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    if scale != 1 and not normalize:
        raise ValueError("scale belongs to cosine logits: pass normalize=True")
    return scale


def _check_scale(scale: Tensor, normalize: bool) -> Tensor:
    """A tensor, whose value only a CPU may look at: other devices would have to be waited for."""
    check_kind("scale", scale)
    if scale.dim() != 0 or scale.dtype not in FLOATING:
        raise ValueError(
            f"expected scale to be a number or a floating tensor (), got {scale.dtype}, {tuple(scale.shape)}"
        )
    if not normalize:
        raise ValueError("scale belongs to cosine logits: pass normalize=True")
    if scale.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 < scale.item() < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale.item()}")
    return scale
