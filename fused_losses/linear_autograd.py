"""How a linear layer and a loss are computed together without ever holding the logits of the whole batch.

Never more logits than fit a budget. Three ways lead to the gradients:

- *picks*: over the k hardest, k a small share of the classes. Forward walks blocks of classes, all rows at a time, and
  keeps (index, logit) pairs; backward touches the k + 1 rows of the weight that each row of the batch has picked, and
  computes no logits.
- *at once*: a scalar loss. Chunks of rows, all classes at a time; each chunk's gradient follows its forward (three
  matmuls instead of four), and backward only multiplies by the upstream scalar, in place.
- *again*: chunks of rows where that scalar cannot be factored out. Backward computes their logits once more.
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

MIB = 2**20
LEAST_NORM = 1e-12  # F.normalize divides by nothing smaller either
# A block of classes is no smaller than this: each pays for k candidates in every row, and for its calls.
LEAST_BLOCK = 4096
LEAST_BLOCK_PER_PICK = 32


def gathers_picks(num_classes: int, k: int, multi_hot: bool) -> bool:
    """Whether backward gathers the picked classes; a larger share is cheaper as a dense matmul.

    Measured on two cores with 8192 and 32768 classes, 64 to 512 features: at C / 32 gathering wins by 10 to 27 %, at
    C / 16 the matmul draws level or wins by up to 13 %.
    """
    return 0 < k <= num_classes // 24 and not multi_hot


def default_chunk_bytes(weight: Tensor, picks: bool) -> int:
    """Blocks of classes stay in the cache; chunks of rows each read the whole weight, and want as much work for it."""
    least = 4 * MIB if weight.device.type == "cpu" else 256 * MIB
    return least if picks else max(least, weight.nbytes)


def _gradients_at_once(reduction: str, dtype: torch.dtype, scales_known: bool) -> bool:
    """Not in float16: its gradients would underflow, for the scaler's factor arrives with backward."""
    return reduction != "none" and dtype != torch.float16 and scales_known


