"""What the tests run over: the losses with their hyper-parameters, shapes, inputs, and the tolerance rule."""

from dataclasses import dataclass, fields
from types import ModuleType

import pytest
import torch
from torch import Tensor

import eager
import fused_losses as fl
import paper
from fused_losses import losses

LAYER_OPTIONS = ("linear_bias", "normalize", "scale", "shard", "gather_input", "options", "return_statistics")


@dataclass(frozen=True)
class Loss:
    name: str  # of the function
    module: str
    family: str
    door: str  # the name by which the doors know its formula
    hypers: tuple[dict, ...]  # the defaults first, then corners
    needs_k: bool

    def __str__(self) -> str:
        return self.name

    def __call__(self, *args, **kwargs) -> Tensor:
        return getattr(fl, self.name)(*args, **kwargs)

    def linear(self, *args, **kwargs) -> Tensor:
        """``fl.linear_loss`` with this loss, the layer's options apart from the loss's own."""
        layer = {name: kwargs.pop(name) for name in LAYER_OPTIONS if name in kwargs}
        return fl.linear_loss(*args, loss=self.module_class()(**kwargs), **layer)

    @property
    def paper(self):
        return getattr(paper, self.name.removesuffix("_loss"))

    @property
    def eager(self):
        return getattr(eager, self.name.removesuffix("_loss"))

    def module_class(self) -> type[torch.nn.Module]:
        return getattr(fl, self.module)

    def ks(self, *ks: int | None) -> list[int | None]:
        """Those of the given k that this loss takes: None is all negatives."""
        return [k for k in ks if k is not None or not self.needs_k]


# Hyper-parameters to test besides the defaults.
CORNERS: dict[str, tuple[dict, ...]] = {
    "crl_loss": (
        {"alpha": 0.0, "beta": 1.0},
        {"alpha": 0.3, "beta": 2.5},
        {"alpha": 0.0, "beta": 0.25},
        {"alpha": 4.0, "beta": 0.0},
    ),
    "hs_lr_loss": ({"alpha": 10.0}, {"alpha": 0.0}),
    "ss_lr_loss": ({"alpha": 5.0, "gamma": 0.5}, {"alpha": 2.0, "gamma": 0.0}, {"alpha": 0.0, "gamma": 1.0}),
}


def named(page: ModuleType = losses) -> list[type[losses.Loss]]:
    """The losses on a page like ``losses.py``, but for the two that are no formula: the log-odds themselves, and
    whatever a user makes of them."""
    found = [x for x in vars(page).values() if isinstance(x, type) and issubclass(x, losses.Loss)]
    return [loss for loss in found if loss not in (losses.Loss, losses.LogOdds, losses.OwnSoftmax)]


def _case(loss: type[losses.Loss]) -> Loss:
    defaults = {field.name: field.default for field in fields(loss)}
    hypers = (defaults, *CORNERS.get(loss.name, ()))
    return Loss(loss.name, f"{loss.__name__}Loss", loss.family, loss.formula, hypers, needs_k=loss is losses.HSLR)


LOSSES = tuple(map(_case, named()))
SOFTMAX = tuple(loss for loss in LOSSES if loss.family == "softmax")
LOGISTIC = tuple(loss for loss in LOSSES if loss.family == "logistic")
CE, NLLR, CRL, LR, HS_LR, SS_LR = (
    next(loss for loss in LOSSES if loss.name == name)
    for name in ("cross_entropy", "nllr_loss", "crl_loss", "lr_loss", "hs_lr_loss", "ss_lr_loss")
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CLASSES = (1, 2, 3, 10, 751, 1000, 21841)


def each(losses, **kwargs):
    """pytest.mark.parametrize over losses, with readable names."""
    return pytest.mark.parametrize("loss", losses, ids=str, **kwargs)


each_form = pytest.mark.parametrize(
    "loss, form", [(loss, "index") for loss in LOSSES] + [(loss, "multihot") for loss in LOGISTIC], ids=str
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_logits(rows: int, classes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random logits of a trained head's spread, (rows, classes)."""
    generator = torch.Generator().manual_seed(1000 * seed + classes)
    return (3 * torch.randn(rows, classes, dtype=torch.float64, generator=generator)).to(dtype)


def make_index(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Random class indices, (rows,)."""
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1000 * seed + classes + 1))


def make_multihot(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Random 0/1 matrix, (rows, classes): the first row without positives, the last without negatives."""
    generator = torch.Generator().manual_seed(1000 * seed + classes + 2)
    target = torch.rand(rows, classes, generator=generator) < 0.2
    target[0] = False
    target[-1] = True
    return target


def make_target(form: str, rows: int, classes: int, seed: int = 0) -> Tensor:
    return {"index": make_index, "multihot": make_multihot}[form](rows, classes, seed)


def value_and_grad(function, logits: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """function(logits) and the gradient of (upstream * function(logits)).sum(), at a copy of the logits."""
    logits = logits.detach().clone().requires_grad_()
    value = function(logits)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    return value.detach(), logits.grad


def assert_as_accurate(ours: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    """The tolerance rule: the error against float64 is at most twice that of torch's own computation in the same
    precision plus one rounding unit of the result at its scale. (Float64 results may be as far off as the judge.)"""
    truth = truth.double()
    error, torchs = (ours.double() - truth).abs().max(), (eager.to(ours.dtype).double() - truth).abs().max()
    units = 32 if ours.dtype == torch.float64 else 1
    bound = 2 * torchs + units * torch.finfo(ours.dtype).eps * truth.abs().max()
    assert error <= bound, f"{what}: error {error:.3e} against float64, allowed {bound:.3e} (torch's own: {torchs:.3e})"


def assert_elementwise(ours: Tensor, truth: Tensor, what: str, atol: float = 0.0) -> None:
    """The second net: each entry for itself, small ones included, relative to its own size. Half precision may be off
    by one rounding unit; `atol` is given where a value may come out of a cancellation."""
    eps = torch.finfo(ours.dtype).eps
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(ours.dtype, eps)
    floor = max(atol, 1e-15, torch.finfo(ours.dtype).smallest_normal * eps)
    torch.testing.assert_close(ours.double(), truth.double(), rtol=rtol, atol=floor, msg=lambda m: f"{what}: {m}")


def signed_nan(sign: int, dtype: torch.dtype) -> Tensor:
    """A NaN with that sign bit. Casts between dtypes may drop the sign, so it is made from its bits."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return torch.tensor(torch.iinfo(bits).max if sign > 0 else -1, dtype=bits).view(dtype)
