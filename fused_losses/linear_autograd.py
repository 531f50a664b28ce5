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

from . import flops, ops, reference
from .autograd import once
from .reductions import finish_of, grad_of_terms, reduce_terms

MIB = 2**20
LEAST_NORM = 1e-12  # F.normalize divides by nothing smaller either
# A block of classes is no smaller than this: each pays for k candidates in every row, and for its calls.
LEAST_BLOCK = 4096
LEAST_BLOCK_PER_PICK = 32
IGNORED = reference.NO_TARGET + 1  # in a block, whose class indices could meet a user's ignore_index


def gathers_picks(num_classes: int, k: int, multi_hot: bool) -> bool:
    """Whether backward gathers the picked classes; a larger share is cheaper as a dense matmul.

    Measured on two cores with 8192 and 32768 classes, 64 to 512 features: at C / 32 gathering wins by 10 to 27 %, at
    C / 16 the matmul draws level or wins by up to 13 %.
    """
    return 0 < k <= num_classes // 24 and not multi_hot


def _chunk_elements(input: Tensor, weight: Tensor, chunk_bytes: int, picks: bool) -> int:
    """How many logits exist at a time, in input's dtype; chunk_bytes 0 for the default.

    Blocks of classes stay in the cache; chunks of rows each read the whole weight, and want as much work for it. Asked
    inside the ops, where shapes are never symbolic.
    """
    if chunk_bytes == 0:
        chunk_bytes = 4 * MIB if weight.device.type == "cpu" else 256 * MIB
        if not picks:
            chunk_bytes = max(chunk_bytes, weight.numel() * input.element_size())
    return max(1, chunk_bytes // input.element_size())


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
    """z = x w^T + bias, or x (w / |w|)^T with norms.

    Classes are normalised before the product: in 16 bits the product of x with a long or a short w would leave the
    range. Some classes at a time, from the weight in its own dtype.
    """

    weight: Tensor  # (classes, features)
    bias: Tensor | None  # (classes,)
    norms: Tensor | None  # (classes,)

    def chunks(self, input: Tensor, chunk_elements: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their input and their logits, one row or at most so many logits at a time, in the same memory."""
        pieces = _pieces(input.shape[0], max(1, chunk_elements // self.weight.shape[0]))
        buffer = _buffer(input, max((rows.stop - rows.start for rows in pieces), default=0), self.weight.shape[0])
        for rows in pieces:
            x = input[rows].contiguous()  # torch 2.10 multiplies a bfloat16 row of a transposed matrix wrongly
            yield rows, x, self.logits(x, out=buffer[: rows.stop - rows.start])

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        if self.norms is not None:
            for classes, directions in self.directions(x.dtype):
                torch.mm(x, directions.t(), out=out[:, classes])
        elif self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        return out

    def directions(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Classes and their w / |w|, divided in the compute dtype."""
        most = MIB if self.weight.device.type == "cpu" else 16 * MIB
        for classes in _pieces(self.weight.shape[0], max(1, most // max(1, self.weight.shape[1]))):
            w = self.weight[classes].to(self.norms.dtype)
            yield classes, (w / self.norms[classes, None]).to(dtype)

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


def _class_norms(weight: Tensor) -> Tensor:
    """|w| of each class, (classes,), in the compute dtype. In pieces: torch copies a 16-bit tensor to reduce it so."""
    pieces = weight.split(max(1, MIB // max(1, weight.shape[1])))
    dtype = reference.compute_dtype(weight.dtype)
    norms = torch.cat([torch.linalg.vector_norm(w, dim=1, dtype=dtype) for w in pieces])
    return norms.clamp_(min=LEAST_NORM)


def _through_norms(dw: Tensor, weight: Tensor, norms: Tensor) -> None:
    """From the gradient by w / |w| to that by w: the part along w goes, since the length of w moves no cosine."""
    classes = max(1, MIB // max(1, weight.shape[1]))
    for part, w, norm in zip(dw.split(classes), weight.split(classes), norms.split(classes), strict=True):
        direction = w.to(part.dtype) / norm[:, None]
        along = (part * direction).sum(1).masked_fill_(norm == LEAST_NORM, 0)  # nothing is normalised there
        part.addcmul_(direction, along[:, None], value=-1).div_(norm[:, None])


def _ignored_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """(rows,) bool; None if there are none, which only a CPU may find out: others would have to be waited for."""
    if target.dim() == 2:
        return None
    ignored = target == ignore_index
    return None if target.device.type == "cpu" and not ignored.any() else ignored


class _Gradients:
    """The gradients of a layer, summed chunk by chunk; those of weight and bias in float32 for a 16-bit layer.

    An ignored row adds literal zeros, whatever its input, and gets them, whatever the weight: 0 * nan is no zero.
    """

    def __init__(self, input: Tensor, layer: _Layer, ignored: Tensor | None, wanted: list[bool]):
        self.layer, self.ignored, self.wanted = layer, ignored, wanted
        self.input, self.weight, self.bias = gradient_shapes(input, layer.weight, wanted)
        self.weight.zero_()
        self.bias.zero_()

    def add(self, rows: slice, x: Tensor, dz: Tensor) -> None:
        """x: a chunk's input; dz: the gradient of its logits."""
        want_input, want_weight, want_bias = self.wanted
        if want_bias:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        if want_input and self.layer.norms is None:
            torch.mm(dz, self.layer.weight, out=self.input[rows])
        elif want_input:
            total = x.new_zeros(x.shape, dtype=self.layer.norms.dtype)
            for classes, directions in self.layer.directions(x.dtype):
                _add_product(total, dz[:, classes], directions)
            self.input[rows] = total
        if want_weight:
            counted = x if self.ignored is None else x.masked_fill(self.ignored[rows, None], 0)
            _add_product(self.weight, dz.t(), counted)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        want_input, want_weight, _ = self.wanted
        if want_input and self.ignored is not None:
            self.input.masked_fill_(self.ignored[:, None], 0)
        if want_weight and self.layer.norms is not None:
            _through_norms(self.weight, self.layer.weight, self.layer.norms)
        return self.input, self.weight, self.bias


# --- chunks of rows through the doors ---------------------------------------------------------------------------------

_DOORS = {
    "softmax": (ops.softmax_forward, ops.softmax_backward),
    "logistic": (ops.logistic_forward, ops.logistic_backward),
}


def _linear_forward(
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, compact=False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward door of the family over all rows: *again*."""
    forward, _ = _DOORS[family]
    _check_target(input, weight, target, ignore_index)
    chunk_elements = _chunk_elements(input, weight, chunk_bytes, picks=False)
    outputs = _forward_shapes(
        input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, compact
    )
    for rows, _, z in _Layer(weight, bias, norms).chunks(input, chunk_elements):
        for whole, part in zip(outputs, forward(z, target[rows], loss, params, k, ignore_index, compact), strict=True):
            whole[rows] = part
    return outputs


def _linear_backward(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, wanted,
    compact=False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias from grad of the terms: *again*."""
    _, backward = _DOORS[family]
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, _ignored_rows(target, ignore_index), wanted)
    for rows, x, z in layer.chunks(input, _chunk_elements(input, weight, chunk_bytes, picks=False)):
        saved = z, target[rows], state[rows], pick_index[rows], pick_logit[rows]
        gradients.add(rows, x, backward(grad[rows], *saved, loss, params, k, ignore_index, z.shape[1], compact))
    return gradients.result()


def _linear_at_once(
    grad, input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of the rows, and the gradients of input, weight and bias for grad of the terms: *at once*."""
    forward, backward = _DOORS[family]
    _check_target(input, weight, target, ignore_index)
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, _ignored_rows(target, ignore_index), wanted)
    terms = torch.empty_like(grad, memory_format=torch.contiguous_format)
    for rows, x, z in layer.chunks(input, _chunk_elements(input, weight, chunk_bytes, picks=False)):
        terms[rows], *saved = forward(z, target[rows], loss, params, k, ignore_index, False)
        saved = z, target[rows], *saved
        # not named here: two chunks' gradients would be alive at a time
        gradients.add(rows, x, backward(grad[rows], *saved, loss, params, k, ignore_index, z.shape[1], False))
    return terms, *gradients.result()


def _check_target(input: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> None:
    """The CPU doors check too, but know a row by its number in the chunk; multi-hot targets would cost a copy here."""
    if input.device.type == "cpu" and target.dim() == 1:
        reference.check_target(target, weight.shape[0], ignore_index)


# --- picks alone ------------------------------------------------------------------------------------------------------


def _linear_forward_picks(
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward door of the family over all rows, compact: *picks*.

    The k hardest of the layer are among the k hardest of each block of classes: these are the candidates. A matmul is
    cheaper for many rows and few classes at a time than the other way round, and its logits stay in the cache.
    """
    _check_target(input, weight, target, ignore_index)
    outputs = _picks_shapes(input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index)
    chunk_elements = _chunk_elements(input, weight, chunk_bytes, picks=True)
    least = max(LEAST_BLOCK, LEAST_BLOCK_PER_PICK * k)
    blocks = _pieces(weight.shape[0], max(least, chunk_elements // max(1, input.shape[0])))
    most_rows = max(1, chunk_elements // blocks[0].stop)
    buffer = _buffer(input, min(most_rows, input.shape[0]), blocks[0].stop)
    layer = _Layer(weight, bias, norms)
    target = target.masked_fill(target == ignore_index, IGNORED)
    for rows in _pieces(input.shape[0], most_rows):
        x = input[rows].contiguous()
        parts = _hardest_of_blocks(layer, blocks, buffer, x, target[rows], family, loss, params, k)
        for whole, part in zip(outputs, parts, strict=True):
            whole[rows] = part
    return outputs


def _hardest_of_blocks(
    layer: _Layer, blocks: list[slice], buffer: Tensor, x: Tensor, target: Tensor, family, loss, params, k
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The compact door over the classes of all blocks, lowest class first among equals."""
    forward, _ = _DOORS[family]
    num_rows, size = x.shape[0], blocks[0].stop
    block_of_target = target.div(size, rounding_mode="floor")
    inside = torch.arange(len(blocks), device=x.device)[:, None] == block_of_target  # (blocks, rows)
    targets = torch.where(inside, target - block_of_target * size, reference.NO_TARGET)
    targets.masked_fill_(target == IGNORED, IGNORED)

    index = x.new_empty((num_rows, 1 + len(blocks) * k), dtype=torch.int32)  # column 0 is the target's
    logit = x.new_empty(index.shape)
    states = []
    for number, classes in enumerate(blocks):
        z = layer.of(classes).logits(x, out=buffer[:num_rows, : classes.stop - classes.start])
        _, state, picked, picked_logit = forward(z, targets[number], loss, params, k, IGNORED, True)
        if z.device.type != "cpu":  # where the doors keep the picks in the order of the classes
            picked, order = picked.sort(dim=1)
            picked_logit = picked_logit.gather(1, order)
        columns = slice(1 + number * k, 1 + (number + 1) * k)
        index[:, columns] = picked + classes.start
        logit[:, columns] = picked_logit
        states.append(state)

    states = torch.stack(states)  # (blocks, rows, values); without the target, z_y is -inf or 0
    z_y = states[..., 2].amax(0) if family == "softmax" else states[..., 0].sum(0)
    elsewhere = target == reference.NO_TARGET  # column 0 is then no class: an empty slot
    index[:, 0] = -1
    out_of_range = ((target < 0) & ~elsewhere) | (target >= layer.weight.shape[0])
    z_y = z_y.masked_fill(elsewhere, -math.inf)
    logit[:, 0] = z_y.masked_fill(out_of_range | states.isnan().any(dim=(0, 2)), math.nan)
    *rows, chosen, chosen_logit = forward(logit, target.clamp(max=0), loss, params, k, IGNORED, True)
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


def _sum_of_classes(factors: Tensor, classes: Tensor, weight: Tensor, norms: Tensor | None, elements: int) -> Tensor:
    """Sum over the slots of factor * weight[class], or of factor * weight[class] / |weight[class]|: (rows, features).

    factors, classes: (rows, slots). elements: how many of the weight's are gathered at a time where they must be.
    """
    if norms is not None:
        factors = factors / norms[classes]
    if norms is None or weight.dtype == factors.dtype:
        return F.embedding_bag(classes, weight, mode="sum", per_sample_weights=factors.to(weight.dtype))
    total = factors.new_empty((classes.shape[0], weight.shape[1]))  # 16 bits do not hold what a norm divides
    for rows in _pieces(classes.shape[0], max(1, elements // max(1, classes.shape[1] * weight.shape[1]))):
        total[rows] = (weight[classes[rows]] * factors[rows, :, None]).sum(1)
    return total


def _pick_gradients(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, wanted, only_picked,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias through the target and the k picks of each row alone: O(rows * k * features).

    With only_picked, those of weight and bias are of the classes that come last. No float atomics: the same bits in
    every run.
    """
    num_classes = weight.shape[0]
    z = pick_logit.to(state.dtype)  # (rows, k)
    if family == "softmax":
        dz_y, dz = reference.softmax_gradient(grad, state, z, loss, params)
        dz_y = dz_y[:, None]
    else:
        dz_y, dz = reference.logistic_gradient(grad, state[:, :1], z, loss, params)
    classes = torch.cat((target[:, None], pick_index), dim=1)  # (rows, 1 + k)
    ignored = (target == ignore_index)[:, None]
    nowhere = (classes < 0) | (classes >= num_classes) | ignored
    dz = torch.cat((dz_y, dz), dim=1).masked_fill(nowhere, 0)

    want_input, want_weight, want_bias = wanted
    dinput = input.new_empty((0, input.shape[1]) if want_input else (0,))  # of no rows
    dweight, dbias = state.new_empty((0,)), state.new_empty((0,))  # results of an op must not share memory
    picked = target.new_empty((0,))
    if want_input and input.shape[0] > 0:
        elements = _chunk_elements(input, weight, chunk_bytes, picks=True)
        dinput = _sum_of_classes(dz, classes.masked_fill(nowhere, 0), weight, norms, elements)
        poisoned = dz_y.isnan() | state.isnan().any(1, keepdim=True)
        dinput = dinput.masked_fill(poisoned, math.nan).masked_fill(ignored, 0).to(input.dtype)
    if want_weight or want_bias:
        by_class = _ByClass(classes.masked_fill(nowhere, num_classes), num_classes, only_picked)
        picked = picked if by_class.picked is None else by_class.picked
    if want_weight:
        dweight = by_class.sum_rows(dz, input.to(dz.dtype))
        if norms is not None:
            _through_norms(dweight, by_class.of(weight), by_class.of(norms))
    if want_bias:
        dbias = by_class.sum_rows(dz, dz.new_ones((dz.shape[0], 1))).squeeze(1)
    return dinput, dweight, dbias, picked


def _linear_backward_picks(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias from grad of the terms: *picks*, dense."""
    dinput, dweight, dbias, _ = _pick_gradients(*arguments, False)
    return dinput, dweight, dbias


def _linear_backward_sparse(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, those of weight and bias of the picked classes alone, and these classes, sorted: *picks*, sparse."""
    return _pick_gradients(*arguments, True)


# --- the same as ops: opaque to the compiler, which would unroll the loop over chunks ---------------------------------

_LAYER = "Tensor input, Tensor weight, Tensor? bias, Tensor? norms, Tensor target, int chunk_bytes, "
_LOSS = "str family, str loss, float[] params, int k, int ignore_index"
_SAVED = "Tensor state, Tensor pick_index, Tensor pick_logit"
_GRADIENTS = "Tensor dinput, Tensor dweight, Tensor dbias"


def _row_shapes(input, family):
    rows = input.shape[0]
    dtype = reference.compute_dtype(input.dtype)
    values = input.new_empty((rows,) if family == "softmax" else (rows, 2), dtype=dtype)
    return values, input.new_empty((rows, 3 if family == "softmax" else 2), dtype=dtype)


def _forward_shapes(
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, compact=False
):
    return *_row_shapes(input, family), *ops.empty_picks(input, k, compact)


def _picks_shapes(input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index):
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
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, wanted,
    compact=False,
):  # fmt: skip
    return gradient_shapes(input, weight, wanted)


def _sparse_shapes(
    grad, state, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, wanted,
):  # fmt: skip
    _, want_weight, want_bias = wanted
    picked = torch.library.get_ctx().new_dynamic_size() if want_weight or want_bias else 0
    dinput, dweight, dbias = gradient_shapes(input, weight, wanted)
    if want_weight:
        dweight = dweight.new_empty((picked, *weight.shape[1:]))
    if want_bias:
        dbias = dbias.new_empty((picked,))
    return dinput, dweight, dbias, target.new_empty((picked,))


def _at_once_shapes(
    grad, input, weight, bias, norms, target, chunk_bytes, family, loss, params, k, ignore_index, wanted
):
    return grad.new_empty(grad.shape), *gradient_shapes(input, weight, wanted)


class_norms = ops.define(
    "class_norms(Tensor weight) -> Tensor",
    _class_norms,
    lambda weight: weight.new_empty(weight.shape[:1], dtype=reference.compute_dtype(weight.dtype)),
)
linear_forward = ops.define(
    f"linear_forward({_LAYER}{_LOSS}, bool compact=False) -> (Tensor terms, {_SAVED})",
    _linear_forward,
    _forward_shapes,
)
linear_forward_picks = ops.define(
    f"linear_forward_picks({_LAYER}{_LOSS}) -> (Tensor terms, {_SAVED})", _linear_forward_picks, _picks_shapes
)
linear_at_once = ops.define(
    f"linear_at_once(Tensor grad, {_LAYER}{_LOSS}, bool[] wanted) -> (Tensor terms, {_GRADIENTS})",
    _linear_at_once,
    _at_once_shapes,
)
linear_backward = ops.define(
    f"linear_backward(Tensor grad, {_SAVED}, {_LAYER}{_LOSS}, bool[] wanted, bool compact=False) -> ({_GRADIENTS})",
    _linear_backward,
    _backward_shapes,
)
linear_backward_picks = ops.define(
    f"linear_backward_picks(Tensor grad, {_SAVED}, {_LAYER}{_LOSS}, bool[] wanted) -> ({_GRADIENTS})",
    _linear_backward_picks,
    _backward_shapes,
)
linear_backward_sparse = ops.define(
    f"linear_backward_sparse(Tensor grad, {_SAVED}, {_LAYER}{_LOSS}, bool[] wanted) -> ({_GRADIENTS}, Tensor picked)",
    _linear_backward_sparse,
    _sparse_shapes,
)
flops.register_when_imported()


# --- the ways ---------------------------------------------------------------------------------------------------------


class Again:
    """Chunks of rows; backward computes their logits once more."""

    @staticmethod
    def forward(layer: tuple, arguments: tuple, compact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Terms of the rows, state and picks, as a forward door gives them."""
        return linear_forward(*layer, *arguments, compact)

    @staticmethod
    def backward(grad: Tensor, saved: list, layer: list, arguments: tuple, wanted: list[bool], compact: bool) -> tuple:
        """The gradients of input, weight and bias from that of the terms; of no elements where not wanted."""
        return linear_backward(grad, *saved, *layer, *arguments, wanted, compact)


class Picks:
    """Blocks of classes; backward gathers what the rows have picked. Always compact."""

    @staticmethod
    def forward(layer: tuple, arguments: tuple, compact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return linear_forward_picks(*layer, *arguments)

    @staticmethod
    def backward(grad: Tensor, saved: list, layer: list, arguments: tuple, wanted: list[bool], compact: bool) -> tuple:
        return linear_backward_picks(grad, *saved, *layer, *arguments, wanted)


class SparsePicks(Picks):
    """The same, with gradients of weight and bias that are coalesced COO tensors."""

    @staticmethod
    @torch.no_grad()  # under create_graph=True the graph is recorded here, where no op hides it
    def backward(grad: Tensor, saved: list, layer: list, arguments: tuple, wanted: list[bool], compact: bool) -> tuple:
        dinput, *of_picked, picked = linear_backward_sparse(grad, *saved, *layer, *arguments, wanted)
        num_classes = layer[1].shape[0]

        def scattered(values: Tensor) -> Tensor:
            size = (num_classes, *values.shape[1:])
            return torch.sparse_coo_tensor(picked[None], values, size, is_coalesced=True, check_invariants=False)

        return dinput, *(
            scattered(values) if want else values for values, want in zip(of_picked, wanted[1:], strict=True)
        )


def way_of(num_classes: int, k: int, multi_hot: bool, sparse_grad: bool) -> type[Again | Picks]:
    if sparse_grad:
        return SparsePicks
    return Picks if gathers_picks(num_classes, k, multi_hot) else Again


# --- autograd ---------------------------------------------------------------------------------------------------------


def linear_loss(
    input, weight, bias, target, class_weight, family, formula, params, alpha, k, ignore_index, reduction, dtype,
    normalize, chunk_bytes, sparse_grad,
):  # fmt: skip
    """input (rows, features), weight (classes, features), target -> loss.

    The layer computes in dtype; the gradients come back in the dtypes of input, weight and bias. Those of the last two
    are rounded from the sums (at once: and once more by the upstream gradient, unless that is 1).
    """
    multi_hot = target.dim() == 2
    wanted = wanted_of(input, weight, bias)
    way = way_of(weight.shape[0], k, multi_hot, sparse_grad)
    # means over the terms of a multi-hot batch: forward counts them, and nothing of the target's size is made here
    counts_terms = family == "logistic" and multi_hot and alpha is not None
    if any(wanted) and way is Again and _gradients_at_once(reduction, dtype, not counts_terms):
        function, how = LinearLossAtOnce, ()
    else:
        function, how = LinearLossFromTerms, (way,)
    arguments = chunk_bytes, family, formula, params, k, ignore_index
    return function.apply(
        input, weight, bias, target, class_weight, arguments, alpha, reduction, dtype, normalize, wanted, *how
    )


def wanted_of(*parameters: Tensor | None) -> list[bool]:
    """Which of input, weight and bias get a gradient. Asked before forward, where nobody records any more."""
    recorded = torch.is_grad_enabled()
    return [recorded and parameter is not None and parameter.requires_grad for parameter in parameters]


def layer_of(input, weight, bias, target, dtype: torch.dtype, normalize: bool) -> tuple:
    """What the ops take: input, weight, bias, norms, target. A weight that is normalised is cast after that."""
    if normalize:
        return input.to(dtype), weight, None, class_norms(weight), target
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), None, target


class LinearLossFromTerms(torch.autograd.Function):
    """*picks* and *again*: forward gives the terms of the rows, and backward the gradients from theirs."""

    @staticmethod
    def forward(
        ctx, input, weight, bias, target, class_weight, arguments, alpha, reduction, dtype, normalize, wanted, way
    ):
        layer = layer_of(input, weight, bias, target, dtype, normalize)
        *_, k, ignore_index = arguments
        terms, *saved = way.forward(layer, arguments, False)
        if class_weight is not None:
            class_weight = class_weight.to(terms.dtype)
        positives = saved[0][:, 1] if target.dim() == 2 else None
        loss, slopes = reduce_terms(
            terms, target, class_weight, positives, alpha, weight.shape[0], k, ignore_index, reduction
        )
        ctx.way, ctx.arguments, ctx.wanted = way, arguments, wanted
        ctx.save_for_backward(input, weight, bias, slopes, *saved, *layer)
        return loss

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, slopes, *saved = ctx.saved_tensors
        saved, layer = saved[:3], saved[3:]
        gradients = ctx.way.backward(grad_of_terms(grad, slopes), saved, layer, ctx.arguments, ctx.wanted, False)
        return *gradients_of((input, weight, bias), gradients, ctx.wanted, grad), *(None,) * 9


class LinearLossAtOnce(torch.autograd.Function):
    """*at once*: forward gives the gradients too, for an upstream gradient of 1; backward multiplies them."""

    @staticmethod
    def forward(ctx, input, weight, bias, target, class_weight, arguments, alpha, reduction, dtype, normalize, wanted):
        layer = layer_of(input, weight, bias, target, dtype, normalize)
        _, family, *_, k, ignore_index = arguments
        one = input.new_ones((), dtype=reference.compute_dtype(dtype))
        finish = finish_of(
            target, class_weight, None, family, alpha, weight.shape[0], k, ignore_index, reduction, one.dtype
        )
        slopes = finish.slopes(one, input.shape[0])
        terms, *gradients = linear_at_once(slopes, *layer, *arguments, wanted)
        gradients = in_dtypes_of((input, weight, bias), gradients, wanted)
        if torch.compiler.is_compiling():  # a compiled graph keeps what backward needs by itself
            ctx.prepared = None
        else:
            ctx.prepared, gradients = _Prepared(gradients), ()
        ctx.arguments, ctx.wanted = arguments, wanted
        ctx.save_for_backward(input, weight, bias, slopes, *layer, *gradients)
        return finish.loss(terms)

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, slopes, *saved = ctx.saved_tensors
        layer, gradients = saved[:5], saved[5:]
        in_place = ctx.prepared is not None
        if in_place:
            gradients = ctx.prepared.take()
            if gradients is None:  # retain_graph=True: an earlier pass has them
                _, *gradients = linear_at_once(slopes, *layer, *ctx.arguments, ctx.wanted)
                gradients = in_dtypes_of((input, weight, bias), gradients, ctx.wanted)
        target, ignore_index = layer[-1], ctx.arguments[-1]
        gradients = _times(gradients, grad, target, ignore_index, in_place)
        return *leading_back(gradients, (input, weight, bias), grad), *(None,) * 8


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
def _times(
    gradients: list[Tensor | None], grad: Tensor, target: Tensor, ignore_index: int, in_place: bool
) -> list[Tensor | None]:
    """The gradients of input, weight and bias, times the upstream gradient.

    An upstream gradient that is not finite makes no zero of an ignored row something else.
    """
    if target.dim() == 1:
        ignored = target == ignore_index
    else:
        ignored = target.new_zeros(target.shape[:1], dtype=torch.bool)
    grad = grad.masked_fill(ignored.all(), 0)  # nothing counts
    if in_place and _can_overwrite(grad):
        gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
    else:
        gradients = [None if gradient is None else gradient * grad for gradient in gradients]
    if gradients[0] is not None:
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
