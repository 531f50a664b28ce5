"""What each loss is: family, hyper-parameters and their defaults, paper, formula.

Notation: z logits of one row, y the target, S the chosen negatives (all of them, or the k most confusing), sigma the
sigmoid, softplus(x) = log(1 + e^x). The softmax family sees a row through

    d = z_y - log sum over S of exp(z_j),        the log-odds of the target among {y} + S,

the logistic family through two sums, pos over the positives P and neg over S. How a formula is evaluated stands once
per backend: ``formulas.py``, ``gpu/formulas.py``, ``csrc/formulas.h``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Base of all losses. Fields are hyper-parameters, each a finite number >= 0."""

    name: ClassVar[str]
    formula: ClassVar[str]  # the name in formulas.py; HS-LR is LR's formula over the k hardest
    family: ClassVar[str] = "softmax"  # or "logistic": what the formula is a function of
    smooths: ClassVar[bool] = True  # whether it takes label smoothing

    def __post_init__(self):
        names: tuple[str, ...] = self.__match_args__  # of the fields; older compilers cannot trace vars(self)
        for name in names:
            value = getattr(self, name)
            if type(value) is not float:  # the usual case saves itself the price of Real
                if not isinstance(value, Real) or isinstance(value, bool):
                    raise TypeError(f"{self.name}: {name} must be a number, got {type(value).__name__}")
                object.__setattr__(self, name, float(value))
            if not 0 <= value < math.inf:  # not math.isfinite: the compiler knows it of no symbolic number
                raise ValueError(f"{self.name}: {name} must be finite and >= 0, got {value}")

    @property
    def params(self) -> list[float]:
        """The hyper-parameters that the formula reads, in its order."""
        return []

    @property
    def weight_of_mean(self) -> float | None:
        """Logistic losses that take means over the negatives: what that mean counts. None: plain sums."""
        return None


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy: softplus(-d) = -log p_y."""

    name = "cross_entropy"
    formula = "cross_entropy"


@dataclass(frozen=True)
class NLLR(Loss):
    """Negative log likelihood ratio: -d = -log(p_y / (1 - p_y)). Zhu, Yao, Jiang, Yu, arXiv 1804.10690."""

    name = "nllr_loss"
    formula = "nllr"


@dataclass(frozen=True)
class CRL(Loss):
    """Competing ratio loss: softplus(-d) + beta * log(alpha + sigma(-d)) = -log p_y + beta * log(alpha + 1 - p_y).

    Zhang et al., arXiv 1907.13349 and 1912.11642. The defaults are the authors'. alpha < 1 allows negative values.
    """

    name = "crl_loss"
    formula = "crl"
    alpha: float = 1.5
    beta: float = 1.0

    @property
    def params(self) -> list[float]:
        return [self.alpha, self.beta]


@dataclass(frozen=True)
class LR(Loss):
    """Logistic regression, one-vs-rest: sum over P of softplus(-z_p) + sum over S of softplus(z_j)."""

    name = "lr_loss"
    formula = "lr"
    family = "logistic"


@dataclass(frozen=True)
class HSLR(Loss):
    """LR with hard selection: mean over P of softplus(-z_p) + alpha * mean over the k hardest of softplus(z_j).

    Dong, Zhu, Gong, AAAI 2019, arXiv 1811.08400, Eq. 5. The authors' code has no default for alpha; this one is ours.
    """

    name = "hs_lr_loss"
    formula = "lr"
    family = "logistic"
    smooths = False
    alpha: float = 1.0

    @property
    def weight_of_mean(self) -> float:
        return self.alpha


@dataclass(frozen=True)
class SSLR(Loss):
    """LR with soft selection: mean over P of softplus(-z_p) + alpha * mean over S of sigma(z_j)^gamma * softplus(z_j).

    Dong, Zhu, Gong, AAAI 2019, arXiv 1811.08400, Eq. 6. The authors' code has no defaults; these are ours.
    """

    name = "ss_lr_loss"
    formula = "ss_lr"
    family = "logistic"
    smooths = False
    alpha: float = 1.0
    gamma: float = 2.0

    @property
    def params(self) -> list[float]:
        return [self.gamma]

    @property
    def weight_of_mean(self) -> float:
        return self.alpha


@dataclass(frozen=True)
class LogOdds(Loss):
    """d itself, the log-odds of the target among {y} + S: what every softmax loss is a function of."""

    name = "log_odds"
    formula = "log_odds"


@dataclass(frozen=True)
class OwnSoftmax(Loss):
    """A function of the user's own: value(d), with autograd's slope."""

    name = "softmax_loss"
    formula = "log_odds"
    value: Callable[[Tensor], Tensor]

    def __post_init__(self):
        if not callable(self.value):
            raise TypeError(f"value must be a function of the log-odds (N,), got {type(self.value).__name__}")


FAMILIES = {loss.formula: loss.family for loss in Loss.__subclasses__()}


class LossSpec(NamedTuple):
    """What is done with a row: one value through all floors, and the last arguments of every op, in this order.

    The logits at hand are the classes [first_class, first_class + their number) of all_classes. Targets count the
    classes of all shards. ``ignore_index`` is looked at first.
    """

    loss: str  # a name of formulas.FORMULAS
    params: Sequence[float]  # its hyper-parameters
    alpha: float | None  # logistic family: weight of the mean over the negatives; None: plain sums
    k: int  # 0: all negatives
    ignore_index: int | None
    first_class: int
    all_classes: int
    compact: bool  # all k picks are kept, not only the last
    labels: bool = False  # the target is (rows, P): classes, ascending and distinct, -1 behind the last
    label_smoothing: float = 0.0  # needs labels
    margin: Sequence[float] = ()  # the numbers of margin.MarginTerms; none without a margin

    @property
    def family(self) -> str:
        return FAMILIES[self.loss]

    def multi_hot(self, target: Tensor) -> bool:
        """Whether the target is (rows, classes)."""
        return target.dim() == 2 and not self.labels

    # No property is read where a graph passes: torch 2.10 traces none of a tuple.

    def of_statistics(self) -> "LossSpec":
        """What a statistics door needs of it: no loss of the softmax family, no weight of a mean, no margin."""
        softmax = FAMILIES[self.loss] == "softmax"
        plain = self._replace(loss="log_odds", params=[]) if softmax else self._replace(alpha=None)
        return plain._replace(margin=())

    def of_finish(self) -> "LossSpec":
        """What the finish behind it needs: no phi of the logistic family."""
        return self if FAMILIES[self.loss] == "softmax" else self._replace(loss="lr", params=[])

    @classmethod
    def of_op(cls, *given) -> "LossSpec":
        """From the last arguments of an op, whose lists cannot be hashed."""
        spec = cls(*given)
        return spec._replace(params=tuple(spec.params), margin=tuple(spec.margin))

    def given(self) -> tuple:
        """As an op is called: the dispatcher needs a tenth of a microsecond for every argument, defaults apart."""
        return self if self.labels or self.margin else self[:8]

    @property
    def slots(self) -> int:
        """Picks that are kept of a row."""
        return self.k if self.compact or self.k == 0 else 1

    @property
    def weight_of_negatives(self) -> float:
        """What neg counts in a row with one target. A mean over nothing is 0."""
        if self.alpha is None:
            return 1.0
        return self.alpha / max(1, min(self.k or self.all_classes, self.all_classes - 1))
