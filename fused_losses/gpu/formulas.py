"""Value and slope of each loss, in Triton: a formula knows no walk.

Every formula has the signature f(x, a, b, FAST) in fp32: x is d, the log-odds of a row's target (softmax losses), or
one logit (logistic losses), a and b are the loss's hyper-parameters in the order of ``losses.py``. FAST takes shorter
primitives, one of which only NVIDIA's assembler knows: for what is done once per logit, so that memory and not
arithmetic bounds the walk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from .sums import fold, fold_product

# log(1 + e) / e on [0, 1], highest power first: relative error of log1p below 1.3e-7 in fp32, tiny e included.
_LOG1P = tl.constexpr(
    (
        -0.0031760570127516985,
        0.019542526453733444,
        -0.056373611092567444,
        0.10543623566627502,
        -0.1526966691017151,
        0.1966327428817749,
        -0.24951615929603577,
        0.33329710364341736,
        -0.49999892711639404,
        1.0,
    )
)
# The same with a relative error of 6e-5, for what is stored in 16 bits.
_ROUGH_LOG1P = tl.constexpr(
    (0.041347309947013855, -0.15742723643779755, 0.30630096793174744, -0.4969778060913086, 0.9999432563781738)
)
_LOG2E = tl.constexpr(1.4426950216293335)  # fp32
_LN2 = tl.constexpr(0.6931471824645996)  # fp32, and what is missing to 1 / _LOG2E
_LN2_LOW = tl.constexpr(1 / 1.4426950216293335 - 0.6931471824645996)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e^x by exp2, 0 below 2^-126. FAST leaves the rounding error of exp2's argument in: relative |x| * 2^-24."""
    power = x * _LOG2E
    if FAST:
        return tl.exp2(power)
    rest = tl.fma(power, -_LN2_LOW, tl.fma(power, -_LN2, x))
    return tl.exp2(power) * (1.0 + tl.where(tl.abs(power) == float("inf"), 0.0, rest))


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x for x in [1, inf]."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def log2(x, FAST: tl.constexpr):
    """FAST: relative error 2^-22 from 2 on, absolute below; 0 counts what is below 2^-126."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1]; log(1 + e) taken literally would lose every digit of a small e."""
    ratio = tl.full(e.shape, _LOG1P[0], tl.float32)
    for i in tl.static_range(1, 10):
        ratio = ratio * e + _LOG1P[i]
    return ratio * e


@triton.jit
def rough_log1p_of_unit(e):
    """The same for what is stored in 16 bits."""
    ratio = tl.full(e.shape, _ROUGH_LOG1P[0], tl.float32)
    for i in tl.static_range(1, 5):
        ratio = ratio * e + _ROUGH_LOG1P[i]
    return ratio * e


@triton.jit
def softplus(x, FAST: tl.constexpr):
    return tl.maximum(x, 0.0) + log1p_of_unit(exp(-tl.abs(x), FAST))


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + exp(-x, FAST), FAST)


@triton.jit
def logaddexp(x, y, FAST: tl.constexpr):
    low = tl.minimum(x, y)
    return tl.maximum(x, y) + tl.where(low == float("-inf"), 0.0, log1p_of_unit(exp(-tl.abs(x - y), FAST)))


# --- softmax losses, of the log-odds ----------------------------------------------------------------------------------


@triton.jit
def log_odds_value(d, a, b, FAST: tl.constexpr):
    return d


@triton.jit
def log_odds_slope(d, a, b, FAST: tl.constexpr):
    return 1.0


@triton.jit
def cross_entropy_value(d, a, b, FAST: tl.constexpr):
    return softplus(-d, FAST)


@triton.jit
def cross_entropy_slope(d, a, b, FAST: tl.constexpr):
    return -sigmoid(-d, FAST)


@triton.jit
def nllr_value(d, a, b, FAST: tl.constexpr):
    return -d


@triton.jit
def nllr_slope(d, a, b, FAST: tl.constexpr):
    return -1.0


@triton.jit
def crl_value(d, alpha, beta, FAST: tl.constexpr):
    competing = beta * logaddexp(tl.log(alpha), -softplus(d, FAST), FAST)
    return softplus(-d, FAST) + tl.where(beta == 0.0, 0.0, competing)


@triton.jit
def crl_slope(d, alpha, beta, FAST: tl.constexpr):
    relative = tl.where(alpha == 0.0, 1.0, sigmoid(-(tl.log(alpha) + softplus(d, FAST)), FAST))
    return -sigmoid(-d, FAST) - beta * sigmoid(d, FAST) * relative


# --- logistic losses, of one negative's logit -------------------------------------------------------------------------


@triton.jit
def lr_phi(z, a, b, FAST: tl.constexpr):
    return softplus(z, FAST)


@triton.jit
def lr_phi_slope(z, a, b, FAST: tl.constexpr):
    return sigmoid(z, FAST)


@triton.jit
def _selected(z, FAST: tl.constexpr):
    """sigma(z), sigma(-z), log(1 + e^-|z|)"""
    e = exp(-tl.abs(z), FAST)
    larger = reciprocal(1.0 + e, FAST)
    smaller = e * larger
    return tl.where(z < 0.0, smaller, larger), tl.where(z < 0.0, larger, smaller), log1p_of_unit(e)


@triton.jit
def _power(z, sigma, log1p, gamma, FAST: tl.constexpr):
    """sigma(z)^gamma, 1 for gamma = 0 even where log sigma(z) = min(z, 0) - log1p is -inf"""
    return exp(gamma * (tl.maximum(tl.minimum(z, 0.0), -_LARGEST) - log1p), FAST)


