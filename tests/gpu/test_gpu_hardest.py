"""The GPU doors over the k hardest negatives: the reference's picks bit for bit, its values and gradients as
accurately.

A row is a case. Every regime is forced on short rows, with tiles of few classes, so that a row has several.
"""

import pytest
import torch
from gpu_doors import DTYPES, FORMULAS, IGNORED, bits, compare, gpu_backend
from gpu_regimes import REGIMES
from gpu_rows import INF, NAN, rows_of_every_kind, targets_for

import cases
from doors import CE, CRL, LR, SS_LR, backward, forward
from fused_losses import reference
from fused_losses.gpu import hardest

each_regime = pytest.mark.parametrize("regime", REGIMES)
each_form = pytest.mark.parametrize("compact", [True, False], ids=["compact", "threshold"])


@pytest.fixture(autouse=True)
def scarce_room(monkeypatch):
    """Room for 2 k candidates and no more: rows of many equal logits must go the long way."""
    monkeypatch.setattr(hardest, "_FEWEST_CANDIDATES", 1)


@each_form
@pytest.mark.parametrize(("regime", "dtype"), [(regime, DTYPES[i % 3]) for i, regime in enumerate(REGIMES)], ids=str)
def test_picks(regime, dtype, compact, device, force):
    """Few picks of a long row, and many of a shorter one where the regime serves that."""
    force(regime)
    classes, k = (203, 8) if compact or regime.startswith("blocks") else (93, 60)
    logits = torch.stack(list(rows_of_every_kind(classes, k, dtype).values()))
    compare(CE if compact else LR, logits.to(device), targets_for(logits).to(device), k, compact)


@each_form
@pytest.mark.parametrize(("formula", "regime"), [*zip(FORMULAS, 3 * REGIMES, strict=False)], ids=str)
def test_formulas(formula, regime, compact, device, force):
    force(regime)
    logits = 3 * torch.randn((2, 131), generator=torch.Generator().manual_seed(1)).to(
        torch.float32 if compact else torch.bfloat16
    )
    compare(formula, logits.to(device), targets_for(logits).to(device), 5, compact)


