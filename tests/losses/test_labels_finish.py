"""What finish makes of labels, smoothing and margins in C++, held against ``finish.py`` in float64.

The judge gets the same statistics, so that only the finish is judged; what the doors see of the logits is tested
elsewhere.
"""

import functools
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import doors
from fused_losses import Margin, finish, ops, reference
from fused_losses.losses import LossSpec
from fused_losses.margin import MarginTerms

cpp = torch.ops.fused_losses
pytestmark = [
    pytest.mark.skipif(bool(ops._extension_failure), reason=ops._extension_failure or "built"),
    pytest.mark.usefixtures("poisoned_memory"),
]

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float64)
CLASSES, SCALE = 23, 6.0
# of the logistic family finish sees the weight of the mean alone
FORMULAS = (
    *doors.SOFTMAX,
    *(doors.LR._replace(alpha=alpha) for alpha in (None, 0.0, 1.0)),
    doors.SS_LR._replace(alpha=3.0),
)
PLACES = (None, 1, 2, 3, 9)  # None: class indices
REDUCTIONS = ("none", "sum", "mean")

each_formula = pytest.mark.parametrize("formula", FORMULAS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers_of(offset: float = 0.0, **margin) -> list[float]:
    terms = MarginTerms.of(Margin(scale=SCALE, **margin), SCALE, offset, torch.float64)
    return list(map(float, terms))


MARGINS = {
    "no margin": [],
    "angle": numbers_of(angle=0.5),
    "cosine": numbers_of(cosine=0.35),
    "negative angle": numbers_of(angle=-0.5),
    "pi": numbers_of(angle=math.pi),
    "minus pi": numbers_of(angle=-math.pi),
    "all, with an offset": numbers_of(angle=0.3, cosine=0.2, offset=-2.0),
    "all, with a large offset": numbers_of(angle=-0.3, cosine=-0.2, offset=1000.0),
}


class Case(NamedTuple):
    statistics: Tensor
    target: Tensor
    weight: Tensor | None
    reduction: str
    spec: LossSpec

    def __str__(self) -> str:
        weighted = "unweighted" if self.weight is None else "weighted"
        return f"{tuple(self.target.shape)} {weighted} {self.reduction} {self.spec}"

    def judged(self) -> tuple[Tensor, Tensor]:
        weight = None if self.weight is None else self.weight.double()
        return finish.finish(self.statistics.double(), self.target, weight, self.reduction, self.spec)

    def plain(self) -> tuple[Tensor, Tensor]:
        return self.judged() if self.statistics.dtype == torch.float64 else finish.finish(*self)

    def ours(self) -> tuple[Tensor, Tensor]:
        return cpp.finish(*self[:4], *self.spec)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(rows: int, places: int, classes: int) -> Tensor:
    """(rows, places), ascending, -1 behind the last: full, empty, then as it happens, every seventh empty."""
    generator = generator_of(places)
    classes_in_some_order = torch.rand(rows, classes, generator=generator).argsort(1)[:, :places]
    count = torch.randint(1, places + 1, (rows,), generator=generator)
    count[0::7], count[1::7] = min(places, classes), 0
    index = torch.nn.functional.pad(classes_in_some_order, (0, places - classes_in_some_order.shape[1]), value=classes)
    index = index.masked_fill(torch.arange(places) >= count[:, None], classes).sort(1).values
    return index.masked_fill(index == classes, -1)


def weights_of(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, places): 0, above 1, and what else happens; NaN in empty places, where nobody reads them."""
    weight = torch.rand(labels.shape, generator=generator_of(labels.shape[1])).to(dtype)
    weight[0::5, 0] = 0
    weight[3::5, 0] = 1.75
    weight[::3, -1] = 0
    return weight.masked_fill(labels == -1, NAN)


def target_of(rows: int, places: int | None, classes: int) -> Tensor:
    if places is not None:
        return labels_of(rows, places, classes)
    target = torch.randint(classes, (rows,), generator=generator_of(7))
    target[1::7] = -100
    return target


ORDINARY, FAR = slice(0, 8), slice(8, 11)  # rows


def odd_logits(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """(17, CLASSES): what is usual, at offsets, masked, NaN and infinite at a label and at a negative.

    labels: (17, P), -1 in empty places."""
    logits = 3 * torch.randn(17, CLASSES, generator=generator_of(1), dtype=torch.float64)
    one = labels.clamp(min=0)[:, 0]  # a label wherever there is one
    logits[2, one[2]], logits[3, one[3]] = 5.6, -5.6  # at a small angle, and at one near pi
    logits[8] += 1000
    logits[9] -= 1000
    logits[10, one[10]] += 80  # confident
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, labels.clamp(min=0), False)
    negative = others.int().argmax(1)
    logits[11] = logits[11].masked_fill(others[11], -INF)  # all of S
    logits[12, one[12]] = -INF
    logits[13] = -INF
    logits[14, negative[14]] = INF
    logits[15, one[15]] = INF
    logits[16, one[16]] = NAN
    return logits.to(dtype)


@functools.cache
def seen_of(family: str, dtype: torch.dtype, places: int | None, smoothing: float, k: int, ignore_index: int | None):
    target = target_of(17, places, CLASSES)
    logits = odd_logits(target[:, None] if places is None else target, dtype)
    formula = doors.CE if family == "softmax" else doors.LR
    spec = formula.spec(CLASSES, k, ignore_index=ignore_index, labels=places is not None, label_smoothing=smoothing)
    return target, reference.statistics(logits, target, *spec)[0]


def problems(formula: doors.Formula, dtype: torch.dtype):
    """Every target, smoothing, margin and weight. k, the reduction, and whether a row without labels counts, change
    from one to the next."""
    blocks = itertools.product(PLACES, (0.0, 0.1), (False, True))
    for block, (places, smoothing, weighted) in enumerate(blocks):
        if places is None and smoothing:
            continue
        for turn, margin in enumerate(MARGINS.values()):
            ignore_index = -100 if places is None else (-1, None)[(turn + block) % 2]
            k = (0, 1, 5, 40)[(turn + block // 2) % 4]
            target, seen = seen_of(formula.family, dtype, places, smoothing, k, ignore_index)
            weight = None
            if weighted:
                weight = torch.linspace(0, 2, CLASSES, dtype=dtype) if places is None else weights_of(target, dtype)
            options = {"labels": places is not None, "label_smoothing": smoothing, "margin": margin}
            spec = formula.spec(CLASSES, k, ignore_index=ignore_index, **options)
            yield Case(seen, target, weight, "none", spec)
            if (turn + block) % 3 == 0:  # of all rows a sum would be NaN, and no more
                of_rows = weight if places is None or weight is None else weight[ORDINARY]
                yield Case(seen[ORDINARY], target[ORDINARY], of_rows, REDUCTIONS[1 + (turn + block) // 3 % 2], spec)


@functools.cache
def judged(number: int, dtype: torch.dtype) -> list[tuple[Case, tuple, tuple]]:
    return [(case, case.judged(), case.plain()) for case in problems(FORMULAS[number], dtype)]


def all_numbers(case: Case, loss: Tensor, coefficients: Tensor, poisoned: Tensor) -> Tensor:
    """(rows, 3 + 9): value, c, b and t, zeros where there are none."""
    values = loss[:, None] if loss.dim() else loss.expand(len(coefficients), 1)
    of_row, t = (coefficients[:, :2], coefficients[:, 2:]) if case.spec.labels else coefficients.split(1, 1)
    parts = (values, *(torch.nn.functional.pad(part, (0, n - part.shape[1])) for part, n in ((of_row, 2), (t, 9))))
    numbers = torch.cat(parts, 1)
    numbers[:, 1:] = numbers[:, 1:].masked_fill(poisoned[:, None], 0)
    return numbers


def scale_of_terms(case: Case) -> float:
    """What the t of several labels is a difference of: weights times psi'."""
    if not case.spec.labels or case.target.shape[1] == 1 or not len(case.target):
        return 0.0
    z = case.statistics[:, 3:].double()[case.target >= 0]
    slope = MarginTerms(*case.spec.margin).psi(z)[1] if case.spec.margin else torch.ones_like(z)
    weight = torch.ones_like(z) if case.weight is None else case.weight.double()[case.target >= 0]
    return float((slope * weight).abs().nan_to_num().max())


def assert_within(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, scale: Tensor, what) -> None:
    """(cases, any) each, and scale (cases,): the tolerance rule with two rounding units, as exp and log1p of the
    kernels are right within 3 ulp, those of torch within 1. what(number): the case in words."""
    units = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 2)
    bound = 2 * (plain - truth).abs().amax(1) + units * torch.maximum(truth.abs().amax(1), scale)
    error = (ours - truth).abs().amax(1)
    worst = int((error - bound).argmax())
    assert error[worst] <= bound[worst], f"{what(worst)}: error {error[worst]:.3e}, allowed {bound[worst]:.3e}"


