"""What is measured, on either device: shapes, the losses, and who computes them.

A provider is a function of (logits, target) that gives the mean loss over the rows; targets are class indices. ``ours``
is the package; ``authors`` is the arithmetic of the papers' own code (its eps and clamps included) without its copies
between devices; ``eager`` is what a careful PyTorch user would write; ``compiled`` is the same under torch.compile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl
from fused_losses.arguments import Options
from fused_losses.autograd import LossFromLogits
from fused_losses.functional import rows_from_logits
from fused_losses.losses import HSLR

Provider = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    rows: int
    classes: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.classes}"

    def nbytes(self, dtype: torch.dtype) -> int:
        """U: one pass over the logits."""
        return self.rows * self.classes * dtype.itemsize


GPU_SHAPES = (
    Shape(256, 1000),
    Shape(4096, 1000),
    Shape(256, 21841),
    Shape(512, 100003),
    Shape(256, 1000000),
    Shape(8192, 32768),
)
HARDEST_SHAPES = (
    Shape(256, 751),
    Shape(4096, 1000),
    Shape(256, 21841),
    Shape(512, 100003),
    Shape(256, 1000000),
)
GPU_LAYERS = ((Shape(4096, 21841), 512), (Shape(2048, 100003), 512))  # and features
INPUTS = ("normal", "trained head", "three values", "ascending")
SHARES = (0.001, 0.01, 0.1)  # k / classes
TINY_SHAPES = (Shape(2, 40), Shape(3, 131))  # to test the commands themselves
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A shape with the k of its losses over the k hardest."""

    shape: Shape
    dtype: str
    k: int

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}, k = {self.k}"


CPU_CASES = (
    Case(Shape(256, 21841), "fp32", 218),
    Case(Shape(256, 21841), "bf16", 218),
    Case(Shape(128, 100000), "fp32", 100),
    Case(Shape(256, 1000), "fp32", 100),
    Case(Shape(256, 21841), "fp32", 2184),
)

ALPHA, BETA = 1.5, 1.0  # of CRL
GAMMA = 2.0  # of SS-LR
EPS = 1e-7  # of the authors

LOSSES = ("cross_entropy", "crl_loss", "nllr_loss", "lr_loss", "ss_lr_loss")


def make(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, inputs: str = "normal") -> tuple[Tensor, Tensor]:
    """Logits (rows, classes) that need a gradient, and class indices (rows,). Inputs other than normal are for
    selection."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn((shape.rows, shape.classes), generator=generator, device=device, dtype=dtype)
    target = torch.randint(shape.classes, (shape.rows,), generator=generator, device=device)
    if inputs == "trained head":  # 64 x cosine of 512 features: the target at 0.6, the others around 0
        logits.mul_(64 / 512**0.5).scatter_(1, target[:, None], 64 * 0.6)
    elif inputs == "three values":
        logits.clamp_(-1, 1).round_()
    elif inputs == "ascending":
        for rows in logits.split(64):
            rows.copy_(rows.sort(dim=1).values)
    return logits.requires_grad_(), target


# --- the authors' arithmetic ------------------------------------------------------------------------------------------


def authors_crl(logits: Tensor, target: Tensor, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    p = F.softmax(logits, dim=1).clamp(EPS, 1 - EPS)
    p_y = p.gather(1, target[:, None])
    return torch.log((1 + alpha - p_y) ** beta / p_y + EPS).mean()


def _authors_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot target, sigmoid, and the mean over the positives."""
    one_hot = torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)
    p = torch.sigmoid(logits)
    return one_hot, p, -(one_hot * torch.log(p + EPS)).sum() / one_hot.sum()


def authors_ss_lr(logits: Tensor, target: Tensor) -> Tensor:
    one_hot, p, positive = _authors_terms(logits, target)
    negative = -((1 - one_hot) * p**GAMMA * torch.log(1 - p + EPS)).sum() / (1 - one_hot).sum()
    return positive + negative


def authors_hs_lr(k: int) -> Provider:
    def provider(logits: Tensor, target: Tensor) -> Tensor:
        one_hot, p, positive = _authors_terms(logits, target)
        terms = -(1 - one_hot) * torch.log(1 - p + EPS)
        return positive + torch.topk(terms, k, dim=1).values.mean()

    return provider


# --- careful PyTorch --------------------------------------------------------------------------------------------------


def eager_crl(logits: Tensor, target: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits.float(), target, reduction="none")
    return (cross_entropy + BETA * torch.log(ALPHA - torch.expm1(-cross_entropy))).mean()


def eager_nllr(logits: Tensor, target: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits.float(), target, reduction="none")
    return (cross_entropy + torch.log(-torch.expm1(-cross_entropy))).mean()


def eager_lr(logits: Tensor, target: Tensor) -> Tensor:
    z = logits.float()
    return (F.softplus(z).sum(1) - z.gather(1, target[:, None]).squeeze(1)).mean()


def eager_ss_lr(logits: Tensor, target: Tensor) -> Tensor:
    z = logits.float()
    z_y = z.gather(1, target[:, None]).squeeze(1)
    negatives = z.scatter(1, target[:, None], -torch.inf)
    terms = torch.sigmoid(negatives) ** GAMMA * F.softplus(negatives)
    return (F.softplus(-z_y) + terms.sum(1) / (z.shape[1] - 1)).mean()


def eager_hs_lr(k: int) -> Provider:
    def provider(logits: Tensor, target: Tensor) -> Tensor:
        negatives = logits.scatter(1, target[:, None], -torch.inf)
        hardest = torch.topk(negatives, k, dim=1, sorted=False).values.float()
        z_y = logits.gather(1, target[:, None]).squeeze(1).float()
        return (F.softplus(-z_y) + F.softplus(hardest).mean(1)).mean()

    return provider


