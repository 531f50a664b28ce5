"""timm's training task with Mixup, CutMix and label smoothing, and what to change in timm's train.py.

There, Mixup makes dense targets of all classes, smoothed. Here it mixes without smoothing, the loss smooths, and takes
the two labels of each dense row:

    mixup_args["label_smoothing"] = 0.0
    train_loss_fn = Mixed(fl.CrossEntropyLoss(label_smoothing=args.smoothing))        # or another loss, k=100, ...
"""

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

import fused_losses as fl


class Mixed(nn.Module):
    """A loss for what timm's Mixup gives: dense rows with two classes at most."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.criterion(logits, fl.Labels.from_dense(target, 2))


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # Mixup draws with NumPy


# The same numbers as timm's.
logits, target = torch.randn(16, 1000), torch.randint(1000, (16,))
losses = []
for smoothing, criterion in ((0.1, SoftTargetCrossEntropy()), (0.0, Mixed(fl.CrossEntropyLoss(label_smoothing=0.1)))):
    seed()
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=1000)
    _, mixed = mixup(torch.randn(16, 3, 8, 8), target)
    losses.append(criterion(logits, mixed))
print(f"a mixed, smoothed batch: timm's loss {losses[0]:.5f}, ours {losses[1]:.5f}")
torch.testing.assert_close(*losses)

images, digit = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
images, digit = F.interpolate(images, size=32), torch.tensor(digit)  # (1797, 1, 32, 32), (1797,)


def accuracy_of(criterion: nn.Module, smoothing: float) -> float:
    seed()
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    task = ClassificationTask(model, criterion=criterion, verbose=False)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=smoothing, num_classes=10)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    for _ in range(6):
        for rows in torch.randperm(1024).split(64):
            optimizer.zero_grad()
            task(*mixup(images[rows], digit[rows]))["loss"].backward()
            optimizer.step()
    with torch.no_grad():
        return (model.eval()(images[1024:]).argmax(1) == digit[1024:]).float().mean().item()


criteria = {
    "timm's loss": (SoftTargetCrossEntropy(), 0.1),
    "cross-entropy": (Mixed(fl.CrossEntropyLoss(label_smoothing=0.1)), 0.0),
    "over the 5 hardest": (Mixed(fl.CrossEntropyLoss(k=5, label_smoothing=0.1)), 0.0),
}
accuracies = {name: accuracy_of(*given) for name, given in criteria.items()}
print("test accuracy:", ", ".join(f"{accuracy:.1%} ({name})" for name, accuracy in accuracies.items()))
assert min(accuracies.values()) > 0.85