def assert_finished(results: list[tuple[Case, tuple, tuple, tuple]]) -> None:
    """(case, ours, plain, truth) of cases with the same number of rows. Rows at an offset, and values, c, b and t, are
    judged apart: the large of them say nothing of the small. Of a row whose c is NaN all but the value may be
    anything."""
    cases = [case for case, *_ in results]
    for case, ours, _, truth in results:
        for result, expected in zip(ours, truth, strict=True):
            assert result.shape == expected.shape and result.dtype == case.statistics.dtype
        assert torch.equal(ours[1][:, 0].isnan(), truth[1][:, 0].isnan()), f"c of {case}"
    dtype = cases[0].statistics.dtype
    ours, plain, truth = (
        torch.stack([all_numbers(of_case[0], *of_case[i], of_case[3][1][:, 0].isnan()) for of_case in results])
        for i in (1, 2, 3)
    )  # (cases, rows, 3 + 9)
    truth = truth.where(truth.abs() <= torch.finfo(dtype).max, truth.to(dtype).double())
    same = (ours.double() == truth) | (ours.isnan() & truth.isnan())
    wrong = torch.where(truth.isfinite(), ~ours.isfinite(), ~same).flatten(1).any(1)
    assert not wrong.any(), f"what is not finite of {cases[int(wrong.int().argmax())]}"
    ours, plain, truth = (x.double().masked_fill(~truth.isfinite(), 0) for x in (ours, plain, truth))
    of_t = torch.tensor([scale_of_terms(case) for case in cases], dtype=torch.float64)
    for rows in (ORDINARY, FAR, slice(FAR.stop, None)):
        for column in (0, 1, 2, slice(3, None)):
            few = [x[:, rows][:, :, column].flatten(1) for x in (ours, plain, truth)]
            scale = of_t if isinstance(column, slice) else torch.zeros_like(of_t)
            if few[0].shape[1]:
                what = lambda n: f"rows from {rows.start}, column {column} of {cases[n]}"  # noqa: E731
                assert_within(*few, dtype, scale, what)


