"""The judge: every loss from the formula that its authors' code states, naively, in float64, with autograd's gradient.

Nothing of the package is imported here. A function takes logits (rows, classes) and a target, class indices (rows,) or
a multi-hot matrix (rows, classes), and returns one value per row (rows,), whose mean is the loss that its paper states.
`k` restricts the negatives of a row to its k hardest; `None` means all of them. Meant for finite logits whose
differences stay below 700, where float64 neither overflows nor underflows in any of these formulas.

What a row's labels may be besides one class, with margins and smoothing: ``softmax_rows`` and ``logistic_rows``, in the
dtype of the logits that they are given.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def positives(logits: Tensor, target: Tensor) -> Tensor:
    """Which entries are positive: bool (rows, classes)."""
    if target.ndim == logits.ndim:
        return target != 0
    positive = torch.zeros(logits.shape, dtype=torch.bool)
    for row, label in enumerate(target.tolist()):
        positive[row, label] = True
    return positive


def negatives(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """S, the chosen negatives: bool (rows, classes). The k hardest are those with the largest logits; among equals the
    lowest class index comes first."""
    positive = positives(logits, target)
    if k is None:
        return ~positive
    chosen = torch.zeros_like(positive)
    for row, (values, taken) in enumerate(zip(logits.detach().double().numpy(), positive.numpy(), strict=True)):
        hardest_first = np.argsort(-values, kind="stable")
        chosen[row, hardest_first[~taken[hardest_first]][:k]] = True
    return chosen


# Softmax family. The target is one class; over the k hardest, the softmax runs over {target} + S.


def target_and_wrong(logits: Tensor, target: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """p_y and sum over j in S of p_j: (rows,) each."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    p = torch.softmax(logits.double().masked_fill(~(positive | negative), -torch.inf), dim=1)
    return (p * positive).sum(1), (p * negative).sum(1)


