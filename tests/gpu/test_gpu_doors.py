"""Losses, statistics, coefficients, gradients of the GPU doors against the reference and float64. A row is a case."""

import math

import pytest
import torch
from gpu_doors import (
    DTYPES,
    FORMULAS,
    IGNORED,
    INTERPRETED,
    assert_as_accurate,
    compare,
    gpu_backend,
    make,
    step,
)
from gpu_rows import INF, NAN, special_rows

import cases
from doors import CE, CRL, LOGISTIC, LR, NLLR, SS_LR, grad_like
from fused_losses import reference
from fused_losses.formulas import FORMULAS as KNOWN
from fused_losses.gpu import device as gpu

each_formula = pytest.mark.parametrize("formula", FORMULAS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
one_of_each = pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)


@each_dtype
@each_formula
def test_formulas(formula, dtype, device):
    logits, target = make(5, 131, dtype)
    compare(formula, logits.to(device), target.to(device))


@pytest.mark.parametrize("formula", LOGISTIC, ids=str)
def test_without_instructions_of_nvidia(formula, device, monkeypatch):
    monkeypatch.setattr(gpu, "profile", lambda _: gpu.Device(1, 4 if INTERPRETED else 32, nvidia=False))
    logits, target = make(5, 75, torch.float32)
    compare(formula, logits.to(device), target.to(device))
    compare(formula, *(x.to(device) for x in special_rows(torch.float32, 75)))


