"""The k hardest classes of a float32 layer by products in bfloat16, and proven: *certified* selection.

Selection needs no exact logits. It needs to know which classes cannot be among the k hardest, and an approximation
with an error bound says that of all but a few more than k, the *candidates*. These get exact logits, from the float32
rows and summed in float64, and among them the k hardest are selected as ever. So picks, logits and statistics are those
of float64 logits rounded to float32, whatever the data; only the time depends on it.

**The bound.** x is a row of the input, w a class, x~ and w~ what rounding leaves of them, z = <x, w>, and z~ the sum of
the products of x~ and w~ in float32, in any order. By the inequalities of the triangle and of Cauchy and Schwarz

    |<x, w> - <x~, w~>|  =  |<x, w - w~> + <x - x~, w~>|  <=  |x| |w - w~| + |x - x~| |w~|.

The product of two bfloat16 numbers has 16 digits and is exact in float32, so z~ is a sum of D numbers: D - 1 roundings,
and at most D more if products are rounded, or those of two features added first. Each is off by u = 2^-24 to nearest,
or by 2^-23 towards zero, as tensor cores round. By the standard argument (Higham, Accuracy and Stability, 3.1), with
n = 2 D and n u <= 2^-4, that is up to 2^18 features,

    |<x~, w~> - z~|  <=  n u / (1 - n u) * sum of |x~_i w~_i|  <=  1.07 n u |x~| |w~|  <  g |x~| |w~|,

g = (D + 16) 2^-21, and half of it where nothing rounds towards zero. Together,

    |z - z~|  <=  b  =  |x| |w - w~| + (|x - x~| + g |x~|) |w~|.

The lengths are by-products of rounding, and are rounded up. What g has left covers the roundings of b itself, of z~ + b
and z~ - b, and of 1 / |w|, by which all of it is multiplied for cosine logits. A bias is added to z~, and 2^-22 of its
size to b.

*Underflow.* AVX-512 BF16 takes subnormal numbers for 0, and flushes results to 0: at most 2^-126 in every product and
sum, and 2^-126 |x_i| for an element. With |x| and |w| in [2^-39, 2^60], or 0, all of that is less than
2^-125 (D + sqrt(D) (|x| + |w|)) < 2^-43 (D + 16) |x| |w|, which g has room for, and nothing overflows, since every
partial sum is at most |x~| |w~| (1 + g). A class outside of that range, one that is not finite among them, is a
candidate of every row; a row outside of it is not certified.

**The selection.** Let T be the k-th largest of z~ - b over any of the negatives. k of them have z >= T. A negative with
z~ + b < T is therefore not among the k hardest; nor is one with z~ + b = T, if k that have z~ - b >= T precede it: its
z is at most theirs, and among equals the lowest class comes first. T and z~ + b are float32 numbers, and rounding to
float32 keeps the order, so both hold of the rounded logits too.

*As the C++ kernel does it* (``csrc/candidates.h``): T grows while a thread walks through its classes; it counts labels
among the k until they are known. What is above T is written down, nothing else is.

*As a matmul does it* (every device): the m hardest by z~ are found, m more than k, and get their logits. All others
have z~ <= e, the smallest of the m, thus z <= e + max b; the k hardest are among the m if e + max b is below the k-th
largest logit.

**Rows of which that proves nothing**, as where more than m classes lie as close together as bfloat16 resolves, are done
once more from products in float32, where x~ = x and w~ = w, and at last in float64.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear_rows, ops
from .finish import ignored_rows
from .linear_rows import (
    LEAST_NORM,
    MIB,
    check_target,
    chunk_elements_of,
    hardest_of_candidates,
    hardest_of_rows,
    pieces_of,
    seen_shapes,
)
from .losses import LossSpec
from .merge import Seen

# --- where it pays ----------------------------------------------------------------------------------------------------

# Measured on one core with AVX-512 BF16, 1 to 256 rows, 16 to 1024 features: where one of these is missed a matmul in
# float32 may be faster.
LEAST_FEATURES = 32
LEAST_ELEMENTS = 2**21
LEAST_ELEMENTS_PER_PICK = 2**13
LEAST_CLASSES_PER_PICK = 64

MOST_FEATURES = 2**18  # of the proof


def pays(input: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> bool:
    """Whether certified selection takes less time than a matmul in float32: on a CPU that the C++ kernel is for, with
    enough features for the products to cost more than the search, and k a small share of the classes."""
    if not _float32(input, weight, bias) or input.device.type != "cpu" or not ops.has_candidates():
        return False
    (classes, features), elements = weight.shape, weight.numel()
    if weight.stride(1) != 1:  # the kernel would want a copy
        return False
    large = features >= LEAST_FEATURES and elements >= max(LEAST_ELEMENTS, LEAST_ELEMENTS_PER_PICK * k)
    return large and classes >= LEAST_CLASSES_PER_PICK * k


def _float32(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


# --- the rows of a layer ----------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What is asked for of some rows of a float32 layer."""

    x: Tensor  # (rows, features)
    weight: Tensor  # (classes, features)
    bias: Tensor | None  # (classes,), or () for all alike
    norms: Tensor | None  # (classes,), for cosine logits
    target: Tensor
    chunk_bytes: int
    spec: LossSpec

    @property
    def labels(self) -> Tensor:
        """Among the classes at hand, (rows, P); -1 for one that is not here."""
        labels = self.target if self.spec.labels else self.target[:, None]
        here = labels - self.spec.first_class
        return here.masked_fill((labels < 0) | (here < 0) | (here >= self.weight.shape[0]), -1)

    def nothing_to_find(self) -> Tensor:
        """Of which rows, (rows,): of ignored ones, whatever they hold."""
        ignored = ignored_rows(self.target, self.spec)
        return torch.zeros_like(self.x[:, 0], dtype=torch.bool) if ignored is None else ignored

    def logits(self, classes: Tensor) -> Tensor:
        """Of classes (rows, slots), summed in float64; -inf where they are -1."""
        z = self.x.new_empty(classes.shape)
        for rows in pieces_of(len(z), max(1, MIB // max(1, classes.shape[1] * self.x.shape[1]))):
            index = classes[rows].clamp(min=0).long()
            w = self.weight[index].double()
            of_rows = torch.bmm(w, self.x[rows, :, None].double()).squeeze(2)
            if self.norms is not None:
                of_rows /= torch.linalg.vector_norm(w, dim=2).clamp_(min=LEAST_NORM)
            if self.bias is not None:
                of_rows += self.bias if self.bias.dim() == 0 else self.bias[index]
            z[rows] = of_rows
        return z.masked_fill_(classes < 0, -math.inf)

    def hardest(self, index: Tensor, logit: Tensor, label_logit: Tensor) -> Seen:
        """Of candidates and their logits, (rows, candidates), and the logits of the labels."""
        index = torch.cat((index.new_full(label_logit.shape, -1), index), dim=1)
        logit = torch.cat((label_logit, logit), dim=1)
        return hardest_of_candidates(index, logit, self.target, self.weight.shape[0], self.spec)


def linear_forward_picks(input, weight, bias, norms, target, chunk_bytes, certified, *spec) -> Seen:
    """As ``linear_rows.linear_forward_picks``.

    certified: None where it pays, True for every float32 layer on the CPU and on CUDA.
    """
    spec = LossSpec(*spec)
    if certified is None:
        certified = pays(input, weight, bias, spec.k)
    proven = _float32(input, weight, bias) and 0 < weight.shape[1] <= MOST_FEATURES
    wanted = certified and proven and input.device.type in ("cpu", "cuda")
    if not wanted or input.shape[0] == 0:
        return linear_rows.linear_forward_picks(input, weight, bias, norms, target, chunk_bytes, *spec)
    check_target(input, target, spec)
    seen = seen_shapes(input, weight, bias, norms, target, chunk_bytes, *spec)
    left = torch.arange(input.shape[0], device=input.device)
    for search in _searches(input.device, weight.shape[0], spec.k):
        certain, found = search(_Rows(input[left], weight, bias, norms, target[left], chunk_bytes, spec))
        for whole, part in zip(seen, found, strict=True):
            whole[left] = part
        left = left[~certain]  # on CUDA forward waits for their number
        if left.shape[0] == 0:
            break
        nan = input[left].isnan().any(1)  # nothing is to be found of these
        for whole, value in zip(seen, (math.nan, -1, -math.inf), strict=True):
            whole[left[nan]] = value
        left = left[~nan]
    return seen


def _searches(device: torch.device, num_classes: int, k: int) -> list[Callable[[_Rows], tuple[Tensor, Seen]]]:
    """One for what the ones before it leave. Each says which rows it is certain of."""
    searches: list[Callable[[_Rows], tuple[Tensor, Seen]]] = []
    if device.type != "cpu":
        searches.append(partial(by_matmul, dtype=torch.bfloat16))
    elif ops.has_candidates() and k <= num_classes // 16:  # the lists of more would be larger than the logits
        searches.append(by_kernel)
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    if backend.matmul.fp32_precision in ("none", "ieee"):  # others multiply with fewer digits
        searches.append(partial(by_matmul, dtype=torch.float32))
    return [*searches, in_float64]


# --- the searches -----------------------------------------------------------------------------------------------------


def most_candidates(k: int) -> int:
    """What the C++ kernel lists of a row at the most, before it gives the row up."""
    return 4 * k + 64


def by_kernel(rows: _Rows, share_of_bound: float = 1.0) -> tuple[Tensor, Seen]:
    """With the C++ kernel. share_of_bound: less than 1 only where a test is to see that it would be wrong."""
    spec = rows.spec
    most = most_candidates(spec.k)
    certain, found = [], []
    chunk = chunk_elements_of(rows.x, rows.weight, rows.chunk_bytes, True) // (5 * most)
    for part in pieces_of(len(rows.x), max(16, chunk)):
        some = rows._replace(x=rows.x[part], target=rows.target[part])
        count, index, logit, label_logit = torch.ops.fused_losses._cpu_candidates(
            some.x, some.weight, some.bias, some.norms is not None, LEAST_NORM, share_of_bound, some.target, most, *spec
        )
        width = max(spec.k, int(count.max()))
        certain.append(some.nothing_to_find() | (count >= 0))
        found.append(some.hardest(index[:, :width], logit[:, :width], label_logit))
    return torch.cat(certain), tuple(torch.cat(part) for part in zip(*found, strict=True))  # type: ignore[return-value]


def by_matmul(rows: _Rows, dtype: torch.dtype) -> tuple[Tensor, Seen]:
    """With products in dtype, bfloat16 or float32."""
    spec, num_classes = rows.spec, rows.weight.shape[0]
    taken = min(2 * spec.k + 64 if dtype == torch.bfloat16 else spec.k + spec.k // 8 + 32, num_classes)
    products = _Products(rows.weight, rows.bias, rows.norms, dtype)
    statistics, index, approximate = hardest_of_rows(
        products, rows.x, rows.target, rows.chunk_bytes, spec._replace(k=taken)
    )
    if index.device.type != "cpu":  # where picks are kept in any order
        index = index.masked_fill(index < 0, num_classes).sort(dim=1).values
        index = index.masked_fill(index == num_classes, -1)
    logit = rows.logits(index)
    bound = products.bound(rows.x)
    least = logit.topk(min(spec.k, taken), dim=1).values[:, -1]
    highest_left = approximate.amin(1) + bound  # -inf, where a slot is empty and none is left
    certain = highest_left < torch.nextafter(least, least.new_tensor(-math.inf)).double()
    if taken == num_classes:
        certain |= bound.isfinite()
    certain &= ~statistics.isnan().any(1)  # picks mean nothing there
    return certain | rows.nothing_to_find(), rows.hardest(index, logit, rows.logits(rows.labels))


def in_float64(rows: _Rows) -> tuple[Tensor, Seen]:
    """With logits in float64, of all classes."""
    products = _Products(rows.weight, rows.bias, rows.norms, torch.float64)
    found = hardest_of_rows(products, rows.x, rows.target, rows.chunk_bytes, rows.spec)
    return torch.ones_like(rows.x[:, 0], dtype=torch.bool), found


class _Products:
    """A layer whose logits are products in dtype, rounded to float32; and what they are off at most."""

    def __init__(self, weight: Tensor, bias: Tensor | None, norms: Tensor | None, dtype: torch.dtype):
        self.weight, self.bias, self.norms, self.dtype = weight, bias, norms, dtype
        self.longest, self.most_lost = (weight.new_zeros((), dtype=torch.float64) for _ in range(2))

    def of(self, classes: slice) -> "_ProductsOf":
        return _ProductsOf(self, classes)

    def bound(self, x: Tensor) -> Tensor:
        """Of |z - z~| for each row and all classes that logits have been asked of, (rows,) float64."""
        features = x.shape[1]
        size, lost = _lengths(x, x.to(self.dtype))
        slack = (features + 16) * 2.0**-21
        bound = size * self.most_lost + (lost + slack * (size + lost)) * self.longest
        underflow = 2.0**-125 * (features + math.sqrt(features) * (size + self.longest))
        if self.bias is not None:
            added = self.bias.abs().double()
            underflow = underflow + 2.0**-22 * added.masked_fill(added.isinf(), 0).amax()
        return (bound + underflow).masked_fill(size * self.longest > 2.0**120, math.inf)


class _ProductsOf(NamedTuple):
    """Some classes of them."""

    whole: _Products
    classes: slice

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        weight, bias, norms, dtype = self.whole.weight, self.whole.bias, self.whole.norms, self.whole.dtype
        w = weight[self.classes]
        if dtype == torch.float64:
            w = w.double()
            if norms is not None:
                w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_(min=LEAST_NORM)
            z = torch.mm(x.double(), w.t())
        else:
            if norms is not None:
                w = w / norms[self.classes, None]
            rounded = w.to(dtype)
            size, lost = _lengths(w, rounded)
            if norms is not None:  # squares that overflow
                lost = lost.masked_fill(norms[self.classes] > 2.0**60, math.inf)
            self.whole.longest = torch.maximum(self.whole.longest, (size + lost).amax())
            self.whole.most_lost = torch.maximum(self.whole.most_lost, lost.amax())
            if x.device.type == "cpu" or dtype == torch.float32:  # the CPU's bfloat16 matmul rounds its results
                z = torch.mm(x.to(dtype).float(), rounded.float().t(), out=out)
            else:
                z = torch.mm(x.to(dtype), rounded.t(), out_dtype=torch.float32)
        if bias is not None:
            z += bias if bias.dim() == 0 else bias[self.classes]
        return z if z is out else out.copy_(z)


def _lengths(exact: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """No less than |exact| and |exact - rounded| of each row, in float64. Squares below 2^-126 may be lost."""
    least = math.sqrt(exact.shape[1]) * 2.0**-63
    size = torch.linalg.vector_norm(exact, dim=1).double() * 1.001 + least
    if rounded.dtype == exact.dtype:
        return size, torch.zeros_like(size)
    return size, torch.linalg.vector_norm(exact - rounded, dim=1).double() * 1.001 + least