def _pieces(total: int, most: int) -> list[slice]:
    """0 ... total in slices of about equal size, none larger than most."""
    size = -(-total // max(1, -(-total // most)))
    return [slice(start, min(start + size, total)) for start in range(0, total, max(1, size))]


def _buffer(like: Tensor, rows: int, classes: int) -> Tensor:
    """Empty (rows, classes) whose rows start at multiples of 64 bytes: a matmul writes them up to 1.7 times as fast."""
    unit = 64 // like.element_size()
    return like.new_empty((rows, -(-classes // unit) * unit))[:, :classes]


# --- the layer --------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """z = x w^T + bias, or x w^T / |w| with norms."""

    weight: Tensor  # (classes, features)
    bias: Tensor | None  # (classes,)
    norms: Tensor | None  # (classes,)

    def chunks(self, input: Tensor, chunk_elements: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits, one row or at most so many logits at a time, always in the same memory."""
        pieces = _pieces(input.shape[0], max(1, chunk_elements // self.weight.shape[0]))
        buffer = _buffer(input, max((rows.stop - rows.start for rows in pieces), default=0), self.weight.shape[0])
        for rows in pieces:
            yield rows, self.logits(input[rows], out=buffer[: rows.stop - rows.start])

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        if self.norms is not None:
            out /= self.norms
        return out

    def of(self, classes: slice) -> "_Layer":
        return _Layer(*(None if tensor is None else tensor[classes] for tensor in self))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def class_norms(weight: Tensor, chunk_elements: int = MIB) -> Tensor:
    """|w| of each class, (classes,), in the compute dtype. In pieces: torch copies a 16-bit tensor to reduce it so."""
    pieces = weight.split(max(1, chunk_elements // max(1, weight.shape[1])))
    dtype = reference.compute_dtype(weight.dtype)
    norms = torch.cat([torch.linalg.vector_norm(w, dim=1, dtype=dtype) for w in pieces])
    return norms.clamp_(min=LEAST_NORM)


def _through_norms(dweight: Tensor, weight: Tensor, norms: Tensor, chunk_elements: int) -> None:
    """From dw at constant |w| to dw: the part along w goes, since the length of w moves no cosine."""
    classes = max(1, chunk_elements // max(1, weight.shape[1]))
    for dw, w, norm in zip(dweight.split(classes), weight.split(classes), norms.split(classes), strict=True):
        w = w.to(dw.dtype)
        dw.addcmul_(w, ((dw * w).sum(1) / norm**2)[:, None], value=-1)


class _Gradients:
    """The gradients of a layer, summed chunk by chunk; those of weight and bias in float32 for a 16-bit layer."""

    def __init__(self, input: Tensor, layer: _Layer, wanted: list[bool]):
        self.x, self.layer, self.wanted = input, layer, wanted
        self.input, self.weight, self.bias = gradient_shapes(input, layer.weight, wanted)
        self.weight.zero_()
        self.bias.zero_()

    def add(self, rows: slice, dz: Tensor) -> None:
        """dz: the gradient of a chunk's logits, free to be overwritten."""
        want_input, want_weight, want_bias = self.wanted
        if want_bias:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        if self.layer.norms is not None:
            dz /= self.layer.norms
        if want_input:
            torch.mm(dz, self.layer.weight, out=self.input[rows])
        if want_weight:
            _add_product(self.weight, dz.t(), self.x[rows])

    def result(self, chunk_elements: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.layer.norms is not None and self.wanted[1]:
            _through_norms(self.weight, self.layer.weight, self.layer.norms, chunk_elements)
        return self.input, self.weight, self.bias


# --- chunks of rows through the doors ---------------------------------------------------------------------------------

_DOORS = {
    "softmax": (ops.softmax_forward, ops.softmax_backward),
    "logistic": (ops.logistic_forward, ops.logistic_backward),
}


def _linear_forward(
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index,
    compact=False, first_class=0, all_classes=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward door of the family over all rows: *again*."""
    forward, _ = _DOORS[family]
    all_classes = _check_target(input, weight, target, ignore_index, first_class, all_classes)
    outputs = _forward_shapes(
        input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, compact
    )
    for rows, z in _Layer(weight, bias, norms).chunks(input, chunk_elements):
        parts = forward(z, target[rows], loss, params, k, ignore_index, compact, first_class, all_classes)
        for whole, part in zip(outputs, parts, strict=True):
            whole[rows] = part
    return outputs


def _linear_backward(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted,
    compact=False, first_class=0, all_classes=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias from grad of the rows: *again*."""
    _, backward = _DOORS[family]
    _check_rows(input, target, grad, state, pick_index, pick_logit)
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, wanted)
    for rows, z in layer.chunks(input, chunk_elements):
        saved = z, target[rows], state[rows], pick_index[rows], pick_logit[rows]
        options = loss, params, k, ignore_index, z.shape[1], compact, first_class, all_classes
        gradients.add(rows, backward(grad[rows], *saved, *options))
    return gradients.result(chunk_elements)


def _linear_at_once(
    grad, input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values or sums of the rows, and the gradients of input, weight and bias for grad of the rows."""
    forward, backward = _DOORS[family]
    _check_rows(input, target, grad)
    _check_target(input, weight, target, ignore_index)
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, wanted)
    values = torch.empty_like(grad, memory_format=torch.contiguous_format)
    for rows, z in layer.chunks(input, chunk_elements):
        values[rows], *saved = forward(z, target[rows], loss, params, k, ignore_index, False)
        saved = z, target[rows], *saved
        # not named here: two chunks' gradients would be alive at a time
        gradients.add(rows, backward(grad[rows], *saved, loss, params, k, ignore_index, z.shape[1], False))
    return values, *gradients.result(chunk_elements)


def _check_rows(*tensors: Tensor) -> None:
    """A chunk takes its rows of each: of what has more, some would be left over."""
    if len({tensor.shape[:1] for tensor in tensors}) > 1:
        raise ValueError(f"expected as many rows in each tensor, got {[tuple(tensor.shape) for tensor in tensors]}")


def _check_target(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    first_class: int = 0,
    all_classes: int | None = None,
) -> int:
    """The CPU doors check too, but know a row by its number in the chunk; multi-hot targets would cost a copy here.
    -> the number of all classes"""
    _check_rows(input, target)
    all_classes = reference.count_classes(weight.shape[0], first_class, all_classes)
    if input.device.type == "cpu" and target.dim() == 1:
        reference.check_target(target, all_classes, ignore_index)
    return all_classes


# --- picks alone ------------------------------------------------------------------------------------------------------


def _linear_forward_picks(
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index,
    first_class=0, all_classes=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward door of the family over all rows, compact: *picks*.

    The k hardest of the layer are among the k hardest of each block of classes: these are the candidates. A matmul is
    cheaper for many rows and few classes at a time than the other way round, and its logits stay in the cache.
    """
    all_classes = _check_target(input, weight, target, ignore_index, first_class, all_classes)
    outputs = _picks_shapes(input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index)
    least = max(LEAST_BLOCK, LEAST_BLOCK_PER_PICK * k)
    blocks = _pieces(weight.shape[0], max(least, chunk_elements // max(1, input.shape[0])))
    most_rows = max(1, chunk_elements // blocks[0].stop)
    buffer = _buffer(input, min(most_rows, input.shape[0]), blocks[0].stop)
    layer = _Layer(weight, bias, norms)
    options = family, loss, params, k, ignore_index, first_class, all_classes
    for rows in _pieces(input.shape[0], most_rows):
        parts = _hardest_of_blocks(layer, blocks, buffer, input[rows], target[rows], *options)
        for whole, part in zip(outputs, parts, strict=True):
            whole[rows] = part
    return outputs


def _hardest_of_blocks(
    layer: _Layer, blocks: list[slice], buffer: Tensor, x: Tensor, target: Tensor,
    family, loss, params, k, ignore_index, first_class, all_classes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The compact door over the classes of all blocks, lowest class first among equals."""
    forward, _ = _DOORS[family]
    num_rows, width = x.shape[0], 1 + len(blocks) * k
    index = x.new_empty((num_rows, width), dtype=torch.int32)  # column 0 is the target's
    logit = x.new_empty(index.shape)
    states = []
    for number, classes in enumerate(blocks):
        z = layer.of(classes).logits(x, out=buffer[:num_rows, : classes.stop - classes.start])
        part = first_class + classes.start, all_classes
        _, state, picked, picked_logit = forward(z, target, loss, params, k, ignore_index, True, *part)
        if z.device.type != "cpu":  # where the doors keep the picks in the order of the classes
            picked, order = picked.sort(dim=1)
            picked_logit = picked_logit.gather(1, order)
        columns = slice(1 + number * k, 1 + (number + 1) * k)
        index[:, columns] = picked + classes.start
        logit[:, columns] = picked_logit
        states.append(state)

    states = torch.stack(states)  # (blocks, rows, values); without the target, z_y is -inf or 0
    z_y = states[..., 2].amax(0) if family == "softmax" else states[..., 0].sum(0)
    # Among the candidates the target is class 0, or one behind them where the layer does not hold it: column 0 is then
    # no class, but an empty slot.
    ignored = target == ignore_index
    bad = (target < 0) | (target >= all_classes)
    elsewhere = (target < first_class) | (target >= first_class + layer.weight.shape[0])
    index[:, 0] = -1
    z_y = z_y.masked_fill(elsewhere, -math.inf)
    logit[:, 0] = z_y.masked_fill(states.isnan().any(dim=(0, 2)), math.nan)
    label = (width * elsewhere.long()).masked_fill_(bad, width + 1).masked_fill_(ignored, -1)
    *rows, chosen, chosen_logit = forward(logit, label, loss, params, k, -1, True, 0, width + 1)
    return *rows, index.gather(1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, -1), chosen_logit


class _ByClass:
    """The entries of a (rows, slots) matrix of classes, sorted by class and, within a class, in the order of the batch.

    A bag holds the entries of one class: of every class, or only of those that occur. Entries of class num_classes
    belong nowhere.
    """

    def __init__(self, classes: Tensor, num_classes: int, only_picked: bool):
        sorted_classes, self.order = classes.flatten().sort(stable=True)
        self.row = self.order // classes.shape[1]
        self.picked = None
        if only_picked:
            bags, counts = sorted_classes.unique_consecutive(return_counts=True)
            self.picked = bags[bags < num_classes]
            self.num_bags = self.picked.shape[0]
        else:
            counts = classes.new_zeros(num_classes + 1).scatter_add_(0, sorted_classes, torch.ones_like(sorted_classes))
            self.num_bags = num_classes
        self.starts = counts.cumsum(0) - counts

    def of(self, rows: Tensor) -> Tensor:
        """The rows of a (classes, ...) tensor, one a bag."""
        return rows if self.picked is None else rows[self.picked]

    def sum_rows(self, factors: Tensor, x: Tensor) -> Tensor:
        """Sum of factor * x[row] over each bag, (bags, features), from factors (rows, slots) and x (rows, features)."""
        factors = factors.flatten()[self.order]
        return F.embedding_bag(self.row, x, self.starts, mode="sum", per_sample_weights=factors)[: self.num_bags]


def _pick_gradients(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted, first_class,
    only_picked,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of input, weight and bias through the target and the k picks of each row alone: O(rows * k * features).

    With only_picked, those of weight and bias are of the classes that come last. No float atomics: the same bits in
    every run.
    """
    num_classes = weight.shape[0]
    _check_rows(input, target, grad, state, pick_index, pick_logit)
    if pick_index.device.type == "cpu":
        reference.check_picks(pick_index, num_classes)
    z = pick_logit.to(state.dtype)  # (rows, k)
    if family == "softmax":
        dz_y, dz = reference.softmax_gradient(grad, state, z, loss, params)
        dz_y = dz_y[:, None]
    else:
        dz_y, dz = reference.logistic_gradient(grad, state[:, :1], z, loss, params)
    classes = torch.cat((target[:, None] - first_class, pick_index), dim=1)  # (rows, 1 + k)
    ignored = (target == ignore_index)[:, None]
    nowhere = (classes < 0) | (classes >= num_classes) | ignored
    dz = torch.cat((dz_y, dz), dim=1).masked_fill(nowhere, 0)
    inside = classes.masked_fill(nowhere, 0)
    dz_by_norm = dz if norms is None else dz / norms[inside]

    want_input, want_weight, want_bias = wanted
    dinput = input.new_empty((0, input.shape[1]) if want_input else (0,))  # of no rows
    dweight, dbias = state.new_empty((0,)), state.new_empty((0,))  # results of an op must not share memory
    by_class = None
    if want_input and input.shape[0] > 0:
        dinput = F.embedding_bag(inside, weight, mode="sum", per_sample_weights=dz_by_norm.to(weight.dtype))
        poisoned = dz_y.isnan() | state.isnan().any(1, keepdim=True)
        dinput = dinput.masked_fill(poisoned, math.nan).masked_fill(ignored, 0)
    if want_weight or want_bias:
        by_class = _ByClass(classes.masked_fill(nowhere, num_classes), num_classes, only_picked)
    if want_weight:
        dweight = by_class.sum_rows(dz_by_norm, input.to(dz.dtype))
        if norms is not None:
            _through_norms(dweight, by_class.of(weight), by_class.of(norms), chunk_elements)
    if want_bias:
        dbias = by_class.sum_rows(dz, dz.new_ones((dz.shape[0], 1))).squeeze(1)
    return dinput, dweight, dbias, None if by_class is None else by_class.picked


def _linear_backward_picks(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted,
    first_class=0, all_classes=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias from grad of the rows: *picks*, dense."""
    *gradients, _ = _pick_gradients(
        grad, state, pick_index, pick_logit,
        input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted, first_class,
        False,
    )  # fmt: skip
    return tuple(gradients)


@torch.no_grad()  # under create_graph=True the graph is recorded here, where no op hides it
def sparse_gradients(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted,
    first_class=0, all_classes=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias from grad of the rows: *picks*, coalesced COO for weight and bias."""
    dinput, *of_picked, picked = _pick_gradients(
        grad, state, pick_index, pick_logit,
        input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted, first_class,
        True,
    )  # fmt: skip

    def scattered(values: Tensor) -> Tensor:
        size = (weight.shape[0], *values.shape[1:])
        return torch.sparse_coo_tensor(picked[None], values, size, is_coalesced=True, check_invariants=False)

    return dinput, *(scattered(values) if want else values for values, want in zip(of_picked, wanted[1:], strict=True))


# --- the same as ops: opaque to the compiler, which would unroll the loop over chunks ---------------------------------

_LAYER = "Tensor input, Tensor weight, Tensor? bias, Tensor? norms, Tensor target, int chunk_elements, "
_LOSS = "str family, str loss, float[] params, int k, int ignore_index"
_SAVED = "Tensor state, Tensor pick_index, Tensor pick_logit"
_GRADIENTS = "Tensor dinput, Tensor dweight, Tensor dbias)"


def _row_shapes(input, family):
    rows = input.shape[0]
    dtype = reference.compute_dtype(input.dtype)
    values = input.new_empty((rows,) if family == "softmax" else (rows, 2), dtype=dtype)
    return values, input.new_empty((rows, 3 if family == "softmax" else 2), dtype=dtype)


def _forward_shapes(
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index,
    compact=False, first_class=0, all_classes=None,
):  # fmt: skip
    return *_row_shapes(input, family), *ops.empty_picks(input, k, compact)


def _picks_shapes(
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index,
    first_class=0, all_classes=None,
):  # fmt: skip
    return *_row_shapes(input, family), *ops.empty_picks(input, k, compact=True)


def gradient_shapes(input, weight, wanted):
    want_input, want_weight, want_bias = wanted
    dtype = reference.compute_dtype(input.dtype)
    return (
        input.new_empty(input.shape if want_input else (0,)),
        input.new_empty(weight.shape if want_weight else (0,), dtype=dtype),
        input.new_empty(weight.shape[:1] if want_bias else (0,), dtype=dtype),
    )


def _backward_shapes(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted,
    *_,
):  # fmt: skip
    return gradient_shapes(input, weight, wanted)


def _at_once_shapes(
    grad, input, weight, bias, norms, target, chunk_elements, family, loss, params, k, ignore_index, wanted
):
    return grad.new_empty(grad.shape), *gradient_shapes(input, weight, wanted)


linear_forward = ops.define(
    f"linear_forward({_LAYER}{_LOSS}, bool compact=False, {ops.PART}) -> (Tensor values, {_SAVED})",
    _linear_forward,
    _forward_shapes,
)
linear_forward_picks = ops.define(
    f"linear_forward_picks({_LAYER}{_LOSS}, {ops.PART}) -> (Tensor values, {_SAVED})",
    _linear_forward_picks,
    _picks_shapes,
)
linear_at_once = ops.define(
    f"linear_at_once(Tensor grad, {_LAYER}{_LOSS}, bool[] wanted) -> (Tensor values, {_GRADIENTS}",
    _linear_at_once,
    _at_once_shapes,
)
linear_backward = ops.define(
    f"linear_backward(Tensor grad, {_SAVED}, {_LAYER}{_LOSS}, bool[] wanted, bool compact=False, {ops.PART}) "
    f"-> ({_GRADIENTS}",
    _linear_backward,
    _backward_shapes,
)
linear_backward_picks = ops.define(
    f"linear_backward_picks(Tensor grad, {_SAVED}, {_LAYER}{_LOSS}, bool[] wanted, {ops.PART}) -> ({_GRADIENTS}",
    _linear_backward_picks,
    _backward_shapes,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


class LinearRowLoss(torch.autograd.Function):
    """input (rows, features), weight (classes, features), target -> loss.

    The layer computes in dtype; the gradients come back in the dtypes of input, weight and bias. Those of the last two
    are rounded from the sums (at once: and once more by the upstream gradient, unless that is 1).
    """

    @staticmethod
    def forward(
        ctx, input, weight, bias, target, class_weight, family, formula, params, alpha, k, ignore_index, reduction,
        dtype, normalize, chunk_bytes, sparse_grad, grad_enabled,
    ):  # fmt: skip
        num_classes = weight.shape[0]
        multi_hot = target.dim() == 2
        compute_dtype = reference.compute_dtype(dtype)
        x, w, b = (None if tensor is None else tensor.to(dtype) for tensor in (input, weight, bias))
        ctx.picks = sparse_grad or gathers_picks(num_classes, k, multi_hot)
        chunk_elements = max(1, (chunk_bytes or default_chunk_bytes(w, ctx.picks)) // dtype.itemsize)
        layer = x, w, b, class_norms(w, chunk_elements) if normalize else None, target
        ctx.arguments = arguments = chunk_elements, family, formula, params, k, ignore_index
        ctx.wanted = [grad_enabled and wanted for wanted in ctx.needs_input_grad[:3]]
        ctx.sparse_grad = sparse_grad
        ctx.reduction = reduction_of(target, class_weight, ignore_index, reduction, compute_dtype)
        ctx.scales = None
        # means over the terms of a multi-hot batch: forward counts them, and nothing of the target's size is made here
        counted = family == "logistic" and multi_hot and alpha is not None
        if family == "logistic" and not counted:
            ctx.scales = term_scales(alpha, None, num_classes, k)

        ctx.at_once = any(ctx.wanted) and not ctx.picks and _gradients_at_once(reduction, dtype, not counted)
        if ctx.at_once:
            values, *gradients = _at_once(ctx, layer)
            gradients = in_dtypes_of((input, weight, bias), gradients, ctx.wanted)
            # a compiled graph keeps them; otherwise backward takes them over, and no step holds the weight's twice
            ctx.gradients = None if torch.compiler.is_compiling() else gradients
            saved = gradients if torch.compiler.is_compiling() else ()
        else:
            values, *saved = (linear_forward_picks if ctx.picks else linear_forward)(*layer, *arguments)
            if counted:
                ctx.scales = term_scales(alpha, saved[0][:, 1], num_classes, k)
        ctx.save_for_backward(input, weight, bias, *layer, *saved)
        return ctx.reduction.loss(values if ctx.scales is None else ctx.scales.values(values))

    @staticmethod
    def backward(ctx, grad):
        parameters, layer, saved = ctx.saved_tensors[:3], ctx.saved_tensors[3:8], ctx.saved_tensors[8:]
        if ctx.at_once and torch.compiler.is_compiling():
            gradients = [None if gradient is None else gradient * grad for gradient in saved]
        elif ctx.at_once:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:  # retain_graph=True: they went with the first pass
                gradients = in_dtypes_of(parameters, _at_once(ctx, layer)[1:], ctx.wanted)
            with torch.no_grad():
                gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
        else:
            grad_rows = _grad_of_rows(ctx, grad, layer[0].shape[0])
            if ctx.sparse_grad:
                backward = sparse_gradients
            else:
                backward = linear_backward_picks if ctx.picks else linear_backward
            gradients = backward(grad_rows, *saved, *layer, *ctx.arguments, ctx.wanted)
            gradients = in_dtypes_of(parameters, gradients, ctx.wanted)
        leads_back = [tensor for tensor in parameters if tensor is not None]
        gradients = [None if gradient is None else once(gradient, *leads_back, grad) for gradient in gradients]
        return *gradients, *(None,) * 14


def _at_once(ctx, layer: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values or sums of the rows, and the gradients of the layer for an upstream gradient of 1."""
    x = layer[0]
    one = x.new_ones((), dtype=reference.compute_dtype(x.dtype))
    return linear_at_once(_grad_of_rows(ctx, one, x.shape[0]), *layer, *ctx.arguments, ctx.wanted)


def in_dtypes_of(tensors, gradients, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, each in the dtype of its tensor."""
    triples = zip(tensors, gradients, wanted, strict=True)
    return [gradient.to(tensor.dtype) if want else None for tensor, gradient, want in triples]


def _grad_of_rows(ctx, grad: Tensor, num_rows: int) -> Tensor:
    """What the backward doors take, (rows,) or (rows, 2)."""
    grad = ctx.reduction.grad_of_values(grad)
    if ctx.scales is None:
        return grad.expand(num_rows)
    return ctx.scales.grad_of_sums(grad).expand(num_rows, 2)
