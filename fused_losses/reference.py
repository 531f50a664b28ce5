"""The doors in plain PyTorch: the truth that the fast wings are tested against, and the fallback for every device.

Contract of the four doors, shared by all wings, z = logits, (rows, classes):

- Arithmetic and row outputs are float64 for float64 logits, else float32 (the compute dtype).
- target: int64 (rows,), or multi-hot (rows, classes) for the logistic doors, where every entry != 0 is a positive.
  An index is a class among ``all_classes``, of which the logits hold [first_class, first_class + classes); without
  ``all_classes`` none lie behind. ``ignore_index``, checked first, is an ignored row; a class that the logits do not
  hold, a row whose positive is elsewhere. Anything else raises on the CPU; on other devices its row becomes NaN.
- k = 0: S is all negatives. k >= 1: the k largest z_j with j not positive, the lowest class index first among equals.
- Picks, int32 and the logits' dtype, empty slots -1 and -inf: the compact form keeps all k, on the CPU in the order of
  the classes, elsewhere in any; the threshold form keeps one, the last taken, the *edge*; k = 0 keeps none.
- softmax state (rows, 3) = m, l, z_y: m the largest logit of S (0 if that is -inf), l = log sum over S of exp(z_j - m).
  m + l is never one number: at offset 1000 that would cost two digits in fp32. A row with a NaN, a +inf or a bad target
  has NaN among them.
- logistic sums (rows, 2) = pos, neg; state (rows, 2) = z_y (0 for multi-hot, NaN for a row with a NaN or a bad target),
  number of positives.
- backward takes d(objective)/d(value) or d(objective)/d(sums), any strides, and writes every element of (rows,
  classes). A row whose coefficient is NaN becomes NaN as a whole; an ignored row becomes literal zeros. ``logits`` is
  None in the compact form with index targets: the picks and the state hold all that it needs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INF = math.inf


# --- formulas ---------------------------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus turns linear at 20: too early for float64


def value(loss: str, margin: Tensor, params: list[float]) -> Tensor:
    """Value of a softmax loss at the margin d."""
    if loss == "nllr":
        return -margin
    cross_entropy = softplus(-margin)
    if loss == "cross_entropy":
        return cross_entropy
    alpha, beta = params
    if beta == 0:
        return cross_entropy
    log_alpha = torch.full_like(margin, math.log(alpha) if alpha > 0 else -INF)
    return cross_entropy + beta * torch.logaddexp(log_alpha, -softplus(margin))


def slope(loss: str, margin: Tensor, params: list[float]) -> Tensor:
    """Derivative of a softmax loss by the margin d."""
    if loss == "nllr":
        return torch.where(margin.isnan(), margin, -1.0)
    cross_entropy = -torch.sigmoid(-margin)
    if loss == "cross_entropy":
        return cross_entropy
    alpha, beta = params
    competing = torch.sigmoid(margin)
    if alpha > 0:
        competing = competing * torch.sigmoid(-(math.log(alpha) + softplus(margin)))
    return cross_entropy - beta * competing


def phi(loss: str, z: Tensor, params: list[float]) -> Tensor:
    """What one negative adds to a logistic loss."""
    if loss == "lr" or params[0] == 0:
        return softplus(z)
    return torch.sigmoid(z).pow(params[0]) * softplus(z)


def phi_slope(loss: str, z: Tensor, params: list[float]) -> Tensor:
    """Derivative of phi by z."""
    sigma = torch.sigmoid(z)
    if loss == "lr" or params[0] == 0:
        return sigma
    gamma = params[0]
    finite = z.clamp(max=torch.finfo(z.dtype).max)  # sigma(-z) * softplus(z) -> 0 at +inf, not 0 * inf
    return sigma.pow(gamma) * (sigma + gamma * torch.sigmoid(-z) * softplus(finite))


def softmax_gradient(grad: Tensor, state: Tensor, z: Tensor, loss: str, params: list[float]) -> tuple[Tensor, Tensor]:
    """dz_y (rows,) and dz of the negatives z (rows, any number), from grad (rows,) and state (rows, 3)."""
    m, l, z_y = state.unbind(1)
    coefficient = grad * slope(loss, (z_y - m) - l, params)
    share = ((z - m[:, None]) - l[:, None]).exp().masked_fill(z == -INF, 0)
    return coefficient, -coefficient[:, None] * share


def logistic_gradient(grad: Tensor, z_p: Tensor, z: Tensor, loss: str, params: list[float]) -> tuple[Tensor, Tensor]:
    """dz of positives z_p and of negatives z, both (rows, any number), from grad (rows, 2)."""
    grad_pos, grad_neg = grad.unsqueeze(2).unbind(1)  # (rows, 1) each
    return -grad_pos * torch.sigmoid(-z_p), grad_neg * phi_slope(loss, z, params)


# --- arguments --------------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COLUMNS = {"softmax": 3, "logistic": 2}  # of the states
PARAMS = {"softmax": {"cross_entropy": 0, "nllr": 0, "crl": 2}, "logistic": {"lr": 0, "ss_lr": 1}}  # how many


def check_same_device(*arguments) -> None:
    """Raises RuntimeError: an op with tensors of several devices is served by whichever of them comes first."""
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found}")


def _check_options(
    family: str, target: Tensor, loss: str, params: list[float], rows: int, num_classes: int, k: int
) -> None:
    if loss not in PARAMS[family]:
        raise ValueError(f"not a {family} loss: {loss}")
    if len(params) != PARAMS[family][loss]:
        raise ValueError(f"{loss} has {PARAMS[family][loss]} hyper-parameters, got {len(params)}")
    if not 0 <= k < 2**31:
        raise ValueError(f"k must be 0 or more, and fewer than 2^31, got {k}")
    if not 0 < num_classes < 2**31 - 1:
        raise ValueError(f"logits need at least one class, and fewer than 2^31 - 1, got {num_classes}")
    multi_hot = family == "logistic" and target.dim() == 2 and not target.is_complex()
    if target.shape != ((rows, num_classes) if multi_hot else (rows,)):
        raise ValueError(f"target does not fit logits ({rows}, {num_classes}), got {tuple(target.shape)}")
    if not multi_hot and target.dtype != torch.int64:
        raise ValueError(f"target must be int64 class indices, got {target.dtype}")


def check_forward(family: str, logits: Tensor, target: Tensor, loss: str, params: list[float], k: int) -> None:
    """Raises ValueError, or RuntimeError, unless these are what a forward door takes; reads no values."""
    check_same_device(logits, target)
    if logits.dim() != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits must be floating and (rows, classes), got {logits.dtype}, {tuple(logits.shape)}")
    _check_options(family, target, loss, params, *logits.shape, k)


def check_backward(
    family: str, grad: Tensor, logits: Tensor | None, target: Tensor, state: Tensor, pick_index: Tensor,
    pick_logit: Tensor, loss: str, params: list[float], k: int, num_classes: int, compact: bool,
) -> None:  # fmt: skip
    """The same for a backward door."""
    check_same_device(grad, logits, target, state, pick_index, pick_logit)
    rows, dtype = state.shape[0] if state.dim() else 0, pick_logit.dtype
    if dtype not in DTYPES or pick_index.dtype != torch.int32:
        raise ValueError("picks must be what forward returned")
    if not grad.dtype == state.dtype == compute_dtype(dtype):
        raise ValueError("grad and state must have the compute dtype: float64 for float64 logits, else float32")
    if state.shape != (rows, COLUMNS[family]) or grad.shape != ((rows,) if family == "softmax" else (rows, 2)):
        raise ValueError("state must be what forward returned, and grad have the shape of its other result")
    _check_options(family, target, loss, params, rows, num_classes, k)
    slots = 0 if k == 0 else k if compact else 1
    if not pick_index.shape == pick_logit.shape == (rows, slots):
        raise ValueError("picks must be what forward returned")
    if logits is None and (k == 0 or not compact or target.dim() == 2):
        raise ValueError("backward needs the logits here")
    if logits is not None and (logits.shape != (rows, num_classes) or logits.dtype != dtype):
        raise ValueError("logits must be those of forward")


def check_picks(pick_index: Tensor, num_classes: int) -> None:
    """Raises IndexError for a pick that is neither a class nor an empty slot, -1. Reads values."""
    wrong = (pick_index < -1) | (pick_index >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(f"Picks must be classes or -1, which those of row {row} are not. ({num_classes} classes)")


# --- rows -------------------------------------------------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_target(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises IndexError for a class out of range, ValueError for a multi-hot entry other than 0 and 1. Reads values."""
    if target.dim() == 2:
        wrong = (target != 0) & (target != 1)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"multi-hot targets must be 0 or 1, got {target[row, column].item()} at row {row}, class {column}; "
                "soft targets are not supported"
            )
        return
    wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"Target {int(target[row])} is out of bounds. (row {row}, {num_classes} classes)")