def topk_alone(k: int) -> Provider:
    """No loss: what selection costs by itself."""

    def provider(logits: Tensor, target: Tensor) -> Tensor:
        return torch.topk(logits, k, dim=1, sorted=False).values.sum()

    return provider


def ours_in_form(k: int, compact: bool) -> Provider:
    """Ours with the form of the picks forced, to find out where scattered stores cost more than reading again."""

    def provider(logits: Tensor, target: Tensor) -> Tensor:
        rows, taken = rows_from_logits(HSLR(), logits, target, Options(k=k))
        spec = taken.spec._replace(compact=compact)
        loss, _ = LossFromLogits.apply(rows, taken.target, taken.weight, taken.reduction, spec)
        return loss

    return provider


# --- providers --------------------------------------------------------------------------------------------------------

_EAGER = {
    "cross_entropy": F.cross_entropy,
    "crl_loss": eager_crl,
    "nllr_loss": eager_nllr,
    "lr_loss": eager_lr,
    "ss_lr_loss": eager_ss_lr,
}
_AUTHORS = {"crl_loss": authors_crl, "ss_lr_loss": authors_ss_lr}


def eager_of(loss: str) -> Provider:
    """Over all negatives."""
    return _EAGER[loss]


def providers(loss: str, k: int | None = None) -> dict[str, Provider]:
    """Who computes this loss, over all negatives or (HS-LR) over the k hardest."""
    if loss == "hs_lr_loss":
        eager, authors = eager_hs_lr(k), {"authors": authors_hs_lr(k)}
        ours = {"ours": lambda logits, target: fl.hs_lr_loss(logits, target, k=k)}
    else:
        eager, authors = _EAGER[loss], {"authors": _AUTHORS[loss]} if loss in _AUTHORS else {}
        ours = {"ours": getattr(fl, loss)}
    return ours | {"eager": eager} | authors | {"compiled": torch.compile(eager, dynamic=False)}


def hardest_providers(k: int, inputs: str) -> dict[str, Provider]:
    """HS-LR over the k hardest: everyone on normal logits, on others those whose time may depend on them."""
    everyone = providers("hs_lr_loss", k) | {"topk": topk_alone(k)}
    if inputs != "normal":
        return {name: everyone[name] for name in ("ours", "eager", "topk")}
    forms = {"ours, compact": ours_in_form(k, True), "ours, threshold": ours_in_form(k, False)}
    return everyone | forms


def peers() -> dict[str, Provider]:
    """Cross-entropy by other projects, as far as they can be imported here."""
    found: dict[str, Provider] = {}
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["liger"] = liger_cross_entropy
    except ImportError:
        pass
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        found["quack"] = lambda logits, target: quack_cross_entropy(logits, target, reduction="mean")
    except ImportError:
        pass
    return found


NAMES = {
    "cross_entropy": "CE",
    "nllr_loss": "NLLR",
    "crl_loss": "CRL",
    "lr_loss": "LR",
    "hs_lr_loss": "HS-LR",
    "ss_lr_loss": "SS-LR",
}


def contenders(k: int) -> dict[str, Provider]:
    """Everyone on every loss, by "loss, provider": "HS-LR, authors"; HS-LR and "CRL, k hardest" over the k hardest."""
    everyone: dict[str, Provider] = {}
    for loss, name in NAMES.items():
        everyone |= {f"{name}, {provider}": function for provider, function in providers(loss, k).items()}
    everyone["CRL over the k hardest, ours"] = lambda logits, target: fl.crl_loss(logits, target, k=k)
    return everyone


# --- options ----------------------------------------------------------------------------------------------------------

SMOOTHING, LAM = 0.1, 0.3  # timm's and torchreid's default; a mixed pair


def eager_mixup(logits: Tensor, target: Tensor) -> Tensor:
    """The usual two calls."""
    return LAM * F.cross_entropy(logits, target) + (1 - LAM) * F.cross_entropy(logits, target.flip(0))


def eager_soft_targets(logits: Tensor, target: Tensor) -> Tensor:
    """One call, for a matrix of all classes' shares, which is made here as timm's Mixup makes it."""
    index, shares = torch.stack((target, target.flip(0)), 1), logits.new_tensor([[LAM, 1 - LAM]])
    soft = logits.new_zeros(logits.shape).scatter_add_(1, index, shares.expand(index.shape))
    return F.cross_entropy(logits, soft)


def with_options() -> dict[str, Provider]:
    """Cross-entropy with what users have switched on, by "loss, provider"."""

    def smoothed(loss: Callable[..., Tensor]) -> Provider:
        return lambda logits, target: loss(logits, target, label_smoothing=SMOOTHING)

    def with_margin(margin: fl.Margin) -> Provider:
        return lambda logits, target: fl.cross_entropy(logits, target, margin=margin)

    def mixup(logits: Tensor, target: Tensor) -> Tensor:
        return fl.cross_entropy(logits, fl.Labels.mixup(target, target.flip(0), LAM))

    return {
        "CE smoothed, ours": smoothed(fl.cross_entropy),
        "CE smoothed, eager": smoothed(F.cross_entropy),
        "CE with an angle, ours": with_margin(fl.Margin(angle=0.5, scale=8.0)),
        "CE with a cosine margin, ours": with_margin(fl.Margin(cosine=0.35)),
        "CE of a mixed pair, ours": mixup,
        "CE of a mixed pair, eager": eager_mixup,
        "CE of soft targets, eager": eager_soft_targets,
    }
