"""The doors in plain PyTorch: the truth that the fast backends are tested against, and the fallback for every device.

Contract of the doors, shared by all backends. z = logits, (rows, classes); what a row's numbers are, and what is made
of them, stands in ``finish.py``; the options that all doors take last, in ``losses.LossSpec``.

- Arithmetic and row outputs are float64 for float64 logits, else float32 (the compute dtype).
- target: int64 (rows,), or multi-hot (rows, classes) for the logistic family, where every entry != 0 is a positive.
  An index is ``ignore_index`` (looked at first: an ignored row), one of all classes, or bad. A class of another shard
  leaves the row without a positive here. A bad target raises on the CPU; on other devices its row becomes NaN.
- labels: int64 (rows, P), in every row ascending and distinct, -1 behind the last (``labels.py`` makes them so). They
  are never in S. One of another shard is not here; one that is no class is bad, as an index is. Where
  ``ignore_index`` is -1, a row without labels is ignored; where it is None, it counts.
- weight: of the classes of all shards, (all classes,), with class indices; of the labels, (rows, P), with labels.
- k = 0: S is all negatives. k >= 1: the k largest z_j with j not positive, the lowest class index first among equals.
- Picks, int32 and the logits' dtype, empty slots -1 and -inf: the compact form keeps all k, on the CPU in the order of
  the classes, elsewhere in any; the threshold form keeps one, the last taken, the *edge*; k = 0 keeps none. They count
  the classes at hand, whatever shard these are.
- statistics gives statistics (rows, 3 | 4 | 3 + P) and picks; forward gives loss and coefficients besides, as
  ``finish`` does.
- backward takes the upstream gradient of the loss, a scalar or (rows,), any strides, in the compute dtype, and writes
  every element of (rows, classes). A row whose coefficients times it are NaN becomes NaN as a whole; an ignored row
  becomes literal zeros, whatever comes from upstream. ``logits`` is None in the compact form unless the target is
  multi-hot: the picks and the statistics hold all that it needs.
- backward_ writes the same gradient over the logits, where nobody else reads these any more. Their rows are contiguous
  and share no memory. Where it raises for picks that are no classes, they may be overwritten already.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .finish import finish as finish_batch
from .finish import ignored_rows
from .formulas import FORMULAS, INF, softplus
from .losses import LossSpec

# --- arguments --------------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_same_device(*arguments) -> None:
    """Raises RuntimeError: an op with tensors of several devices is served by whichever of them comes first."""
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found}")


def check_forward(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, spec: LossSpec) -> None:
    """Raises ValueError, or RuntimeError, unless these are what forward takes; reads no values."""
    _check_reduction(reduction)
    check_same_device(logits, target, weight)
    check_statistics(logits, target, spec)
    _check_weight(weight, target, compute_dtype(logits.dtype), spec)


def check_statistics(logits: Tensor, target: Tensor, spec: LossSpec) -> None:
    """The same for statistics."""
    check_same_device(logits, target)
    if logits.dim() != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits must be floating and (rows, classes), got {logits.dtype}, {tuple(logits.shape)}")
    _check_spec(spec, target, *logits.shape)


def check_finish(
    statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str,
    spec: LossSpec,
) -> None:  # fmt: skip
    """The same for finish."""
    _check_reduction(reduction)
    check_same_device(statistics, target, weight)
    _check_spec(spec, target, target.shape[0] if target.dim() else 0)
    _check_statistics(statistics, target, spec)
    _check_weight(weight, target, statistics.dtype, spec)


def check_backward(
    grad: Tensor, coefficients: Tensor, logits: Tensor | None, target: Tensor, statistics: Tensor, pick_index: Tensor,
    pick_logit: Tensor, num_classes: int, spec: LossSpec,
) -> None:  # fmt: skip
    """The same for backward."""
    check_same_device(grad, coefficients, logits, target, statistics, pick_index, pick_logit)
    rows, dtype = target.shape[0] if target.dim() else 0, pick_logit.dtype
    _check_spec(spec, target, rows, num_classes)
    if dtype not in DTYPES or pick_index.dtype != torch.int32:
        raise ValueError("picks must be what forward returned")
    if not pick_index.shape == pick_logit.shape == (rows, spec.slots):
        raise ValueError("picks must be what forward returned")
    if not grad.dtype == coefficients.dtype == statistics.dtype == compute_dtype(dtype):
        raise ValueError("grad, coefficients and statistics must be float64 for float64 logits, else float32")
    _check_statistics(statistics, target, spec)
    if coefficients.shape != (rows, num_coefficients(target, spec)) or grad.shape not in ((), (rows,)):
        raise ValueError("coefficients must be what forward returned, grad one number or (rows,)")
    if logits is None and not (spec.compact and spec.k > 0 and not spec.multi_hot(target)):
        raise ValueError("backward needs the logits here")
    if logits is not None and (logits.shape != (rows, num_classes) or logits.dtype != dtype):
        raise ValueError("logits must be those of forward")


def check_overwritten(logits: Tensor) -> None:
    """The same of the logits that backward_ writes over."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be (rows, classes), got {tuple(logits.shape)}")
    rows, num_classes = logits.shape
    if (num_classes > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < num_classes):
        raise ValueError(
            "logits to be overwritten must be contiguous within rows that share no memory, got the strides "
            f"{tuple(logits.stride())}: give a copy of them, logits.contiguous(), or call backward"
        )