@triton.jit
def _square(z, sigma, log1p, gamma, FAST: tl.constexpr):
    return sigma * sigma


@triton.jit
def _soft_selection_value(z, gamma, FAST: tl.constexpr, POWER: tl.constexpr):
    sigma, _, log1p = _selected(z, FAST)
    return POWER(z, sigma, log1p, gamma, FAST) * (tl.maximum(z, 0.0) + log1p)


@triton.jit
def _soft_selection_slope(z, gamma, FAST: tl.constexpr, POWER: tl.constexpr):
    sigma, opposite, log1p = _selected(z, FAST)
    finite = _finite_softplus(z, log1p, _LARGEST)
    return _slope(POWER(z, sigma, log1p, gamma, FAST), sigma, gamma, opposite * finite)


@triton.jit
def _slope(power, sigma, gamma, opposite_share):
    """opposite_share: sigma(-z) softplus(z)"""
    return power * (sigma + gamma * opposite_share)


@triton.jit
def _finite_softplus(z, log1p, MOST: tl.constexpr):
    """sigma(-z) softplus(z) tends to 0 at z = +inf, and must not become 0 * inf."""
    return tl.minimum(tl.maximum(z, 0.0), MOST) + log1p


@triton.jit
def ss_lr_phi(z, gamma, b, FAST: tl.constexpr):
    return _soft_selection_value(z, gamma, FAST, _power)


@triton.jit
def ss_lr_phi_slope(z, gamma, b, FAST: tl.constexpr):
    return _soft_selection_slope(z, gamma, FAST, _power)


@triton.jit
def ss_lr_square_phi(z, gamma, b, FAST: tl.constexpr):
    return _soft_selection_value(z, gamma, FAST, _square)


@triton.jit
def ss_lr_square_phi_slope(z, gamma, b, FAST: tl.constexpr):
    return _soft_selection_slope(z, 2.0, FAST, _square)


@triton.jit
def ss_lr_square_phi_slope_16(z, gamma, b, FAST: tl.constexpr):
    """The same for a gradient of 16 bits. sigma(-z) as 1 - sigma is off by a unit of sigma, which a large z would
    multiply: beyond 32, where the product is below 1e-12, it counts as 32."""
    sigma, _, _ = _selected(z, FAST)
    finite = _finite_softplus(z, rough_log1p_of_unit(exp(-tl.abs(z), FAST)), 32.0)
    return _slope(sigma * sigma, sigma, 2.0, finite - sigma * finite)


# Sums over a tile, f(z, a, b, FAST, VECTOR): of phi over what each thread holds, (ROWS, LANES) -> (LANES // VECTOR,).


@triton.jit
def sum_of_softplus(z, FAST: tl.constexpr, VECTOR: tl.constexpr):
    """The logarithms are taken once for all: of the product of the 1 + e^-|z|, at most 2 each."""
    p = fold_product(exp(-tl.abs(z), FAST), VECTOR)
    of_product = tl.where(p < 1.0, log1p_of_unit(p), log2(1.0 + p, FAST) * _LN2)
    return fold(tl.maximum(z, 0.0), VECTOR) + of_product


@triton.jit
def lr_sum(z, a, b, FAST: tl.constexpr, VECTOR: tl.constexpr):
    return sum_of_softplus(z, FAST, VECTOR)


@triton.jit
def ss_lr_sum(z, gamma, b, FAST: tl.constexpr, VECTOR: tl.constexpr):
    return fold(ss_lr_phi(z, gamma, b, FAST), VECTOR)


@triton.jit
def ss_lr_square_sum(z, gamma, b, FAST: tl.constexpr, VECTOR: tl.constexpr):
    return fold(ss_lr_square_phi(z, gamma, b, FAST), VECTOR)


class Formula(NamedTuple):
    """Value and slope of d, or phi and its slope, with the hyper-parameters that both take."""

    value: triton.JITFunction
    slope: triton.JITFunction
    a: float
    b: float


_FORMULAS = {
    "log_odds": (log_odds_value, log_odds_slope),
    "cross_entropy": (cross_entropy_value, cross_entropy_slope),
    "nllr": (nllr_value, nllr_slope),
    "crl": (crl_value, crl_slope),
    "lr": (lr_phi, lr_phi_slope),
    "ss_lr": (ss_lr_phi, ss_lr_phi_slope),
    "ss_lr, square": (ss_lr_square_phi, ss_lr_square_phi_slope),
}
_SUMS = {"lr": lr_sum, "ss_lr": ss_lr_sum, "ss_lr, square": ss_lr_square_sum}


def _name(loss: str, params: Sequence[float]) -> str:
    """The default exponent of SS-LR has its own formulas, with one exponential less."""
    return "ss_lr, square" if (loss, list(params)) == ("ss_lr", [2.0]) else loss


def formulas(loss: str, params: Sequence[float]) -> Formula:
    return Formula(*_FORMULAS[_name(loss, params)], *(*params, 0.0, 0.0)[:2])


def slope_of_phi(loss: str, params: Sequence[float], itemsize: int) -> triton.JITFunction:
    """Of a logistic loss, for a gradient whose elements have so many bytes."""
    name = _name(loss, params)
    return ss_lr_square_phi_slope_16 if (name, itemsize) == ("ss_lr, square", 2) else _FORMULAS[name][1]


def sum_of_phi(loss: str, params: Sequence[float]) -> triton.JITFunction:
    return _SUMS[_name(loss, params)]
