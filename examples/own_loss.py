"""A loss of your own: one line of PyTorch, a function of d, the log-odds of the target.

The focal loss (arXiv 1708.02002) is -(1 - p)^2 log p of the target's probability p = sigmoid(d). Written by hand it
keeps several matrices of rows x classes; here the logits are read once, and their gradient is written once.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fused_losses as fl


def focal(d: Tensor) -> Tensor:  # (rows,) -> (rows,)
    return -(torch.sigmoid(-d) ** 2) * F.logsigmoid(d)


# The same numbers as by hand, gradient included.
torch.manual_seed(0)
logits, target = torch.randn(8, 1000, dtype=torch.float64, requires_grad=True), torch.randint(1000, (8,))
log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
by_hand = (-((1 - log_p.exp()) ** 2) * log_p).mean()
ours = fl.softmax_loss(logits, target, focal)
gradients = [torch.autograd.grad(loss, logits)[0] for loss in (by_hand, ours)]
torch.testing.assert_close(ours, by_hand)
torch.testing.assert_close(*gradients)
print("focal loss: value and gradient as by hand")

# As a module it takes the options of the other losses: here, only the three hardest of the nine wrong digits.
criterion = fl.SoftmaxLoss(focal, k=3)
logits = torch.randn(1, 10, requires_grad=True)
criterion(logits, torch.tensor([0])).backward()
print(f"over the 3 hardest, {logits.grad.count_nonzero()} of 10 logits have a gradient: theirs and the target's")
assert logits.grad.count_nonzero() == 4

images, digit = load_digits(return_X_y=True)
images, digit = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digit)  # (1797, 64), (1797,)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
for _ in range(100):
    optimizer.zero_grad()
    criterion(model(images[:1000]), digit[:1000]).backward()
    optimizer.step()
with torch.no_grad():
    accuracy = (model(images[1000:]).argmax(1) == digit[1000:]).float().mean().item()
print(f"trained with it: {accuracy:.1%} of 797 digits that it has not seen are right")
assert accuracy > 0.9

# In LinearLoss, which owns the last layer, no logits of the whole batch ever exist.
head = fl.LinearLoss(128, 10, loss=criterion, bias=True)
head.load_state_dict(model[2].state_dict())  # the names are nn.Linear's
with torch.no_grad():
    torch.testing.assert_close(head(model[:2](images), digit), criterion(model(images), digit))