@each_dtype
@each_formula
def test_values_and_coefficients(isa, formula, dtype):
    cases = judged(FORMULAS.index(formula), dtype)
    for rows in (ORDINARY.stop, 17):
        assert_finished([(case, case.ours(), plain, truth) for case, truth, plain in cases if len(case.target) == rows])


def test_the_cases_are_what_they_should_be():
    """Ignored rows, empty rows that count, NaN, infinite values, and a margin on both sides of its bends."""
    cases = judged(FORMULAS.index(doors.CE), torch.float64)
    values = torch.cat([truth[0] for case, truth, _ in cases if case.reduction == "none"])
    assert values.isnan().any() and values.isinf().any() and (values == 0).any()
    assert {case.spec.k for case, *_ in cases} == {0, 1, 5, 40}
    assert len({(case.spec.k, case.reduction, case.weight is None) for case, *_ in cases}) == 4 * 3 * 2
    ignored = {(case.spec.ignore_index, tuple(case.spec.margin)) for case, *_ in cases if case.spec.labels}
    assert len(ignored) == 2 * len(MARGINS)
    labels = torch.cat([case.statistics[ORDINARY, 3:].flatten() for case, *_ in cases if case.spec.labels])
    u = labels[labels.isfinite()] / SCALE
    assert (u > 1).any() and (u < -1).any() and ((u > math.cos(0.5)) & (u < 1)).any() and (u < -math.cos(0.5)).any()


