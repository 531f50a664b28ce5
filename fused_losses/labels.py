"""Several classes per row: mixed labels, soft labels, sparse multi-hot targets. Never an N x C matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INT64 = torch.iinfo(torch.int64)


class Labels(NamedTuple):
    """The classes of each row, as a target of any loss; with weights, soft labels.

    The softmax family needs weights: the row's loss is the sum over its labels of weight times the loss of the label
    among itself, the other labels and S, from one pass over the logits. That is cross-entropy with soft targets (with
    label smoothing, for weights that sum to 1), and mixup's lam L(a) + (1 - lam) L(b) for every other loss. A row
    without labels is ignored.

    The logistic family takes them as the positives of a multi-hot target: the same loss as with the dense one. A label
    of weight w counts w softplus(-z) + (1 - w) softplus(z). A row without labels has no positives, and counts.

    The negatives S leave all labels of the row out, whatever their weight. A class that occurs twice counts once, with
    the sum of its weights. Nothing is checked here; the loss that gets them raises TypeError, ValueError or IndexError
    for what does not fit its logits.

    Args:
        index: signed integer, (N, P) classes, -1 in empty places; for one row (P,) beside logits (C,).
        weight: floating, of index's shape, without gradient; read where there is a label. Default: None.

    Example:
        >>> labels = fl.Labels(torch.tensor([[1, 7], [999, -1]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
        >>> fl.cross_entropy(torch.zeros(2, 1000), labels)  # log C
        tensor(6.9078)
    """

    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed
    weight: Tensor | None = None

    @classmethod
    def mixup(cls, a: Tensor, b: Tensor, lam: float | Tensor) -> "Labels":
        """Labels a with weight lam and b with weight 1 - lam: mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899).

        Args:
            a: integer, classes (N,) of the first of the two mixed images.
            b: those of the second.
            lam: a number, or a tensor () or (N,).

        Returns:
            Labels: the labels of N rows.

        Example:
            >>> target = torch.tensor([1, 999])
            >>> fl.Labels.mixup(target, target.flip(0), 0.75).index
            tensor([[  1, 999],
                    [999,   1]])
        """
        if isinstance(lam, Tensor):
            weight = torch.stack((lam, 1 - lam), dim=-1)
        elif a.device.type == "cpu":
            weight = torch.tensor((float(lam), 1 - float(lam)))
        else:  # filled there: a copy would wait for the device
            weight = torch.stack([torch.full((), share, device=a.device) for share in (float(lam), 1 - float(lam))])
        return cls(torch.stack((a, b), dim=-1), weight.expand(*a.shape, 2))

    @classmethod
    def from_lists(
        cls, classes: Sequence[Sequence[int]], weight: Sequence[Sequence[float]] | None = None, device=None
    ) -> "Labels":
        """Labels from one list of classes per row.

        Args:
            classes: a sequence of sequences of integers.
            weight: sequences of numbers, of the same lengths. Default: None.
            device: of the tensors. Default: None, PyTorch's.

        Returns:
            Labels: the labels of N rows.

        Raises:
            ValueError: a row with more or fewer weights than classes.

        Example:
            >>> fl.Labels.from_lists([[1, 7], [999]]).index
            tensor([[  1,   7],
                    [999,  -1]])
        """
        most = max(1, max(map(len, classes), default=0))
        index = torch.tensor([[*row, *[-1] * (most - len(row))] for row in classes], dtype=torch.int64, device=device)
        index = index.view(len(classes), most)
        if weight is None:
            return cls(index)
        if [len(row) for row in classes] != [len(row) for row in weight]:
            raise ValueError("expected a weight for every class")
        padded = [[*row, *[0.0] * (most - len(row))] for row in weight]
        return cls(index, torch.tensor(padded, dtype=torch.float32, device=device).view(len(classes), most))

    @classmethod
    def from_csr(cls, crow: Tensor, col: Tensor, weight: Tensor | None = None, *, most: int | None = None) -> "Labels":
        """Labels from compressed sparse rows: those of row i are col[crow[i] : crow[i + 1]].

        Args:
            crow: integer (N + 1,).
            col: integer (labels of all rows,).
            weight: floating, of col's shape. Default: None.
            most: the most labels that a row may have; rows with more lose those behind. Default: None, what the rows
                have, which on a GPU waits for the device.

        Returns:
            Labels: the labels of N rows.

        Example:
            >>> fl.Labels.from_csr(torch.tensor([0, 2, 3]), torch.tensor([1, 7, 999])).index
            tensor([[  1,   7],
                    [999,  -1]])
        """
        starts, counts = crow[:-1], crow[1:] - crow[:-1]
        if most is None:
            most = int(counts.max()) if counts.shape[0] else 0
        place = torch.arange(max(1, most), device=col.device)
        filled = place < counts[:, None]  # (N, P)
        if col.shape[0] == 0:
            empty = torch.full(filled.shape, -1, dtype=torch.int64, device=col.device)
            return cls(empty, None if weight is None else weight.new_zeros(filled.shape))
        at = (starts[:, None] + place).masked_fill(~filled, 0)
        return cls(
            col[at].long().masked_fill(~filled, -1), None if weight is None else weight[at].masked_fill(~filled, 0)
        )

    @classmethod
    def from_dense(cls, target: Tensor, most: int) -> "Labels":
        """The labels of dense soft targets: the largest of each row, those above 0.

        Exact where no row has more: ``from_dense(target, 2)`` for timm's Mixup and CutMix without their
        label_smoothing, which the losses take instead.

        Args:
            target: floating (N, C).
            most: how many labels a row may have, at most C.

        Returns:
            Labels: the labels of N rows.

        Example:
            >>> fl.Labels.from_dense(torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]), 2).index[0]
            tensor([0, 2])
        """
        weight, index = target.topk(most, dim=-1)
        return cls(index.masked_fill(weight <= 0, -1), weight)

    def to(self, *args, **kwargs) -> "Labels":
        """Both tensors moved by ``Tensor.to``, for devices; a dtype is that of the weights.

        Args:
            args: those of ``Tensor.to``.
            kwargs: those of ``Tensor.to``.

        Returns:
            Labels: the labels of N rows.

        Example:
            >>> fl.Labels.from_lists([[1], [7]]).to("cpu").index.device
            device(type='cpu')
        """
        weight = None if self.weight is None else self.weight.to(*args, **kwargs)
        device = torch.empty(0, device=self.index.device).to(*args, **kwargs).device
        return Labels(self.index.to(device), weight)


def in_order(index: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels (rows, P), int64, as the doors take them: ascending and distinct in every row, -1 behind the last.
    Duplicates add up their weights, of which there are none, (0, P), where none are given."""
    # without its sign, -1 is the largest of all: empty places come behind all classes
    ascending, order = (index ^ INT64.min).sort(dim=1, stable=True)
    ascending = ascending ^ INT64.min
    again = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] != -1)
    place = F.pad(~again, (1, 0), value=False).long().cumsum(1)
    # behind the last label every place holds -1 already
    distinct = torch.full_like(ascending, -1).scatter(1, place, ascending)
    if weight is None:
        return distinct, torch.empty((0, index.shape[1]), device=index.device)
    empty = index == -1
    weight = weight.masked_fill(empty, 0).gather(1, order)
    return distinct, torch.zeros_like(weight).scatter_add(1, place, weight)
