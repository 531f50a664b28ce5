"""The losses as ``nn.Module``: the arguments of the function twin, given once.

``forward(logits, target)`` is the twin's. ``weight`` is a buffer: it moves with ``.to(device)`` and stands in the state
dict. Every argument is an attribute and may be assigned anew, ``criterion.alpha = 2.0``; it is checked then, as it is
when the module is made. An assigned ``k`` takes the place of ``ratio``, and the other way round.
"""

import operator
from dataclasses import replace

from torch import Tensor, nn

from . import functional
from .class_parallel import ClassShard, check_shard
from .functional import IGNORE_INDEX, check_kind_of_weight, check_options
from .losses import CRL, HSLR, LR, NLLR, SSLR, CrossEntropy, Loss

OPTIONS = ("k", "ratio", "weight", "ignore_index", "reduction", "check_targets", "shard")
PLAIN = {"k": operator.index, "ratio": float, "ignore_index": operator.index}
RIVALS = {"k": "ratio", "ratio": "k"}
HYPER_PARAMETERS = {name for loss in Loss.__subclasses__() for name in loss.__match_args__}


class RowLoss(nn.Module):
    """A loss and its options."""

    weight: Tensor | None

    def __init__(self, loss: Loss, *options):
        super().__init__()
        self.register_buffer("weight", None)
        self._take(loss, dict(zip(OPTIONS, options, strict=True)))

    def _take(self, loss: Loss, options: dict) -> None:
        """Checks all of them, then sets them."""
        check_options(loss, *(options[name] for name in ("k", "ratio", "ignore_index", "reduction")))
        if options["weight"] is not None:
            check_kind_of_weight(options["weight"])
        if options["check_targets"] not in (False, True):
            raise TypeError(f"check_targets must be a bool, got {options['check_targets']}")
        if options["shard"] is not None:
            check_shard(options["shard"])
        super().__setattr__("loss", loss)
        for name, value in options.items():
            # NumPy's numbers become Python's: the compiler would take them for tensors
            plain = PLAIN.get(name) if value is not None else None
            super().__setattr__(name, plain(value) if plain else value)

    def __setattr__(self, name: str, value) -> None:
        if name in OPTIONS:
            options = self.options | {name: value}
            if value is not None and name in RIVALS:
                options[RIVALS[name]] = None
            self._take(self.loss, options)
        elif name not in HYPER_PARAMETERS:
            super().__setattr__(name, value)
        elif name in self.loss.__match_args__:
            self._take(replace(self.loss, **{name: value}), self.options)
        else:
            raise AttributeError(f"{type(self).__name__} has no hyper-parameter {name}")

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


def _of_loss(name: str) -> property:
    """A hyper-parameter, to be read; assigned, it makes another of the frozen losses."""
    return property(lambda module: getattr(module.loss, name))


class CrossEntropyLoss(RowLoss):
    """Module twin of :func:`fused_losses.cross_entropy`: softmax cross-entropy, over all or the k hardest negatives."""

    def __init__(
        self,
        *,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = IGNORE_INDEX,
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
        ignore_index: int | None = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(NLLR(), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class CRLLoss(RowLoss):
    """Module twin of :func:`fused_losses.crl_loss`: competing ratio loss."""

    alpha = _of_loss("alpha")
    beta = _of_loss("beta")

    def __init__(
        self,
        *,
        alpha: float = CRL.alpha,
        beta: float = CRL.beta,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = IGNORE_INDEX,
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
        ignore_index: int | None = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(LR(), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class HSLRLoss(RowLoss):
    """Module twin of :func:`fused_losses.hs_lr_loss`: hard selection; ``k`` or ``ratio`` is required."""

    alpha = _of_loss("alpha")

    def __init__(
        self,
        *,
        k: int | None = None,
        ratio: float | None = None,
        alpha: float = HSLR.alpha,
        weight: Tensor | None = None,
        ignore_index: int | None = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(HSLR(alpha), k, ratio, weight, ignore_index, reduction, check_targets, shard)


class SSLRLoss(RowLoss):
    """Module twin of :func:`fused_losses.ss_lr_loss`: logistic regression with soft selection."""

    alpha = _of_loss("alpha")
    gamma = _of_loss("gamma")

    def __init__(
        self,
        *,
        alpha: float = SSLR.alpha,
        gamma: float = SSLR.gamma,
        k: int | None = None,
        ratio: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = IGNORE_INDEX,
        reduction: str = "mean",
        check_targets: bool = False,
        shard: ClassShard | None = None,
    ):
        super().__init__(SSLR(alpha, gamma), k, ratio, weight, ignore_index, reduction, check_targets, shard)
