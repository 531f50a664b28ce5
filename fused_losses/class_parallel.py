"""The classifier sharded over the ranks of a process group, exactly: states of rows are merged, logits never travel.

Every rank of the group sees all rows of the batch and its own range of classes. The doors run on that range; a row
whose positive is on another rank has ``NO_TARGET`` there. Then one all-gather of a few numbers per row, which every
rank merges in the order of the ranks, so that all hold the same bits:

- softmax over all negatives: (m, l, z_y) of each rank, merged by log-sum-exp;
- logistic over all negatives: the two sums of each rank, added;
- k hardest: each rank offers its k best (logit, class). The k best of these, lowest class first among equals, are the
  k hardest of all; a rank keeps those that are its own, so every gradient is written by the owner of its class.

Backward needs no communication: with the merged state, the backward doors give the shard's columns of the gradient.
Every rank has the same loss, and calls backward on it; the gradients are those of one loss, not of their sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops, reference
from .autograd import once
from .linear_autograd import IGNORED


@dataclass(frozen=True)
class ClassShard:
    """This rank's classes, [start, stop) of num_classes.

    Made on every rank of the group at the same time: the ranks tell each other their ranges, which must follow each
    other in the order of the ranks, from 0 to num_classes without gap or overlap. Uneven and empty ranges are fine.

    Args:
        start, stop: 0 <= start <= stop <= num_classes.
        num_classes: the classes of all ranks together.
        group: a ``torch.distributed`` process group. Default: the default group.

    Raises:
        ValueError: ranges that do not tile [0, num_classes); on every rank alike.
        RuntimeError: ``torch.distributed`` is not initialised.
    """

    start: int
    stop: int
    num_classes: int
    group: "dist.ProcessGroup | None" = None
    largest: int = field(init=False, repr=False)  # classes of the rank that has the most

    def __post_init__(self):
        _check_initialized()
        ranges = [None] * self.world_size
        dist.all_gather_object(ranges, (self.start, self.stop, self.num_classes), group=self.group)
        if not _tile(ranges):
            told = ", ".join(f"[{start}, {stop}) of {num_classes}" for start, stop, num_classes in ranges)
            raise ValueError(
                f"the ranks' class shards must tile [0, num_classes) in the order of the ranks, got {told}"
            )
        object.__setattr__(self, "largest", max(stop - start for start, stop, _ in ranges))

    @classmethod
    def split(cls, num_classes: int, group: "dist.ProcessGroup | None" = None) -> "ClassShard":
        """Shards as ``torch.chunk`` makes them: ceil(num_classes / ranks) classes each, what is left on the last."""
        _check_initialized()
        size = -(-num_classes // dist.get_world_size(group))
        start = min(dist.get_rank(group) * size, num_classes)
        return cls(start, min(start + size, num_classes), num_classes, group)

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

    def check_width(self, name: str, shape: torch.Size, width: int) -> int:
        """The number of classes of all ranks, if a tensor of this shape holds those of this one."""
        if width != len(self):
            raise ValueError(
                f"expected {name} of this rank's {len(self)} classes [{self.start}, {self.stop}) of "
                f"{self.num_classes}, got {tuple(shape)}"
            )
        return self.num_classes

    def offers(self, k: int) -> int:
        """How many picks a rank offers of the k hardest."""
        return min(k, self.largest)


def _check_initialized() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("class shards need torch.distributed: call torch.distributed.init_process_group first")


def _tile(ranges: list[tuple[int, int, int]]) -> bool:
    edge = 0
    for start, stop, num_classes in ranges:
        if not (start == edge <= stop and num_classes == ranges[0][2]):
            return False
        edge = stop
    return edge == ranges[0][2] > 0


# --- merging ----------------------------------------------------------------------------------------------------------


def gather(shard: ClassShard, *mine: Tensor) -> Iterator[Tensor]:
    """Each tensor of every rank, (ranks, *its shape), in one collective: their bytes travel side by side."""
    parts = [tensor.flatten().view(torch.uint8) for tensor in mine]
    packed = torch.cat(parts)
    theirs = packed.new_empty((shard.world_size, packed.shape[0]))
    dist.all_gather(list(theirs), packed, group=shard.group)
    for part, tensor in zip(theirs.split([part.shape[0] for part in parts], dim=1), mine, strict=True):
        aligned = part.clone(memory_format=torch.contiguous_format).flatten()
        yield aligned.view(tensor.dtype).view(shard.world_size, *tensor.shape)


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
    targets. The result has k picks, or those of all ranks if they are fewer. Merged in float64, so that what the shards
    rounded is not rounded again.
    """
    terms, state, pick_index, pick_logit = outputs
    row = state if family == "softmax" else torch.cat((terms, state), dim=1)
    if k == 0:
        (rows,) = gather(shard, row)  # (ranks, rows, values)
        hardest = None
    else:
        index = torch.where(pick_index < 0, shard.num_classes, pick_index + shard.start)
        rows, index, logit = gather(shard, row, index, pick_logit)
        hardest, pick_index, pick_logit = _merge_picks(shard, index, logit, k)
    rows = rows.double()
    if family == "softmax":
        m, l, z_y = rows.unbind(2)
        m, l = _merge_log_sums(m, l) if hardest is None else _merge_log_sums(hardest.t(), hardest.new_zeros(()))
        z_y = z_y.amax(0).masked_fill(rows.isnan().any(dim=(0, 2)), torch.nan)
        merged_terms = reference.value(formula, (z_y - m) - l, params)
        merged_state = torch.stack((m, l, z_y), dim=1)
    else:
        rows = rows.sum(0)  # z_y is 0 on all ranks but one; NaN wins
        if hardest is not None:
            rows[:, 1] = reference.phi(formula, hardest, params).sum(1)  # of a row with a NaN, pos is NaN
        merged_terms, merged_state = rows.split(2, dim=1)
    if ignored is not None:
        merged_terms = merged_terms.masked_fill(ignored if family == "softmax" else ignored[:, None], 0)
    return merged_terms.to(terms.dtype), merged_state.to(state.dtype, copy=True), pick_index, pick_logit


