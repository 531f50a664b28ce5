"""What a user writes, for the type checkers of ``test_typing.py``: they object to the lines marked, and to no other.

It is never run.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

import fused_losses as fl

logits, target = torch.randn(4, 100), torch.arange(4)
x, w = torch.randn(4, 8), torch.randn(100, 8)
soft = fl.Labels.mixup(target, target.flip(0), 0.3)
options = fl.LinearLossOptions(chunk_bytes=2**20)

# --- right ---

criterion = fl.HSLRLoss(k=10, alpha=2.0, reduction="none", margin=fl.Margin(angle=0.5, scale=64.0))
assert_type(criterion, fl.HSLRLoss)
assert_type(criterion(logits, target), Tensor)
assert_type(fl.SoftmaxLoss(lambda d: -F.logsigmoid(d), k=10)(logits, soft), Tensor)
assert_type(fl.lr_loss(logits, fl.Labels.from_lists([[1], [2]])), Tensor)
losses: list[fl.RowLoss] = [fl.CrossEntropyLoss(label_smoothing=0.1), fl.NLLRLoss(), fl.CRLLoss(beta=0.5), criterion]
head = fl.LinearLoss(8, 100, loss=losses[0], normalize=True, scale="learned", options=options)
assert_type(head(x, target), Tensor)
assert_type(head(x, target, return_statistics=True), tuple[Tensor, fl.RowStatistics])
assert_type(fl.linear_loss(x, w, target, loss=criterion), Tensor)
assert_type(fl.linear_loss(x, w, soft, loss=criterion, return_statistics=True)[1], fl.RowStatistics)
assert_type(head.grown(200).predict(x), Tensor)
assert_type(fl.row_statistics(logits, target).correct, Tensor)
assert_type(fl.logistic_sums(logits, target, k=10)[0], Tensor)
assert_type(fl.show_config(), str)
assert_type(fl.__version__, str)
criterion.k, criterion.ratio, criterion.reduction = None, 0.1, "sum"


def train(loss: fl.RowLoss, reduction: Literal["mean", "sum"]) -> Tensor:
    loss.reduction = reduction
    return loss(logits, target)


# --- k ---
fl.HSLRLoss(k="10")  # wrong
fl.hs_lr_loss(logits, target, k=0.01)  # wrong
fl.linear_cross_entropy(x, w, target, k=10.0)  # wrong
head.topk(x, "10")  # wrong
# --- reduction ---
fl.CRLLoss(reduction="average")  # wrong
fl.cross_entropy(logits, target, reduction="batchmean")  # wrong
criterion.reduction = "average"  # wrong
# --- a keyword that is none ---
fl.HSLRLoss(k=10, gamma=2.0)  # wrong
fl.SSLRLoss(topk=10)  # wrong
fl.ss_lr_loss(logits, target, size_average=True)  # wrong
fl.LinearLoss(8, 100, num_classes=100)  # wrong
# --- a loss of torch ---
fl.LinearLoss(8, 100, loss=nn.CrossEntropyLoss())  # wrong
fl.linear_loss(x, w, target, loss=F.cross_entropy)  # wrong
fl.LinearLoss(8, 100, loss=fl.HSLRLoss)  # wrong
# --- margin ---
fl.CrossEntropyLoss(margin=0.5)  # wrong
fl.cross_entropy(logits, target, margin=("angle", 0.5))  # wrong
fl.Margin(angle="0.5")  # wrong
# --- labels ---
fl.Labels([[1, 2], [3, 4]])  # wrong
criterion(logits, [1, 2, 3, 4])  # wrong
head(x, [1, 2, 3, 4])  # wrong
fl.lr_loss(logits, (target, target))  # wrong
fl.Labels.from_lists([1, 2])  # wrong