@each_formula
def test_few_classes(isa, formula):
    """Rows without negatives, and with more places than classes."""
    shapes = ((1, 1), (1, 3), (3, 1), (3, 5))
    for (classes, places), smoothing, margin in itertools.product(shapes, (0.0, 0.1), ("angle", "no margin")):
        target = labels_of(8, places, classes)
        logits = 3 * torch.randn(8, classes, generator=generator_of(3))
        logits[7] = -INF
        for k, weighted in ((0, False), (2, True)):
            options = {"labels": True, "label_smoothing": smoothing, "margin": MARGINS[margin]}
            spec = formula.spec(classes, k, ignore_index=None, **options)
            seen, *_ = reference.statistics(logits, target, *spec)
            weight = weights_of(target, torch.float32) if weighted else None
            case = Case(seen, target, weight, "none", spec)
            assert_finished([(case, case.ours(), case.plain(), case.judged())])


SOME = (doors.CRL, doors.LR._replace(alpha=1.0))


def many_rows(formula, rows: int, places: int | None, dtype: torch.dtype, reduction: str) -> Case:
    generator = generator_of(rows)
    target = target_of(rows, places, 1000)
    columns = 3 if places is None else 3 + places
    statistics = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    statistics[:, 1] = statistics[:, 1].abs() + 1
    if places is not None:
        statistics[:, 2] = -1000 * statistics[:, 2].abs()
        statistics[:, 3:] = statistics[:, 3:].masked_fill(target == -1, -INF)
    weight = torch.rand(1000, dtype=dtype) if places is None else weights_of(target, dtype)
    options = {} if places is None else {"labels": True, "label_smoothing": 0.1}
    ignore_index = -100 if places is None else -1
    spec = formula.spec(1000, 50, ignore_index=ignore_index, margin=MARGINS["angle"], **options)
    return Case(statistics.to(dtype), target, weight, reduction, spec)


@functools.cache
def many_judged(number: int, rows: int, places: int | None, dtype: torch.dtype, reduction: str):
    case = many_rows(SOME[number], rows, places, dtype, reduction)
    return case, case.judged(), case.plain()


@each_dtype
@pytest.mark.parametrize("formula", SOME, ids=str)
def test_many_rows(isa, threads, formula, dtype):
    """Any number of threads gives the same bits."""
    shapes = [
        (0, 3, "none"),
        (1, None, "none"),
        (15, 1, "mean"),
        (1025, 3, "sum"),
        *itertools.product((3000,), (None, 3), REDUCTIONS),
    ]
    for shape in shapes:
        case, truth, plain = many_judged(SOME.index(formula), *shape[:2], dtype, shape[2])
        results = []
        for n in (1, 2, 3):
            threads(n)
            results.append(case.ours())
        for now in results[1:]:
            assert all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(now, results[0], strict=True))
        if shape[0]:
            assert_finished([(case, results[0], plain, truth)])


def test_tensors_of_any_layout(isa):
    """Statistics, targets and weights that are not contiguous; one row for all."""
    for formula, places in itertools.product((doors.CE, doors.LR), (None, 1, 3)):
        case = many_rows(formula, 40, places, torch.float32, "none")
        expected = case.ours()
        spread = lambda x: torch.stack((x, torch.zeros_like(x)), -1)[..., 0]  # noqa: E731
        turned = lambda x: x.t().contiguous().t()  # noqa: E731
        for view in (spread, turned):
            changed = case._replace(
                statistics=view(case.statistics), target=view(case.target), weight=view(case.weight)
            )
            assert all(map(torch.equal, changed.ours(), expected))
        one = case._replace(
            statistics=case.statistics[2:3].expand(40, -1), target=case.target[2:3].expand(case.target.shape),
            weight=case.weight if places is None else case.weight[2:3].expand(case.weight.shape),
        )  # fmt: skip
        for ours, of_all in zip(one.ours(), expected, strict=True):
            assert torch.equal(ours, of_all[2:3].expand(ours.shape))


