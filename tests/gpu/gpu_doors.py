"""Calls to the GPU doors beside the reference's, and how close they must be.

On a CUDA device if there is one, else on CPU tensors: in Triton's interpreter (``conftest.py`` beside this asks for
it), or on the emulator (``tests/emulator``).
"""

import os

import torch
from torch import Tensor

from doors import LOGISTIC, SOFTMAX, SS_LR, Formula, Kept, grad_like
from fused_losses import reference
from fused_losses.gpu import doors as gpu_backend
from fused_losses.gpu.layout import gradient_row_stride

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMULAS = (*SOFTMAX, *LOGISTIC, SS_LR._replace(params=[1.0]))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-24}  # what a gradient may lose anywhere
IGNORED = -100


def make(rows: int, classes: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random logits (rows, classes) and class indices (rows,), on the CPU."""
    generator = torch.Generator().manual_seed(1000 * classes + seed)
    logits = spread * torch.randn((rows, classes), generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(classes, (rows,), generator=generator)


def step(
    backend, formula: Formula, logits: Tensor, target: Tensor, k=0, compact=False, *, grad=None, ignore_index=IGNORED,
    part=(0, None), weight=None, reduction="none",
) -> tuple[Kept, Tensor]:  # fmt: skip
    """Forward and backward through the doors: what forward gives, and dlogits. part: first_class and all_classes."""
    spec = formula.spec(logits.shape[1], k, compact, ignore_index)
    spec = spec._replace(first_class=part[0], all_classes=part[1] or logits.shape[1])
    weight = None if weight is None else weight.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    kept = Kept(*backend.forward(logits, target, weight, reduction, *spec))
    if grad is None:
        grad = grad_like(logits) if reduction == "none" else torch.tensor(0.7)
    given = None if compact and target.dim() == 1 else logits
    _, coefficients, *rest = kept
    grad = grad.to(kept.loss)
    return kept, backend.backward(grad, coefficients, given, target, *rest, logits.shape[1], *spec)


class Unchecked:
    """The reference as other devices than the CPU see it: a bad target makes its row NaN, it does not raise."""

    def __getattr__(self, name):
        door = getattr(reference, name)

        def unchecked(*args):
            honest, reference.check_target = reference.check_target, lambda *_: None
            try:
                return door(*args)
            finally:
                reference.check_target = honest

        return unchecked


def compare(
    formula: Formula, logits: Tensor, target: Tensor, k: int = 0, compact: bool = False, *, backend=gpu_backend,
    grad: Tensor | None = None, weight: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    """One step through the GPU doors: the picks are the reference's, bit for bit; the rest is held against the
    reference in the same precision and in float64. options: of ``step``. Gives dlogits."""
    given = [x for x in (logits, target, grad, weight) if x is not None]
    before = [x.clone() for x in given]
    options |= {"grad": grad, "weight": weight}
    ours, dlogits = step(backend, formula, logits, target, k, compact, **options)
    for mine, kept in zip(given, before, strict=True):
        torch.testing.assert_close(mine, kept, rtol=0, atol=0, equal_nan=True)
    theirs, same = step(Unchecked(), formula, logits, target, k, compact, **options)
    truth, exact = step(Unchecked(), formula, logits.double(), target, k, compact, **options)

    for name in ("loss", "coefficients", "statistics"):
        assert getattr(ours, name).dtype == torch.float32 and getattr(ours, name).shape == getattr(theirs, name).shape
    assert dlogits.dtype == logits.dtype and dlogits.shape == logits.shape
    stride = gradient_row_stride(logits.shape[1], logits.stride(), logits.element_size())
    assert dlogits.stride() == (logits.shape[1] if compact and target.dim() == 1 else stride, 1)
    assert_same_picks(logits, ours[3:], theirs[3:])
    assert_as_accurate(*(poisoned(of.statistics) for of in (ours, theirs, truth)), f"{formula}: statistics")
    assert_as_accurate(ours.coefficients, theirs.coefficients, truth.coefficients, f"{formula}: coefficients")
    assert_as_accurate(ours.loss, theirs.loss, truth.loss, f"{formula}: loss")
    assert_as_accurate(dlogits, same, exact, f"{formula}: dlogits")
    assert_same_in_place(dlogits, backend, formula, logits, target, k, compact, **options)
    return dlogits


def assert_same_in_place(dlogits: Tensor, backend, formula, logits, target, k, compact, **options) -> None:
    """The gradient written over logits of the same layout, where they allow it: the same bits, and nothing around."""
    rows, classes = logits.shape
    if logits.stride(1) != 1 or (rows > 1 and logits.stride(0) < classes) or (compact and target.dim() == 1):
        return
    around = torch.full((logits.untyped_storage().nbytes() // logits.element_size(),), 7.0).to(logits)
    place = logits.shape, logits.stride(), logits.storage_offset()
    over = around.clone().as_strided(*place).copy_(logits)
    _, result = step(InPlace(backend), formula, over, target, k, compact, **options)
    assert torch.equal(bits(result), bits(dlogits))
    left = result.as_strided(around.shape, (1,), 0)
    around.as_strided(*place).copy_(dlogits)
    assert torch.equal(bits(left), bits(around))


def compare_at_once(
    formula: Formula, logits: Tensor, target: Tensor, k: int = 0, compact: bool = False, *, backend=gpu_backend
) -> None:
    """Forward and backward in one call, held against the reference's two as ``compare`` holds them."""
    options = {"k": k, "compact": compact, "grad": grad_like(logits).float()}
    over = logits.clone(memory_format=torch.preserve_format)
    spec = formula.spec(logits.shape[1], k, compact, IGNORED)
    loss, statistics = backend.at_once_(options["grad"], over, target, None, *spec)
    theirs, same = step(Unchecked(), formula, logits, target, **options)
    truth, exact = step(Unchecked(), formula, logits.double(), target, **options)
    assert_as_accurate(loss, theirs.loss, truth.loss, f"{formula}: loss")
    assert_as_accurate(*(map(poisoned, (statistics, theirs.statistics, truth.statistics))), f"{formula}: statistics")
    assert_as_accurate(over, same, exact, f"{formula}: dlogits")


class InPlace:
    """A backend whose backward overwrites the logits."""

    def __init__(self, backend):
        self.forward, self.backward_ = backend.forward, backend.backward_

    def backward(self, grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, *spec):
        self.backward_(grad, coefficients, logits, target, statistics, pick_index, pick_logit, *spec)
        return logits


def assert_same_picks(logits: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """In any order; whatever they are in rows with a NaN, they are classes."""
    (index, logit), (their_index, their_logit) = (_by_class(*picks) for picks in (ours, theirs))
    assert index.dtype == torch.int32 and logit.dtype == logits.dtype and index.shape == their_index.shape
    assert ((index >= -1) & (index < logits.shape[1])).all()
    without_nan = ~logits.isnan().any(1)
    assert torch.equal(index[without_nan], their_index[without_nan])
    assert torch.equal(bits(logit[without_nan]), bits(their_logit[without_nan]))


def _by_class(index: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
    order = index.argsort(dim=1, stable=True)
    return index.gather(1, order), logit.gather(1, order)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def poisoned(statistics: Tensor) -> Tensor:
    """Which of a bad row's statistics is NaN is the backend's own affair."""
    return statistics.masked_fill(statistics.isnan().any(1, keepdim=True), float("nan"))


def assert_as_accurate(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """Row by row: NaN and infinities where the reference has them, and an error against float64 within twice PyTorch's
    own in the same precision plus a few rounding units of the row's scale: an exponential by exp2 rounds its argument
    once more."""
    ours, theirs, truth = (
        x.detach().cpu().reshape(x.shape if x.dim() == 2 else (-1, 1)) for x in (ours, theirs, truth)
    )
    assert ours.shape == theirs.shape
    special = ~theirs.isfinite()
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{what}: NaN elsewhere than in the reference"
    torch.testing.assert_close(
        ours[special].nan_to_num(posinf=1e38, neginf=-1e38),
        theirs[special].nan_to_num(posinf=1e38, neginf=-1e38),
        rtol=0,
        atol=0,
    )
    finite = theirs.isfinite() & truth.isfinite()
    truth = truth.double().where(finite, 0)
    error = (ours.double().where(finite, 0) - truth).abs()
    allowed = 2 * (theirs.double().where(finite, 0) - truth).abs().amax(1, keepdim=True)
    units = (8 if ours.dtype == torch.float32 else 1) * torch.finfo(ours.dtype).eps
    allowed = allowed + units * truth.abs().amax(1, keepdim=True) + TINY[ours.dtype]
    wrong = (error > allowed).nonzero().tolist()
    assert not wrong, (
        f"{what}: at {wrong[:8]} off by {error[error > allowed][:8].tolist()}, allowed {allowed.flatten()[:8].tolist()}"
    )
