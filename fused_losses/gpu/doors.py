"""The doors of the GPU wing, for any k. The contract stands in ``reference.py``."""

from torch import Tensor

from . import hardest, launch
from .launch import unserved
from .reductions import reduce_terms

__all__ = [
    "logistic_backward",
    "logistic_forward",
    "reduce_terms",
    "softmax_backward",
    "softmax_forward",
    "unserved",
]


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
    wing = hardest if k > 0 else launch
    return wing.softmax_forward(logits, target, loss, params, k, ignore_index, compact, first_class, all_classes)


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
    wing = hardest if k > 0 else launch
    return wing.softmax_backward(
        grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact,
        first_class, all_classes,
    )  # fmt: skip


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
    wing = hardest if k > 0 else launch
    return wing.logistic_forward(logits, target, loss, params, k, ignore_index, compact, first_class, all_classes)


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
    wing = hardest if k > 0 else launch
    return wing.logistic_backward(
        grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact,
        first_class, all_classes,
    )  # fmt: skip
