"""Margins on the logits of the labels: ArcFace, CosFace, AM-softmax, their combination, per-sample margins.

A margin makes psi(z_p) of a label's logit z_p before the loss sees it. Selection, the walks over the logits and the
statistics that a user gets see the plain logits: a margin of numbers is the first step of the finish, one of tensors
is N x P numbers in front of it.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import LossSpec

LEAST_SINE = 2.0**-11  # what psi' divides by at the least


@dataclass(frozen=True, eq=False)
class Margin:
    """A margin on the target's logit: psi(z) = scale * (cos(theta + angle) - cosine), theta = acos(z / scale).

    ``angle`` alone is ArcFace (Deng et al., CVPR 2019, arXiv 1801.07698, Eq. 3), ``cosine`` alone CosFace and
    AM-softmax (Wang et al., arXiv 1801.09414 and 1801.05599), both are the combined margin of ArcFace's Eq. 4. Tensors
    give every row its own: ElasticFace, AdaFace, whose negative angles stop at theta + angle = 0.

    ``|z / scale|`` is clamped to 1. The slope psi' divides by sin(theta) or 2^-11, whichever is larger: it is at most
    ``1 + 2048 * |sin(angle)|``.

    Args:
        angle: radians, from -pi to pi; a number, or a floating tensor (N,) without gradient. Where theta + angle
            exceeds pi it is cos(theta) - angle * sin(angle) instead of cos(theta + angle): for angles up to 2.33 that
            goes on falling. Default: 0.
        cosine: a finite number, or a floating tensor (N,) without gradient. Default: 0.
        scale: what the cosines were multiplied by, finite, > 0. From logits an angle needs it (1 for plain cosines); a
            linear layer with ``normalize=True`` gives its own. Default: None, which is 1 without an angle.

    Raises:
        TypeError: angle, cosine or scale of another kind.
        ValueError: a number out of its range, a tensor that is not (N,) or requires a gradient.

    Example:
        >>> cosface = fl.CrossEntropyLoss(margin=fl.Margin(cosine=0.35, scale=64.0))
        >>> cosines = F.normalize(torch.randn(2, 8)) @ F.normalize(torch.randn(1000, 8)).T
        >>> cosface(64.0 * cosines, torch.tensor([1, 999])).shape
        torch.Size([])
    """

    angle: float | Tensor = 0.0
    cosine: float | Tensor = 0.0
    scale: float | None = None

    def __post_init__(self):
        for name, most in (("angle", math.pi), ("cosine", math.inf)):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() > 0:
                if value.dim() != 1 or not value.dtype.is_floating_point:
                    raise ValueError(
                        f"Margin: {name} must be a number or a floating tensor (N,), got {value.dtype}, "
                        f"{tuple(value.shape)}"
                    )
                if value.requires_grad:
                    raise ValueError(f"the losses are not differentiable by a margin: pass {name}.detach()")
                continue
            object.__setattr__(self, name, _number(name, value))
            if not abs(getattr(self, name)) <= most or not math.isfinite(getattr(self, name)):
                allowed = "from -pi to pi (radians)" if name == "angle" else "finite"
                raise ValueError(f"Margin: {name} must be {allowed}, got {value}")
        if self.scale is not None:
            object.__setattr__(self, "scale", _number("scale", self.scale))
            if not 0 < self.scale < math.inf:
                raise ValueError(f"Margin: scale must be finite and > 0, got {self.scale}")

    @property
    def per_row(self) -> dict[str, Tensor]:
        """What of it is a tensor (N,)."""
        found = {"angle": self.angle, "cosine": self.cosine}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def turns(self) -> bool:
        """Whether there is an angle, or may be."""
        return isinstance(self.angle, Tensor) or self.angle != 0


def _number(name: str, value) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"Margin: {name} must be a number or a tensor (N,), got a tensor without dimensions")
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"Margin: {name} must be a number, got {type(value).__name__}")
    return float(value)


class MarginTerms(NamedTuple):
    """What psi is made of: numbers, or tensors that broadcast with (rows, P)."""

    cos: float | Tensor  # of the angle
    sin: float | Tensor
    cosine: float | Tensor
    beyond: float | Tensor  # angle * sin(angle)
    scale: float | Tensor
    offset: float | Tensor  # a bias that all logits have, and no cosine

    @classmethod
    def of(cls, margin: Margin, scale: float | Tensor, offset: float | Tensor, dtype: torch.dtype) -> "MarginTerms":
        """dtype: the compute dtype."""
        angle, cosine = (
            value.to(dtype)[:, None] if isinstance(value, Tensor) else value for value in (margin.angle, margin.cosine)
        )
        if isinstance(angle, Tensor):
            sin = angle.sin().abs() * angle.sign()  # of pi rounded up it is below 0
            return cls(angle.cos(), sin, cosine, angle * sin, scale, offset)
        return cls(math.cos(angle), math.sin(angle), cosine, angle * math.sin(angle), scale, offset)

    def numbers(self) -> bool:  # no property: torch 2.10 traces none of a tuple
        return not any(isinstance(term, Tensor) for term in self)

    def psi(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """psi(z), psi'(z), and the gradient of psi by the scale at fixed z: (rows, P) each. -inf stays."""
        plain = (z - self.offset) / self.scale
        if isinstance(self.sin, float) and self.sin == 0 and self.cos == 1:
            turned, slope, by_scale = plain, torch.ones_like(z), torch.zeros_like(z)
        else:
            turned, slope, by_scale = self._turned(plain)
        psi = self.scale * (turned - self.cosine) + self.offset
        masked = z == -math.inf
        return torch.where(masked, z, psi), torch.where(masked, 1, slope), by_scale - self.cosine

    def _turned(self, plain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(u) = cos(theta + angle) of u = cos(theta), f', and f - u f'."""
        u = plain.clamp(-1, 1)
        sine = ((1 - u) * (1 + u)).sqrt()
        divisor = sine.clamp(min=LEAST_SINE)
        value, slope, rest = u * self.cos - sine * self.sin, self.cos + u / divisor * self.sin, -self.sin / divisor
        beyond = (u < -self.cos) & (self.sin > 0)
        value, slope = torch.where(beyond, u - self.beyond, value), torch.where(beyond, 1, slope)
        rest = torch.where(beyond, -self.beyond, rest)
        capped = (u > self.cos) & (self.sin < 0)
        value, slope, rest = (torch.where(capped, x, y) for x, y in ((1, value), (0, slope), (1, rest)))
        if isinstance(self.sin, Tensor):
            still = (self.sin == 0) & (self.cos > 0)  # rows without an angle take any logits
            value, slope, rest = (torch.where(still, x, y) for x, y in ((plain, value), (1, slope), (0, rest)))
        return value, slope, rest


def first_label(spec: LossSpec) -> int:
    """The column of the statistics from which on they are the labels' logits."""
    return 3 if spec.labels else 2