@each_dtype
@each_formula
def test_forward_is_statistics_and_finish(isa, formula, dtype):
    """Bit for bit; and as accurate as the reference's forward."""
    forms = (("angle", 0, False), ("all, with an offset", 5, True))
    for (places, smoothing), (margin, k, compact) in itertools.product(
        ((None, 0.0), (1, 0.1), (3, 0.0), (9, 0.1)), forms
    ):
        target = target_of(17, places, CLASSES)
        logits = odd_logits(target[:, None] if places is None else target, dtype)[:11]
        target = target[:11]
        weight = torch.linspace(0, 2, CLASSES, dtype=dtype) if places is None else weights_of(target, dtype)
        options = {"labels": places is not None, "label_smoothing": smoothing, "margin": MARGINS[margin]}
        spec = formula.spec(CLASSES, k, compact, -100 if places is None else -1, **options)
        for reduction in ("none", "mean"):
            loss, coefficients, *seen = cpp.forward(logits, target, weight, reduction, *spec)
            for ours, alone in zip(seen, cpp.statistics(logits, target, *spec), strict=True):
                assert torch.equal(ours, alone)
            finished = cpp.finish(seen[0], target, weight, reduction, *spec)
            assert all(map(torch.equal, (loss, coefficients), finished))
        truth, plain = (
            reference.forward(z, target, weight.to(z.dtype), "mean", *spec)[0] for z in (logits.double(), logits)
        )
        few = (x.double().view(1, 1) for x in (loss, plain, truth))
        assert_within(*few, dtype, torch.zeros(1), lambda _: f"loss of {spec}")


def test_digits_of_a_confident_label(isa):
    """sigma(z) - 1 is 0 in float32 where the multi-hot target and the class index have a gradient."""
    z = torch.tensor([10.0, 20.0, 40.0, 80.0])
    statistics = torch.stack((torch.zeros(4), torch.ones(4), torch.zeros(4), z), 1)
    expected = -torch.sigmoid(-z)
    index = torch.zeros(4, dtype=torch.int64)
    shifted = numbers_of(cosine=0.0)
    for _, coefficients in (
        cpp.finish(statistics, index[:, None], None, "none", *doors.LR.spec(9, ignore_index=None, labels=True)),
        finish.finish(statistics, index[:, None], None, "none", doors.LR.spec(9, ignore_index=None, labels=True)),
        cpp.finish(statistics[:, [0, 1, 3]], index, None, "none", *doors.LR.spec(9, margin=shifted)),
    ):
        torch.testing.assert_close(coefficients[:, -1], expected, rtol=1e-6, atol=0)


def test_an_angle_that_float32_does_not_hold(isa):
    """It clamps the cosine all the same."""
    for angle in (1e-50, -1e-50):
        spec = doors.NLLR.spec(9, margin=numbers_of(angle=angle))
        case = Case(torch.tensor([[0.0, 0.0, 30.0], [0.0, 0.0, -30.0]]), torch.tensor([0, 1]), None, "none", spec)
        torch.testing.assert_close(case.ours(), case.plain())
        assert case.ours()[0].tolist() == [-SCALE, SCALE]


def test_only_a_nan_poisons_a_row(isa):
    """A value of inf - inf or 0 * inf is NaN, the gradient is not."""
    labels, weight = torch.tensor([[0]]), torch.tensor([[2.0]])
    case = Case(
        torch.tensor([[1.0, INF, 0.0, INF]]), labels, weight, "none", doors.LR.spec(9, ignore_index=None, labels=True)
    )
    value, coefficients = case.ours()
    assert value.isnan() and coefficients.tolist() == [[1.0, 0.0, -1.0]] == case.plain()[1].tolist()
    spec = doors.LR._replace(alpha=0.0).spec(9, margin=MARGINS["angle"])
    case = Case(torch.tensor([[1.0, INF, 1.0]]), torch.tensor([0]), None, "none", spec)
    value, coefficients = case.ours()
    assert value.isnan() and coefficients[0, 0] == 0
    torch.testing.assert_close(coefficients, case.plain()[1])
    case = case._replace(statistics=torch.tensor([[1.0, 1.0, NAN]]), spec=doors.LR.spec(9, margin=MARGINS["angle"]))
    for _, coefficients in (case.ours(), case.plain()):
        assert coefficients.isnan().all()
