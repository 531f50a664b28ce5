"""The raw ops under arguments that do not fit each other: an error or a result, never a crash.

Every case follows from its number. A process of its own runs them and says which it has begun: of a crash, that is what
is left. Under AddressSanitizer (``make test-sanitized``) a read or write outside of a tensor is a crash too.
"""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_losses  # noqa: F401  registers the ops
from fused_losses import ops, reference
from fused_losses.losses import LossSpec

OPS = torch.ops.fused_losses
DOORS = ("forward", "statistics", "finish", "backward", "backward_")
LINEAR = (
    "linear_forward",
    "linear_forward_picks",
    "linear_at_once",
    "linear_backward",
    "linear_backward_picks",
)
CANDIDATES = ("_cpu_candidates",) if ops.has_candidates() else ()
# Nothing between a million and 2^31, for k and num_classes: that would be an allocation of gigabytes, and allowed.
INTS = (-1, 0, 1, 2, 3, 5, 7, 17, 100, -100, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
TEXTS = (
    "",
    "cross_entropy",
    "nllr",
    "crl",
    "lr",
    "ss_lr",
    "softmax",
    "logistic",
    "none",
    "sum",
    "mean",
    "µ" * 99,
    "exp",
)
FLOATS = (0.0, 1.0, 2.0, 0.5, -1.0, 1e300, float("nan"), float("inf"))
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (
    *FLOATING, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip


class Refused(Exception):
    """A case that could not be made."""


def formula_of(draw: random.Random, family: str) -> tuple[str, list[float]]:
    return draw.choice({
        "softmax": [("log_odds", []), ("cross_entropy", []), ("nllr", []), ("crl", [1.5, 1.0])],
        "logistic": [("lr", []), ("ss_lr", [2.0]), ("ss_lr", [0.5])],
    }[family])  # fmt: skip


def consistent(draw: random.Random) -> tuple[str, list]:
    """An op and arguments that fit each other, of any loss, form and layout."""
    family, (rows, classes) = (
        draw.choice(("softmax", "logistic")),
        draw.choice(((3, 17), (1, 40), (5, 1), (0, 4), (9, 3))),
    )
    formula, params = formula_of(draw, family)
    dtype, k, compact = draw.choice(FLOATING), draw.choice((0, 1, 2, 5, 20)), draw.random() < 0.5
    name = draw.choice((*DOORS, *DOORS, *DOORS, *LINEAR, "_cpu_elementary", *CANDIDATES))
    if name == "_cpu_elementary":
        return name, [draw.choice(("exp", "log1p", "log1p_of_product")), torch.randn(draw.choice((0, 1, 3, 33)))]
    part = (0, classes) if draw.random() < 0.7 else (draw.choice((0, 4)), 100)
    labels = name in DOORS and draw.random() < 0.5
    labels |= name in CANDIDATES and draw.random() < 0.5
    multi_hot = not labels and name not in CANDIDATES and family == "logistic" and draw.random() < 0.4
    ignore_index = -100 if multi_hot else draw.choice((-1 if labels else -100, None))
    if labels:
        target = labels_of(draw, rows, part[1])
    elif multi_hot:
        target = (torch.rand(rows, classes) < 0.3).to(draw.choice(DTYPES[:-1]))
    else:
        target = torch.randint(part[1], (rows,))
        if ignore_index is not None:
            target[target % 5 == 4] = ignore_index
    alpha = draw.choice((None, 1.5)) if family == "logistic" else None
    smoothing = draw.choice((0.0, 0.1)) if labels else 0.0
    margin = margin_of(draw) if name in DOORS and not multi_hot else []
    spec = LossSpec(formula, params, alpha, k, ignore_index, *part, compact, labels, smoothing, margin)
    if name in CANDIDATES:
        x, w = torch.randn(rows, 6), torch.randn(classes, 6)
        bias = draw.choice((None, torch.randn(classes), torch.randn(())))
        how = [draw.random() < 0.5, 1e-12, 1.0, target, draw.choice((spec.k + 2, 30))]
        return name, [x, w, bias, *how, *spec._replace(k=max(spec.k, 1))]
    if name in LINEAR:
        return name, linear_arguments(draw, name, rows, classes, target, spec, dtype)
    logits, cd = torch.randn(rows, classes).to(dtype), reference.compute_dtype(dtype)
    if name == "statistics":
        return name, [logits, target, *spec]
    weight = None
    if draw.random() < 0.4 and not multi_hot:
        weight = torch.rand(target.shape if labels else part[1], dtype=cd) * draw.choice((1, 2))
    reduced = target, weight, draw.choice(("none", "sum", "mean")), *spec
    if name == "forward":
        return name, [logits, *reduced]
    loss, coefficients, statistics, *picks = OPS.forward(logits, *reduced)
    if name == "finish":
        return name, [statistics, *reduced]
    if name == "backward_":
        return name, [torch.rand_like(loss), coefficients, logits, target, statistics, *picks, *spec]
    withheld = logits if k == 0 or not compact or multi_hot or draw.random() < 0.5 else None
    return name, [torch.rand_like(loss), coefficients, withheld, target, statistics, *picks, classes, *spec]


def margin_of(draw: random.Random) -> list[float]:
    """The numbers of MarginTerms, or none."""
    angle, cosine, scale, offset = (
        draw.choice(x) for x in ((0.0, 0.5, -0.5, 3.1), (0.0, 0.35), (1.0, 64.0), (0.0, -7.0))
    )
    numbers = [math.cos(angle), math.sin(angle), cosine, angle * math.sin(angle), scale, offset]
    return draw.choice(([], numbers))


def labels_of(draw: random.Random, rows: int, classes: int) -> Tensor:
    """(rows, P): as many classes as it happens, then -1."""
    target = torch.full((rows, draw.choice((1, 2, 5))), -1)
    for row in target:
        few = sorted(draw.sample(range(classes), draw.randint(0, min(len(row), classes))))
        row[: len(few)] = torch.tensor(few, dtype=torch.int64)
    return target


def linear_arguments(draw, name, rows, classes, target, spec, dtype) -> list:
    layer = [torch.randn(rows, 6, dtype=dtype), torch.randn(classes, 6, dtype=dtype), torch.randn(classes, dtype=dtype)]
    if draw.random() < 0.5:
        layer[2] = None
    cd = reference.compute_dtype(dtype)
    norms = None if draw.random() < 0.5 else torch.rand(classes, dtype=cd) + 0.1
    if "picks" in name:
        spec = spec._replace(k=max(spec.k, 1), compact=True)
    if ("picks" in name and target.dim() == 2) or name == "linear_at_once":
        target = torch.randint(classes, (rows,))
        spec = spec._replace(first_class=0, all_classes=classes)
    arguments = [*layer, norms, target, draw.choice((1, 30, 10**6))]
    wanted = [draw.random() < 0.7 for _ in range(3)]
    wanted[2] &= layer[2] is not None
    if name == "linear_at_once":
        return [torch.rand(rows, dtype=cd), None, *arguments, wanted, *spec]
    forward = name.replace("backward", "forward")
    how = [draw.choice((None, True, False))] if "picks" in name else []  # certified
    seen = getattr(OPS, forward)(*arguments, *how, *spec)
    return (
        [*arguments, *how, *spec]
        if forward == name
        else [torch.rand(rows, 2, dtype=cd), *seen, *arguments, wanted, *spec]
    )


def reshaped(draw: random.Random, tensor: Tensor) -> Tensor:
    rank = tensor.dim()
    changes = [
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: tensor.flatten(),
        lambda: tensor[:0],
        lambda: tensor[1:],
        lambda: tensor[..., :-1],
        lambda: tensor[..., :0],
        lambda: torch.cat((tensor, tensor)),
        lambda: torch.cat((tensor, tensor), -1),
        lambda: tensor.mT.contiguous(),
        lambda: tensor.sum(),
        lambda: tensor[..., :1].expand(tensor.shape),
        lambda: tensor[:1].expand(tensor.shape),
        lambda: tensor.as_strided(tensor.shape, (1,) * rank),
        lambda: tensor.mT.contiguous().mT,
        lambda: torch.stack((tensor, tensor), -1)[..., 0],
        lambda: torch.cat((tensor, tensor), -1)[..., 1 : 1 + tensor.shape[-1]],
        lambda: tensor.new_empty((0, *tensor.shape[1:])),
        lambda: tensor.new_zeros(draw.choice(((), (3,), (3, 17), (17, 3), (2, 3, 4), (0, 0), (1, 1, 1, 1)))),
    ]
    return draw.choice(changes)()


def revalued(draw: random.Random, tensor: Tensor) -> Tensor:
    """Other numbers in some places: classes that there are not, what is not finite."""
    if tensor.is_floating_point():
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1e30, 1.0]).to(tensor.dtype)
    elif tensor.is_complex() or tensor.dtype == torch.bool:
        return ~tensor if tensor.dtype == torch.bool else -tensor
    else:
        info = torch.iinfo(tensor.dtype)
        odd = [n for n in (*INTS, 16, 18, 39, 40, 10**6) if info.min <= n <= info.max] + [info.min, info.max]
        odd = torch.tensor(odd, dtype=tensor.dtype)
    some = torch.rand(tensor.shape) < draw.choice((0.2, 1.0))
    return torch.where(some, odd[torch.randint(len(odd), tensor.shape)], tensor)


