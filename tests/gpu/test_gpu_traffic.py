"""What the kernels cost before any clock runs: bytes of logits moved, and launches."""

from collections import Counter

import pytest
import torch
from gpu_doors import FORMULAS, IGNORED, INTERPRETED, gpu_wing, make, make_grad
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import fused_losses as fl
from doors import CRL, LR, backward, forward
from fused_losses import ops
from fused_losses.gpu import launch
from fused_losses.gpu import reductions as gpu_reductions

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
    kept = forward(gpu_wing, formula, logits, target)
    of_forward = dict(launches), dict(moved)
    launches.clear(), moved.clear()
    backward(gpu_wing, formula, make_grad(formula, logits.shape[0]), logits, target, kept)
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
    (forward_launches, in_forward), (backward_launches, in_backward) = both_doors(
        FORMULAS[name], logits, target, *traffic
    )
    one_pass = logits.numel() * logits.element_size()
    target_logits = 0 if multi_hot else ROWS * logits.element_size()

    assert sum(forward_launches.values()) == (2 if split else 1)
    assert sum(backward_launches.values()) == 1
    assert in_forward["logits_ptr", "read"] == one_pass + target_logits
    assert in_backward["logits_ptr", "read"] == one_pass
    assert in_backward["dlogits_ptr", "written"] == one_pass
    assert sum(moved for (_, way), moved in in_forward.items() if way == "written") <= 72 * ROWS  # sums and states
    if multi_hot:
        assert in_forward["target_ptr", "read"] == in_backward["target_ptr", "read"] == target.numel()


@interpreted
@pytest.mark.parametrize("formula", [CRL, LR], ids=str)
def test_ignored_rows_are_not_read(formula, traffic):
    logits, _ = make(ROWS, CLASSES, torch.bfloat16)
    target = torch.full((ROWS,), IGNORED)
    (_, in_forward), (_, in_backward) = both_doors(formula, logits, target, *traffic)
    assert in_forward["logits_ptr", "read"] == in_backward.get(("logits_ptr", "read"), 0) == 0
    assert in_backward["dlogits_ptr", "written"] == logits.numel() * logits.element_size()


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


@interpreted
@pytest.mark.parametrize("loss, reduction", STEPS)
def test_launches_of_a_whole_step(loss, reduction, monkeypatch):
    """The reduction of N values adds two small launches to the doors' two, where there is one to do."""
    monkeypatch.setattr(ops, "loss_forward", ops._loss_forward)  # what serves CUDA, though the tensors are not there
    monkeypatch.setattr(ops, "loss_backward", ops._loss_backward)
    monkeypatch.setattr(ops, "_triton_wing", lambda *_: gpu_wing)
    kernels = []
    monkeypatch.setattr(gpu_reductions, "launch", lambda kernel, *_, **__: kernels.append(kernel))
    logits, target = make(4, 50, torch.float32)
    logits.requires_grad_()
    with Launches() as launches:
        value = getattr(fl, loss)(logits, target, reduction=reduction)
        value.backward(torch.ones_like(value.detach()))
    names = launches.names
    assert sum(name.endswith(("_forward", "_backward")) for name in names) == 2
    assert len(names) - 1 + len(kernels) == STEPS[loss, reduction], names  # less the ones_like