def _check_spec(spec: LossSpec, target: Tensor, rows: int, num_classes: int | None = None) -> None:
    """num_classes: those at hand, None where none are."""
    _check_numbers(LossSpec.of_op(*spec), num_classes)
    if spec.labels:
        if target.dim() != 2 or target.shape[1] == 0 or target.dtype != torch.int64:
            raise ValueError(f"labels must be int64 (rows, P), P >= 1, got {target.dtype}, {tuple(target.shape)}")
        if spec.ignore_index not in (None, -1):
            raise ValueError(f"ignore_index must be None or -1 with labels, got {spec.ignore_index}")
    elif target.dim() == 2:
        if spec.family != "logistic" or target.is_complex():
            raise ValueError("multi-hot targets are for the logistic family only, and not complex")
        if num_classes is not None and target.shape[1] != num_classes:
            raise ValueError("multi-hot targets must have the shape of the logits")
    elif target.dim() != 1 or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 class indices (rows,), got {target.dtype}, {tuple(target.shape)}")
    if target.shape[0] != rows:
        raise ValueError(f"target must have as many rows as the logits, {rows}, got {target.shape[0]}")


@functools.lru_cache
def _check_numbers(spec: LossSpec, num_classes: int | None) -> None:
    """What is right once stays so: a call costs less than its checks."""
    if spec.loss not in FORMULAS:
        raise ValueError(f"not a loss: {spec.loss}")
    num_params = FORMULAS[spec.loss].num_params
    if len(spec.params) != num_params:
        raise ValueError(f"{spec.loss} has {num_params} hyper-parameters, got {len(spec.params)}")
    if not 0 <= spec.k < 2**31:
        raise ValueError(f"k must be 0 or more, and fewer than 2^31, got {spec.k}")
    if spec.first_class < 0 or spec.all_classes < 1:
        raise ValueError(f"there are no classes from {spec.first_class} on among {spec.all_classes}")
    if num_classes is not None and not 0 < num_classes < 2**31 - 1:
        raise ValueError(f"logits need at least one class, and fewer than 2^31 - 1, got {num_classes}")
    if num_classes is not None and spec.first_class + num_classes > spec.all_classes:
        raise ValueError(f"the classes from first_class {spec.first_class} on exceed all_classes {spec.all_classes}")
    if len(spec.margin) not in (0, 6):
        raise ValueError("margin must be empty or the six numbers of MarginTerms")
    if not 0 <= spec.label_smoothing < 1 or (spec.label_smoothing > 0 and not spec.labels):
        raise ValueError(f"label_smoothing must be in [0, 1), and 0 without labels, got {spec.label_smoothing}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"not a reduction: {reduction}")


def _check_statistics(statistics: Tensor, target: Tensor, spec: LossSpec) -> None:
    expected = (target.shape[0], num_statistics(target, spec))
    if statistics.shape != expected:
        raise ValueError(f"statistics must have the shape {expected} here, got {tuple(statistics.shape)}")
    if statistics.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"statistics must be float32 or float64, got {statistics.dtype}")