def cross_entropy(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """-log p_y: the baseline of every paper below."""
    p_target, _ = target_and_wrong(logits, target, k)
    return -torch.log(p_target)


def nllr(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """-log( p_y / sum_{j != y} p_j ): Zhu et al., arXiv 1804.10690; CRL's code at alpha = 0, beta = 1."""
    p_target, p_wrong = target_and_wrong(logits, target, k)
    return -torch.log(p_target / p_wrong)


def crl(logits: Tensor, target: Tensor, k: int | None = None, *, alpha: float, beta: float) -> Tensor:
    """log( (alpha + sum_{j != y} p_j)^beta / p_y ): ratio.py of github.com/PRIS-CV/CRL-code, whose constant A is
    alpha + 1, so that its A - p_y is the bracket here; without its clamp and eps. arXiv 1907.13349, 1912.11642."""
    p_target, p_wrong = target_and_wrong(logits, target, k)
    return torch.log((alpha + p_wrong) ** beta / p_target)


# Logistic family. s = sigmoid(z); log s and log(1 - s) = log sigmoid(-z) without the authors' eps.


def positive_sum(logits: Tensor, positive: Tensor) -> Tensor:
    """-sum over the positives of log s: (rows,)."""
    return -(F.logsigmoid(logits.double()) * positive).sum(1)


def negative_sum(logits: Tensor, negative: Tensor, gamma: float = 0.0) -> Tensor:
    """-sum over the chosen negatives of s^gamma log(1 - s): (rows,)."""
    z = logits.double()
    return -(torch.sigmoid(z) ** gamma * F.logsigmoid(-z) * negative).sum(1)


def two_means(positive_sum: Tensor, positive: Tensor, negative_sum: Tensor, negative: Tensor, alpha: float) -> Tensor:
    """Rows whose mean is the authors' batch loss: the mean over the batch's positives plus alpha times the mean over
    its chosen negatives. A mean over nothing is 0."""
    rows, count_positive, count_negative = len(positive), int(positive.sum()), int(negative.sum())
    return rows * (positive_sum / max(count_positive, 1) + alpha * negative_sum / max(count_negative, 1))


def lr(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """-sum_{positive} log s - sum_{negative} log(1 - s): one binary logistic loss per class, the baseline that
    arXiv 1811.08400 starts from (not in its code)."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    return positive_sum(logits, positive) + negative_sum(logits, negative)


def hs_lr(logits: Tensor, target: Tensor, k: int, *, alpha: float) -> Tensor:
    """-(1/P) sum_{positive} log s - alpha (1/(N K)) sum_i sum_{j in TopK_i} log(1 - s): Eq. 5 of arXiv 1811.08400 as
    class HS_LR of LR_Focus_pytorch.py states it (github.com/qd301/FocusRectificationLogisticRegression)."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    return two_means(positive_sum(logits, positive), positive, negative_sum(logits, negative), negative, alpha)


def ss_lr(logits: Tensor, target: Tensor, k: int | None = None, *, alpha: float, gamma: float) -> Tensor:
    """-(1/P) sum_{positive} log s - alpha (1/M) sum_{negative} s^gamma log(1 - s): Eq. 6 of arXiv 1811.08400 as class
    SS_LR of the same file states it; M = the number of (chosen) negatives in the batch."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    return two_means(positive_sum(logits, positive), positive, negative_sum(logits, negative, gamma), negative, alpha)


# Several labels of a row with weights, margins on their logits, smoothing. S never holds a label, and is picked by the
# plain logits.


class Margin(NamedTuple):
    """angle and cosine: of all rows, or (rows,), one of each."""

    angle: float | Tensor = 0.0
    cosine: float | Tensor = 0.0
    scale: float = 1.0

    def of_row(self, row: int) -> "Margin":
        return Margin(*(float(m[row]) if isinstance(m, Tensor) else m for m in self[:2]), self.scale)


Labels = list[dict[int, float]]  # of each row: class -> weight


def one_label(target: Tensor, ignore_index: int = -100) -> Labels:
    """Class indices (rows,) as labels of weight 1; none in an ignored row."""
    return [{} if label == ignore_index else {label: 1.0} for label in target.tolist()]


def several_labels(index: Tensor, weight: Tensor | None = None) -> Labels:
    """index (rows, P), -1 in empty places. A class that is named twice is one label: with the sum of its weights, or
    without weights of weight 1."""
    rows: Labels = [{} for _ in index]
    for row, classes in enumerate(index.tolist()):
        for place, label in enumerate(classes):
            if label != -1:
                more = 1.0 if weight is None else float(weight[row, place])
                rows[row][label] = more if weight is None else rows[row].get(label, 0.0) + more
    return rows


def psi(z: Tensor, margin: Margin) -> Tensor:
    """The logit of a label (a 0-dim tensor) after its margin. theta = acos(z / scale): ArcFace (arXiv 1801.07698) adds
    angle to it, and continues where that is beyond pi as its authors' code does (insightface, easy_margin = False);
    AdaFace's negative angles (arXiv 2204.00964) stop at 0. CosFace (arXiv 1801.09414) subtracts cosine."""
    angle, cosine, scale = margin
    if angle == 0:
        return z - scale * cosine
    theta = torch.acos(z / scale)
    if theta + angle > math.pi:
        return scale * (torch.cos(theta) - angle * math.sin(angle) - cosine)
    if theta + angle < 0:
        return scale * (torch.ones_like(z) - cosine)
    return scale * (torch.cos(theta + angle) - cosine)


def label_matrix(logits: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Which classes are labels, bool (rows, classes), and their weights, 0 elsewhere."""
    positive, weight = torch.zeros(logits.shape, dtype=torch.bool), torch.zeros_like(logits, requires_grad=False)
    for row, of_row in enumerate(labels):
        for label, w in of_row.items():
            positive[row, label], weight[row, label] = True, w
    return positive, weight


def with_margin(logits: Tensor, labels: Labels, margin: Margin | None) -> Tensor:
    """psi in the place of every label's logit."""
    if margin is None:
        return logits
    places = [(row, label) for row, of_row in enumerate(labels) for label in of_row]
    if not places:
        return logits
    moved = [psi(logits[row, label], margin.of_row(row)) for row, label in places]
    row, label = torch.tensor(places).T
    return logits.index_put((row, label), torch.stack(moved))


def softmax_rows(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Labels, k: int | None = None, *,
    margin: Margin | None = None, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Of every label with its weight: the loss as if it were the only one, over the labels and S. A row without labels
    is 0. loss(logits, class indices) is one of the functions above, or one of somebody's own.

    Smoothing adds eps (sum of w_p psi(z_p) - the mean of the logits of labels and S), which for cross-entropy is
    -sum of q_j log p_j with q = (1 - eps) w + eps / (number of labels and S).
    """
    positive, weight = label_matrix(logits, labels)
    kept = positive | negatives(logits, positive, k)
    z = with_margin(logits, labels, margin)
    values = []
    for row, of_row in enumerate(labels):
        classes = kept[row].nonzero().squeeze(1).tolist()
        among = z[row, classes]
        value = 0 * logits[row].sum()
        for label, w in of_row.items():
            value = value + w * loss(among[None], torch.tensor([classes.index(label)])).squeeze(0)
        if of_row and label_smoothing:
            value = value + label_smoothing * ((weight[row] * z[row]).sum() - among.mean())
        values.append(value)
    return torch.stack(values)


def logistic_rows(
    logits: Tensor, labels: Labels, k: int | None = None, *, alpha: float | None = None, gamma: float = 0.0,
    margin: Margin | None = None, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Binary cross-entropy of every label with its weight as target, and of S with target 0. alpha: HS-LR, SS-LR, whose
    two means count labels, whatever their weight. Smoothing (LR alone): targets (1 - eps) w + eps / n, 0 for w in S,
    n the number of labels and S of the row."""
    positive, weight = label_matrix(logits, labels)
    negative = negatives(logits, positive, k)
    kept = positive | negative
    share = label_smoothing / kept.sum(1, keepdim=True).to(logits.dtype)
    target = (1 - label_smoothing) * weight + share
    z = with_margin(logits, labels, margin)
    terms = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    focus = torch.sigmoid(z) ** gamma
    pos, neg = (terms * positive).sum(1), (focus * terms * negative).sum(1)
    return pos + neg if alpha is None else two_means(pos, positive, neg, negative, alpha)