def exotic(draw: random.Random, tensor: Tensor):
    return draw.choice([
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: torch._neg_view(tensor),
        lambda: tensor.clone().requires_grad_(),
        lambda: tensor.to(draw.choice(DTYPES)),
        lambda: tensor.to(draw.choice(DTYPES)),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
        lambda: freed(tensor.clone(), draw),
        lambda: None,
    ])()  # fmt: skip


def freed(tensor: Tensor, draw: random.Random) -> Tensor:
    """A tensor that keeps its sizes, without the memory or with half of it."""
    tensor.untyped_storage().resize_(draw.choice((0, tensor.nbytes // 2)))
    return tensor


def corrupted(draw: random.Random, argument):
    if isinstance(argument, Tensor):
        try:
            return draw.choice((reshaped, reshaped, revalued, revalued, exotic))(draw, argument)
        except Exception as error:
            raise Refused from error
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int) or (argument is None and draw.random() < 0.5):
        return draw.choice(INTS)
    if isinstance(argument, str):
        return draw.choice(TEXTS)
    if isinstance(argument, list) and argument and isinstance(argument[0], bool):
        return argument[: draw.choice((0, 1, 2))] or [True] * 4
    if isinstance(argument, list):
        return [draw.choice(FLOATS) for _ in range(draw.choice((0, 1, 2, 3, 6, 6, 7)))]
    return draw.choice((torch.randn(3, 17), torch.zeros(3, dtype=torch.int64), *FLOATS))


def is_freed(argument) -> bool:
    if not isinstance(argument, Tensor) or argument.layout != torch.strided or argument.is_nested or argument.is_meta:
        return False
    try:
        return argument.untyped_storage().nbytes() < argument.nbytes and argument.is_contiguous()
    except NotImplementedError:  # no storage at all
        return False


def outcome(call, arguments) -> tuple | Exception:
    try:
        result = call(*arguments)
    except Exception as error:
        return error
    return result if isinstance(result, tuple) else (result,)


def door(backend, name: str):
    """An op as a function with a result: that of backward_ is what it overwrites."""
    op = getattr(backend, name)
    if name != "backward_":
        return op

    def overwritten(grad, coefficients, logits, *others):
        assert op(grad, coefficients, logits, *others) is None
        return logits

    return overwritten


def case(number: int) -> str:
    """Runs it: "result", "error", or "none" where there was nothing to run."""
    draw = random.Random(number)
    torch.manual_seed(number)
    name, arguments = consistent(draw)
    changes = draw.choice((0, 1, 1, 1, 1, 2, 2, 3, 4))
    try:
        for at in draw.sample(range(len(arguments)), min(changes, len(arguments))):
            arguments[at] = corrupted(draw, arguments[at])
    except Refused:
        return "none"
    if (name not in DOORS or ops._extension_failure) and any(map(is_freed, arguments)):
        return "none"  # PyTorch's own ops read freed memory
    if not hasattr(OPS, name):
        return "none"  # an op of the C++ extension, which was not built
    sound = [a for a in arguments if type(a) is Tensor and a.layout == torch.strided and not a.is_nested]
    try:
        before = [a.detach().clone() for a in sound if not a.is_meta and not is_freed(a)]
    except NotImplementedError:
        return "none"  # PyTorch copies no negated view of an unsigned tensor
    plain = all(type(a) is not Tensor or (a.layout == torch.strided and not a.is_meta) for a in arguments)
    given = list(arguments)
    if name == "backward_" and plain and isinstance(given[2], Tensor) and not is_freed(given[2]):
        given[2] = given[2].detach().clone()
    found = outcome(door(OPS, name), arguments)
    overwritten = name == "backward_" and (isinstance(found, tuple) or "Picks" in str(found))
    for now, then in zip((a for a in sound if not a.is_meta and not is_freed(a)), before, strict=True):
        if not (overwritten and now is arguments[2]):
            torch.testing.assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)
    if isinstance(found, Exception):
        assert changes, f"{name} refuses {arguments}: {found!r}"
        return "error"
    devices = {a.device.type for a in arguments if isinstance(a, Tensor)}
    assert len(devices) <= 1 and {t.device.type for t in found} == devices, f"{name} of tensors on {devices}"
    if name in DOORS and plain:
        theirs = outcome(torch.no_grad()(door(reference, name)), given)
        if isinstance(theirs, IndexError) and name in ("backward", "backward_"):
            return "result"  # the reference looks at the picks of ignored rows too, where nothing is written
        if isinstance(theirs, RuntimeError) and "without overflow" in str(theirs):
            return "result"  # PyTorch refuses a number of a margin that float32 does not hold, where ours are infinite
        assert not isinstance(theirs, Exception), f"{name} takes what the reference refuses: {theirs!r}"
        for ours, expected in zip(found, theirs, strict=True):
            assert ours.shape == expected.shape and ours.dtype == expected.dtype
            if ours.dtype == torch.int32 and ours.numel():
                assert int(ours.min()) >= -1 and int(ours.max()) < arguments[0].shape[1]
    return "result"


def run(first: int, stop: int) -> None:
    torch.set_num_threads(2)
    counts = dict.fromkeys(("result", "error", "none"), 0)
    for number in range(first, stop):
        os.write(1, f"{number}\n".encode())
        counts[case(number)] += 1
    print(counts["result"], counts["error"], counts["none"])


def fuzz(first: int, stop: int) -> None:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":allocator_may_return_null=1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(first), str(stop)],
        env={**os.environ, "PYTHONPATH": path, "ASAN_OPTIONS": sanitizer}, capture_output=True, text=True,
    )  # fmt: skip
    *numbers, last = done.stdout.splitlines()
    assert done.returncode == 0, f"case {last}: python {__file__} {last} {int(last) + 1}\n{done.stderr[-6000:]}"
    results, errors, none = map(int, last.split())
    assert len(numbers) == results + errors + none == stop - first
    assert min(results, errors) > (stop - first) // 5, "neither results nor errors may be rare"
    print(f"{stop - first} cases: {results} results, {errors} errors, {none} that could not be made")


def test_arguments_that_do_not_fit():
    fuzz(0, 1500)


@pytest.mark.slow
def test_many_arguments_that_do_not_fit():
    fuzz(10_000, 30_000)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
