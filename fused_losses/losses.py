"""What each loss is: family, hyper-parameters and their defaults, paper, formula.

Notation: z logits of one row, y the target, S the chosen negatives (all of them, or the k most confusing), sigma the
sigmoid, softplus(x) = log(1 + e^x). The softmax family sees a row through its margin

    d = z_y - log sum over S of exp(z_j),        the log-odds of the target among {y} + S,

the logistic family through two sums, pos over the positives P and neg over S. How a formula is evaluated stands once
per backend: ``reference.py``, ``gpu/formulas.py``, ``csrc/formulas.h``.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar


@dataclass(frozen=True)
class Loss:
    """Base of the six losses; their fields are the hyper-parameters, each a finite number >= 0."""

    name: ClassVar[str]
    family: ClassVar[str]  # "softmax" or "logistic": which doors serve it
    formula: ClassVar[str]  # the name that the doors know; HS-LR is LR's formula over the k hardest
    alpha = None  # logistic family: the weight of the negatives' mean, None for plain sums

    def __post_init__(self):
        for name in self.__match_args__:  # the names of the fields; older compilers cannot trace vars(self)
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


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy: softplus(-d) = -log p_y."""

    name = "cross_entropy"
    family = "softmax"
    formula = "cross_entropy"


@dataclass(frozen=True)
class NLLR(Loss):
    """Negative log likelihood ratio: -d = -log(p_y / (1 - p_y)). Zhu, Yao, Jiang, Yu, arXiv 1804.10690."""

    name = "nllr_loss"
    family = "softmax"
    formula = "nllr"


@dataclass(frozen=True)
class CRL(Loss):
    """Competing ratio loss: softplus(-d) + beta * log(alpha + sigma(-d)) = -log p_y + beta * log(alpha + 1 - p_y).

    Zhang et al., arXiv 1907.13349 and 1912.11642. The defaults are the authors'. alpha < 1 allows negative values.
    """

    name = "crl_loss"
    family = "softmax"
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
    family = "logistic"
    formula = "lr"


@dataclass(frozen=True)
class HSLR(Loss):
    """LR with hard selection: mean over P of softplus(-z_p) + alpha * mean over the k hardest of softplus(z_j).

    Dong, Zhu, Gong, AAAI 2019, arXiv 1811.08400, Eq. 5. The authors' code has no default for alpha; this one is ours.
    """

    name = "hs_lr_loss"
    family = "logistic"
    formula = "lr"
    alpha: float = 1.0


@dataclass(frozen=True)
class SSLR(Loss):
    """LR with soft selection: mean over P of softplus(-z_p) + alpha * mean over S of sigma(z_j)^gamma * softplus(z_j).

    Dong, Zhu, Gong, AAAI 2019, arXiv 1811.08400, Eq. 6. The authors' code has no defaults; these are ours.
    """

    name = "ss_lr_loss"
    family = "logistic"
    formula = "ss_lr"
    alpha: float = 1.0
    gamma: float = 2.0

    @property
    def params(self) -> list[float]:
        return [self.gamma]