@pytest.mark.parametrize("formula, compact", [(LR, True), (CRL, False)], ids=str)
def test_many_equal_picks(formula, compact, device, force):
    """A plain sum of their terms rounds every time in the same direction."""
    force("walked")
    logits, target, k = torch.zeros((1, 8195)), torch.tensor([5]), 8000
    if formula is CRL:
        logits[:, 7] = 0.3  # the other terms are no powers of two
    ours, same, truth = (
        forward(backend, formula, z.to(on), target.to(on), k, compact)
        for backend, z, on in (
            (gpu_backend, logits, device), (reference, logits, "cpu"), (reference, logits.double(), "cpu")
        )
    )  # fmt: skip
    for name in ("loss", "statistics"):
        cases.assert_as_accurate(getattr(ours, name).cpu(), getattr(same, name), getattr(truth, name), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_last_of_equal_picks(dtype, device, force):
    """In the tail of a row that begins within a vector, cut among more equals; in the last of several tiles, as the
    last of all."""
    force("walked")
    wide = torch.zeros((2, 1200), dtype=dtype)
    wide[1, 3::3] = 1
    target = torch.tensor([0], device=device)
    for row, classes, k in ((0, 131, 128), (1, 1101, 366)):
        logits = wide[row : row + 1, 3 : 3 + classes].to(device)
        assert row == 0 or k == logits[0, 1:].sum()
        compare(LR, logits, target, k, False)


@each_form
@pytest.mark.parametrize(
    ("regime", "formula", "kind"),
    [("held", SS_LR, torch.bool), ("walked", LR, torch.float32), ("walked", SS_LR, torch.int64)],
    ids=str,
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
    for formula in (CRL, SS_LR)[:: 1 if regime == "walked" else -2]:
        grad = torch.linspace(-1, 1, 12)
        grad[0] = NAN
        dlogits = compare(
            formula, logits.to(device), target.to(device), 4, compact, grad=grad.to(device), part=(5, 137)
        )
        assert (bits(dlogits[:2].cpu()) == 0).all()
        assert dlogits[[3, 4, 5, 10, 11]].isnan().all() and dlogits[[2, 6, 7, 8, 9]].isfinite().all()


@pytest.mark.parametrize("regime", ["held", "walked"])
@pytest.mark.parametrize("classes", [1, 2, 7, 9, 17])
def test_few_classes(regime, classes, device, force):
    """Every k, up to one more than there are negatives; rows shorter than a vector."""
    force(regime)
    logits = torch.randint(4, (2, classes), generator=torch.Generator().manual_seed(classes)).to(torch.bfloat16)
    for k in {1, classes - 1, classes} - {0}:
        compare(CRL, logits.to(device), targets_for(logits).to(device), k, compact=k % 2 == 0)


@pytest.mark.parametrize("regime", ["walked", "blocks of 16", "blocks of 8, split"])
def test_memory_layouts(regime, device, force):
    """Rows that begin anywhere within a vector, rows of a wider matrix, columns that are not adjacent, strided targets
    and gradients."""
    force(regime)
    wide = torch.randn((2, 140), generator=torch.Generator().manual_seed(4)).to(torch.bfloat16).to(device)
    target = torch.arange(4, device=device)[::2]
    grad = torch.ones(1, device=device).expand(2)
    for logits in (wide[:, 1:132], wide[:, 5:136], wide.t().contiguous().t()[:, :131]):
        compare(CE, logits, target, 4, True, grad=grad)
        compare(CE, logits, target, 4, False, grad=grad)


@pytest.mark.parametrize("formula", [CRL, LR], ids=str)
def test_no_rows(formula, device):
    logits, target = torch.empty((0, 300), device=device), torch.empty(0, dtype=torch.int64, device=device)
    compare(formula, logits, target, 3, True)


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
    kept_for_backward = forward(gpu_backend, CRL, logits, target, k, compact=True)
    rims, winners = 2 * 2 * 4, (k + 1) * 9 // 8
    assert traffic(logits)[0] <= rows * (classes + winners * width + rims + 1)
    maxima = rows * (classes / width + 2 * 32 / width)
    assert traffic(kept[0][0])[1] <= maxima + rows * (2 * k + 8)

    before = traffic(logits)
    dlogits = backward(gpu_backend, CRL, torch.ones(rows), logits, target, kept_for_backward, k, compact=True)
    assert traffic(logits) == before
    assert traffic(dlogits) == (0, rows * (classes + k + 1))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_every_write_lies_in_the_row_s_own_memory(k, traffic, force, monkeypatch):
    kept = []
    honest = hardest._scratch
    monkeypatch.setattr(hardest, "_scratch", lambda *of: kept.append(honest(*of)) or kept[0])
    force("blocks of 8, split")
    logits = torch.randint(3, (1, 165), generator=torch.Generator().manual_seed(6)).to(torch.float16)
    outputs = forward(gpu_backend, LR, logits, torch.tensor([7]), k, compact=True)
    known = sum(traffic(tensor)[1] for tensor in (*outputs, *kept[0][:2]))
    assert known == traffic.everything()[1]


def test_picks_that_are_no_classes_are_written_nowhere(traffic):
    """They come from whoever kept them since forward."""
    classes, outside = 131, torch.tensor([[131, -1, 7, 132, 10**6, 2**31 - 1, -2, -(2**31)]], dtype=torch.int32)
    logits, target = torch.randn((1, classes), generator=torch.Generator().manual_seed(8)), torch.tensor([3])
    for formula in (CRL, LR):
        kept = forward(gpu_backend, formula, logits, target, 8, compact=True)
        before = traffic.everything()[1]
        elsewhere = kept._replace(pick_index=outside)
        dlogits = backward(gpu_backend, formula, torch.ones(1), logits, target, elsewhere, 8, compact=True)
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
        compare(CRL, logits, target, k, compact=True)
        for row in range(3):
            before = traffic(logits)[0]
            forward(gpu_backend, CRL, logits[row : row + 1], target[row : row + 1], k, compact=True)
            assert traffic(logits)[0] - before <= 7 * classes


@each_regime
def test_one_pick(regime, device, force):
    force(regime)
    rows = rows_of_every_kind(165, 1, torch.float16)
    logits = torch.stack([rows[name] for name in ("2 values", "all equal", "normal", "masked", "both zeros")])
    compare(CRL, logits.to(device), targets_for(logits).to(device), 1, compact=True)
