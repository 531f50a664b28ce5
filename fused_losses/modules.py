"""The losses as ``nn.Module``: the arguments of the function twin, given once.

``forward(logits, target)`` is the twin's. ``weight`` is a buffer: it moves with ``.to(device)`` and stands in the state
dict. Options are checked when the module is made.
"""

from torch import Tensor, nn

from . import functional
from .class_parallel import ClassShard
from .functional import IGNORE_INDEX
from .losses import CRL, HSLR, LR, NLLR, SSLR, CrossEntropy, Loss


class RowLoss(nn.Module):
    """A loss and its options."""

    weight: Tensor | None

    def __init__(self, loss: Loss, k, ratio, weight, ignore_index, reduction, check_targets, shard):
        super().__init__()
        functional.check_options(loss, k, ratio, reduction)
        self.loss = loss
        self.k = k
        self.ratio = ratio
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.check_targets = check_targets
        self.shard = shard
        self.register_buffer("weight", weight)

    @property
    def options(self) -> dict:
        """The arguments that the function twins of all losses share."""
        return {
            "k": self.k,
            "ratio": self.ratio,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "check_targets": self.check_targets,
            "shard": self.shard,
        }

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return functional.apply(self.loss, logits, target, **self.options)

    def extra_repr(self) -> str:
        settings = vars(self.loss) | self.options
        if self.weight is not None:
            settings["weight"] = f"<{self.weight.shape[0]} classes>"
        usual = {"ignore_index": IGNORE_INDEX, "check_targets": False}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if value != usual.get(name))


class CrossEntropyLoss(RowLoss):
    """Module twin of :func:`fused_losses.cross_entropy`: softmax cross-entropy, over all or the k hardest negatives."""

    def __init__(
        self,
        *,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(CrossEntropy(), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class NLLRLoss(RowLoss):
    """Module twin of :func:`fused_losses.nllr_loss`: negative log likelihood ratio."""

    def __init__(
        self,
        *,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(NLLR(), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class CRLLoss(RowLoss):
    """Module twin of :func:`fused_losses.crl_loss`: competing ratio loss."""

    def __init__(
        self,
        *,
        alpha: float = CRL.alpha,
        beta: float = CRL.beta,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(CRL(alpha, beta), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class LRLoss(RowLoss):
    """Module twin of :func:`fused_losses.lr_loss`: vanilla logistic regression, one-vs-rest."""

    def __init__(
        self,
        *,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(LR(), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class HSLRLoss(RowLoss):
    """Module twin of :func:`fused_losses.hs_lr_loss`: hard selection; ``k`` or ``ratio`` is required."""

    def __init__(
        self,
        *,
        k: int | None = None,
        ratio: float | None = None,
        alpha: float = HSLR.alpha,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(HSLR(alpha), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class SSLRLoss(RowLoss):
    """Module twin of :func:`fused_losses.ss_lr_loss`: logistic regression with soft selection."""

    def __init__(
        self,
        *,
        alpha: float = SSLR.alpha,
        gamma: float = SSLR.gamma,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(SSLR(alpha, gamma), k, ratio, weight, ignore_index, reduction, check_targets, shard)