@pytest.mark.parametrize("formula", [CE, LR], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 64, 65, 127, 300])
def test_class_counts(formula, dtype, classes, device):
    logits, target = make(3, classes, dtype)
    compare(formula, logits.to(device), target.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_position_of_the_target(dtype, device):
    """In either rim, in a whole tile, in the cut tile; rows begin at every remainder by a vector."""
    logits, _ = make(75, 75, dtype)
    compare(CE, logits.to(device), torch.arange(75, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_formula
def test_edges(formula, dtype, device):
    logits, target = special_rows(dtype, 75)
    compare(formula, logits.to(device), target.to(device))


@each_dtype
@one_of_each
def test_offsets(formula, dtype, device):
    """Far from 0 the state keeps its digits: m and l are never one number."""
    logits, target = make(3, 75, dtype)
    for offset in (1000.0, -1000.0, 5e4):
        compare(formula, (logits + offset).to(device), target.to(device))


@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def test_soft_selection_is_as_accurate_as_torch(gamma, device):
    """Loss and gradient in float32 against float64, relative to the largest of the row: at most twice the error of
    PyTorch's own functions. Untrained heads (around 0), trained one-vs-rest heads (far below 0), saturated ones."""
    centres = torch.tensor([0.0, 0.0, -3.0, -7.0, -12.0, -20.0, 5.0, 30.0]).repeat(6)
    logits = (torch.randn((48, 99), generator=torch.Generator().manual_seed(1)) + centres[:, None]).to(device)
    target = torch.arange(48, device=device)
    formula = SS_LR._replace(params=[gamma], alpha=1.0)

    def step_of(backend, dtype):
        kept, dlogits = step(backend, formula, logits.to(dtype), target, grad=torch.ones(48, device=device))
        return kept.loss[:, None], dlogits

    truth = step_of(reference, torch.float64)
    of_backends = step_of(gpu_backend, torch.float32), step_of(reference, torch.float32), truth
    for name, ours, theirs, exact in zip(("loss", "gradient"), *of_backends, strict=True):
        scale = exact.abs().amax(1, keepdim=True)
        error, torchs = (((x.double() - exact) / scale).abs().max() for x in (ours, theirs))
        assert error <= 2 * torchs, f"{name}: {error:.2e}, torch's own {torchs:.2e}"


# --- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@one_of_each
def test_reductions(formula, reduction, weighted, device):
    """Ignored rows and bad ones; the reduced loss of the others without the bad."""
    logits, target = make(6, 75, torch.float32)
    target[2] = IGNORED
    weight = (0.5 + torch.rand(75)).to(device) if weighted else None
    for k, compact in ((0, False), (3, True), (3, False)):
        compare(formula, logits.to(device), target.to(device), k, compact, reduction=reduction, weight=weight)
    target[4] = 75
    dlogits = compare(formula, logits.to(device), target.to(device), reduction=reduction, weight=weight)
    assert dlogits[4].isnan().all() and not dlogits[2].any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_row_is_ignored(reduction, device):
    logits, target = make(3, 20, torch.float32)
    for formula in (CRL, SS_LR):
        dlogits = compare(formula, logits.to(device), torch.full_like(target, IGNORED).to(device), reduction=reduction)
        assert not dlogits.any()


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "formula, dtype, classes",
    [(LR, torch.float32, 16389), (SS_LR, torch.bfloat16, 16389), (CRL, torch.float32, 65541)],
    ids=str,
)
def test_many_equal_terms(formula, dtype, classes, device, monkeypatch):
    """A plain sum of them rounds every time in the same direction. One program has hundreds of tiles."""
    monkeypatch.setattr(gpu, "parts_for", lambda *_: 1)
    logits, target = torch.zeros((1, classes), dtype=dtype), torch.tensor([classes - 1])
    if formula is CRL:
        logits[:, :64] = 0.3  # the largest of every thread: the other terms are no powers of two
    kept, dlogits = step(gpu_backend, formula, logits.to(device), target.to(device))
    (same, gradient), (truth, exact) = (step(reference, formula, z, target) for z in (logits, logits.double()))
    for name in ("loss", "statistics"):
        cases.assert_as_accurate(getattr(kept, name).cpu(), getattr(same, name), getattr(truth, name), name)
    cases.assert_as_accurate(dlogits.cpu(), gradient, exact, "dlogits")


def test_many_equal_positives(device, monkeypatch):
    monkeypatch.setattr(gpu, "parts_for", lambda *_: 1)
    logits, target = torch.zeros((1, 16389)), torch.ones((1, 16389), dtype=torch.bool)
    target[0, 9000:] = False
    ours, same = (
        step(backend, LR, logits.to(on), target.to(on))[0].statistics.cpu()
        for backend, on in ((gpu_backend, device), (reference, "cpu"))
    )
    truth = math.log(2) * torch.tensor([[0, 7389, 9000]], dtype=torch.float64)
    for column in (1, 2):
        cases.assert_as_accurate(ours[:, column], same[:, column], truth[:, column], "sum")
    assert ours[0, 0] == 0 and ours[0, 3] == 9000


def test_infinite_terms_among_many(device):
    logits, target = torch.zeros((2, 999)), torch.tensor([3, 3])
    logits[0, 70] = logits[1, 3] = INF
    statistics = step(gpu_backend, LR, logits.to(device), target.to(device))[0].statistics
    assert statistics[0].tolist() == [INF, INF, 0.0]
    assert statistics[1].tolist() == [0.0, pytest.approx(998 * math.log(2)), INF]


# --- targets ----------------------------------------------------------------------------------------------------------


@each_formula
def test_rows_without_a_target_here(formula, device):
    """Ignored, elsewhere, out of range; ignored rows stay zero whatever their logits and gradients are."""
    logits, target = make(12, 75, torch.bfloat16)
    target += 7
    target[:11] = torch.tensor([IGNORED, 6, 85, -1, 2**40, IGNORED, -(2**63), -(2**63) + 1, 2**63 - 1, 82, 7])
    grad = grad_like(logits)
    logits[5], grad[5] = NAN, NAN
    logits, target, grad = logits.to(device), target.to(device), grad.to(device)
    dlogits = compare(formula, logits, target, grad=grad, part=(7, 85))
    assert torch.equal(dlogits[[0, 5]], torch.zeros_like(dlogits[:2]))
    assert dlogits[[2, 3, 4, 6, 7, 8]].isnan().all()
    assert dlogits[[1, 9, 10]].isfinite().all()


@one_of_each
def test_no_label_is_ignored(formula, device):
    """Without an ignore_index every label is a class or bad, whatever its value."""
    logits, _ = make(7, 20, torch.float32)
    target = torch.tensor([0, -1, IGNORED, 20, -(2**63), 2**63 - 1, 19], device=device)
    for k, compact in ((0, False), (3, True), (3, False)):
        dlogits = compare(formula, logits.to(device), target, k, compact, ignore_index=None)
        assert dlogits[1:6].isnan().all() and dlogits[[0, 6]].isfinite().all()


@pytest.mark.parametrize("k, compact", [(0, False), (3, True), (3, False)])
@one_of_each
def test_a_row_is_nan_if_a_coefficient_times_its_upstream_gradient_is(formula, k, compact, device):
    """Either coefficient, an infinite upstream gradient times 0; an ignored row stays 0."""
    logits, target = make(6, 75, torch.float32)
    target[5] = IGNORED
    spec = formula.spec(75, k, compact)
    kept = gpu_backend.forward(logits.to(device), target.to(device), None, "none", *spec)
    coefficients, grad = torch.ones((6, 2)), torch.ones(6)
    coefficients[0, 0], coefficients[1, 1], coefficients[2, 0], grad[2:] = NAN, NAN, 0.0, INF
    coefficients[3], grad[3] = 2.0, NAN
    coefficients[4], grad[4] = 2.0, 3.0
    found = []
    for backend, on in ((gpu_backend, device), (reference, "cpu")):
        given = logits.to(on) if not (compact and k) else None
        rest = [x.to(on) for x in kept[2:]]
        found.append(backend.backward(grad.to(on), coefficients.to(on), given, target.to(on), *rest, 75, *spec).cpu())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert found[0][:4].isnan().all() and found[0][4].isfinite().all() and not found[0][5].any()


@one_of_each
def test_ignore_index_may_be_a_class(formula, device):
    logits, _ = make(3, 20, torch.float32)
    dlogits = compare(formula, logits.to(device), torch.tensor([3, 19, 0], device=device), ignore_index=3)
    assert not dlogits[0].any()


@one_of_each
def test_index_targets_of_any_stride(formula, device):
    logits, target = make(4, 20, torch.float32)
    spread = torch.full((9,), 5)
    spread[1::2] = target
    compare(formula, logits.to(device), spread.to(device)[1::2])
    compare(formula, logits.to(device), torch.tensor(7, device=device).expand(4))


@pytest.mark.parametrize(
    "target_dtype",
    [
        torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.uint16, torch.uint32, torch.uint64,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2fnuz,
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formula", [LR, SS_LR], ids=str)
def test_multi_hot(formula, dtype, target_dtype, device):
    logits, _ = make(4, 131, dtype)
    target = torch.rand((4, 131), generator=torch.Generator().manual_seed(0)) < 0.2
    target[0], target[1] = False, True
    compare(formula, logits.to(device), target.to(target_dtype).to(device))


@pytest.mark.parametrize("formula", [LR, SS_LR], ids=str)
def test_multi_hot_edges(formula, device):
    logits, _ = special_rows(torch.float32, 75)
    target = torch.zeros(logits.shape, dtype=torch.bool)
    target[:, [0, 9, 40]] = True
    compare(formula, logits.to(device), target.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multi_hot_layouts(dtype, device):
    """Targets whose rows begin elsewhere in a vector than the logits' rows."""
    wide, _ = make(4, 90, dtype)
    target = (torch.rand((4, 91), generator=torch.Generator().manual_seed(0)) < 0.3).to(device)
    wide = wide.to(device)
    compare(SS_LR, wide[:, :75], target[:, :75])
    compare(SS_LR, wide[:, 3:78], target[:, 5:80].to(torch.int32))
    compare(SS_LR, wide[:, 1:76].contiguous(), target[:, 1:76])
    compare(SS_LR, wide[:, :75], target.t().contiguous().t()[:, :75])


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@one_of_each
def test_layouts_of_logits(formula, dtype, device):
    wide, target = make(6, 90, dtype)
    wide, target = wide.to(device), target.to(device) % 70
    views = {
        "rows cut out": wide[:, :75],
        "misaligned": wide[:, 1:76],
        "misaligned, odd stride": wide.flatten()[3 : 3 + 5 * 89].view(5, 89)[:, :71],
        "every other row": wide[::2],
        "expanded": wide[2:3].expand(3, 90),
        "transposed": wide.t().contiguous().t()[:3],
        "every other class": wide[:, ::2],
        "one class": wide[:, 4:5],
    }
    for logits in views.values():
        compare(formula, logits, target[: logits.shape[0]] % logits.shape[1])


@pytest.mark.skipif(not INTERPRETED, reason="needs memory of the host")
@one_of_each
def test_foreign_memory_that_begins_between_two_vectors(formula, device):
    """Such logits are copied, rows and all: the gradient's layout follows the layout that the caller sees."""
    memory = torch.empty(400, dtype=torch.uint8)
    start = (4 - memory.data_ptr()) % 16
    wide = torch.frombuffer(memoryview(memory.numpy())[start : start + 320], dtype=torch.float32).view(4, 20)
    assert wide.data_ptr() % 16 == 4 and wide.storage_offset() == 0
    logits, target = make(4, 20, torch.float32)
    wide.copy_(logits)
    compare(formula, wide, target)
    compare(formula, wide[:, :17], target % 17)
    compare(formula, wide.flatten()[:76].view(4, 19), target % 19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_rows_begin_as_the_logits_rows_do(dtype, device):
    """By 16 bytes: only then are loads and stores of 16 bytes both aligned. The gaps between rows stay untouched."""
    wide, target = make(5, 90, dtype)
    wide, target = wide.to(device), target.to(device) % 75
    for logits in (wide[:, :75], wide[:, 1:76], wide[:, :75].contiguous()):
        dlogits = step(gpu_backend, CE, logits, target)[-1]
        for row, drow in zip(logits, dlogits, strict=True):
            assert row.data_ptr() % 16 == drow.data_ptr() % 16
        stride = dlogits.stride(0)
        gaps = dlogits.as_strided((5, stride), (stride, 1), 0).flatten()
        written = torch.zeros_like(gaps, dtype=torch.bool)
        written.as_strided((5, 75), (stride, 1), dlogits.storage_offset()).fill_(True)
        assert gaps[~written].isnan().all()


@one_of_each
def test_nothing_outside_a_row_is_read(formula, device):
    """NaN on every side."""
    wide = torch.full((5, 90), NAN)
    inner, target = make(3, 75, torch.float32)
    wide[1:4, 8:83] = inner
    wide = wide.to(torch.bfloat16).to(device)
    for logits in (wide[1:4, 8:83], wide[1:4, 9:83]):
        dlogits = compare(formula, logits, target.to(device) % 74)
        assert dlogits.isfinite().all()


@each_formula
def test_upstream_gradients_of_any_stride(formula, device):
    logits, target = make(4, 20, torch.float32)
    for grad in (torch.tensor(0.7, device=device).expand(4), torch.randn(9, device=device)[::2][:4]):
        compare(formula, logits.to(device), target.to(device), grad=grad)


@each_formula
def test_no_rows(formula, device):
    logits, target = make(0, 20, torch.bfloat16)
    compare(formula, logits.to(device), target.to(device))


def test_half_precision_overflows_to_infinity(device):
    """After the product in fp32, so that a gradient scaler sees it."""
    logits, target = make(2, 20, torch.float16)
    grad = torch.full((2,), 1e6, device=device)
    dlogits = compare(NLLR, logits.to(device), target.to(device), grad=grad)
    assert (dlogits.cpu().gather(1, target[:, None]) == -INF).all()


def test_tiny_gradients_survive_until_the_cast(device):
    """Scaled in fp32: an fp16 share of 1e-6 times a scale of 65536 is not 0."""
    logits = torch.zeros((1, 300), dtype=torch.float16, device=device)
    logits[0, 1:] = -7.0
    target = torch.zeros(1, dtype=torch.int64, device=device)
    dlogits = compare(CE, logits, target, grad=torch.full((1,), 65536.0, device=device))
    assert (dlogits[0, 1:] > 0).all()


# --- split rows -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("split_rows", "shuffled_grid")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_formula
def test_split_rows(formula, dtype, device):
    logits, target = make(4, 299, dtype)
    target[0] = IGNORED
    compare(formula, logits.to(device), target.to(device))


@pytest.mark.usefixtures("split_rows", "shuffled_grid")
@one_of_each
def test_split_rows_edges(formula, device):
    logits, target = special_rows(torch.bfloat16, 299)
    compare(formula, logits.to(device), target.to(device))


@pytest.mark.usefixtures("split_rows", "shuffled_grid")
@pytest.mark.parametrize("classes", [1, 63, 65, 129, 257])
def test_split_rows_with_parts_of_every_size(classes, device):
    logits, target = make(2, classes, torch.bfloat16)
    compare(CRL, logits.to(device), target.to(device))
    compare(LR, logits.to(device), torch.rand(2, classes, device=device) < 0.3)


@pytest.mark.usefixtures("split_rows")
@pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)
def test_split_rows_are_reproducible(formula, device, request):
    """Bit by bit, whoever comes first."""
    logits, target = make(4, 299, torch.bfloat16)
    logits, target = logits.to(device), target.to(device)
    for reduction in ("none", "mean"):
        kept, dlogits = step(gpu_backend, formula, logits, target, reduction=reduction)
        request.getfixturevalue("shuffled_grid")
        for _ in range(3):
            again, gradient = step(gpu_backend, formula, logits, target, reduction=reduction)
            for one, other in zip((*kept, dlogits), (*again, gradient), strict=True):
                assert torch.equal(one, other)


# --- the tolerance rule -----------------------------------------------------------------------------------------------


def test_the_rule_refuses_small_errors():
    truth = torch.randn((3, 40), dtype=torch.float64)
    rounded = truth.float()
    assert_as_accurate(rounded, rounded, truth, "rounded")
    for wrong in (
        rounded * (1 + 2e-6),
        rounded.index_fill(1, torch.tensor([7]), 0.0),
        rounded.index_fill(1, torch.tensor([7]), NAN),
    ):
        with pytest.raises(AssertionError):
            assert_as_accurate(wrong, rounded, truth, "wrong")


def test_every_formula_of_the_losses_is_tested():
    assert {formula.loss for formula in FORMULAS} == set(KNOWN)
