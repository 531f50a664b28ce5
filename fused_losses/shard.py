"""The classes sharded over the ranks of a process group: which rank has which, and what the ranks tell each other.

Everything that talks stands here; what is said of the losses, in ``merge.py``.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ClassShard:
    """This rank's classes, [start, stop) of num_classes.

    Made on every rank of the group at the same time: the ranks tell each other their ranges, which must follow each
    other in the order of the ranks, from 0 to num_classes without gap or overlap. Uneven and empty ranges are fine;
    :meth:`split` makes even ones.

    Args:
        start: the first class of this rank, 0 <= start <= stop.
        stop: the class behind its last, stop <= num_classes.
        num_classes: the classes of all ranks together, fewer than 2^31.
        group: a ``torch.distributed`` process group. Default: None, the default group.
        check_ranks: at the first call of a loss with this shard, compare what the ranks gave it, in one exchange that
            waits for the device. What differs later is not seen. Default: True.

    Raises:
        ValueError: ranges that do not tile [0, num_classes), on every rank alike; this rank is not one of the group.
        RuntimeError: ``torch.distributed`` is not initialised.

    Example:
        >>> shard = fl.ClassShard(0, 1000, 1000)  # of one rank, which has all classes
        >>> logits, target = torch.zeros(2, len(shard)), torch.tensor([1, 999])
        >>> fl.cross_entropy(logits, target, shard=shard)
        tensor(6.9078)
    """

    start: int
    stop: int
    num_classes: int
    group: "dist.ProcessGroup | None" = None
    check_ranks: bool = True
    checked: list[bool] = field(init=False, repr=False, compare=False, default_factory=list)
    edges: tuple[int, ...] = field(init=False, repr=False)  # 0, and where the classes of each rank stop
    meshes: "dict[str, DeviceMesh]" = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        _check_member(self.group)
        ranges = [(0, 0, 0)] * self.world_size
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
    def split(
        cls, num_classes: int, group: "dist.ProcessGroup | None" = None, *, check_ranks: bool = True
    ) -> "ClassShard":
        """Shards as ``torch.chunk`` makes them: ceil(num_classes / ranks) classes each, what is left on the last.

        Args:
            num_classes: the classes of all ranks together, fewer than 2^31.
            group: a ``torch.distributed`` process group. Default: None, the default group.
            check_ranks: as in :class:`ClassShard`. Default: True.

        Returns:
            ClassShard: this rank's.

        Raises:
            ValueError: this rank is not one of the group.
            RuntimeError: ``torch.distributed`` is not initialised.

        Example:
            >>> shard = fl.ClassShard.split(1000)
            >>> shard.start, shard.stop, shard.world_size
            (0, 1000, 1)
        """
        _check_member(group)
        edges = _edges_of_chunks(num_classes, dist.get_world_size(group))
        rank = dist.get_rank(group)
        return cls(edges[rank], edges[rank + 1], num_classes, group, check_ranks)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def unchecked(self) -> bool:
        """Whether the ranks are to be compared now. A compiled graph cannot."""
        return self.check_ranks and not self.checked and not torch.compiler.is_compiling()

    def __len__(self) -> int:
        return self.stop - self.start

    def __bool__(self) -> bool:
        return True  # also without classes

    def __deepcopy__(self, _) -> "ClassShard":
        return self  # a process group cannot be copied

    def __reduce__(self):
        """Unpickled it is made anew, by every rank at the same time: not on another number of ranks."""
        return ClassShard, (self.start, self.stop, self.num_classes, self.group, self.check_ranks)

    def offers(self, k: int) -> int:
        """How many picks a rank offers of the k hardest."""
        return min(k, max(stop - start for start, stop in itertools.pairwise(self.edges)))

    @property
    def even(self) -> bool:
        """Whether :meth:`split` would make these shards: ``DTensor`` knows no others."""
        return self.edges == _edges_of_chunks(self.num_classes, self.world_size)

    def dtensor(self, mine: Tensor) -> "DTensor":
        """This rank's rows of a tensor (classes, ...) as the ``DTensor`` of all ranks' rows, in the same memory.

        That is what :class:`LinearLoss` has for parameters where it can, and what ``torch.distributed.checkpoint``
        saves, and loads in place on any number of ranks; it would take the plain tensors of the ranks for copies of
        one.

        Args:
            mine: (classes of this rank, ...), or (), the same on every rank, which is replicated.

        Returns:
            DTensor: (classes of all ranks, ...), sharded by its first dimension; or ().

        Raises:
            ValueError: shards that :meth:`split` would not make, on every rank alike; ``DTensor`` knows no others.

        Example:
            >>> shard = fl.ClassShard.split(1000)
            >>> shard.dtensor(torch.zeros(len(shard), 8)).shape
            torch.Size([1000, 8])
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape, placements = mine.shape, [Replicate() if mine.dim() == 0 else Shard(0)]
        if mine.dim() > 0:
            shape = torch.Size((width_of_shard(self, "rows", mine.shape, mine.shape[0]), *mine.shape[1:]))
        if not self.even:
            raise ValueError(f"DTensor knows the shards of ClassShard.split only, got borders {self.edges}")
        stride = torch.empty(shape, device="meta").stride()
        mesh = self._mesh(mine.device.type)
        return DTensor.from_local(mine.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)

    def _mesh(self, device_type: str) -> "DeviceMesh":
        from torch.distributed.device_mesh import DeviceMesh

        if device_type == "meta":  # where nothing is ever sent
            device_type = "cpu"
        if device_type not in self.meshes:
            group = self.group or dist.group.WORLD
            assert group is not None  # the shard was made by one of its ranks
            self.meshes[device_type] = DeviceMesh.from_group(group, device_type)
        return self.meshes[device_type]

    def holds(self, tensor: "DTensor") -> bool:
        """Whether each rank has of it what :meth:`dtensor` would give it."""
        mesh, placement = tensor.device_mesh, tensor.placements[0]
        ours = self.meshes.get(mesh.device_type)
        if mesh != ours and mesh.mesh.tolist() != dist.get_process_group_ranks(self.group or dist.group.WORLD):
            return False
        if tensor.dim() == 0:
            return placement.is_replicate()
        return self.even and placement.is_shard(0) and tensor.shape[0] == self.num_classes


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Asked of the type, for the compiler finds no attributes of a ``DTensor``; and imported by those who have one."""
    return hasattr(type(tensor), "to_local")


def local_of(shard: ClassShard | None, tensor: Tensor) -> Tensor:
    """What this rank has of a ``DTensor`` that its shard :meth:`~ClassShard.holds`, with gradients; of () the same on
    every rank, which must be so of its gradient. Any other tensor as it is."""
    if shard is None or not is_dtensor(tensor) or not shard.holds(tensor):
        return tensor
    return tensor.to_local()


def check_shard(shard: ClassShard) -> None:
    if not isinstance(shard, ClassShard):
        raise TypeError(f"shard must be a ClassShard, got {type(shard).__name__}")


def width_of_shard(shard: ClassShard, name: str, shape: torch.Size, width: int) -> int:
    """The number of classes of all ranks, if a tensor of this shape holds those of this one."""
    check_shard(shard)
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


# --- collectives ------------------------------------------------------------------------------------------------------


def gather(shard: ClassShard, *mine: Tensor) -> Iterator[Tensor]:
    """Each tensor (rows, ...) of every rank, (ranks, rows, ...), in one collective: their bytes travel side by side."""
    packed = _side_by_side(mine)
    theirs = packed.new_empty((shard.world_size, *packed.shape))
    dist.all_gather(list(theirs), packed, group=shard.group)
    return _apart(theirs, mine)


def check_agreement(shard: ClassShard, told: dict[str, object]) -> None:
    """Raises ValueError, on every rank alike, where the ranks tell different things: before they exchange numbers that
    would not fit, or be wrong."""
    of_ranks: list[dict[str, object]] = [{}] * shard.world_size
    dist.all_gather_object(of_ranks, told, group=shard.group)
    for name in told:
        values = [of_rank.get(name) for of_rank in of_ranks]
        if not all(_same(value, values[0]) for value in values):
            said = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"the ranks that share the classes must agree in {name}, got {said}")
    shard.checked.append(True)


def _same(a: object, b: object) -> bool:
    """Sums of tensors may be rounded differently."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) or (a != a and b != b)
    return a == b


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


