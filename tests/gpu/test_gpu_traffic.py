"""What the kernels cost before any clock runs: bytes of logits moved, and launches."""

from collections import Counter

import pytest
import torch
from gpu_doors import FORMULAS, IGNORED, INTERPRETED, family, make, make_grad
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import fused_losses as fl
from fused_losses.gpu import launch

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")
ROWS, CLASSES = 3, 299


@pytest.fixture
def traffic(monkeypatch):
    """Counts launches by kernel, and bytes read and written by kernel argument."""
    launches, moved = Counter(), Counter()
    places = []  # (argument, first address, behind the last), of the launch under way
    honest = launch.launch

    def watched(kernel, grid, warps, *arguments, **constexprs):
        launches[kernel.fn.__name__] += 1
        tensors = [(n, x) for n, x in zip(kernel.arg_names, arguments, strict=False) if isinstance(x, torch.Tensor)]
        places[:] = [(n, s.data_ptr(), s.data_ptr() + s.nbytes()) for n, x in tensors for s in [x.untyped_storage()]]
        honest(kernel, grid, warps, *arguments, **constexprs)

    def count(way, pointers, mask):
        address = pointers.data if mask is None else pointers.data[mask.data.astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name, first, behind in places:
            moved[name, way] += size * int(((address >= first) & (address < behind)).sum())

    def masked_load(self, pointers, mask, other, *rest):
        count("read", pointers, mask)
        return load(self, pointers, mask, other, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        count("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    monkeypatch.setattr(launch, "launch", watched)
    return launches, moved


def both_doors(formula, logits, target, launches, moved):
    """(launches, bytes moved) of forward and of backward."""
    loss, params = FORMULAS[formula]
    forward, backward = getattr(launch, f"{family(formula)}_forward"), getattr(launch, f"{family(formula)}_backward")
    _, state, *picks = forward(logits, target, loss, params, 0, IGNORED, False)
    of_forward = dict(launches), dict(moved)
    launches.clear(), moved.clear()
    grad = make_grad(formula, logits.shape[0])
    backward(grad, logits, target, state, *picks, loss, params, 0, IGNORED, logits.shape[1], False)
    return of_forward, (dict(launches), dict(moved))


@interpreted
@pytest.mark.parametrize("split", [False, True], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formula", ["crl", "lr", "lr, multi-hot"])
def test_bytes_and_launches(formula, dtype, split, traffic, request):
    """Forward reads every logit once, backward reads and writes every one once; the targets' logits once more."""
    if split:
        request.getfixturevalue("split_rows")
    logits, target = make(ROWS, CLASSES, dtype)
    name, _, multi_hot = formula.partition(", ")
    if multi_hot:
        target = torch.rand((ROWS, CLASSES)) < 0.1
    (forward_launches, forward), (backward_launches, backward) = both_doors(name, logits, target, *traffic)
    one_pass = logits.numel() * logits.element_size()
    target_logits = 0 if multi_hot else ROWS * logits.element_size()

    assert sum(forward_launches.values()) == (2 if split else 1)
    assert sum(backward_launches.values()) == 1
    assert forward["logits_ptr", "read"] == one_pass + target_logits
    assert backward["logits_ptr", "read"] == one_pass
    assert backward["dlogits_ptr", "written"] == one_pass
    assert sum(moved for (_, way), moved in forward.items() if way == "written") <= 72 * ROWS  # sums and states
    if multi_hot:
        assert forward["target_ptr", "read"] == backward["target_ptr", "read"] == target.numel()


@interpreted
@pytest.mark.parametrize("formula", ["crl", "lr"])
def test_ignored_rows_are_not_read(formula, traffic):
    logits, _ = make(ROWS, CLASSES, torch.bfloat16)
    target = torch.full((ROWS,), IGNORED)
    (_, forward), (_, backward) = both_doors(formula, logits, target, *traffic)
    assert forward["logits_ptr", "read"] == backward.get(("logits_ptr", "read"), 0) == 0
    assert backward["dlogits_ptr", "written"] == logits.numel() * logits.element_size()


class Launches(TorchDispatchMode):
    """Operators that start work on a device: all but views and allocations. A door counts as one."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in function._schema.returns)
        if not is_view and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


STEPS = {  # operators of one whole step, forward and backward, from logits that need a gradient
    ("crl_loss", "none"): 2,
    ("crl_loss", "mean"): 4,
    ("cross_entropy", "none"): 2,
    ("cross_entropy", "mean"): 4,
    ("ss_lr_loss", "none"): 4,
    ("ss_lr_loss", "mean"): 4,
}


@pytest.mark.parametrize("loss, reduction", STEPS)
def test_operators_of_a_whole_step(loss, reduction):
    """On any device: the reduction of N values adds two small launches to the doors' two, where there is one."""
    logits, target = make(4, 50, torch.float32)
    logits.requires_grad_()
    with Launches() as launches:
        value = getattr(fl, loss)(logits, target, reduction=reduction)
        value.backward(torch.ones_like(value.detach()))
    names = launches.names
    assert sum(name.endswith(("_forward", "_backward")) for name in names) == 2
    assert len(names) - 1 == STEPS[loss, reduction], names  # less the ones_like
