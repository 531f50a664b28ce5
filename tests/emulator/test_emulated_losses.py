"""The public functions on the emulator, from logits or from a linear layer to the gradients, as CUDA tensors are
served; and the finish of N numbers."""

import pytest
import torch
from emulated_backend import Backend
from gpu_doors import DTYPES, IGNORED, assert_as_accurate, make
from shapes import part
from shards import loss_of, step_of_shard

from doors import CRL, LR, SS_LR
from fused_losses import LinearLossOptions, finish
from ranks import Ranks

LOSSES = ("cross_entropy", "nllr_loss", "crl_loss", "lr_loss", "ss_lr_loss", "hs_lr_loss")
LINEAR_LOSSES = tuple(
    f"linear {module}" for module in ("CrossEntropyLoss", "NLLRLoss", "CRLLoss", "LRLoss", "SSLRLoss", "HSLRLoss")
)
SELECTED_ALWAYS = "hs_lr_loss", "linear HSLRLoss"
CASES, LINEAR_CASES = (
    [(loss, selection) for selection in selections for loss in losses if selection or loss not in SELECTED_ALWAYS]
    for losses, selections in (
        (LOSSES, ({"ratio": 0.02}, {"k": 300}, {})),
        (LINEAR_LOSSES, ({}, {"k": 9}, {"k": 700})),
    )
)
SHARDED = [("crl_loss", False), ("ss_lr_loss", False), ("linear CRLLoss", True)]


def step(loss, inputs, target, **options):
    """The loss, and its gradients by the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss_of(loss, **options)(*leaves, target)
    value.backward(torch.full_like(value, 0.7))
    return value.detach().reshape(-1), *(leaf.grad for leaf in leaves)


def compare(backend: Backend, loss: str, inputs, target, **options) -> None:
    """Held against the CPU's kernels in the same precision and in float64."""
    calls = sum(backend.calls.values())
    with backend.serving():
        ours = step(loss, inputs, target, **options)
    assert sum(backend.calls.values()) >= calls + 2
    theirs = step(loss, inputs, target, **options)
    truth = step(loss, [x.double() for x in inputs], target, **options)
    for place, of in enumerate(zip(ours, theirs, truth, strict=True)):
        if len(inputs) == 2:  # each class sums what few rows left of large terms: no scale of its own
            of = [x.reshape(1, -1) for x in of]
        assert_as_accurate(*of, f"{loss} {options}: {place}")


@pytest.mark.parametrize(("loss", "selection"), part(CASES, 5))
@pytest.mark.parametrize("reduction", part(["mean", "none", "sum"], 3))
def test_losses(loss, selection, reduction, backend):
    logits, target = make(7, 2100 if selection else 751, DTYPES[LOSSES.index(loss) % 3])
    target[2] = IGNORED
    compare(backend, loss, (logits,), target, reduction=reduction, **selection)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", part([False, True], 2))
@pytest.mark.parametrize(
    "formula, multi_hot", [(CRL, False), (SS_LR._replace(alpha=1.5), False), (LR._replace(alpha=1.5), True)], ids=str
)
@pytest.mark.parametrize("rows", part([1025, 1, 2, 1000, 1024, 4097], 6))
def test_finish(rows, formula, multi_hot, weighted, reduction, backend):
    generator = torch.Generator().manual_seed(rows)
    statistics = torch.rand((rows, 4 if multi_hot else 3), generator=generator)
    target, weight = torch.zeros((rows, 50)), None
    if multi_hot:
        statistics[:, 3] = torch.randint(9, (rows,), generator=generator)
    else:
        target = torch.randint(50, (rows, 2), generator=generator)[:, 1]
        target[1::3] = IGNORED
        weight = torch.rand(50, generator=generator) if weighted else None
    spec = formula.spec(50, 7)
    loss, coefficients = backend.finish(statistics, target, weight, reduction, *spec)
    weight = None if weight is None else weight.double()
    expected, expected_coefficients = finish.finish(statistics.double(), target, weight, reduction, spec)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(coefficients, expected_coefficients.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("loss", "selection"), part(LINEAR_CASES, 5))
def test_linear_losses(loss, selection, backend):
    """In chunks of rows, at once and again; by picks from blocks of classes."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((7, 16), (2100, 16)))
    target = torch.randint(2100, (7,), generator=generator)
    target[2] = IGNORED
    for reduction in ("mean", "none"):
        options = LinearLossOptions(chunk_bytes=3 * 2100 * 4)
        compare(backend, loss, (x, weight), target, reduction=reduction, options=options, **selection)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("selection", part([{"k": 30}, {}, {"k": 300}], 3), ids=str)
@pytest.mark.parametrize(("name", "linear"), part(SHARDED, 3))
def test_class_shards(name, linear, selection, ranks, device):
    """Two ranks with half of the classes each: targets that are elsewhere, merged states, picks that others outdo."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((9, 16 if linear else 1501), generator=generator)
    weight = torch.randn((1501, 16), generator=generator)
    target = torch.randint(1501, (9,), generator=generator)
    target[3] = IGNORED
    inputs = (logits, weight) if linear else (logits,)
    answers = ranks.run(2, step_of_shard, device.target, name, [x.tolist() for x in inputs], target.tolist(), selection)
    theirs, truth = (step(name, [x.to(t) for x in inputs], target, **selection) for t in (torch.float32, torch.float64))
    assert all(calls >= 2 for *_, calls in answers)
    values, gradients = zip(*((value, gradient) for value, gradient, _ in answers), strict=True)
    for value in values:
        assert_as_accurate(torch.tensor([value]), theirs[0], truth[0], "loss")
    whole = torch.cat([torch.tensor(gradient) for gradient in gradients], dim=0 if linear else 1)
    assert_as_accurate(*(x.reshape(1, -1) for x in (whole, theirs[-1], truth[-1])), "gradient of what is sharded")
