# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Classifiers with very many classes: a walk through `fused_losses`
#
# Run it as a script, which writes its pictures beside itself, or open it as a notebook (`jupytext --to ipynb
# walkthrough.py`; VS Code and PyCharm open it as it is). It takes a quarter of a minute on one processor.

# %%
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fused_losses as fl
from photographs import Photographs

# %% [markdown]
# ## 1. Who is pushed?
#
# One image, 1,000 classes: a few are confusing, the others are easy. A loss pushes the logits of wrong classes down;
# how hard it pushes each is the gradient. Cross-entropy pushes all of them, logistic regression as well, and a thousand
# gentle pushes outweigh the five that matter. Over the k hardest, only these are pushed.

# %%
torch.manual_seed(0)
logits = torch.cat([torch.tensor([2.0]), torch.randn(999) - 2]).sort(descending=True).values
target = (logits == 2.0).nonzero().squeeze(1)  # (1,)
criteria = {
    "cross-entropy": fl.CrossEntropyLoss(),
    "logistic regression (LR)": fl.LRLoss(),
    "HS-LR, the 10 hardest": fl.HSLRLoss(k=10),
    "SS-LR": fl.SSLRLoss(),
}
pushes = {}
for name, criterion in criteria.items():
    row = logits.clone()[None].requires_grad_()  # (1, classes)
    criterion(row, target).backward()
    push = row.grad[0][logits != 2.0]  # without the target's, which is pulled up
    pushes[name] = push / push.sum()

figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, push in pushes.items():
    axis.plot(range(1, 1000), push.cumsum(0), label=name)
axis.set(xscale="log", xlabel="wrong classes, hardest first", ylabel="share of the push")
axis.legend()
figure.savefig("push.png")

shares = {name: push.topk(10).values.sum().item() for name, push in pushes.items()}
print("of the push, the ten hardest classes get", ", ".join(f"{share:.0%} ({name})" for name, share in shares.items()))
assert shares["HS-LR, the 10 hardest"] > 0.999 > 0.5 > shares["logistic regression (LR)"]

# %% [markdown]
# ## 2. Digits among ten thousand classes
#
# Scikit-learn's 1,797 handwritten digits, and a classifier of 10,000 classes: the 9,990 others never occur, like most
# identities in a batch. Each loss has the learning rate that was best for it on held-out rows (`bench/results`). All
# start from a bias of -log(C - 1), where every class has the probability 1 / C.

# %%
CLASSES, EPOCHS = 10_000, 15
images, digit = load_digits(return_X_y=True)
images, digit = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digit)  # (1797, 64), (1797,)
train, test = torch.randperm(len(digit)).split([1078, 719])


def accuracies(criterion: nn.Module, lr: float) -> list[float]:
    """On the test rows after each epoch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    head = fl.LinearLoss(128, CLASSES, loss=criterion, bias=True)
    nn.init.constant_(head.bias, -math.log(CLASSES - 1))
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr, momentum=0.9)
    found = []
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            head(network(images[rows]), digit[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            found.append((head.predict(network(images[test])) == digit[test]).float().mean().item())
    return found


curves = {
    "cross-entropy": accuracies(fl.CrossEntropyLoss(), 0.14),
    "LR": accuracies(fl.LRLoss(), 0.14),
    "HS-LR, k = 3": accuracies(fl.HSLRLoss(k=3, alpha=3.6), 0.05),
}
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, curve in curves.items():
    axis.plot(range(1, EPOCHS + 1), curve, label=name)
axis.set(xlabel="epochs", ylabel="test accuracy", title="digits among 10,000 classes")
axis.legend()
figure.savefig("digits.png")

print("digits among 10,000 classes:", ", ".join(f"{curve[-1]:.1%} ({name})" for name, curve in curves.items()))
assert curves["HS-LR, k = 3"][-1] > 0.9

# %% [markdown]
# ## 3. What waits for backward
#
# Between forward and backward, autograd keeps what it needs. Of a linear layer and a loss, that is a matrix of
# rows x classes. `LinearLoss` over the k hardest keeps, of each row, k classes with their logits.

# %%
widths, rows, features = [2**n for n in range(10, 17)], 64, 32


def kept(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], classes: int) -> int:
    """Bytes beside input and weight."""
    inputs = torch.randn(rows, features, requires_grad=True)
    weight, target = torch.randn(classes, features, requires_grad=True), torch.randint(classes, (rows,))
    given = {tensor.untyped_storage().data_ptr() for tensor in (inputs, weight, target)}
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(inputs, weight, target)  # held until the bytes are counted
    del loss
    return sum(size for pointer, size in found.items() if pointer not in given)


ways = {
    "linear + F.cross_entropy": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    "linear_loss, HS-LR, k = 16": lambda x, w, y: fl.linear_loss(x, w, y, loss=fl.HSLRLoss(k=16)),
}
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
sizes = {name: [kept(way, classes) for classes in widths] for name, way in ways.items()}
for name, size in sizes.items():
    axis.plot(widths, size, label=name)
axis.set(xscale="log", yscale="log", xlabel="classes", ylabel=f"bytes kept for backward, {rows} rows")
axis.legend()
figure.savefig("kept.png")

print("kept for backward at 65,536 classes:", ", ".join(f"{size[-1]:,} bytes ({name})" for name, size in sizes.items()))
assert sizes["linear_loss, HS-LR, k = 16"][0] == sizes["linear_loss, HS-LR, k = 16"][-1]

# %% [markdown]
# ## 4. Recognise a thousand identities
#
# ArcFace against the hundred hardest identities: each is a place in one of two photographs, seen a little differently
# every time. `topk` gives the nearest identities, without a matrix of all logits.

# %%
IDENTITIES = 1000
torch.manual_seed(0)
layers = []
for channels, wider in ((3, 16), (16, 32), (32, 64)):
    layers += [nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64, bias=False), nn.BatchNorm1d(64))
arcface = fl.CrossEntropyLoss(k=100, margin=fl.Margin(angle=0.5))
head = fl.LinearLoss(64, IDENTITIES, loss=arcface, normalize=True, scale=32.0)
optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=0.01)

photographs, generator = Photographs(IDENTITIES), torch.Generator().manual_seed(0)
for _ in range(150):
    identity = torch.randint(IDENTITIES, (256,))
    optimizer.zero_grad()
    head(network(photographs.look(identity, generator)), identity).backward()
    optimizer.step()

everyone = torch.arange(IDENTITIES)
queries = photographs.look(everyone, generator)
with torch.no_grad():
    nearest = head.topk(network.eval()(queries), 5).indices  # (identities, 5)
right = nearest == everyone[:, None]
print(f"recognised: {right[:, 0].float().mean():.1%}, among the five nearest: {right.any(1).float().mean():.1%}")
assert right.any(1).float().mean() > 0.7

figure, axes = plt.subplots(4, 6, figsize=(7, 5), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
for row, who in zip(axes, range(100, 900, 200), strict=True):
    row[0].set_ylabel("query →")
    row[0].imshow(queries[who].permute(1, 2, 0).clamp(0, 1))
    for axis, found in zip(row[1:], nearest[who], strict=True):
        axis.imshow(photographs.look(found[None], generator)[0].permute(1, 2, 0).clamp(0, 1))
        axis.set_xlabel("right" if found == who else "")
figure.suptitle("a query, and looks at its five nearest identities")
figure.savefig("nearest.png")
