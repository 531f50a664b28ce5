"""Calls to the GPU doors beside the reference's, and how close they must be.

On a CUDA device if there is one, else on CPU tensors: in Triton's interpreter (``conftest.py`` beside this asks for
it), or on the emulator (``tests/emulator``).
"""

import os

import torch
from torch import Tensor

from doors import CE, CRL, LR, NLLR, SS_LR, Formula, backward, forward
from fused_losses import reference
from fused_losses.gpu import doors as gpu_wing
from fused_losses.gpu.layout import gradient_row_stride

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SOFTMAX = {
    "cross_entropy": CE,
    "nllr": NLLR,
    "crl": CRL,
    "crl, alpha 0": CRL._replace(params=[0.0, 1.0]),
    "crl, alpha 0.3": CRL._replace(params=[0.3, 2.5]),
    "crl, beta 0": CRL._replace(params=[0.0, 0.0]),
}
LOGISTIC = {
    "lr": LR,
    "ss_lr": SS_LR,
    "ss_lr, gamma 0": SS_LR._replace(params=[0.0]),
    "ss_lr, gamma 1": SS_LR._replace(params=[1.0]),
    "ss_lr, gamma 0.5": SS_LR._replace(params=[0.5]),
}
FORMULAS = SOFTMAX | LOGISTIC
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-24}  # what a gradient may lose anywhere
IGNORED = -100


def make(rows: int, classes: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random logits (rows, classes) and class indices (rows,), on the CPU."""
    generator = torch.Generator().manual_seed(1000 * classes + seed)
    logits = spread * torch.randn((rows, classes), generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(classes, (rows,), generator=generator)


def make_grad(formula: Formula, rows: int, seed: int = 0) -> Tensor:
    shape = (rows,) if formula.family == "softmax" else (rows, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def step(wing, formula: Formula, logits, target, grad, k=0, compact=False, ignore_index=IGNORED) -> tuple[Tensor, ...]:
    """rows (rows,) or (rows, 2), state, pick_index, pick_logit, and dlogits."""
    kept = forward(wing, formula, logits, target, k, compact, ignore_index)
    return *kept, backward(wing, formula, grad, logits, target, kept, k, compact, ignore_index)


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
    formula: Formula,
    logits: Tensor,
    target: Tensor,
    k: int = 0,
    compact: bool = False,
    *,
    grad: Tensor | None = None,
    ignore_index: int = IGNORED,
    wing=gpu_wing,
) -> Tensor:
    """One step through the GPU doors: the picks are the reference's, bit for bit; the rest is held against the
    reference in the same precision and in float64. Gives dlogits."""
    grad = make_grad(formula, logits.shape[0]).to(logits.device) if grad is None else grad
    before = logits.clone(), target.clone(), grad.clone()
    ours = step(wing, formula, logits, target, grad, k, compact, ignore_index)
    for mine, kept in zip((logits, target, grad), before, strict=True):
        torch.testing.assert_close(mine, kept, rtol=0, atol=0, equal_nan=True)
    theirs = step(Unchecked(), formula, logits, target, grad, k, compact, ignore_index)
    truth = step(Unchecked(), formula, logits.double(), target, grad.double(), k, compact, ignore_index)

    rows, state, index, logit, dlogits = ours
    assert rows.dtype == state.dtype == torch.float32 and dlogits.dtype == logits.dtype
    assert dlogits.shape == logits.shape
    stride = gradient_row_stride(logits.shape[1], logits.stride(), logits.element_size())
    assert dlogits.stride() == (logits.shape[1] if compact and target.dim() == 1 else stride, 1)
    _assert_same_picks(logits, (index, logit), theirs[2:4])

    states = [poisoned(formula, outputs[1]) for outputs in (ours, theirs, truth)]
    for name, *of in (
        ("rows", rows, theirs[0], truth[0]), ("state", *states), ("dlogits", dlogits, theirs[4], truth[4])
    ):  # fmt: skip
        assert_as_accurate(*of, f"{formula}: {name}")
    return dlogits


def _assert_same_picks(logits: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
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


def poisoned(formula: Formula, state: Tensor) -> Tensor:
    """Which entry of a poisoned row's state is NaN is the wing's own affair."""
    if formula.family == "softmax":
        doubtful = ((state[:, 2] - state[:, 0]) - state[:, 1]).isnan()
    else:
        doubtful = state[:, 0].isnan()
    return state.masked_fill(doubtful[:, None], float("nan"))


def assert_as_accurate(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """Row by row: NaN and infinities where the reference has them, and an error against float64 within twice PyTorch's
    own in the same precision plus a few rounding units of the row's scale: an exponential by exp2 rounds its argument
    once more."""
    ours, theirs, truth = (x.detach().cpu().reshape(-1, *x.shape[1:] or (1,)) for x in (ours, theirs, truth))
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
