"""Hugging Face's Accelerate with `LinearLoss` as the head: accumulated batches, and the training accuracy for free.

accelerate launch accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_losses as fl

images, digit = load_digits(return_X_y=True)
images, digit = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digit)  # (1797, 64), (1797,)
train, test = TensorDataset(images[:1024], digit[:1024]), (images[1024:], digit[1024:])


class Classifier(nn.Module):
    """One module that gives the loss: Accelerate prepares it as a whole, for DDP and autocast."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.head = fl.LinearLoss(128, 10, loss=criterion, bias=True)

    def forward(self, images: Tensor, target: Tensor):
        return self.head(self.network(images), target, return_statistics=True)


def fit(batch_size: int, accumulated: int, epochs: int) -> tuple[Classifier, float]:
    """The classifier, and its accuracy on the rows of the last epoch, as it was trained on them."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model = Classifier(fl.CRLLoss(k=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train, batch_size, shuffle=True))
    for _ in range(epochs):
        correct = 0
        for images, target in loader:
            with accelerator.accumulate(model):
                loss, statistics = model(images, target)
                accelerator.backward(loss)  # it divides by the number of batches that are accumulated
                optimizer.step()
                optimizer.zero_grad()
            correct += statistics.correct.sum().item()  # from the pass that gave the loss
    return accelerator.unwrap_model(model), correct / len(train)


whole, _ = fit(batch_size=128, accumulated=1, epochs=2)
accumulated, _ = fit(batch_size=32, accumulated=4, epochs=2)
for one, other in zip(whole.parameters(), accumulated.parameters(), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
print("four batches of 32, accumulated, train as one of 128 does")

model, training_accuracy = fit(batch_size=32, accumulated=1, epochs=30)
with torch.no_grad():
    accuracy = (model.head.predict(model.network(test[0])) == test[1]).float().mean().item()
print(f"{training_accuracy:.1%} right of the digits trained on, {accuracy:.1%} of the others")
assert accuracy > 0.9
