"""What the tests of margins, smoothing and labels run over, and what the judge says of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor

import eager
import fused_losses as fl
import paper
from cases import DTYPES, HS_LR, LOSSES, LR, SS_LR, Loss, assert_as_accurate, compute_dtype, value_and_grad

ROWS, CLASSES, SCALE = 6, 40, 6.0
IGNORED = -100


def poly(d: Tensor) -> Tensor:
    """Of the log-odds: -log p + 1 - p, Poly-1 with epsilon 1 (Leng et al., arXiv 2204.12511)."""
    return torch.nn.functional.softplus(-d) + torch.sigmoid(-d)


@dataclass(frozen=True)
class Own(Loss):
    """A loss of the user's own, called as those with a name are."""

    def __call__(self, logits, target, **options) -> Tensor:
        return fl.softmax_loss(logits, target, poly, **options)

    def module_class(self) -> Callable[..., torch.nn.Module]:
        return lambda **options: fl.SoftmaxLoss(poly, **options)

    @property
    def paper(self):
        def poly_of_p(logits, target, k):
            p, wrong = paper.target_and_wrong(logits, target, k)
            return -p.log() + wrong

        return poly_of_p

    @property
    def eager(self):
        def poly_of_log_p(logits, target, k):
            log_p, wrong = eager.softmax_terms(logits, target, k)
            return -log_p + wrong

        return poly_of_log_p


OWN = Own("own", "SoftmaxLoss", "softmax", "log_odds", ({},), needs_k=False)
EVERY_LOSS = (*LOSSES, OWN)
SMOOTHED = tuple(loss for loss in EVERY_LOSS if loss not in (HS_LR, SS_LR))

# A few of a row's own are 0, in which case there is no angle to take.
MARGINS: dict[str, dict] = {
    "no margin": {},
    "angle": {"angle": 0.5, "scale": SCALE},
    "cosine": {"cosine": 0.35, "scale": SCALE},
    "both": {"angle": 0.3, "cosine": 0.2, "scale": SCALE},
    "per row": {
        "angle": torch.tensor([0.5, 0.25, 0.0, -0.5, 0.75, -0.25], dtype=torch.float64),
        "cosine": torch.tensor([0.25, 0.0, 0.5, 0.125, 0.0, -0.25], dtype=torch.float64),
        "scale": SCALE,
    },
}
each_margin = pytest.mark.parametrize("margin", MARGINS)


def margin_option(name: str) -> dict:
    """As a keyword argument of ours."""
    return {"margin": fl.Margin(**MARGINS[name])} if MARGINS[name] else {}


def paper_margin(name: str, rows: Tensor) -> paper.Margin | None:
    """Of these rows."""
    of_rows = {key: m[rows] if isinstance(m, Tensor) else m for key, m in MARGINS[name].items()}
    return paper.Margin(**of_rows) if of_rows else None


# Classes (rows, P) and weights that every dtype holds exactly. Row 0 is confident of its first class and row 1 of
# anything but that, row 3 confident too: see make_logits.
FIRST = [7, 12, 0, 39, 20, 3]
INDEX: dict[str, list[list[int]]] = {
    "one label": [[c] for c in FIRST],
    "two labels": [[7, 8], [12, 39], [0, 1], [39, 0], [20, 3], [3, 20]],
    "three labels": [[7, 30, 9], [12, 0, 5], [0, 39, 20], [39, 38, 37], [20, 21, 22], [3, 2, 1]],
    "duplicates": [[7, 9, 7], [12, 12, 12], [0, 5, 5], [39, 39, 1], [20, 4, 6], [3, 8, 3]],
    "padding": [[7, -1, 9, -1], [-1, 12, -1, -1], [0, 39, 20, 3], [-1, -1, -1, 39], [20, 20, -1, -1], [3, 5, -1, 9]],
    "rows without labels": [[7, 9], [-1, -1], [0, 5], [39, -1], [-1, -1], [-1, 3]],
}
FORMS = ("class indices", *INDEX)
each_form = pytest.mark.parametrize("form", FORMS)


def make_weight(form: str) -> Tensor:
    """Weights (rows, P): of two labels lam and 1 - lam, of more a sum other than 1, and here and there 0."""
    rows, places = torch.tensor(INDEX[form]).shape
    if places == 1:
        return torch.tensor([1, 1, 0.75, 0.5, 1, 0.25], dtype=torch.float64)[:, None]
    if form == "two labels":
        lam = torch.tensor([0.75, 0.5, 1.0, 0.125, 0.0, 0.3125], dtype=torch.float64)
        return torch.stack((lam, 1 - lam), 1)
    return (torch.arange(rows * places, dtype=torch.float64).reshape(rows, places) * 5 % 9) / 16


def make_target(form: str, weighted: bool = True, rows: int = ROWS) -> Tensor | fl.Labels:
    if form == "class indices":
        return torch.tensor([IGNORED if row == 2 else label for row, label in enumerate(FIRST)])[:rows]
    index = torch.tensor(INDEX[form])[:rows]
    return fl.Labels(index, make_weight(form)[:rows]) if weighted else fl.Labels(index)


def paper_labels(form: str, weighted: bool = True) -> paper.Labels:
    if form == "class indices":
        return paper.one_label(torch.tensor([IGNORED if row == 2 else label for row, label in enumerate(FIRST)]))
    return paper.several_labels(torch.tensor(INDEX[form]), make_weight(form) if weighted else None)


