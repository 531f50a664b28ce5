"""The GPU doors over the k hardest negatives: the reference's picks bit for bit, its values and gradients as
accurately.

A row is a case. Every regime is forced on short rows, with tiles of few classes, so that a row has several.
"""

import math

import pytest
import torch
from gpu_doors import (
    DTYPES,
    FORMULAS,
    IGNORED,
    INTERPRETED,
    LOGISTIC,
    SOFTMAX,
    Unchecked,
    assert_as_accurate,
    family,
    make_grad,
)
from torch import Tensor
from triton.runtime import interpreter

import cases
from fused_losses import reference
from fused_losses.gpu import hardest
from fused_losses.gpu.hardest import Plan

INF, NAN = math.inf, math.nan
REGIMES = ("held", "walked", "blocks of 8", "blocks of 16", "blocks of 32", "blocks of 8, split")

each_regime = pytest.mark.parametrize("regime", REGIMES)
each_form = pytest.mark.parametrize("compact", [True, False], ids=["compact", "threshold"])


@pytest.fixture(autouse=True)
def scarce_room(monkeypatch):
    """Room for 2 k candidates and no more: rows of many equal logits must go the long way."""
    monkeypatch.setattr(hardest, "_FEWEST_CANDIDATES", 1)


@pytest.fixture
def force(monkeypatch):
    """force(regime) for every launch that follows."""

    def plan(regime, device, num_rows, num_classes, k, itemsize, multi_hot):
        lanes = 16 // itemsize * device.threads_per_warp
        tiles = max(1, 2 ** math.ceil(math.log2(num_classes)) // lanes)
        if regime == "held":
            return Plan(1, tiles, 2, held=True)
        if regime == "walked" or multi_hot:
            return Plan(1, 1, 2)
        return Plan(1, 2, 4, width=int(regime.split()[2].rstrip(",")), parts=3 if "split" in regime else 1)

    return lambda regime: monkeypatch.setattr(hardest, "plan", lambda *of: plan(regime, *of))


def rows_of_every_kind(classes: int, k: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(classes, generator=generator)  # noqa: E731
    places = torch.arange(classes)
    rows = {f"{n} values": torch.randint(n, (classes,), generator=generator) / 4 - 1 for n in (2, 5, 30)}
    rows |= {
        "normal": 3 * normal(),
        "wide": torch.distributions.StudentT(1.0).sample((classes,)).clamp(-6e4, 6e4),
        "far from 0": 1000 + normal(),
        "ascending": normal().sort().values,
        "descending": normal().sort(descending=True).values,
        "all equal": torch.full((classes,), -1.5),
        "both zeros": torch.where(normal() > 0, 0.0, -0.0),
        "subnormal": normal().sign() * torch.finfo(torch.float16).smallest_normal / 4,
        "one-hot peak": torch.where(places == classes // 3, 9.0, 0.0),
        "hardest together": normal() + 20 * ((places >= classes // 4) & (places < classes // 4 + k)),
        "hardest at stride 8": normal() + 20 * (places % 8 == 3),
        "hardest at stride 16": normal() + 20 * (places % 16 == 0),
        "masked": normal().masked_fill(torch.rand(classes, generator=generator) < 0.7, -INF),
        "nearly all masked": torch.where(places == classes - 1, 0.5, -INF),
        "all masked": torch.full((classes,), -INF),
        "+inf": torch.where(places == classes // 2, INF, normal()),
        "NaN": torch.where(places == classes // 2, NAN, normal()),
        "-NaN at the end": torch.where(places == classes - 1, -NAN, normal()),
        "all NaN": torch.full((classes,), NAN),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def compare(
    formula: str, logits: Tensor, target: Tensor, k: int, compact: bool, grad: Tensor | None = None, part=(0, None)
) -> Tensor:
    """One step through the GPU doors, held against the reference and float64; gives dlogits."""
    (loss, params), kind = FORMULAS[formula], family(formula)
    grad = make_grad(formula, logits.shape[0]).to(logits.device) if grad is None else grad
    unchecked, before = Unchecked(), (logits.clone(), target.clone())

    def step(wing, logits, grad):
        outputs = getattr(wing, f"{kind}_forward")(logits, target, loss, params, k, IGNORED, compact, *part)
        given = None if compact and target.dim() == 1 else logits
        return *outputs, getattr(wing, f"{kind}_backward")(
            grad, given, target, *outputs[1:], loss, params, k, IGNORED, logits.shape[1], compact, *part
        )

    ours = step(hardest, logits, grad)
    theirs = step(unchecked, logits, grad)
    truth = step(unchecked, logits.double(), grad.double())
    for mine, kept in zip((logits, target), before, strict=True):
        torch.testing.assert_close(mine, kept, rtol=0, atol=0, equal_nan=True)

    without_nan = ~logits.isnan().any(1)
    (index, logit), (their_index, their_logit) = (pair_by_class(*outputs[2:4]) for outputs in (ours, theirs))
    assert index.dtype == torch.int32 and logit.dtype == logits.dtype and index.shape == their_index.shape
    assert torch.equal(index[without_nan], their_index[without_nan])
    assert torch.equal(bits(logit[without_nan]), bits(their_logit[without_nan]))
    assert ((index >= -1) & (index < logits.shape[1])).all()

    states = [poisoned(kind, outputs[1]) for outputs in (ours, theirs, truth)]
    for name, *of in (
        ("rows", ours[0], theirs[0], truth[0]), ("state", *states), ("dlogits", ours[4], theirs[4], truth[4])
    ):  # fmt: skip
        assert_as_accurate(*of, f"{formula}: {name}")
    assert ours[4].dtype == logits.dtype and ours[4].shape == logits.shape
    return ours[4]


def pair_by_class(index: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
    order = index.argsort(dim=1, stable=True)
    return index.gather(1, order), logit.gather(1, order)


def poisoned(kind: str, state: Tensor) -> Tensor:
    """Which entry of a poisoned row's state is NaN is the wing's own affair."""
    doubtful = ((state[:, 2] - state[:, 0]) - state[:, 1]).isnan() if kind == "softmax" else state[:, 0].isnan()
    return state.masked_fill(doubtful[:, None], NAN)


def targets_for(logits: Tensor, seed: int = 0) -> Tensor:
    """Random classes; every third row's target is its largest logit, so that it stands among what is picked from."""
    target = torch.randint(logits.shape[1], (logits.shape[0],), generator=torch.Generator().manual_seed(seed))
    target[::3] = logits[::3].float().nan_to_num(nan=0.0).argmax(1)
    return target


@each_form
@pytest.mark.parametrize(("regime", "dtype"), [(regime, DTYPES[i % 3]) for i, regime in enumerate(REGIMES)], ids=str)
def test_picks(regime, dtype, compact, device, force):
    """Few picks of a long row, and many of a shorter one where the regime serves that."""
    force(regime)
    classes, k = (203, 8) if compact or regime.startswith("blocks") else (93, 60)
    logits = torch.stack(list(rows_of_every_kind(classes, k, dtype).values()))
    compare("cross_entropy" if compact else "lr", logits.to(device), targets_for(logits).to(device), k, compact)


@each_form
@pytest.mark.parametrize(("formula", "regime"), zip(FORMULAS, 2 * REGIMES, strict=False))
def test_formulas(formula, regime, compact, device, force):
    force(regime)
    logits = 3 * torch.randn((2, 131), generator=torch.Generator().manual_seed(1)).to(
        torch.float32 if compact else torch.bfloat16
    )
    compare(formula, logits.to(device), targets_for(logits).to(device), 5, compact)


@pytest.mark.parametrize("formula, compact", [("lr", True), ("ss_lr", False)], ids=["compact", "threshold"])
def test_many_equal_picks(formula, compact, device, force):
    """A plain sum of their terms rounds every time in the same direction."""
    force("walked")
    logits, target, k = torch.zeros((1, 8195)), torch.tensor([5]), 8000
    loss, params = FORMULAS[formula]

    def step(wing, logits):
        return wing.logistic_forward(logits, target, loss, params, k, IGNORED, compact)[0]

    ours, same, truth = step(hardest, logits.to(device)), step(reference, logits), step(reference, logits.double())
    cases.assert_as_accurate(ours.cpu(), same, truth, "sums")


@each_form
@pytest.mark.parametrize(
    ("regime", "formula", "kind"),
    [("held", "ss_lr", torch.bool), ("walked", "lr", torch.float32), ("walked", "ss_lr", torch.int64)],
)
def test_multi_hot(regime, formula, kind, compact, device, force):
    """No positive, some, all of them; all but two."""
    force(regime)
    rows = rows_of_every_kind(75, 7, torch.bfloat16)
    logits = torch.stack([rows[name] for name in ("5 values", "wide", "masked", "NaN", "normal")])
    shares = torch.tensor([0.0, 0.1, 0.5, 0.1, 1.0])
    target = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < shares[:, None]
    target = torch.cat((target, torch.ones((1, 75), dtype=torch.bool)))
    target[5, 5:7] = False
    compare(formula, torch.cat((logits, logits[:1])).to(device), target.to(device, kind), 7, compact)


@pytest.mark.parametrize(
    ("regime", "compact"), [("held", False), ("walked", True), ("blocks of 8", True), ("blocks of 16", False)]
)
def test_targets(regime, compact, device, force):
    """Ignored, not here, out of range, the hardest class, classes of either rim."""
    force(regime)
    logits = torch.randn((12, 131), generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    logits[1] = NAN
    hardest_class = 5 + int(logits[6].float().argmax())
    target = torch.tensor([
        IGNORED, IGNORED, 4, 137, -1, 2**40, hardest_class, 5, 135, 136, -(2**63), 2**63 - 1
    ])  # fmt: skip
    for formula, shape in (("crl", (12,)), ("ss_lr", (12, 2)))[:: 1 if regime == "walked" else -2]:
        grad = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        grad[0] = NAN
        dlogits = compare(formula, logits.to(device), target.to(device), 4, compact, grad.to(device), part=(5, 137))
        assert (bits(dlogits[:2].cpu()) == 0).all()
        assert dlogits[[3, 4, 5, 10, 11]].isnan().all() and dlogits[[2, 6, 7, 8, 9]].isfinite().all()


@pytest.mark.parametrize("regime", ["held", "walked"])
@pytest.mark.parametrize("classes", [1, 2, 7, 9, 17])
def test_few_classes(regime, classes, device, force):
    """Every k, up to one more than there are negatives; rows shorter than a vector."""
    force(regime)
    logits = torch.randint(4, (2, classes), generator=torch.Generator().manual_seed(classes)).to(torch.bfloat16)
    for k in {1, classes - 1, classes} - {0}:
        compare("crl", logits.to(device), targets_for(logits).to(device), k, compact=k % 2 == 0)


@pytest.mark.parametrize("regime", ["walked", "blocks of 16", "blocks of 8, split"])
def test_memory_layouts(regime, device, force):
    """Rows that begin anywhere within a vector, rows of a wider matrix, columns that are not adjacent, strided targets
    and gradients."""
    force(regime)
    wide = torch.randn((2, 140), generator=torch.Generator().manual_seed(4)).to(torch.bfloat16).to(device)
    target = torch.arange(4, device=device)[::2]
    grad = torch.ones(1, device=device).expand(2)
    for logits in (wide[:, 1:132], wide[:, 5:136], wide.t().contiguous().t()[:, :131]):
        compare("cross_entropy", logits, target, 4, True, grad)
        compare("cross_entropy", logits, target, 4, False, grad)


def test_no_rows(device):
    for kind, formula in (("softmax", "crl"), ("logistic", "lr")):
        loss, params = FORMULAS[formula]
        logits, target = torch.empty((0, 300), device=device), torch.empty(0, dtype=torch.int64, device=device)
        outputs = getattr(hardest, f"{kind}_forward")(logits, target, loss, params, 3, IGNORED, True)
        assert outputs[2].shape == outputs[3].shape == (0, 3)
        grad = torch.empty_like(outputs[0])
        dlogits = getattr(hardest, f"{kind}_backward")(
            grad, None, target, *outputs[1:], loss, params, 3, IGNORED, 300, True
        )
        assert dlogits.shape == (0, 300)


@pytest.fixture
def traffic(monkeypatch):
    """traffic(tensor) -> (elements read, elements written) of a tensor so far, by the addresses of active lanes."""
    if not INTERPRETED:
        pytest.skip("counts what the interpreter reads and writes")
    builder, reads, writes = interpreter.InterpreterBuilder, [], []
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self, pointers, mask, *rest):
        reads.append(pointers.data[mask.data].ravel())
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        writes.append(pointers.data[mask.data].ravel())
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)

    def counted(tensor: Tensor) -> tuple[int, int]:
        first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        return tuple(sum(int(((at >= first) & (at < first + size)).sum()) for at in found) for found in (reads, writes))

    counted.everything = lambda: (sum(map(len, reads)), sum(map(len, writes)))
    return counted


def test_traffic(traffic, force, monkeypatch):
    """Forward reads every logit once and the winning blocks again; backward writes every element once and the picks
    again."""
    kept = []
    honest = hardest._scratch
    monkeypatch.setattr(hardest, "_scratch", lambda *of: kept.append(honest(*of)) or kept[0])
    force("blocks of 16")
    rows, classes, k, width = 2, 3001, 20, 16
    logits = torch.randn((rows, classes), generator=torch.Generator().manual_seed(5))
    target = torch.tensor([7, 2999])
    _, state, *picks = hardest.softmax_forward(logits, target, "crl", [1.5, 1.0], k, IGNORED, True)
    rims, winners = 2 * 2 * 4, (k + 1) * 9 // 8
    assert traffic(logits)[0] <= rows * (classes + winners * width + rims + 1)
    maxima = rows * (classes / width + 2 * 32 / width)
    assert traffic(kept[0][0])[1] <= maxima + rows * (2 * k + 8)

    before = traffic(logits)
    dlogits = hardest.softmax_backward(
        torch.ones(rows), None, target, state, *picks, "crl", [1.5, 1.0], k, IGNORED, classes, True
    )
    assert traffic(logits) == before
    assert traffic(dlogits) == (0, rows * (classes + k + 1))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_every_write_lies_in_the_row_s_own_memory(k, traffic, force, monkeypatch):
    kept = []
    honest = hardest._scratch
    monkeypatch.setattr(hardest, "_scratch", lambda *of: kept.append(honest(*of)) or kept[0])
    force("blocks of 8, split")
    logits = torch.randint(3, (1, 165), generator=torch.Generator().manual_seed(6)).to(torch.float16)
    outputs = hardest.logistic_forward(logits, torch.tensor([7]), "lr", [], k, IGNORED, True)
    known = sum(traffic(tensor)[1] for tensor in (*outputs, *kept[0][:2]))
    assert known == traffic.everything()[1]


def test_picks_that_are_no_classes_are_written_nowhere(traffic):
    """They come from whoever kept them since forward."""
    classes, outside = 131, torch.tensor([[131, -1, 7, 132, 10**6, 2**31 - 1, -2, -(2**31)]], dtype=torch.int32)
    logits, target = torch.randn((1, classes), generator=torch.Generator().manual_seed(8)), torch.tensor([3])
    for kind, formula in (("softmax", "crl"), ("logistic", "lr")):
        loss, params = FORMULAS[formula]
        outputs = getattr(hardest, f"{kind}_forward")(logits, target, loss, params, 8, IGNORED, True)
        backward, grad = getattr(hardest, f"{kind}_backward"), torch.ones_like(outputs[0])
        before = traffic.everything()[1]
        options = loss, params, 8, IGNORED, classes, True
        dlogits = backward(grad, None, target, outputs[1], outside, outputs[3], *options)
        assert traffic(dlogits)[1] == traffic.everything()[1] - before == classes + 2
        assert dlogits.nonzero()[:, 1].tolist() == [3, 7]


@pytest.mark.parametrize("regime", ["held", "walked", "blocks of 16"])
def test_fewer_unmasked_than_wanted(regime, traffic, device, force):
    """One less than wanted, as many, one more; and that what is masked is not searched bit by bit."""
    force(regime)
    classes, k = 203, 8
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(7)
        order = torch.rand((5, classes), generator=generator).argsort(1)
        counts = torch.tensor([[1], [k - 1], [k], [k + 1], [k]])
        logits = torch.randn((5, classes), generator=generator).masked_fill(order >= counts, -INF).to(dtype)
        target = torch.tensor([0, *(order[1:4] == 30).int().argmax(1).tolist(), int(order[4].argmin())])
        compare("crl", logits, target, k, compact=True)
        for row in range(3):
            before = traffic(logits)[0]
            loss, params = FORMULAS["crl"]
            hardest.softmax_forward(logits[row : row + 1], target[row : row + 1], loss, params, k, IGNORED, True)
            assert traffic(logits)[0] - before <= 7 * classes


@each_regime
def test_one_pick(regime, device, force):
    force(regime)
    rows = rows_of_every_kind(165, 1, torch.float16)
    logits = torch.stack([rows[name] for name in ("2 values", "all equal", "normal", "masked", "both zeros")])
    compare("crl", logits.to(device), targets_for(logits).to(device), 1, compact=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed, device, force):
    """Any dtype, regime, length, k, form and loss, on rows of every kind."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda among: among[int(torch.randint(len(among), (1,), generator=draw))]  # noqa: E731
    for _ in range(4):
        regime, dtype, classes = pick(REGIMES), pick(DTYPES), int(torch.randint(40, 300, (1,), generator=draw))
        k = pick(range(1, max(2, classes // 24 if regime.startswith("blocks") else classes)))
        force(regime)
        logits = torch.stack(list(rows_of_every_kind(classes, k, dtype, seed).values()))
        compare(
            pick([*SOFTMAX, *LOGISTIC]), logits.to(device), targets_for(logits, seed).to(device), k, pick((True, False))
        )