def count_classes(num_classes: int, first_class: int, all_classes: int | None) -> int:
    """All classes that a class index can name, of which the logits hold [first_class, first_class + num_classes)."""
    if all_classes is None:
        all_classes = first_class + num_classes
    if not 0 <= first_class <= all_classes - num_classes < 2**63 - num_classes:
        raise ValueError(f"{num_classes} classes from {first_class} on are not among {all_classes}")
    return all_classes


def read_target(
    target: Tensor, num_classes: int, ignore_index: int, first_class: int, all_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The positives (rows, classes), the ignored rows (rows,) and the rows with a bad target (rows,), all bool."""
    if target.dim() == 2:
        none = torch.zeros(target.shape[0], dtype=torch.bool, device=target.device)
        return target != 0, none, none
    ignored = target == ignore_index
    bad = ((target < 0) | (target >= all_classes)) & ~ignored
    column = (target - first_class).masked_fill(ignored | bad, -1)
    classes = torch.arange(num_classes, device=target.device)
    return classes == column[:, None], ignored, bad


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


def finish(dlogits: Tensor, coefficient: Tensor, ignored: Tensor, dtype: torch.dtype) -> Tensor:
    dlogits = torch.where(coefficient.isnan()[:, None], math.nan, dlogits)
    return dlogits.masked_fill(ignored[:, None], 0).to(dtype).contiguous()


# --- doors ------------------------------------------------------------------------------------------------------------


def softmax_forward(
    logits: Tensor,
    target: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value (rows,), state (rows, 3), pick_index and pick_logit (rows, k | 1 | 0)."""
    check_forward("softmax", logits, target, loss, params, k)
    all_classes = count_classes(logits.shape[1], first_class, all_classes)
    if logits.device.type == "cpu":
        check_target(target, all_classes, ignore_index)
    positive, ignored, bad = read_target(target, logits.shape[1], ignore_index, first_class, all_classes)
    chosen, pick_index, pick_logit = picks(logits, positive, ignored | bad, k, compact)
    z = logits.to(compute_dtype(logits.dtype))

    negatives = z.masked_fill(~chosen, -INF)
    m = negatives.amax(1)
    m = m.masked_fill(m == -INF, 0)
    l = (negatives - m[:, None]).exp().sum(1).log()
    z_y = z.masked_fill(~positive, -INF).amax(1)
    z_y = z_y.masked_fill(z.isnan().any(1) | (z_y == INF) | bad, math.nan)

    state = torch.stack((m, l, z_y), dim=1).masked_fill(ignored[:, None], 0)
    return value(loss, (z_y - m) - l, params).masked_fill(ignored, 0), state, pick_index, pick_logit


def softmax_backward(
    grad: Tensor,
    logits: Tensor | None,
    target: Tensor,
    state: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    num_classes: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> Tensor:
    """dlogits (rows, classes) from grad (rows,)."""
    tensors = grad, logits, target, state, pick_index, pick_logit
    check_backward("softmax", *tensors, loss, params, k, num_classes, compact)
    all_classes = count_classes(num_classes, first_class, all_classes)
    if pick_index.device.type == "cpu":
        check_picks(pick_index, num_classes)
        if target.dim() == 1:
            check_target(target, all_classes, ignore_index)
    positive, ignored, _ = read_target(target, num_classes, ignore_index, first_class, all_classes)
    compact = compact and k > 0
    z = (pick_logit if compact else logits).to(state.dtype)
    coefficient, dz = softmax_gradient(grad, state, z, loss, params)
    if compact:
        dlogits = scatter_picks(pick_index, dz, num_classes)
    else:
        dlogits = torch.where(chosen_negatives(z, positive, pick_index, pick_logit, k), dz, 0)
    dlogits = torch.where(positive, coefficient[:, None], dlogits)
    return finish(dlogits, coefficient, ignored, pick_logit.dtype)


def logistic_forward(
    logits: Tensor,
    target: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sums (rows, 2), state (rows, 2), pick_index and pick_logit (rows, k | 1 | 0)."""
    check_forward("logistic", logits, target, loss, params, k)
    all_classes = count_classes(logits.shape[1], first_class, all_classes)
    if logits.device.type == "cpu":
        check_target(target, all_classes, ignore_index)
    positive, ignored, bad = read_target(target, logits.shape[1], ignore_index, first_class, all_classes)
    chosen, pick_index, pick_logit = picks(logits, positive, ignored | bad, k, compact)
    z = logits.to(compute_dtype(logits.dtype))

    poisoned = z.isnan().any(1) | bad
    pos = torch.where(positive, softplus(-z), 0).sum(1)
    neg = torch.where(chosen, phi(loss, z, params), 0).sum(1)
    sums = torch.stack((pos, neg), dim=1).masked_fill(poisoned[:, None], math.nan)
    z_y = torch.where(positive, z, 0).sum(1) if target.dim() == 1 else torch.zeros_like(pos)
    state = torch.stack((z_y.masked_fill(poisoned, math.nan), positive.sum(1).to(z.dtype)), dim=1)
    return sums.masked_fill(ignored[:, None], 0), state.masked_fill(ignored[:, None], 0), pick_index, pick_logit


def logistic_backward(
    grad: Tensor,
    logits: Tensor | None,
    target: Tensor,
    state: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    num_classes: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> Tensor:
    """dlogits (rows, classes) from grad (rows, 2), by pos and by neg."""
    tensors = grad, logits, target, state, pick_index, pick_logit
    check_backward("logistic", *tensors, loss, params, k, num_classes, compact)
    all_classes = count_classes(num_classes, first_class, all_classes)
    if pick_index.device.type == "cpu":
        check_picks(pick_index, num_classes)
        if target.dim() == 1:
            check_target(target, all_classes, ignore_index)
    positive, ignored, _ = read_target(target, num_classes, ignore_index, first_class, all_classes)
    z_y = state[:, 0]
    compact = compact and k > 0
    z = (pick_logit if compact else logits).to(state.dtype)
    z_p = z_y[:, None] if logits is None else logits.to(state.dtype)
    dz_p, dz = logistic_gradient(grad, z_p, z, loss, params)
    if compact:
        dlogits = scatter_picks(pick_index, dz, num_classes)
    else:
        dlogits = torch.where(chosen_negatives(z, positive, pick_index, pick_logit, k), dz, 0)
    dlogits = torch.where(positive, dz_p, dlogits)
    return finish(dlogits, z_y, ignored, pick_logit.dtype)