def make_logits(dtype: torch.dtype = torch.float64, seed: int = 0, classes: int = CLASSES) -> Tensor:
    """Cosines times SCALE, (rows, classes), none of which any dtype rounds to SCALE. The first class of rows 0 and 3 is
    at a small angle, that of row 1 at one near pi."""
    generator = torch.Generator().manual_seed(seed)
    cosine = 1.9 * torch.rand(ROWS, classes, dtype=torch.float64, generator=generator) - 0.95
    for row, value in ((0, 0.97), (1, -0.97), (3, 0.96)):
        cosine[row, FIRST[row]] = value
    return (SCALE * cosine).to(dtype)


@dataclass(frozen=True)
class Case:
    loss: Loss
    form: str = "class indices"
    margin: str = "no margin"
    label_smoothing: float = 0.0
    k: int | None = None
    dtype: torch.dtype = torch.float64
    weighted: bool = True
    hyper: dict = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        parts = [self.loss.name, self.form, "" if self.weighted else "unweighted", self.margin]
        smoothed = f"smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return "-".join(x for x in (*parts, smoothed, f"k {self.k}", str(self.dtype)[6:]) if x)

    @property
    def options(self) -> dict:
        """Of ours, hyper-parameters and reduction apart."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return {"k": self.k, **margin_option(self.margin), **smoothing}

    @property
    def target(self) -> Tensor | fl.Labels:
        return make_target(self.form, self.weighted)

    def ours(self, logits: Tensor, reduction: str = "none") -> Tensor:
        return self.loss(logits, self.target, reduction=reduction, **self.options, **self.hyper)

    def rows(self, logits: Tensor, formula: Callable) -> Tensor:
        """The judge's values of the rows, by a formula of one label: the paper's, or what a PyTorch user writes."""
        counted = self.counted.nonzero().squeeze(1)
        labels = [paper_labels(self.form, self.weighted)[row] for row in counted]
        options = {"margin": paper_margin(self.margin, counted), "label_smoothing": self.label_smoothing}
        hyper = self.loss.hypers[0] | self.hyper
        if self.loss.family == "softmax":
            one = lambda z, y: formula(z, y, None, **hyper)  # noqa: E731
            few = paper.softmax_rows(one, logits[counted], labels, self.k, **options)
        else:
            few = paper.logistic_rows(logits[counted], labels, self.k, **hyper, **options)
        return logits.new_zeros(ROWS).index_put((counted,), few)

    def truth(self, logits: Tensor) -> Tensor:
        return self.rows(logits.double(), self.loss.paper)

    def yardstick(self, logits: Tensor) -> Tensor:
        """As a careful PyTorch user would compute it: the tolerance."""
        return self.rows(eager.working(logits), self.loss.eager)

    @property
    def counted(self) -> Tensor:
        """Rows that a mean counts, bool (rows,)."""
        every = self.loss.family == "logistic" and self.form != "class indices"
        return torch.tensor([bool(of_row) or every for of_row in paper_labels(self.form, self.weighted)])


def assert_agrees(case: Case, logits: Tensor | None = None) -> None:
    """Values of the rows, and the gradient under an upstream gradient that differs from row to row."""
    logits = make_logits(case.dtype) if logits is None else logits
    upstream = torch.tensor([1.0, -0.75, 0.5, 1.5, -0.25, 2.0], dtype=torch.float64)
    value, grad = value_and_grad(case.ours, logits, upstream)
    eager_value, eager_grad = value_and_grad(case.yardstick, logits, upstream)
    true_value, true_grad = value_and_grad(case.truth, logits.double(), upstream)
    assert value.dtype == compute_dtype(logits.dtype) and value.shape == (ROWS,)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    assert_as_accurate(value, eager_value, true_value, "value")
    assert_as_accurate(grad, eager_grad, true_grad, "gradient")
    if logits.dtype == torch.float64:  # entry by entry, but for what comes out of a cancellation
        torch.testing.assert_close(value, true_value, rtol=1e-12, atol=1e-13, msg=lambda m: f"value: {m}")
        torch.testing.assert_close(grad, true_grad, rtol=1e-11, atol=1e-14, msg=lambda m: f"gradient: {m}")
    positive, _ = paper.label_matrix(logits.double(), paper_labels(case.form, case.weighted))
    outside = ~(positive | paper.negatives(logits, positive, case.k)) | ~case.counted[:, None]
    assert (grad[outside] == 0).all()
    assert (value[~case.counted] == 0).all()


def _allowed(loss: Loss, form: str, smoothing: float, k: int | None, weighted: bool) -> bool:
    if loss.needs_k and k is None:
        return False
    if not weighted and (loss.family == "softmax" or form == "class indices"):
        return False
    return not smoothing or (loss in SMOOTHED and not (loss == LR and not weighted))


KS = (None, 1, 5, 30)


def everything() -> list[Case]:
    """All of it."""
    axes = product(EVERY_LOSS, FORMS, MARGINS, (0.0, 0.1), KS, DTYPES, (True, False))
    return [
        Case(loss, form, margin, smoothing, k, dtype, weighted)
        for loss, form, margin, smoothing, k, dtype, weighted in axes
        if _allowed(loss, form, smoothing, k, weighted)
    ]


def matrix() -> list[Case]:
    """Every loss with every form of labels and every margin, and with each of these every pair of the other axes that
    there is, in turn; float64 twice as often as the other dtypes."""
    dtypes = (torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float64, torch.float16)
    cases, turn = [], 0
    for loss, form, margin in product(EVERY_LOSS, FORMS, MARGINS):
        others = [
            (smoothing, k, weighted)
            for smoothing, k, weighted in product((0.1, 0.0), KS, (False, True))
            if _allowed(loss, form, smoothing, k, weighted)
        ]
        for _ in range(2):
            smoothing, k, weighted = others[turn * 5 % len(others)]
            cases.append(Case(loss, form, margin, smoothing, k, dtypes[(turn + turn // 6) % 6], weighted))
            turn += 1
    return cases