def with_rows(tensor: Tensor, rows: int) -> Tensor:
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


# --- rows of the weight -----------------------------------------------------------------------------------------------

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


def move_rows(
    old: ClassShard | None, old_rows: Tensor, new: ClassShard | None, new_rows: Tensor, origin: Tensor
) -> None:
    """Fills new_rows, this rank's rows of a tensor (classes, ...), with those of old_rows that origin (classes,) names:
    the class that each was, -1 for a row that stays as it is. Every rank names the same."""
    for first in range(0, origin.shape[0], CLASSES_AT_A_TIME):
        wanted = origin[first : first + CLASSES_AT_A_TIME]
        start, stop = (0, old_rows.shape[0]) if old is None else (old.start, old.stop)
        mine = (wanted >= start) & (wanted < stop)
        rows = old_rows.new_zeros((wanted.shape[0], *old_rows.shape[1:]))
        rows[mine] = old_rows[wanted[mine] - start]
        if old is not None:  # one rank has a row, the others add zero bytes
            dist.all_reduce(rows.view(-1).view(torch.uint8), group=old.group)
        begin, end = (0, new_rows.shape[0]) if new is None else (new.start, new.stop)
        numbers = torch.arange(first, first + wanted.shape[0], device=origin.device)
        taken = (wanted >= 0) & (numbers >= begin) & (numbers < end)
        new_rows[numbers[taken] - begin] = rows[taken]


