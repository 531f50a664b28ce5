"""What only a device can show: rows as long as users have them, whole calls that do not wait for the device, CUDA
graphs, the compiler, the linear layer. Skipped where there is no device."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_doors import IGNORED, INTERPRETED, compare, make
from gpu_labels import compare_labels, make_labels
from gpu_rows import INF, NAN
from torch import Tensor

import fused_losses as fl
from doors import CE, CRL, LR, SS_LR
from fused_losses.gpu import device as gpu
from fused_losses.gpu import hardest

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a device")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = ((33, 1000), (5, 4099), (3, 21841), (300, 21841), (2, 100_003), (1, 1_000_003))
each_size = pytest.mark.parametrize(("rows", "classes"), SIZES)
each_dtype = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)


def rows_and_targets(rows: int, classes: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """One row is ignored, one has masked classes, one a NaN, one only few values; where there are so many."""
    logits, target = make(rows, classes, dtype)
    target[::3] = logits[::3].float().argmax(1)
    if rows > 4:
        target[1], logits[4, classes // 2] = IGNORED, NAN
        logits[2, : classes // 2], logits[3] = -INF, logits[3].round()
    return logits.to(device), target.to(device)


# --- the doors, on long rows ------------------------------------------------------------------------------------------


@each_dtype
@each_size
@pytest.mark.parametrize("formula", [CE, CRL, LR, SS_LR], ids=str)
def test_all_negatives(formula, rows, classes, dtype, device):
    compare(formula, *rows_and_targets(rows, classes, dtype, device))


@pytest.mark.parametrize("share", [1000, 100, 10, 3])
@each_dtype
@each_size
@pytest.mark.parametrize("formula", [CRL, LR], ids=str)
def test_hardest(formula, rows, classes, dtype, share, device):
    for compact in (True, False):
        compare(formula, *rows_and_targets(rows, classes, dtype, device), max(1, classes // share), compact)


@each_dtype
@each_size
def test_multi_hot(rows, classes, dtype, device):
    logits, _ = rows_and_targets(rows, classes, dtype, device)
    target = torch.rand((rows, classes), device=device) < 0.01
    compare(SS_LR, logits, target)
    for compact in (True, False):
        compare(LR, logits, target, max(1, classes // 100), compact)


@each_dtype
@each_size
@pytest.mark.parametrize("formula", [CE, LR], ids=str)
def test_labels(formula, rows, classes, dtype, device):
    logits, _ = rows_and_targets(rows, classes, dtype, device)
    labels = make_labels(rows, 3, classes).to(device)
    few, many = (classes // 100, True), (classes // 10, False)
    for k, compact, smoothing in ((0, False, 0.1), (0, False, 0.0), (*few, 0.1), (*many, 0.0)):
        compare_labels(formula, logits, labels, k, compact, smoothing)


@pytest.mark.parametrize("formula", [CE, CRL, LR, SS_LR], ids=str)
def test_fp16(formula, device):
    for rows, classes in SIZES[:4]:
        logits, target = rows_and_targets(rows, classes, FP16, device)
        for k, compact in ((0, False), (classes // 100, True), (classes // 5, False)):
            compare(formula, logits, target, k, compact)


def test_the_sizes_reach_every_way(device):
    """Rows held, walked, by blocks, by blocks shared out; whole rows and shared ones."""
    found = set()
    on = gpu.profile(device)
    for rows, classes in SIZES:
        for share in (1000, 100, 10, 3):
            plan = hardest.plan(on, rows, classes, max(1, classes // share), 2, multi_hot=False)
            found.add("held" if plan.held else "walked" if not plan.width else f"blocks, {plan.parts > 1}")
        found.add(f"shared: {gpu.parts_for(on, rows, classes // 8192) > 1}")
    assert len(found) == 6, found


# --- whole calls ------------------------------------------------------------------------------------------------------

N, C, D = 48, 5003, 64
Call = Callable[[Tensor, Tensor], Tensor]


def calls() -> dict[str, Call]:
    """By name, functions of logits (N, C) and class indices (N,)."""

    def multi_hot(y: Tensor) -> Tensor:
        return torch.zeros((N, C), dtype=torch.bool, device=y.device).scatter_(1, y.clamp(min=0)[:, None], True)

    def weights(z: Tensor) -> Tensor:
        return torch.linspace(0.5, 1.5, C, device=z.device, dtype=torch.float64 if z.dtype == torch.float64 else FP32)

    return {
        "CE": fl.cross_entropy,
        "CE, weights": lambda z, y: fl.cross_entropy(z, y, weight=weights(z)),
        "CE, smoothed": lambda z, y: fl.cross_entropy(z, y, label_smoothing=0.1),
        "CE, a mixed pair": lambda z, y: fl.cross_entropy(z, fl.Labels.mixup(y.abs(), y.flip(0).abs(), 0.3)),
        "CE, margin": lambda z, y: fl.cross_entropy(z, y, margin=fl.Margin(cosine=0.3)),
        "CE, angle, k": lambda z, y: fl.cross_entropy(z, y, margin=fl.Margin(angle=0.3, scale=16.0), k=50),
        "CE, k": lambda z, y: fl.cross_entropy(z, y, k=50),
        "NLLR": fl.nllr_loss,
        "NLLR, sum": lambda z, y: fl.nllr_loss(z, y, reduction="sum"),
        "CRL": fl.crl_loss,
        "CRL, k": lambda z, y: fl.crl_loss(z, y, k=1000),
        "LR": fl.lr_loss,
        "LR, smoothed": lambda z, y: fl.lr_loss(z, y, label_smoothing=0.1),
        "LR, multi-hot": lambda z, y: fl.lr_loss(z, multi_hot(y)),
        "HS-LR": lambda z, y: fl.hs_lr_loss(z, y, k=50),
        "HS-LR, many": lambda z, y: fl.hs_lr_loss(z, y, ratio=0.3),
        "HS-LR, multi-hot": lambda z, y: fl.hs_lr_loss(z, multi_hot(y), k=50),
        "SS-LR": fl.ss_lr_loss,
        "own": lambda z, y: fl.softmax_loss(z, y, value=lambda log_odds: F.softplus(-2 * log_odds)),
        "rows": lambda z, y: fl.crl_loss(z, y, reduction="none").square().sum(),
    }  # fmt: skip


def inputs(dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn((N, C), generator=generator)
    target = torch.randint(C, (N,), generator=generator)
    target[5] = IGNORED
    return logits.to(BF16).to(dtype).to(device).requires_grad_(), target.to(device)


def value_and_gradient(call: Call, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = call(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


@each_dtype
@pytest.mark.parametrize("name", calls())
def test_as_on_the_cpu_in_float64(name, dtype, device):
    call = calls()[name]
    found = value_and_gradient(call, *inputs(dtype, device))
    exact = value_and_gradient(call, *inputs(torch.float64, "cpu"))
    torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=2e-6 if dtype == FP32 else 1e-2, atol=1e-6)
    scale = exact[1].abs().max()
    torch.testing.assert_close(
        found[1].cpu().double() / scale, exact[1] / scale, rtol=0, atol=2e-6 if dtype == FP32 else 4e-3
    )


@pytest.mark.parametrize("name", calls())
def test_nobody_waits_for_the_device(name, device):
    logits, target = inputs(BF16, device)
    call = calls()[name]
    value_and_gradient(call, logits, target)  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(call, logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["CE", "CE, smoothed", "CRL, k", "LR, multi-hot", "HS-LR", "HS-LR, many", "SS-LR"])
def test_cuda_graphs(name, device):
    call, (logits, target) = calls()[name], inputs(BF16, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_gradient(call, logits, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = value_and_gradient(call, logits, target)
    with torch.no_grad():
        logits.copy_(logits.flip(1))
    graph.replay()
    for of_graph, expected in zip(found, value_and_gradient(call, logits, target), strict=True):
        assert torch.equal(of_graph, expected)


@pytest.mark.parametrize("name", ["CE", "CRL, k", "HS-LR", "CE, smoothed"])
def test_compiled(name, device):
    call, (logits, target) = calls()[name], inputs(FP32, device)
    compiled = torch.compile(lambda z, y: call(2 * z, y), fullgraph=True)
    found = value_and_gradient(compiled, logits, target)
    expected = value_and_gradient(lambda z, y: call(2 * z, y), logits, target)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


# --- the linear layer -------------------------------------------------------------------------------------------------

LAYERS = {
    "CE": {"loss": fl.CrossEntropyLoss()},
    "CE, bias": {"loss": fl.CrossEntropyLoss(), "bias": True},
    "CRL, in chunks": {"loss": fl.CRLLoss(), "options": fl.LinearLossOptions(chunk_bytes=2**16)},
    "HS-LR": {"loss": fl.HSLRLoss(k=20)},
    "HS-LR, many": {"loss": fl.HSLRLoss(k=900)},
    "HS-LR, sparse": {"loss": fl.HSLRLoss(k=20), "options": fl.LinearLossOptions(sparse_grad=True)},
    "ArcFace": {
        "loss": fl.CrossEntropyLoss(margin=fl.Margin(angle=0.4)), "normalize": True, "scale": "learned",
    },
    "ArcFace, k": {"loss": fl.CrossEntropyLoss(margin=fl.Margin(angle=0.4), k=100), "normalize": True, "scale": 16.0},
    "SS-LR, cosine": {"loss": fl.SSLRLoss(), "normalize": True, "scale": "learned", "logit_bias": True},
}  # fmt: skip


def step_of_layer(name: str, device, dtype: torch.dtype, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)
    head = fl.LinearLoss(D, C, **LAYERS[name]).to(device, dtype)
    x = torch.randn((N, D), generator=torch.Generator().manual_seed(3)).to(device, dtype).requires_grad_()
    _, target = inputs(FP32, device)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = head(x, target)
    loss.backward()
    grads = [parameter.grad for parameter in (x, *head.parameters())]
    return loss.detach(), [grad.to_dense() if grad.is_sparse else grad for grad in grads]


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, device):
    exact_loss, exact = step_of_layer(name, "cpu", torch.float64)
    for dtype, autocast in ((FP32, False), (FP32, True)):
        if autocast and "sparse" in name:
            continue
        loss, grads = step_of_layer(name, device, dtype, autocast)
        torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=3e-2 if autocast else 3e-5, atol=1e-6)
        picked = LAYERS[name]["loss"].k is not None  # in 16 bits others are picked
        for grad, of_exact in zip(grads, exact, strict=True):
            error = (grad.cpu().double() - of_exact).norm() / of_exact.norm()
            assert error < ((0.3 if picked else 3e-2) if autocast else 3e-5), (name, autocast, error)


def test_topk_of_a_layer(device):
    head = fl.LinearLoss(D, C).to(device)
    x = torch.randn((N, D), device=device)
    found = head.topk(x, 5)
    expected = (x @ head.weight.detach().T).topk(5)
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("name", [name for name in LAYERS if "sparse" not in name])
def test_no_layer_waits_for_the_device(name, device):
    head = fl.LinearLoss(D, C, **LAYERS[name]).to(device)
    x, (_, target) = torch.randn((N, D), device=device, requires_grad=True), inputs(FP32, device)
    head(x, target).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
