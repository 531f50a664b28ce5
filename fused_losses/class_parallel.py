"""The classifier sharded over the ranks of a process group, exactly: states of rows are merged, not logits.

Every rank of the group sees all rows of the batch and its own range of classes. The doors run on that range; a row
whose positive is on another rank has ``NO_TARGET`` there. Then a few numbers per row are exchanged and merged in the
order of the ranks, so that all hold the same bits:

- softmax over all negatives: (m, l, z_y) of each rank, in one all-gather, merged by log-sum-exp;
- logistic over all negatives: the two sums of each rank, in one all-gather, added;
- k hardest: each rank offers its k best (logit, class). Every rank merges its share of the rows, for which one
  all-to-all brings it all offers: the k best, lowest class first among equals, are the k hardest of all. What it then
  tells the others, in one all-gather, is each row's terms, state and edge, the last of its k. Of its offers a rank
  keeps those up to the edge, so every gradient is written by the owner of its class. No rank receives all offers: what
  a step sends does not grow with the number of ranks.

Backward needs no communication: with the merged state, the backward doors give the shard's columns of the gradient.
Every rank has the same loss, and calls backward on it; the gradients are those of one loss, not of their sum.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops, reference
from .autograd import once
from .linear_autograd import IGNORED, SparsePicks, gradient_shapes, gradients_of, layer_of, way_of
from .reductions import grad_of_terms

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ClassShard:
    """This rank's classes, [start, stop) of num_classes.

    Made on every rank of the group at the same time: the ranks tell each other their ranges, which must follow each
    other in the order of the ranks, from 0 to num_classes without gap or overlap. Uneven and empty ranges are fine.

    Args:
        start, stop: 0 <= start <= stop <= num_classes.
        num_classes: the classes of all ranks together, fewer than 2^31.
        group: a ``torch.distributed`` process group. Default: the default group.

    Raises:
        ValueError: ranges that do not tile [0, num_classes); on every rank alike.
        ValueError: this rank is not one of the group.
        RuntimeError: ``torch.distributed`` is not initialised.
    """

    start: int
    stop: int
    num_classes: int
    group: "dist.ProcessGroup | None" = None
    edges: tuple[int, ...] = field(init=False, repr=False)  # 0, and where the classes of each rank stop

    def __post_init__(self):
        _check_member(self.group)
        ranges = [None] * self.world_size
        dist.all_gather_object(ranges, (self.start, self.stop, self.num_classes), group=self.group)
        if not _tile(ranges):
            told = ", ".join(f"[{start}, {stop}) of {num_classes}" for start, stop, num_classes in ranges)
            raise ValueError(
                f"the ranks' class shards must tile [0, num_classes) in the order of the ranks, got {told}"
            )
        if self.num_classes >= 2**31:
            raise ValueError(f"expected fewer than 2^31 classes, got {self.num_classes}")
        object.__setattr__(self, "edges", (0, *(stop for _, stop, _ in ranges)))

    @classmethod
    def split(cls, num_classes: int, group: "dist.ProcessGroup | None" = None) -> "ClassShard":
        """Shards as ``torch.chunk`` makes them: ceil(num_classes / ranks) classes each, what is left on the last."""
        _check_member(group)
        edges = _edges_of_chunks(num_classes, dist.get_world_size(group))
        rank = dist.get_rank(group)
        return cls(edges[rank], edges[rank + 1], num_classes, group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def __len__(self) -> int:
        return self.stop - self.start

    def __bool__(self) -> bool:
        return True  # also without classes

    def __deepcopy__(self, _) -> "ClassShard":
        return self  # a process group cannot be copied

    def local_target(self, target: Tensor, ignore_index: int) -> Tensor:
        """What the doors take on this rank, with ``ignore_index=IGNORED``, for class indices (rows,) or multi-hot."""
        if target.dim() == 2:
            return target
        outside = (target < self.start) | (target >= self.stop)
        local = (target - self.start).masked_fill(outside, reference.NO_TARGET)
        local.masked_fill_((target < 0) | (target >= self.num_classes), -1)  # out of range for everybody
        return local.masked_fill_(target == ignore_index, IGNORED)

    def offers(self, k: int) -> int:
        """How many picks a rank offers of the k hardest."""
        return min(k, max(stop - start for start, stop in itertools.pairwise(self.edges)))

    def dtensor(self, mine: Tensor) -> "DTensor":
        """mine, this rank's rows of a tensor (classes, ...), as the ``DTensor`` of all ranks' rows, in the same memory.

        That is what ``torch.distributed.checkpoint`` saves, and loads in place on any number of ranks; it would take
        the plain tensors of the ranks for copies of one.

        Raises:
            ValueError: shards that :meth:`split` would not make, on every rank alike; ``DTensor`` knows no others.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        width_of_shard(self, "rows", mine.shape, mine.shape[0])
        if self.edges != _edges_of_chunks(self.num_classes, self.world_size):
            raise ValueError(f"DTensor knows the shards of ClassShard.split only, got borders {self.edges}")
        mesh = DeviceMesh.from_group(self.group or dist.group.WORLD, mine.device.type)
        shape = torch.Size((self.num_classes, *mine.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(mine.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def width_of_shard(shard: ClassShard, name: str, shape: torch.Size, width: int) -> int:
    """The number of classes of all ranks, if a tensor of this shape holds those of this one."""
    if not isinstance(shard, ClassShard):
        raise TypeError(f"shard must be a ClassShard, got {type(shard).__name__}")
    if width != len(shard):
        raise ValueError(
            f"expected {name} of this rank's {len(shard)} classes [{shard.start}, {shard.stop}) of "
            f"{shard.num_classes}, got {tuple(shape)}"
        )
    return shard.num_classes


def _check_member(group: "dist.ProcessGroup | None") -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("class shards need torch.distributed: call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not one of the group whose ranks share the classes")


def _edges_of_chunks(num_classes: int, world_size: int) -> tuple[int, ...]:
    size = -(-num_classes // world_size)
    return tuple(min(rank * size, num_classes) for rank in range(world_size + 1))


def _tile(ranges: list[tuple[int, int, int]]) -> bool:
    edge = 0
    for start, stop, num_classes in ranges:
        if not (start == edge <= stop and num_classes == ranges[0][2]):
            return False
        edge = stop
    return edge == ranges[0][2] > 0


# --- merging ----------------------------------------------------------------------------------------------------------


def gather(shard: ClassShard, *mine: Tensor) -> Iterator[Tensor]:
    """Each tensor (rows, ...) of every rank, (ranks, rows, ...), in one collective: their bytes travel side by side."""
    packed = _side_by_side(mine)
    theirs = packed.new_empty((shard.world_size, *packed.shape))
    dist.all_gather(list(theirs), packed, group=shard.group)
    return _apart(theirs, mine)


def exchange(shard: ClassShard, *mine: Tensor) -> Iterator[Tensor]:
    """Of each tensor (rows, ...) of every rank what it holds for this rank's share of the rows: (ranks, share, ...)."""
    packed = _side_by_side(mine)
    shares = rows_of_ranks(shard, packed.shape[0])
    share = shares[dist.get_rank(shard.group)]
    theirs = packed.new_empty((shard.world_size, share, packed.shape[1]))
    dist.all_to_all_single(theirs.flatten(0, 1), packed, [share] * shard.world_size, shares, group=shard.group)
    return _apart(theirs, mine)


def rows_of_ranks(shard: ClassShard, rows: int) -> list[int]:
    """How many rows each rank merges: all but the last ones as many as the first."""
    most = -(-rows // shard.world_size)
    return [max(0, min(most, rows - rank * most)) for rank in range(shard.world_size)]


def _side_by_side(tensors: tuple[Tensor, ...]) -> Tensor:
    """(rows, bytes of all)"""
    return torch.cat([tensor.reshape(len(tensor), tensor.shape[1:].numel()).view(torch.uint8) for tensor in tensors], 1)


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Zeros behind it, up to so many rows: what all ranks gather has one size. (Autocast chooses torch.cat's dtype.)"""
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return padded


def _apart(packed: Tensor, like: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """(ranks, rows, bytes of all) -> tensors of the dtypes and widths of like."""
    widths = [tensor.dtype.itemsize * tensor.shape[1:].numel() for tensor in like]
    for part, tensor in zip(packed.split(widths, dim=2), like, strict=True):
        aligned = part.clone(memory_format=torch.contiguous_format)
        yield aligned.view(tensor.dtype).view(*packed.shape[:2], *tensor.shape[1:])


def merge(
    shard: ClassShard,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    ignored: Tensor | None,
    family: str,
    formula: str,
    params: list[float],
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward door gives for the whole rows, from what it gave for the shard; of the picks, the shard's own.

    outputs: terms, state and picks, with ``shard.offers(k)`` picks of each row; ignored (rows,), None for multi-hot
    targets. Of the picks the result has those that are among the k hardest of all, the others are empty slots.
    """
    terms, state, pick_index, pick_logit = outputs
    row = state if family == "softmax" else torch.cat((terms, state), dim=1)  # (rows, values)
    if k == 0:
        (rows,) = gather(shard, row)
        terms, state = _merge_rows(rows, None, terms.dtype, family, formula, params)
    else:
        count = row.shape[0]
        index = torch.where(pick_index < 0, shard.num_classes, pick_index + shard.start)
        rows, indices, logits = exchange(shard, row, index, pick_logit)
        indices, logits = _hardest(indices, logits, k)
        merged = _merge_rows(rows, logits.double(), terms.dtype, family, formula, params)
        most = rows_of_ranks(shard, count)[0]
        mine = (_with_rows(part, most) for part in (*merged, indices[:, -1], logits[:, -1]))
        terms, state, edge, edge_logit = (part.flatten(0, 1)[:count] for part in gather(shard, *mine))
        edge, edge_logit = edge[:, None], edge_logit[:, None]
        taken = (pick_logit > edge_logit) | ((pick_logit == edge_logit) & (index <= edge))
        pick_index = pick_index.masked_fill(~taken, -1)
        pick_logit = pick_logit.masked_fill(~taken, -torch.inf)
    if ignored is not None:
        terms = terms.masked_fill(ignored if family == "softmax" else ignored[:, None], 0)
    return terms, state, pick_index, pick_logit


def _merge_rows(
    rows: Tensor, hardest: Tensor | None, dtype: torch.dtype, family: str, formula: str, params: list[float]
) -> tuple[Tensor, Tensor]:
    """Terms and state of whole rows from those of the ranks, (ranks, rows, values), and from the logits of the k
    hardest, (rows, k). In float64, so that what the shards rounded is not rounded again."""
    rows = rows.double()
    if family == "softmax":
        m, l, z_y = rows.unbind(2)
        m, l = _merge_log_sums(m, l) if hardest is None else _merge_log_sums(hardest.t(), hardest.new_zeros(()))
        z_y = z_y.amax(0).masked_fill(rows.isnan().any(dim=(0, 2)), torch.nan)
        terms, state = reference.value(formula, (z_y - m) - l, params), torch.stack((m, l, z_y), dim=1)
    else:
        rows = rows.sum(0)  # z_y is 0 on all ranks but one; NaN wins
        if hardest is not None:
            rows[:, 1] = reference.phi(formula, hardest, params).sum(1)  # of a row with a NaN, pos is NaN
        terms, state = rows.split(2, dim=1)
    return terms.to(dtype), state.to(dtype, copy=True)


def _merge_log_sums(m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """m and l (rows,) of the union, from those of the parts, (parts, rows); without anything finite, l is -inf."""
    m = m.masked_fill(l == -torch.inf, -torch.inf)
    most = m.amax(0)
    most = most.masked_fill(most == -torch.inf, 0)
    return most, ((m - most) + l).exp().sum(0).log()


def _hardest(index: Tensor, logit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k hardest of all offers, hardest first, lowest class first among equals: index and logit (rows, k).

    index, logit: (ranks, rows, offers), num_classes and -inf in empty slots.
    """
    index, logit = (part.transpose(0, 1).flatten(1) for part in (index, logit))  # (rows, ranks * offers)
    index, by_class = index.sort(dim=1)
    logit, by_logit = logit.gather(1, by_class).sort(dim=1, descending=True, stable=True)
    return index.gather(1, by_logit[:, :k]), logit[:, :k]


def nothing(rows: int, like: Tensor, family: str, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward door would give for rows without classes: nothing to add, nothing to pick."""
    dtype = reference.compute_dtype(like.dtype)
    terms = like.new_zeros((rows,) if family == "softmax" else (rows, 2), dtype=dtype)
    state = like.new_zeros((rows, 3 if family == "softmax" else 2), dtype=dtype)
    if family == "softmax":
        state[:, 1:] = -torch.inf
    pick_logit = like.new_full((rows, k), -torch.inf)
    return terms, state, torch.full_like(pick_logit, -1, dtype=torch.int32), pick_logit


# --- losses from logits -----------------------------------------------------------------------------------------------


class LossFromShard(torch.autograd.Function):
    """``LossFromLogits`` of a shard: logits (rows, classes of the shard), global target (rows,) or local multi-hot.

    Always the compact form: picks can be merged, edges cannot.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, family, formula, params, alpha, k, ignore_index, reduction, shard):
        multi_hot = target.dim() == 2
        local, offers = shard.local_target(target, ignore_index), shard.offers(k)
        if len(shard) == 0:
            outputs = nothing(logits.shape[0], logits, family, offers)
        else:
            door = ops.softmax_forward if family == "softmax" else ops.logistic_forward
            outputs = door(logits, local, formula, params, offers, IGNORED, k > 0)
        terms, state, pick_index, pick_logit = merge(
            shard, outputs, None if multi_hot else target == ignore_index, family, formula, params, k
        )
        loss, slopes = ops.reduce_terms(
            terms, state, target, weight, logits.dtype, alpha, shard.num_classes, k, ignore_index, reduction
        )
        kept = None if k > 0 and not multi_hot else logits
        ctx.save_for_backward(slopes, kept, local, state, pick_index, pick_logit)
        ctx.door_arguments = family, formula, params, pick_index.shape[1], IGNORED, len(shard), k > 0
        ctx.set_materialize_grads(False)  # the states have none
        return loss, state

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 11
        slopes, kept, target, state, pick_index, pick_logit = ctx.saved_tensors
        if ctx.door_arguments[-2] == 0:
            dlogits = pick_logit.new_empty((state.shape[0], 0))
        else:
            dlogits = ops.loss_backward(grad, slopes, kept, target, state, pick_index, pick_logit, *ctx.door_arguments)
        return once(dlogits, state, grad), *(None,) * 10


# --- linear losses ----------------------------------------------------------------------------------------------------


class LinearLossFromShard(torch.autograd.Function):
    """``LinearRowLoss`` of a shard: input (rows, features) of all ranks, weight (classes of the shard, features).

    By picks, or in chunks of rows, whose logits backward computes once more: their merged state is known when all ranks
    have seen all rows. The gradient of input is the sum of the ranks', one all-reduce; those of weight and bias stay
    where the classes are.
    """

    @staticmethod
    def forward(
        ctx, input, weight, bias, target, class_weight, family, formula, params, alpha, k, ignore_index, reduction,
        dtype, normalize, chunk_bytes, sparse_grad, wanted, shard,
    ):  # fmt: skip
        multi_hot = target.dim() == 2
        offers, compact = shard.offers(k), k > 0
        way = way_of(len(shard), offers, multi_hot, sparse_grad)
        layer = layer_of(input, weight, bias, shard.local_target(target, ignore_index), dtype, normalize)
        arguments = chunk_bytes, family, formula, params, offers, IGNORED
        if len(shard) == 0:
            outputs = nothing(input.shape[0], layer[0], family, offers)
        else:
            outputs = way.forward(layer, arguments, compact)
        ignored = None if multi_hot else target == ignore_index
        terms, *saved = merge(shard, outputs, ignored, family, formula, params, k)
        if class_weight is not None:
            class_weight = class_weight.to(terms.dtype)
        loss, slopes = ops.reduce_terms(
            terms, saved[0], target, class_weight, dtype, alpha, shard.num_classes, k, ignore_index, reduction
        )
        ctx.shard, ctx.way, ctx.arguments, ctx.wanted, ctx.compact = shard, way, arguments, wanted, compact
        ctx.save_for_backward(input, weight, bias, slopes, *saved, *layer)
        return loss

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, slopes, *saved = ctx.saved_tensors
        saved, layer = saved[:3], saved[3:]
        if len(ctx.shard) == 0:
            gradients = [part.zero_() for part in gradient_shapes(layer[0], layer[1], ctx.wanted)]
            if ctx.way is SparsePicks:
                gradients[1:] = (part.to_sparse(1) for part in gradients[1:])
        else:
            of_terms = grad_of_terms(grad, slopes)
            gradients = ctx.way.backward(of_terms, saved, layer, ctx.arguments, ctx.wanted, ctx.compact)
        if ctx.wanted[0]:
            dist.all_reduce(gradients[0], group=ctx.shard.group)
        return *gradients_of((input, weight, bias), gradients, ctx.wanted, grad), *(None,) * 15


CLASSES_AT_A_TIME = 4096


def own_rows_of(shard: ClassShard, mine: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
    """Fills mine, this rank's rows of a tensor (classes, ...), with what fill draws for them among all classes: the
    same seed gives every class the same numbers, however the classes are sharded. Every rank draws all."""
    piece = mine.new_empty((CLASSES_AT_A_TIME, *mine.shape[1:]))
    for first in range(0, shard.num_classes, CLASSES_AT_A_TIME):
        rows = fill(piece[: shard.num_classes - first])
        start, stop = max(first, shard.start), min(first + rows.shape[0], shard.stop)
        if start < stop:
            mine[start - shard.start : stop - shard.start] = rows[start - first : stop - first]


def move_rows(old: ClassShard, old_rows: Tensor, new: ClassShard, new_rows: Tensor) -> None:
    """Copies each class's row from the rank that has it among the old shards to the one that has it among the new."""
    rank = dist.get_rank(old.group)
    for owner, (edge, end) in enumerate(itertools.pairwise(old.edges)):
        for start in range(edge, end, CLASSES_AT_A_TIME):
            stop = min(start + CLASSES_AT_A_TIME, end)
            if owner == rank:
                rows = old_rows[start - edge : stop - edge].contiguous()
            else:
                rows = old_rows.new_empty((stop - start, *old_rows.shape[1:]))
            dist.broadcast(rows, group=old.group, group_src=owner)
            first, last = max(start, new.start), min(stop, new.stop)
            if first < last:
                new_rows[first - new.start : last - new.start] = rows[first - start : last - start]


def gather_batch(shard: ClassShard, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """input (rows, features) and class indices (rows,) of all ranks, in the order of the ranks; ranks may have
    different numbers of rows, also none.

    The gradient that comes back to a rank is that of its own rows, times the number of ranks: DDP divides by it when it
    averages the gradients of the network in front, and a mean over the rows of all ranks is to stay that.
    """
    wanted = torch.is_grad_enabled() and input.requires_grad
    (told,) = gather(shard, torch.tensor([[input.shape[0], wanted]], device=input.device))
    counts, wanted_by = told.flatten(0, 1).t().tolist()
    if any(wanted_by) and not input.requires_grad:
        input = input.detach().requires_grad_()  # all ranks take part in the all-reduce of backward, or none
    return _GatherRows.apply(input, target, counts, shard)


def _one_behind_the_other(of_ranks: Tensor, counts: list[int]) -> Tensor:
    """The first so many rows of each rank."""
    rows = of_ranks.new_empty((sum(counts), *of_ranks.shape[2:]))
    for part, of_rank in zip(rows.split(counts), of_ranks, strict=True):
        part.copy_(of_rank[: part.shape[0]])
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, counts, shard):
        ctx.own = input.shape[0], sum(counts[: dist.get_rank(shard.group)])
        ctx.world_size = shard.world_size
        most = max(counts)
        inputs, targets = gather(shard, _with_rows(input, most), _with_rows(target, most))
        target = _one_behind_the_other(targets, counts)
        ctx.mark_non_differentiable(target)
        return _one_behind_the_other(inputs, counts), target

    @staticmethod
    def backward(ctx, grad, _):
        rows, start = ctx.own
        return grad[start : start + rows] * ctx.world_size, None, None, None
