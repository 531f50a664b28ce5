"""The losses as ``nn.Module``: the arguments of the function twin, given once.

``forward(logits, target)`` is the twin's. ``weight`` is a buffer: it moves with ``.to(device)`` and stands in the state
dict. Every argument is an attribute and may be assigned anew, ``criterion.alpha = 2.0``; it is checked then, as it is
when the module is made. An assigned ``k`` takes the place of ``ratio``, and the other way round.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import functional
from .arguments import IGNORE_INDEX, LossOptions, Options, Reduce, check_options
from .labels import Labels
from .losses import CRL, HSLR, LR, NLLR, SSLR, CrossEntropy, Loss, OwnSoftmax
from .margin import Margin
from .shard import ClassShard

if TYPE_CHECKING:
    from typing_extensions import Unpack

HYPER_PARAMETERS = {field.name for loss in Loss.__subclasses__() for field in fields(loss)}
PLAIN: dict[str, Callable] = {
    "k": operator.index, "ratio": float, "ignore_index": operator.index, "label_smoothing": float
}  # fmt: skip
RIVALS = {"k": "ratio", "ratio": "k"}


class RowLoss(nn.Module):
    """A loss and its options. Base of the loss modules.

    Args:
        options: ``k``, ``ratio``, ``weight``, ``ignore_index``, ``reduction``, ``label_smoothing``, ``margin``,
            ``check_targets`` and ``shard``, with meaning, defaults and errors as in :func:`fused_losses.cross_entropy`.
    """

    loss: Loss
    k: int | None
    ratio: float | None
    weight: Tensor | None
    ignore_index: int | None
    reduction: Reduce
    label_smoothing: float
    margin: Margin | None
    check_targets: bool
    shard: ClassShard | None

    def __new__(cls, *args: Any, **kwargs: Any) -> RowLoss:
        first = next(iter(inspect.signature(cls).parameters.values()))
        if args and first.kind is first.KEYWORD_ONLY:
            raise TypeError(f"{cls.__name__} takes its arguments by name, {cls.__name__}(k=100), got {args[0]!r}")
        return super().__new__(cls)

    def __init_subclass__(cls, smooths: bool = True, **kwargs: Any) -> None:
        """Spells the options out, for ``help()`` and ``inspect``."""
        super().__init_subclass__(**kwargs)
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Options.__annotations__[name]
            )
            for name, default in Options._field_defaults.items()
            if smooths or name != "label_smoothing"
        ]
        cls.__signature__ = inspect.Signature([*own[1:], *shared])  # type: ignore[attr-defined]

    def __init__(self, loss: Loss, **options: Unpack[LossOptions]):
        super().__init__()
        unknown = [name for name in options if name not in Options._fields]
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}")
        self.register_buffer("weight", None)
        self._take(loss, Options(**options))

    def _take(self, loss: Loss, options: Options) -> None:
        """Checks all of them, then sets them."""
        check_options(loss, options)
        values: dict[str, Any] = {"loss": loss, **options._asdict()}
        self._buffers["weight"] = values.pop("weight")  # by name, the compiler could not trace it
        for name, value in values.items():
            # NumPy's numbers become Python's: the compiler would take them for tensors
            plain = PLAIN.get(name) if value is not None else None
            super().__setattr__(name, plain(value) if plain else value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Options._fields:
            changed = {name: value}
            if value is not None and name in RIVALS:
                changed[RIVALS[name]] = None
            self._take(self.loss, self.options._replace(**changed))
        elif name not in HYPER_PARAMETERS:
            super().__setattr__(name, value)
        elif name in self.loss.__match_args__:
            self._take(replace(self.loss, **{name: value}), self.options)
        else:
            raise AttributeError(f"{type(self).__name__} has no hyper-parameter {name}")

    @property
    def options(self) -> Options:
        """The arguments that the function twins of all losses share."""
        return Options(*(getattr(self, name) for name in Options._fields))

    def forward(self, logits: Tensor, target: Tensor | Labels) -> Tensor:
        return functional.apply(self.loss, logits, target, self.options)

    def extra_repr(self) -> str:
        settings = vars(self.loss) | self.options._asdict()
        if self.weight is not None:
            settings["weight"] = f"<{self.weight.shape[0]} classes>"
        usual = {"ignore_index": IGNORE_INDEX, "label_smoothing": 0.0, "margin": None, "check_targets": False}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if value != usual.get(name))


class _HyperParameter:
    """A field of the module's frozen loss, to be read; assigned, it makes another loss (``RowLoss.__setattr__``)."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: RowLoss | None, owner: type) -> Any:
        return self if module is None else getattr(module.loss, self.name)


class CrossEntropyLoss(RowLoss):
    """Module twin of :func:`fused_losses.cross_entropy`: softmax cross-entropy, over all or the k hardest negatives."""

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(CrossEntropy(), **options)


class NLLRLoss(RowLoss):
    """Module twin of :func:`fused_losses.nllr_loss`: negative log likelihood ratio."""

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(NLLR(), **options)


class CRLLoss(RowLoss):
    """Module twin of :func:`fused_losses.crl_loss`: competing ratio loss."""

    alpha = _HyperParameter()
    beta = _HyperParameter()

    def __init__(self, *, alpha: float = CRL.alpha, beta: float = CRL.beta, **options: Unpack[LossOptions]):
        super().__init__(CRL(alpha, beta), **options)


class LRLoss(RowLoss):
    """Module twin of :func:`fused_losses.lr_loss`: vanilla logistic regression, one-vs-rest."""

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(LR(), **options)


class HSLRLoss(RowLoss, smooths=False):
    """Module twin of :func:`fused_losses.hs_lr_loss`: hard selection; ``k`` or ``ratio`` is required."""

    alpha = _HyperParameter()

    def __init__(self, *, alpha: float = HSLR.alpha, **options: Unpack[LossOptions]):
        super().__init__(HSLR(alpha), **options)


class SSLRLoss(RowLoss, smooths=False):
    """Module twin of :func:`fused_losses.ss_lr_loss`: logistic regression with soft selection."""

    alpha = _HyperParameter()
    gamma = _HyperParameter()

    def __init__(self, *, alpha: float = SSLR.alpha, gamma: float = SSLR.gamma, **options: Unpack[LossOptions]):
        super().__init__(SSLR(alpha, gamma), **options)


class SoftmaxLoss(RowLoss):
    """Module twin of :func:`fused_losses.softmax_loss`: value(log-odds), a loss of your own."""

    value = _HyperParameter()

    def __init__(self, value: Callable[[Tensor], Tensor], **options: Unpack[LossOptions]):
        super().__init__(OwnSoftmax(value), **options)
