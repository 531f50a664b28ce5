"""What the kernels cost before any clock runs: bytes of logits moved, and launches."""

from collections import Counter

import pytest
import torch
from gpu_doors import IGNORED, INTERPRETED, gpu_backend, make
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import fused_losses as fl
from doors import CE, CRL, LR, NLLR, backward, forward, grad_like
from fused_losses import ops
from fused_losses.gpu import device as gpu

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")
ROWS, CLASSES = 3, 299


@pytest.fixture
def traffic(monkeypatch):
    """Counts launches by kernel, and bytes read and written by kernel argument."""
    launches, moved = Counter(), Counter()
    places = []  # (argument, first address, behind the last), of the launch under way
    honest = gpu.launch

    def watched(kernel, grid, *arguments):
        launches[kernel.name] += 1
        names = kernel.function.arg_names
        tensors = [(n, x) for n, x in zip(names, arguments, strict=False) if isinstance(x, torch.Tensor)]
        places[:] = [(n, s.data_ptr(), s.data_ptr() + s.nbytes()) for n, x in tensors for s in [x.untyped_storage()]]
        honest(kernel, grid, *arguments)

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
    monkeypatch.setattr(gpu, "launch", watched)
    return launches, moved


def both_doors(formula, logits, target, launches, moved):
    """(launches, bytes moved) of forward and of backward."""
    kept = forward(gpu_backend, formula, logits, target)
    of_forward = dict(launches), dict(moved)
    launches.clear(), moved.clear()
    backward(gpu_backend, formula, grad_like(logits), logits, target, kept)
    return of_forward, (dict(launches), dict(moved))


@interpreted
@pytest.mark.parametrize("split", [False, True], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("formula", "multi_hot"), [(CRL, False), (LR, False), (LR, True)], ids=str)
def test_bytes_and_launches(formula, multi_hot, dtype, split, traffic, request):
    """Forward reads every logit once, backward reads and writes every one once; the targets' logits once more."""
    if split:
        request.getfixturevalue("split_rows")
    logits, target = make(ROWS, CLASSES, dtype)
    if multi_hot:
        target = torch.rand((ROWS, CLASSES)) < 0.1
    (forward_launches, in_forward), (backward_launches, in_backward) = both_doors(formula, logits, target, *traffic)
    one_pass = logits.numel() * logits.element_size()
    target_logits = 0 if multi_hot else ROWS * logits.element_size()

    assert sum(forward_launches.values()) == (2 if split else 1)
    assert sum(backward_launches.values()) == 1
    assert in_forward["logits_ptr", "read"] == one_pass + target_logits
    assert in_backward["logits_ptr", "read"] == one_pass
    assert in_backward["dlogits_ptr", "written"] == one_pass
    assert sum(moved for (_, way), moved in in_forward.items() if way == "written") <= 84 * ROWS  # numbers of rows
    if multi_hot:
        assert in_forward["target_ptr", "read"] == in_backward["target_ptr", "read"] == target.numel()


@interpreted
@pytest.mark.parametrize("formula", [CRL, LR], ids=str)
def test_at_once_is_one_launch(formula, traffic):
    """The logits are read twice, the second time where they may still be cached, and written once."""
    launches, moved = traffic
    logits, target = make(ROWS, CLASSES, torch.bfloat16)
    one_pass = logits.numel() * logits.element_size()
    gpu_backend.at_once_(torch.ones(ROWS), logits, target, None, *formula.spec(CLASSES, 0, False, IGNORED))
    assert launches == {"at_once_kernel": 1}
    assert moved["logits_ptr", "read"] == 2 * one_pass + ROWS * logits.element_size()
    assert moved["logits_ptr", "written"] == one_pass


@interpreted
@pytest.mark.parametrize("formula", [CRL, LR], ids=str)
def test_ignored_rows_are_not_read(formula, traffic):
    logits, _ = make(ROWS, CLASSES, torch.bfloat16)
    target = torch.full((ROWS,), IGNORED)
    (_, in_forward), (_, in_backward) = both_doors(formula, logits, target, *traffic)
    assert in_forward["logits_ptr", "read"] == in_backward.get(("logits_ptr", "read"), 0) == 0
    assert in_backward["dlogits_ptr", "written"] == logits.numel() * logits.element_size()


