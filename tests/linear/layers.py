"""What the tests of the linear losses share: layers, gradients, and a watch on what is made."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, FEATURES, CLASSES = 7, 8, 100


WAYS = {"all": None, "picks": 3, "dense": 50}  # how the gradients of 100 classes are computed for k of them


CHUNKS = {"one row": 1, "three rows": 3 * CLASSES * 8, "one chunk": None}


each_way = pytest.mark.parametrize("k", WAYS.values(), ids=WAYS.keys())


each_gradient = pytest.mark.parametrize(
    "k, sparse_grad",
    [(None, False), (3, False), (50, False), (3, True), (50, True)],
    ids=["all", "picks", "dense", "sparse picks", "sparse"],
)


each_chunk = pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS.keys())


each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


each_layer = pytest.mark.parametrize("normalize", [False, True], ids=["linear", "cosine"])


def k_of(loss, k, classes=CLASSES):
    return classes - 1 if k is None and loss.needs_k else k


def make_layer(rows=ROWS, features=FEATURES, classes=CLASSES, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """input (rows, features), weight (classes, features), bias (classes,)."""
    generator = torch.Generator().manual_seed(rows + features + classes)
    shapes = (rows, features), (classes, features), (classes,)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)


def make_exact_layer(rows=ROWS, features=FEATURES, classes=CLASSES, dtype=torch.float64):
    """Multiples of 1/4 whose logits no dtype rounds: the picks, ties and all, are the same in every precision."""
    generator = torch.Generator().manual_seed(rows + features + classes)
    shapes = (rows, features), (classes, features), (classes,)
    return tuple((torch.randint(-2, 3, shape, generator=generator) / 2).to(dtype) for shape in shapes)


def make_upstream(rows=ROWS) -> Tensor:
    return torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def cosines(x: Tensor, w: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).t()


def value_and_grads(function, *tensors: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """function(*tensors), and the gradient by each of (upstream * it).sum(), at copies of the tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    upstream = torch.tensor(-1.7) if upstream is None else upstream
    value.backward(upstream.to(value.dtype).expand(value.shape))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for name, ours, theirs in zip(("value", "dinput", "dweight", "dbias"), got, expected, strict=False):
        assert ours.dtype == theirs.dtype, name
        torch.testing.assert_close(ours.to_dense(), theirs, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    assert len(got) == len(expected)


class Watch(TorchDispatchMode):
    """The ops that ran, and the size of the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket.__name__)
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.layout == torch.strided and not func.is_view:
                self.largest = max(self.largest, made.numel())
        return result


def picked_classes(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """The targets and the k hardest of each row, sorted."""
    hardest = logits.scatter(1, target[:, None], -torch.inf).topk(k).indices
    return torch.cat((hardest.flatten(), target)).unique()
