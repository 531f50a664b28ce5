"""A linear layer in front of the doors: statistics of the rows, and gradients from their coefficients, without ever
holding the logits of the whole batch.

Never more logits than fit a budget, and their gradient is written over them. Three ways lead to the gradients:

- *picks*: over the k hardest, k a small share of the classes. Forward walks blocks of classes, all rows at a time, and
  keeps (index, logit) pairs; backward touches the rows of the weight that each row of the batch has as label or pick,
  and computes no logits.
- *at once*: a scalar loss. Chunks of rows, all classes at a time; each chunk's gradient follows its forward (three
  matmuls instead of four), and backward only multiplies by the upstream scalar, in place.
- *again*: chunks of rows where that scalar cannot be factored out. Backward computes their logits once more.

``linear_autograd.py`` chooses; ``linear_ops.py`` makes ops of these functions.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .finish import ignored_rows
from .losses import LossSpec
from .merge import Seen, sum_of_picks

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


def chunk_elements_of(input: Tensor, weight: Tensor, chunk_bytes: int, picks: bool) -> int:
    """How many logits exist at a time, in input's dtype; chunk_bytes 0 for the default.

    Blocks of classes stay in the cache; chunks of rows each read the whole weight, and want as much work for it. Asked
    inside the ops, where shapes are never symbolic.
    """
    if chunk_bytes == 0:
        chunk_bytes = 4 * MIB if weight.device.type == "cpu" else 256 * MIB
        if not picks:
            chunk_bytes = max(chunk_bytes, weight.numel() * input.element_size())
    return max(1, chunk_bytes // input.element_size())


def pieces_of(total: int, most: int) -> list[slice]:
    """0 ... total in slices of about equal size, none larger than most."""
    size = -(-total // max(1, -(-total // most)))
    return [slice(start, min(start + size, total)) for start in range(0, total, max(1, size))]


def _buffer(like: Tensor, rows: int, classes: int) -> Tensor:
    """Empty (rows, classes) whose rows start at multiples of 64 bytes: a matmul writes them up to 1.7 times as fast."""
    unit = 64 // like.element_size()
    return like.new_empty((rows, -(-classes // unit) * unit))[:, :classes]


# --- shapes -----------------------------------------------------------------------------------------------------------


def seen_shapes(input, weight, bias, norms, target, chunk_bytes, *spec):
    spec = LossSpec(*spec)
    return reference.empty_statistics(input, target, spec), *reference.empty_picks(input, spec)


def gradient_shapes(input, weight, bias, wanted):
    want_input, want_weight, want_bias = wanted
    dtype = reference.compute_dtype(input.dtype)
    return (
        input.new_empty(input.shape if want_input else (0,)),
        input.new_empty(weight.shape if want_weight else (0,), dtype=dtype),
        input.new_empty(_shape_of_bias(weight, bias) if want_bias else (0,), dtype=dtype),
    )


def _shape_of_bias(weight: Tensor, bias: Tensor | None) -> torch.Size:
    return weight.shape[:1] if bias is None else bias.shape


def one_bias(bias: Tensor | None) -> bool:
    """Whether it is one of all classes, ()."""
    return bias is not None and bias.dim() == 0


# --- the layer --------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """z = x w^T + bias, or x (w / |w|)^T + bias with norms.

    Classes are normalised before the product: in 16 bits the product of x with a long or a short w would leave the
    range. Some classes at a time, from the weight in its own dtype.
    """

    weight: Tensor  # (classes, features)
    bias: Tensor | None  # (classes,), or () for all alike
    norms: Tensor | None  # (classes,)

    def chunks(self, input: Tensor, chunk_elements: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their input and their logits: one row, or at most so many logits, at a time and in the same memory."""
        pieces = pieces_of(input.shape[0], max(1, chunk_elements // self.weight.shape[0]))
        buffer = _buffer(input, max((rows.stop - rows.start for rows in pieces), default=0), self.weight.shape[0])
        for rows in pieces:
            x = input[rows].contiguous()  # torch 2.10 multiplies a bfloat16 row of a transposed matrix wrongly
            yield rows, x, self.logits(x, out=buffer[: rows.stop - rows.start])

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        if self.norms is not None:
            for classes, directions in self.directions(x.dtype):
                torch.mm(x, directions.t(), out=out[:, classes])
            if self.bias is not None:
                out += self.bias
        elif self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        return out

    def directions(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Classes and their w / |w|, divided in the compute dtype."""
        assert self.norms is not None
        most = MIB if self.weight.device.type == "cpu" else 16 * MIB
        for classes in pieces_of(self.weight.shape[0], max(1, most // max(1, self.weight.shape[1]))):
            w = self.weight[classes].to(self.norms.dtype)
            yield classes, (w / self.norms[classes, None]).to(dtype)

    def of(self, classes: slice) -> "_Layer":
        bias = self.bias if self.bias is None or one_bias(self.bias) else self.bias[classes]
        return _Layer(self.weight[classes], bias, None if self.norms is None else self.norms[classes])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def class_norms(weight: Tensor) -> Tensor:
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


def _rows_to_zero(target: Tensor, spec: LossSpec) -> Tensor | None:
    """Ignored rows, (rows,) bool; None if there are none, which only a CPU may find out: other devices would have to be
    waited for."""
    ignored = ignored_rows(target, spec)
    return None if ignored is None or (target.device.type == "cpu" and not ignored.any()) else ignored


class _Gradients:
    """The gradients of a layer, summed chunk by chunk; those of weight and bias in float32 for a 16-bit layer.

    An ignored row adds literal zeros, whatever its input, and gets them, whatever the weight: 0 * nan is no zero.
    """

    def __init__(self, input: Tensor, layer: _Layer, ignored: Tensor | None, wanted: list[bool]):
        self.layer, self.ignored, self.wanted = layer, ignored, wanted
        self.input, self.weight, self.bias = gradient_shapes(input, layer.weight, layer.bias, wanted)
        self.weight.zero_()
        self.bias.zero_()

    def add(self, rows: slice, x: Tensor, dz: Tensor) -> None:
        """x: a chunk's input; dz: the gradient of its logits."""
        want_input, want_weight, want_bias = self.wanted
        if want_bias:
            self.bias += dz.sum(0, dtype=self.bias.dtype).sum_to_size(self.bias.shape)
        norms = self.layer.norms
        if want_input and norms is None:
            torch.mm(dz, self.layer.weight, out=self.input[rows])
        elif want_input and norms is not None:
            total = x.new_zeros(x.shape, dtype=norms.dtype)
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


def linear_forward(input, weight, bias, norms, target, chunk_bytes, *spec) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward door sees of all rows: *again*."""
    spec = LossSpec(*spec)
    check_target(input, target, spec)
    seen = seen_shapes(input, weight, bias, norms, target, chunk_bytes, *spec)
    for rows, _, z in _Layer(weight, bias, norms).chunks(input, chunk_elements_of(input, weight, chunk_bytes, False)):
        part = ops.statistics(z, target[rows], *spec)
        for whole, of_rows in zip(seen, part, strict=True):
            whole[rows] = of_rows
    return seen


def linear_backward(
    coefficients, statistics, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, wanted, *spec,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias from the rows' coefficients: *again*."""
    spec = LossSpec(*spec)
    _check_rows(input, target, coefficients, statistics, pick_index, pick_logit)
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, _rows_to_zero(target, spec), wanted)
    one = coefficients.new_ones(())
    for rows, x, z in layer.chunks(input, chunk_elements_of(input, weight, chunk_bytes, False)):
        saved = target[rows], statistics[rows], pick_index[rows], pick_logit[rows]
        ops.backward_(one, coefficients[rows], z, *saved, *spec)
        gradients.add(rows, x, z)
    return gradients.result()


def linear_at_once(
    share, label_weight, input, weight, bias, norms, target, chunk_bytes, wanted, *spec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and statistics of the rows, and the gradients of input, weight and bias for the share (rows,) that each
    row has in the loss: *at once*. label_weight: as ``finish`` takes it."""
    spec = LossSpec(*spec)
    _check_rows(input, target, share)
    check_target(input, target, spec)
    layer = _Layer(weight, bias, norms)
    gradients = _Gradients(input, layer, _rows_to_zero(target, spec), wanted)
    values = torch.empty_like(share)
    statistics = reference.empty_statistics(input, target, spec)
    for rows, x, z in layer.chunks(input, chunk_elements_of(input, weight, chunk_bytes, False)):
        weights = None if label_weight is None else label_weight[rows]
        values[rows], statistics[rows] = ops.at_once_(share[rows], z, target[rows], weights, *spec)
        gradients.add(rows, x, z)
    return values, statistics, *gradients.result()


def _check_rows(*tensors: Tensor) -> None:
    """A chunk takes its rows of each: of what has more, some would be left over."""
    if len({tensor.shape[:1] for tensor in tensors}) > 1:
        raise ValueError(f"expected as many rows in each tensor, got {[tuple(tensor.shape) for tensor in tensors]}")


def check_target(input: Tensor, target: Tensor, spec: LossSpec) -> None:
    """The CPU doors check too, but know a row by its number in the chunk; multi-hot targets would cost a copy here."""
    _check_rows(input, target)
    if input.device.type == "cpu" and not spec.multi_hot(target):
        reference.check_target(target, spec)


# --- picks alone ------------------------------------------------------------------------------------------------------


def linear_forward_picks(input, weight, bias, norms, target, chunk_bytes, *spec) -> Seen:
    """What the compact door sees of all rows: *picks*.

    The k hardest of the layer are among the k hardest of each block of classes: these are the candidates. A matmul is
    cheaper for many rows and few classes at a time than the other way round, and its logits stay in the cache.
    """
    spec = LossSpec(*spec)
    check_target(input, target, spec)
    return hardest_of_rows(_Layer(weight, bias, norms), input, target, chunk_bytes, spec)


def hardest_of_rows(layer, input: Tensor, target: Tensor, chunk_bytes: int, spec: LossSpec) -> Seen:
    """The compact door over all classes of a layer: whatever has a weight and gives the logits of some classes."""
    weight = layer.weight
    seen = reference.empty_statistics(input, target, spec), *reference.empty_picks(input, spec)
    chunk_elements = chunk_elements_of(input, weight, chunk_bytes, True)
    least = max(LEAST_BLOCK, LEAST_BLOCK_PER_PICK * spec.k)
    blocks = pieces_of(weight.shape[0], max(least, chunk_elements // max(1, input.shape[0])))
    most_rows = max(1, chunk_elements // blocks[0].stop)
    buffer = _buffer(input, min(most_rows, input.shape[0]), blocks[0].stop)
    for rows in pieces_of(input.shape[0], most_rows):
        part = _hardest_of_blocks(layer, blocks, buffer, input[rows].contiguous(), target[rows], spec)
        for whole, of_rows in zip(seen, part, strict=True):
            whole[rows] = of_rows
    return seen


def _hardest_of_blocks(layer, blocks: list[slice], buffer: Tensor, x: Tensor, target: Tensor, spec: LossSpec) -> Seen:
    """The compact door over the classes of all blocks, lowest class first among equals."""
    num_rows, k = x.shape[0], spec.k
    labels = target if spec.labels else target[:, None]
    num_labels = labels.shape[1]
    index = x.new_empty((num_rows, num_labels + len(blocks) * k), dtype=torch.int32)  # the labels come first
    logit = x.new_empty(index.shape)
    of_blocks = []
    for number, classes in enumerate(blocks):
        z = layer.of(classes).logits(x, out=buffer[:num_rows, : classes.stop - classes.start])
        of_block = spec._replace(first_class=spec.first_class + classes.start)
        statistics, picked, picked_logit = ops.statistics(z, target, *of_block)
        if z.device.type != "cpu":  # where the doors keep the picks in the order of the classes
            picked, order = picked.sort(dim=1)
            picked_logit = picked_logit.gather(1, order)
        columns = slice(num_labels + number * k, num_labels + (number + 1) * k)
        index[:, columns] = torch.where(picked < 0, -1, picked + classes.start)
        logit[:, columns] = picked_logit
        of_blocks.append(statistics)

    seen = torch.stack(of_blocks)  # (blocks, rows, 3 | 3 + P)
    index[:, :num_labels] = -1
    of_labels = seen[..., 3 if spec.labels else 2 :].amax(0)
    logit[:, :num_labels] = of_labels.masked_fill(seen.isnan().any(dim=(0, 2))[:, None], math.nan)
    return hardest_of_candidates(index, logit, target, layer.weight.shape[0], spec)


def hardest_of_candidates(index: Tensor, logit: Tensor, target: Tensor, num_classes: int, spec: LossSpec) -> Seen:
    """The compact door over the candidates of each row, (rows, P + candidates): the labels, whose index is -1, and
    negatives in the order of the classes, -1 and -inf in empty slots."""
    label, among = _among_candidates(target, num_classes, index.shape[1], spec)
    statistics, chosen, chosen_logit = ops.statistics(logit, label, *among)
    chosen = index.gather(1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, -1)
    if spec.label_smoothing:  # an empty slot among the candidates is no negative
        statistics[:, 2] = sum_of_picks(chosen >= 0, chosen_logit.to(statistics.dtype), statistics[:, 0], spec)
    return statistics, chosen, chosen_logit


def _among_candidates(target: Tensor, num_classes: int, width: int, spec: LossSpec) -> tuple[Tensor, LossSpec]:
    """Target and options where the classes are the columns of candidates, those of the labels first.

    A label that is somewhere is its column, which is an empty slot if it is of another shard. Of class indices 0 is the
    target here, width one of another shard, width + 1 an ignored row, -1 no class.
    """
    among = spec._replace(first_class=0, all_classes=width + 1)
    if spec.labels:
        column = torch.arange(target.shape[1], device=target.device)
        no_class = (target < -1) | (target >= spec.all_classes)
        return torch.where(target == -1, -1, column.expand_as(target)).masked_fill_(no_class, width + 1), among
    here = (target >= spec.first_class) & (target < spec.first_class + num_classes)
    label = torch.where(here, 0, width).masked_fill_((target < 0) | (target >= spec.all_classes), -1)
    ignored = ignored_rows(target, spec)
    if ignored is not None:
        label.masked_fill_(ignored, width + 1)
    return label, among._replace(ignore_index=width + 1)


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
    for rows in pieces_of(classes.shape[0], max(1, elements // max(1, classes.shape[1] * weight.shape[1]))):
        total[rows] = (weight[classes[rows]] * factors[rows, :, None]).sum(1)
    return total


def _pick_gradients(
    only_picked: bool, coefficients, statistics, pick_index, pick_logit,
    input, weight, bias, norms, target, chunk_bytes, wanted, *spec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias through the labels and the k picks of each row alone: O(rows * k * features).

    With only_picked, those of weight and bias are of the classes that come last. No float atomics: the same bits in
    every run.
    """
    spec = LossSpec(*spec)
    num_classes = weight.shape[0]
    _check_rows(input, target, coefficients, statistics, pick_index, pick_logit)
    if input.device.type == "cpu":
        reference.check_picks(pick_index, num_classes)
    dz = reference.gradient_of_negatives(coefficients, statistics, pick_logit.to(statistics.dtype), spec)
    labels = target if spec.labels else target[:, None]
    classes = torch.cat((labels - spec.first_class, pick_index), dim=1)  # (rows, P + k)
    nowhere = (classes < 0) | (classes >= num_classes)
    ignored = ignored_rows(target, spec)
    if ignored is not None:
        nowhere |= ignored[:, None]
    dz = torch.cat((coefficients[:, -labels.shape[1] :], dz), dim=1).masked_fill(nowhere, 0)

    want_input, want_weight, want_bias = wanted
    dinput = input.new_empty((0, input.shape[1]) if want_input else (0,))  # of no rows
    dweight, dbias = statistics.new_empty((0,)), statistics.new_empty((0,))  # results of an op must not share memory
    picked = target.new_empty((0,))
    if want_input and input.shape[0] > 0:
        elements = chunk_elements_of(input, weight, chunk_bytes, True)
        dinput = _sum_of_classes(dz, classes.masked_fill(nowhere, 0), weight, norms, elements)
        dinput = dinput.masked_fill(coefficients.isnan().any(1, keepdim=True), math.nan)
        dinput = dinput if ignored is None else dinput.masked_fill(ignored[:, None], 0)
        dinput = dinput.to(input.dtype)
    if want_weight or (want_bias and not one_bias(bias)):
        by_class = _ByClass(classes.masked_fill(nowhere, num_classes), num_classes, only_picked)
        picked = picked if by_class.picked is None else by_class.picked
    if want_weight:
        counted = input if ignored is None else input.masked_fill(ignored[:, None], 0)
        dweight = by_class.sum_rows(dz, counted.to(dz.dtype))
        if norms is not None:
            _through_norms(dweight, by_class.of(weight), by_class.of(norms))
    if want_bias and one_bias(bias):
        dbias = dz.sum()
    elif want_bias:
        dbias = by_class.sum_rows(dz, dz.new_ones((dz.shape[0], 1))).squeeze(1)
    return dinput, dweight, dbias, picked


def linear_backward_picks(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias from the rows' coefficients: *picks*, dense."""
    dinput, dweight, dbias, _ = _pick_gradients(False, *arguments)
    return dinput, dweight, dbias


def linear_backward_sparse(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, those of weight and bias of the picked classes alone, and these classes, sorted: *picks*, sparse."""
    return _pick_gradients(True, *arguments)