class Launches(TorchDispatchMode):
    """Operators of PyTorch's own that start work on a device: all but views and allocations."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in function._schema.returns)
        if not is_view and namespace != "fused_losses" and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def served(monkeypatch):
    """CPU tensors take the way of CUDA tensors. Gives the kernels that are started, none of which runs."""
    kernels = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *_: kernels.append(kernel))
    monkeypatch.setattr(ops, "_triton_backend", lambda *_: gpu_backend)
    for name in ("forward", "statistics", "finish", "backward", "backward_"):
        monkeypatch.setattr(ops, name, getattr(ops, f"_{name}_on_cuda"))
    return kernels


STEPS = {  # kernels of one whole step, forward and backward, from logits that need a gradient
    ("crl_loss", "none"): 2,
    ("crl_loss", "mean"): 3,
    ("cross_entropy", "none"): 2,
    ("cross_entropy", "mean"): 3,
    ("cross_entropy", "sum"): 3,
    ("ss_lr_loss", "none"): 2,
    ("ss_lr_loss", "mean"): 3,
    ("hs_lr_loss", "none"): 2,
    ("hs_lr_loss", "mean"): 3,
}


@interpreted
@pytest.mark.parametrize("loss, reduction", STEPS)
def test_launches_of_a_whole_step(loss, reduction, served):
    """The reduction of N numbers adds one small launch to the doors' two, where there is one to do; PyTorch none."""
    logits, target = make(4, 50, torch.float32)
    logits.requires_grad_()
    options = {"k": 5} if loss == "hs_lr_loss" else {}
    upstream = torch.ones(4 if reduction == "none" else ())
    with Launches() as launches:
        getattr(fl, loss)(logits, target, reduction=reduction, **options).backward(upstream)
    assert launches.names == []
    assert len(served) == STEPS[loss, reduction]


@interpreted
@pytest.mark.parametrize(
    "options, multi_hot, kernels",
    [
        ({"weight": torch.ones(50)}, False, ["forward_kernel", "finish_kernel", "backward_kernel"]),
        ({}, True, ["forward_kernel", "finish_kernel", "backward_kernel"]),
        ({"margin": fl.Margin(cosine=0.3)}, False, ["forward_kernel", "finish_labels_kernel", "backward_kernel"]),
        ({"k": 5}, False, ["row_kernel", "scatter_kernel"]),
    ],
)
def test_what_a_finish_by_itself_is_for(options, multi_hot, kernels, served, monkeypatch):
    """Class weights, means over the terms of a batch, and a margin, also without a reduction."""
    monkeypatch.setattr(ops, "keeps_picks", lambda *of: of[3] > 0)
    logits, target = make(4, 50, torch.float32)
    target = torch.nn.functional.one_hot(target, 50) if multi_hot else target
    value = fl.ss_lr_loss(logits.requires_grad_(), target, reduction="none", **options)
    value.backward(torch.ones(4))
    assert [kernel.name for kernel in served] == kernels


@interpreted
def test_launches_of_a_linear_layer(served, monkeypatch):
    """One for each chunk of rows, whose loss and gradient are made while its logits are there."""
    monkeypatch.setattr(ops, "_is_cuda", lambda _: True)
    monkeypatch.setattr(ops, "_unseen_triton", lambda *_: gpu_backend)
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    options = fl.LinearLossOptions(chunk_bytes=4 * 50 * 4)
    loss = fl.linear_cross_entropy(x, weight, torch.arange(8), options=options)
    loss.backward()
    assert [kernel.name for kernel in served] == ["at_once_kernel"] * 2


def mean_step(formula, k, compact):
    logits, target = make(4, 50, torch.float32)
    spec = formula.spec(50, k, compact)
    _, coefficients, *kept = gpu_backend.forward(logits, target, None, "mean", *spec)
    gpu_backend.backward(torch.ones(()), coefficients, logits, target, *kept, 50, *spec)


@interpreted
@pytest.mark.parametrize("k, compact", [(0, False), (5, True), (5, False)])
def test_no_walk_and_no_backward_of_the_softmax_family_knows_a_loss(k, compact, monkeypatch):
    """The kernels of CE, NLLR and CRL are the same, with the same arguments, but for the finish."""
    of_losses = []
    for formula in (CE, NLLR, CRL):
        started = []
        monkeypatch.setattr(
            gpu, "launch", lambda kernel, grid, *given, to=started: to.append(
                (kernel.name, kernel.warps, kernel.constants, grid, [x for x in given if not hasattr(x, "dtype")])
            )
        )  # fmt: skip
        mean_step(formula, k, compact)
        walk, finish, backward_ = started
        assert finish[0] == "finish_kernel"
        of_losses.append((walk, backward_))
    assert of_losses[0] == of_losses[1] == of_losses[2]