def _check_weight(weight: Tensor | None, target: Tensor, dtype: torch.dtype, spec: LossSpec) -> None:
    if spec.margin and spec.multi_hot(target):
        raise ValueError("a margin works with class indices and labels only")
    if weight is None:
        return
    expected = target.shape if spec.labels else (spec.all_classes,)
    if spec.multi_hot(target) or weight.shape != expected or weight.dtype != dtype:
        raise ValueError(
            "weight must be (all classes,) with class indices or (rows, P) with labels, of the compute dtype"
        )


def check_picks(pick_index: Tensor, num_classes: int) -> None:
    """Raises IndexError for a pick that is neither a class nor an empty slot, -1. Reads values."""
    wrong = (pick_index < -1) | (pick_index >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(f"Picks must be classes or -1, which those of row {row} are not. ({num_classes} classes)")


# --- rows -------------------------------------------------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_statistics(target: Tensor, spec: LossSpec) -> int:
    if spec.labels:
        return 3 + target.shape[1]
    return 3 if target.dim() == 1 else 4


def num_coefficients(target: Tensor, spec: LossSpec) -> int:
    return 2 + target.shape[1] if spec.labels else 2


def empty_statistics(like: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
    """(rows, 3 | 4 | 3 + P) for rows of the dtype of like."""
    return like.new_empty((target.shape[0], num_statistics(target, spec)), dtype=compute_dtype(like.dtype))


def empty_picks(like: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """pick_index and pick_logit for the rows and the dtype of like."""
    pick_logit = like.new_empty((like.shape[0], spec.slots))
    return torch.empty_like(pick_logit, dtype=torch.int32), pick_logit


def check_target(target: Tensor, spec: LossSpec) -> None:
    """Raises IndexError for a class out of range, ValueError for a multi-hot entry other than 0 and 1, or for labels
    out of order. Reads values."""
    if spec.multi_hot(target):
        wrong = (target != 0) & (target != 1)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"multi-hot targets must be 0 or 1, got {target[row, column].item()} at row {row}, class {column}; "
                "soft targets are Labels with weights"
            )
        return
    no_class = (target < 0) | (target >= spec.all_classes)
    wrong = no_class & (target != -1) if spec.labels else no_class
    if spec.ignore_index is not None:
        wrong &= target != spec.ignore_index
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(f"Target {int(target[place])} is out of bounds. (row {place[0]}, {spec.all_classes} classes)")
    if spec.labels:
        here, behind = target[:, :-1], target[:, 1:]
        if ((behind != -1) & ((here == -1) | (here >= behind))).any():
            raise ValueError("labels must be ascending, with -1 behind the last")


def read_target(target: Tensor, num_classes: int, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The positives (rows, classes), the ignored rows (rows,) and the rows with a bad target (rows,), all bool."""
    none = torch.zeros(target.shape[0], dtype=torch.bool, device=target.device)
    if spec.multi_hot(target):
        return target != 0, none, none
    labels = target if spec.labels else target[:, None]  # (rows, P)
    ignored = ignored_rows(target, spec)
    ignored = none if ignored is None else ignored
    empty = labels == -1 if spec.labels else ignored[:, None]
    bad = (~empty & ((labels < 0) | (labels >= spec.all_classes))).any(1)
    here = labels_here(labels, num_classes, spec) & ~(ignored | bad)[:, None]
    return scatter_picks(torch.where(here, labels - spec.first_class, -1), here, num_classes), ignored, bad


def labels_here(labels: Tensor, num_classes: int, spec: LossSpec) -> Tensor:
    """Which labels are among the classes at hand."""
    return (labels >= spec.first_class) & (labels < min(spec.first_class + num_classes, spec.all_classes))


def hardest(logits: Tensor, positive: Tensor, k: int) -> Tensor:
    """Class indices of the k hardest negatives of each row, (rows, k), hardest first, -1 behind the last negative."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    positives_last = torch.sort(positive.gather(1, order).byte(), dim=1, stable=True)
    picked = order.gather(1, positives_last.indices[:, :k]).masked_fill(positives_last.values[:, :k] != 0, -1)
    return F.pad(picked, (0, k - picked.shape[1]), value=-1)


def picks(logits: Tensor, positive: Tensor, skipped: Tensor, k: int, compact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The set S as a mask (rows, classes), and what is kept of it: (index, logit)."""
    if k == 0:
        empty = logits.new_empty((logits.shape[0], 0))
        return ~positive, empty.int(), empty
    picked = hardest(logits, positive, k).masked_fill(skipped[:, None], -1)  # (rows, k)
    chosen = scatter_picks(picked, torch.ones_like(picked, dtype=torch.bool), logits.shape[1])
    if not compact:
        last = (picked >= 0).sum(1, keepdim=True) - 1
        picked = picked.gather(1, last.clamp(min=0))
    else:
        picked = picked.where(picked >= 0, logits.shape[1]).sort(dim=1).values
        picked = picked.masked_fill(picked == logits.shape[1], -1)
    picked_logits = logits.gather(1, picked.clamp(min=0)).masked_fill(picked < 0, -INF)
    return chosen, picked.int(), picked_logits


def scatter_picks(pick_index: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """values (rows, k) at their classes in a zero matrix (rows, classes); empty slots, and what is no class, go
    nowhere."""
    outside = (pick_index < 0) | (pick_index >= num_classes)
    column = pick_index.long().masked_fill(outside, num_classes)
    return values.new_zeros((values.shape[0], num_classes + 1)).scatter(1, column, values)[:, :num_classes]


def chosen_negatives(z: Tensor, positive: Tensor, pick_index: Tensor, pick_logit: Tensor, k: int) -> Tensor:
    """The set S as a mask (rows, classes), from the threshold form or for all negatives."""
    if k == 0:
        return ~positive
    classes = torch.arange(z.shape[1], device=z.device)
    edge = pick_logit.to(z.dtype)  # (rows, 1)
    above = (z > edge) | ((z == edge) & (classes <= pick_index))
    return above & ~positive & (pick_index >= 0)


# --- doors ------------------------------------------------------------------------------------------------------------


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, coefficients (rows, 2 | 2 + P), statistics and picks."""
    check_forward(logits, target, weight, reduction, LossSpec(*spec))
    seen = statistics(logits, target, *spec)
    return *finish(seen[0], target, weight, reduction, *spec), *seen


def statistics(logits: Tensor, target: Tensor, *spec) -> tuple[Tensor, Tensor, Tensor]:
    """statistics (rows, 3 | 4 | 3 + P), pick_index and pick_logit (rows, k | 1 | 0)."""
    spec = LossSpec(*spec)
    check_statistics(logits, target, spec)
    if logits.device.type == "cpu":
        check_target(target, spec)
    positive, ignored, bad = read_target(target, logits.shape[1], spec)
    chosen, pick_index, pick_logit = picks(logits, positive, ignored | bad, spec.k, spec.compact)
    if spec.labels:
        seen = _statistics_of_labels(logits, target, chosen, bad, spec)
    else:
        seen = _statistics(logits, positive, chosen, bad, target.dim() == 2, spec)
    return seen.masked_fill(ignored[:, None], 0), pick_index, pick_logit


def finish(statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec) -> tuple[Tensor, Tensor]:
    """loss, coefficients (rows, 2 | 2 + P)."""
    check_finish(statistics, target, weight, reduction, LossSpec(*spec))
    return finish_batch(statistics, target, weight, reduction, LossSpec(*spec))


def _statistics(logits, positive, chosen, bad, multi_hot: bool, spec: LossSpec) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    z_y = z.masked_fill(~positive, -INF).amax(1)
    poisoned = z.isnan().any(1) | bad
    m, l_or_neg = _negatives(z, chosen, spec)
    if spec.family == "softmax":
        return torch.stack((m, l_or_neg, z_y.masked_fill(poisoned | (z_y == INF), math.nan)), dim=1)
    neg = l_or_neg.masked_fill(poisoned, math.nan)
    if not multi_hot:
        return torch.stack((m, neg, z_y.masked_fill(poisoned, math.nan)), dim=1)
    pos = torch.where(positive, softplus(-z), 0).sum(1).masked_fill(poisoned, math.nan)
    return torch.stack((m, neg, pos, positive.sum(1).to(z.dtype)), dim=1)


def _statistics_of_labels(logits, labels, chosen, bad, spec: LossSpec) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    m, l_or_neg = _negatives(z, chosen, spec)
    l_or_neg = l_or_neg.masked_fill(z.isnan().any(1) | bad, math.nan)
    s = torch.zeros_like(m)
    if spec.label_smoothing:
        s = torch.where(chosen, z - m[:, None] if spec.family == "softmax" else z, 0).sum(1)
    here = labels_here(labels, z.shape[1], spec)
    z_p = z.gather(1, (labels - spec.first_class).masked_fill(~here, 0)).masked_fill(~here, -INF)
    if spec.family == "softmax":
        z_p = z_p.masked_fill(z_p == INF, math.nan)
    return torch.cat((torch.stack((m, l_or_neg, s), dim=1), z_p), dim=1)


def _negatives(z: Tensor, chosen: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """m, and l or neg, (rows,) each."""
    negatives = z.masked_fill(~chosen, -INF)
    m = negatives.amax(1)
    if spec.family == "softmax":
        m = m.masked_fill(m == -INF, 0)
        return m, (negatives - m[:, None]).exp().sum(1).log()
    return m, torch.where(chosen, FORMULAS[spec.loss].value(z, *spec.params), 0).sum(1)


def backward(
    grad: Tensor,
    coefficients: Tensor,
    logits: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    num_classes: int,
    *spec,
) -> Tensor:
    """dlogits (rows, classes)."""
    spec = LossSpec(*spec)
    check_backward(grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, spec)
    if pick_index.device.type == "cpu":
        check_picks(pick_index, num_classes)
        if not spec.multi_hot(target):
            check_target(target, spec)
    positive, ignored, _ = read_target(target, num_classes, spec)
    scaled = coefficients * grad.reshape(-1, 1)  # (rows, 2 | 2 + P)
    compact = spec.compact and spec.k > 0
    seen = pick_logit if compact else logits
    assert seen is not None, "only the compact form does without the logits"
    z = seen.to(statistics.dtype)
    dz = gradient_of_negatives(scaled, statistics, z, spec)
    if compact:
        dlogits = scatter_picks(pick_index, dz, num_classes)
    else:
        dlogits = torch.where(chosen_negatives(z, positive, pick_index, pick_logit, spec.k), dz, 0)
    to_target, poison = scaled[:, 1:2], scaled[:, :2].isnan().any(1, keepdim=True)
    if spec.labels:
        here = labels_here(target, num_classes, spec)
        to_target = scatter_picks(torch.where(here, target - spec.first_class, -1), scaled[:, 2:], num_classes)
        poison = scaled[:, :1].isnan()
    elif spec.multi_hot(target):
        assert logits is not None, "multi-hot targets need the logits in every form"
        to_target = to_target * torch.sigmoid(-logits.to(statistics.dtype))
    dlogits = torch.where(positive, to_target, dlogits)
    dlogits = torch.where(poison, math.nan, dlogits)
    return dlogits.masked_fill(ignored[:, None], 0).to(pick_logit.dtype).contiguous()


def backward_(
    grad: Tensor,
    coefficients: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    *spec,
) -> None:
    """The same, written over the logits."""
    check_overwritten(logits)
    seen = target, statistics, pick_index, pick_logit
    logits.copy_(backward(grad, coefficients, logits, *seen, logits.shape[1], *spec))


def gradient_of_negatives(scaled: Tensor, statistics: Tensor, z: Tensor, spec: LossSpec) -> Tensor:
    """dz of negatives z (rows, any number), from the coefficients times the upstream gradient."""
    c = scaled[:, :1]
    if spec.family == "softmax":
        m, l = statistics[:, :1], statistics[:, 1:2]
        dz = c * ((z - m) - l).exp().masked_fill(z == -INF, 0)
    else:
        dz = c * FORMULAS[spec.loss].slope(z, *spec.params)
    return dz + scaled[:, 1:2] if spec.label_smoothing else dz
