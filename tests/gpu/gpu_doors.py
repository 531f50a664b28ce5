"""Calls to the GPU doors beside the reference's, and how close they must be.

On a CUDA device if there is one, else on CPU tensors in Triton's interpreter, which must be asked for before Triton is
imported.
"""

import os

import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

from fused_losses import reference  # noqa: E402
from fused_losses.gpu import launch  # noqa: E402
from fused_losses.gpu.layout import gradient_row_stride  # noqa: E402

SOFTMAX = {
    "cross_entropy": ("cross_entropy", []),
    "nllr": ("nllr", []),
    "crl": ("crl", [1.5, 1.0]),
    "crl, alpha 0": ("crl", [0.0, 1.0]),
    "crl, alpha 0.3": ("crl", [0.3, 2.5]),
    "crl, beta 0": ("crl", [0.0, 0.0]),
}
LOGISTIC = {
    "lr": ("lr", []),
    "ss_lr": ("ss_lr", [2.0]),
    "ss_lr, gamma 0": ("ss_lr", [0.0]),
    "ss_lr, gamma 1": ("ss_lr", [1.0]),
    "ss_lr, gamma 0.5": ("ss_lr", [0.5]),
}
FORMULAS = SOFTMAX | LOGISTIC
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-24}  # what a gradient may lose anywhere
IGNORED = -100


def family(formula: str) -> str:
    return "softmax" if formula in SOFTMAX else "logistic"


def make(rows: int, classes: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random logits (rows, classes) and class indices (rows,), on the CPU."""
    generator = torch.Generator().manual_seed(1000 * classes + seed)
    logits = spread * torch.randn((rows, classes), generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(classes, (rows,), generator=generator)


def make_grad(formula: str, rows: int, seed: int = 0) -> Tensor:
    shape = (rows,) if family(formula) == "softmax" else (rows, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def step(wing, formula: str, logits: Tensor, target: Tensor, grad: Tensor, ignore_index: int = IGNORED, part=(0, None)):
    """rows (rows,) or (rows, 2), state, and dlogits. part: first_class and all_classes."""
    loss, params = FORMULAS[formula]
    forward, backward = (getattr(wing, f"{family(formula)}_{pass_}") for pass_ in ("forward", "backward"))
    rows, state, *picks = forward(logits, target, loss, params, 0, ignore_index, False, *part)
    options = loss, params, 0, ignore_index, logits.shape[1], False, *part
    return rows, state, backward(grad, logits, target, state, *picks, *options)


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
    formula: str, logits: Tensor, target: Tensor, grad: Tensor | None = None, ignore_index: int = IGNORED,
    part: tuple[int, int | None] = (0, None),
) -> Tensor:  # fmt: skip
    """One step through the GPU doors, held against the reference in the same precision and in float64: dlogits."""
    grad = make_grad(formula, logits.shape[0]).to(logits.device) if grad is None else grad
    before = logits.clone(), target.clone(), grad.clone()
    rows, state, dlogits = step(launch, formula, logits, target, grad, ignore_index, part)
    for mine, kept in zip((logits, target, grad), before, strict=True):
        torch.testing.assert_close(mine, kept, rtol=0, atol=0, equal_nan=True)

    assert rows.dtype == state.dtype == torch.float32 and dlogits.dtype == logits.dtype
    assert dlogits.shape == logits.shape
    assert dlogits.stride() == (gradient_row_stride(logits.shape[1], logits.stride(), logits.element_size()), 1)

    wing = Unchecked()
    same = step(wing, formula, logits, target, grad, ignore_index, part)
    truth = step(wing, formula, logits.double(), target, grad.double(), ignore_index, part)
    if family(formula) == "logistic":
        assert torch.equal(state[:, 1], same[1][:, 1]), "number of positives"
    # A poisoned row has a NaN among its state; which one is the wing's own affair.
    state, same_state, true_state = (
        s.masked_fill(s.isnan().any(1, keepdim=True), float("nan")) for s in (state, same[1], truth[1])
    )
    same, truth = (same[0], same_state, same[2]), (truth[0], true_state, truth[2])
    for name, ours, theirs, exact in zip(
        ("rows", "state", "dlogits"), (rows, state, dlogits), same, truth, strict=True
    ):
        assert_as_accurate(ours, theirs, exact, f"{formula}: {name}")
    return dlogits


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