def _merge_log_sums(m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """m and l (rows,) of the union, from those of the parts, (parts, rows); without anything finite, l is -inf."""
    m = m.masked_fill(l == -torch.inf, -torch.inf)
    most = m.amax(0)
    most = most.masked_fill(most == -torch.inf, 0)
    return most, ((m - most) + l).exp().sum(0).log()


def _merge_picks(shard: ClassShard, index: Tensor, logit: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k hardest of all, float64 (rows, k), and the shard's own among them: index and logit, empty slots -1, -inf.

    index, logit: (ranks, rows, offers), num_classes and -inf in empty slots.
    """
    dtype = logit.dtype
    index, logit = (part.transpose(0, 1).flatten(1) for part in (index, logit))  # (rows, ranks * offers)
    index, by_class = index.sort(dim=1)
    logit, by_logit = logit.gather(1, by_class).sort(dim=1, descending=True, stable=True)
    hardest, logit = index.gather(1, by_logit[:, :k]), logit[:, :k]
    own = (hardest >= shard.start) & (hardest < shard.stop)
    own_index = (hardest - shard.start).masked_fill(~own, -1).int()
    return logit.double(), own_index, logit.masked_fill(~own, -torch.inf).to(dtype).contiguous()


def nothing(rows: int, like: Tensor, family: str, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward door would give for rows without classes: nothing to add, nothing to pick."""
    dtype = reference.compute_dtype(like.dtype)
    terms = like.new_zeros((rows,) if family == "softmax" else (rows, 2), dtype=dtype)
    state = like.new_zeros((rows, 2), dtype=dtype)
    if family == "softmax":
        state = torch.tensor((0, -torch.inf, -torch.inf), dtype=dtype, device=like.device).expand(rows, 3)
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