# --- rows of the batch ------------------------------------------------------------------------------------------------


def gather_batch(
    shard: ClassShard, input: Tensor, target: list[Tensor], of_rows: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """input (rows, features), target and what else the rows have, (rows, ...) each, of all ranks in the order of the
    ranks; ranks may have different numbers of rows, also none, and of labels per row.

    target: class indices (rows,) or labels (rows, P) and, it may be, their weights.

    The gradient that comes back to a rank is that of its own rows, times the number of ranks: DDP divides by it when it
    averages the gradients of the network in front, and a mean over the rows of all ranks is to stay that.
    """
    wanted = torch.is_grad_enabled() and input.requires_grad
    most_labels = target[0].shape[1] if target[0].dim() == 2 else 0
    (told,) = gather(shard, torch.tensor([[input.shape[0], wanted, most_labels]], device=input.device))
    counts, wanted_by, labels = told.flatten(0, 1).t().tolist()
    if any(wanted_by) and not input.requires_grad:
        input = input.detach().requires_grad_()  # all ranks take part in the all-reduce of backward, or none
    if max(labels) > most_labels:
        target = [F.pad(part, (0, max(labels) - most_labels), value=-1) for part in target]
    input, *rows = _GatherRows.apply(counts, shard, input, *target, *of_rows)
    return input, rows[: len(target)], rows[len(target) :]


def _one_behind_the_other(of_ranks: Tensor, counts: list[int]) -> Tensor:
    """The first so many rows of each rank."""
    rows = of_ranks.new_empty((sum(counts), *of_ranks.shape[2:]))
    for part, of_rank in zip(rows.split(counts), of_ranks, strict=True):
        part.copy_(of_rank[: part.shape[0]])
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts, shard, *rows):
        """The first is input."""
        ctx.own = rows[0].shape[0], sum(counts[: dist.get_rank(shard.group)])
        ctx.world_size = shard.world_size
        most = max(counts)
        of_ranks = gather(shard, *(with_rows(part, most) for part in rows))
        input, *others = (_one_behind_the_other(part, counts) for part in of_ranks)
        ctx.mark_non_differentiable(*others)
        return input, *others

    @staticmethod
    def backward(ctx, grad, *_):
        rows, start = ctx.own
        return None, None, grad[start : start + rows] * ctx.world_size, *(None for _ in _)
