"""Losses of a classifier whose classes are sharded over ranks: values and gradients of the whole, on every rank."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_losses as fl
import paper
from bench.speed.scale import Setup, load, traffic
from cases import (
    CE,
    CRL,
    HS_LR,
    LOGISTIC,
    LOSSES,
    LR,
    SOFTMAX,
    Loss,
    make_index,
    make_logits,
    make_multihot,
    make_target,
    value_and_grad,
)
from fused_losses.losses import LossSpec
from fused_losses.merge import merge
from fused_losses.shard import ClassShard, gather
from ranks import refusal

ROWS = 12
# ranks, classes: none divides the classes evenly; of the four ranks with 5 classes the last has none
WORLDS = ((1, 751), (2, 751), (3, 1000), (4, 751), (4, 5))
each_world = pytest.mark.parametrize("ranks, classes", WORLDS)


def columns(shard: ClassShard) -> slice:
    return slice(shard.start, shard.stop)


def of_shard(shard: ClassShard, loss: Loss, logits, target, upstream=None, **options):
    """Value and gradient by this rank's columns, as lists: tensors would travel as files."""
    local = target if target.dim() < logits.dim() else target[..., columns(shard)]
    value, grad = value_and_grad(
        lambda z: loss(z, local, shard=shard, **options), logits[..., columns(shard)], upstream
    )
    return value.numpy(), grad.float().numpy()


def many_of_shard(group, edges, cases) -> list:
    """of_shard of every case; edges None: ClassShard.split."""
    shards = {}
    results = []
    for loss, logits, target, upstream, options in cases:
        classes = logits.shape[-1]
        if classes not in shards:
            rank = dist.get_rank(group)
            shards[classes] = (
                ClassShard.split(classes, group)
                if edges is None
                else ClassShard(edges[rank], edges[rank + 1], classes, group)
            )
        results.append(of_shard(shards[classes], loss, logits, target, upstream, **options))
    return results


def whole(answers: list) -> list:
    """(value, gradient) of every case: one value, the same bits on every rank, and the gradients side by side."""
    merged = []
    for of_ranks in zip(*answers, strict=True):
        values, grads = zip(*of_ranks, strict=True)
        assert len({value.tobytes() for value in values}) == 1, "the ranks do not hold the same loss"
        merged.append((torch.from_numpy(values[0]), torch.cat([torch.from_numpy(grad) for grad in grads], dim=-1)))
    return merged


def compare(world, ranks, cases, edges=None) -> list:
    """Runs the cases sharded and holds them to the same losses of whole rows, NaN where these are NaN."""
    results = whole(world.run(ranks, many_of_shard, edges, cases))
    for (loss, logits, target, upstream, options), (value, grad) in zip(cases, results, strict=True):
        expected, expected_grad = value_and_grad(lambda z: loss(z, target, **options), logits, upstream)
        what = f"{loss}, {tuple(logits.shape)}, {logits.dtype}, {options}"
        torch.testing.assert_close(value, expected, equal_nan=True, msg=lambda text: f"{what}: {text}")
        torch.testing.assert_close(
            grad, expected_grad.float(), equal_nan=True, rtol=1e-5 if logits.dtype == torch.float32 else 1e-2,
            atol=1e-7, msg=lambda text: f"{what}: {text}",
        )  # fmt: skip
    return results


def truth(loss: Loss, logits, target, k, options, upstream):
    """Value and gradient in float64."""
    hyper = {name: options[name] for name in ("alpha", "beta", "gamma") if name in options}
    return value_and_grad(lambda z: loss.paper(z, target, k, **hyper), logits.double(), upstream)


# --- exactness --------------------------------------------------------------------------------------------------------


@each_world
def test_as_exact_as_whole_rows(world, ranks, classes):
    """The error against float64 is at most twice that of whole rows plus 1e-7 of the largest entry; every loss, every
    hyper-parameter, all negatives and the k hardest."""
    logits = make_logits(ROWS, classes, torch.float32)
    upstream = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    cases, ks = [], []
    for loss, form in itertools.product(LOSSES, ("index", "multihot")):
        if form == "multihot" and loss in SOFTMAX:
            continue
        target = make_target(form, ROWS, classes)
        for hyper, k in itertools.product(loss.hypers, loss.ks(None, 1, 3, 100, classes)):
            cases.append((loss, logits, target, upstream, {"k": k, "reduction": "none"} | hyper))
            ks.append(k)
    results = whole(world.run(ranks, many_of_shard, None, cases))
    for k, case, ours in zip(ks, cases, results, strict=True):
        loss, logits, target, _, options = case
        unsharded = value_and_grad(lambda z: loss(z, target, **options), logits, upstream)
        judge = truth(loss, logits, target, k, options, upstream)
        for what, mine, of_whole, true in zip(("value", "gradient"), ours, unsharded, judge, strict=True):
            error, allowed = (mine.double() - true).abs().max(), (of_whole.double() - true).abs().max()
            bound = 2 * allowed + 1e-7 * max(1, true.abs().max())
            assert error <= bound, f"{loss} {options} {what}: {error:.2e}, whole rows {allowed:.2e}"


@each_world
def test_the_k_hardest_are_those_of_whole_rows(world, ranks, classes):
    """Among equal logits the lowest class first, wherever the ranks' borders are: the gradient touches S and the
    positives, nothing else."""
    logits = make_logits(ROWS, classes, torch.float32).div(3).mul(2).round().div(2)  # some ten values
    logits[0] = 0
    logits[1, ::2] = -0.0
    cases = []
    for loss, form, k in itertools.product((HS_LR, CE), ("index", "multihot"), (1, 3, 100)):
        if form == "index" or loss in LOGISTIC:
            cases.append((loss, logits, make_target(form, ROWS, classes, seed=2), None, {"k": k, "reduction": "sum"}))
    for (_, _, target, _, options), (_, grad) in zip(
        cases, whole(world.run(ranks, many_of_shard, None, cases)), strict=True
    ):
        touched = paper.positives(logits, target) | paper.negatives(logits, target, options["k"])
        assert torch.equal(grad != 0, touched)


@pytest.mark.parametrize("edges", [(0, 1, 1, 10), (0, 0, 10, 10), (0, 7, 9, 10), (0, 0, 0, 10)], ids=str)
def test_uneven_and_empty_shards(world, edges):
    logits = make_logits(ROWS, 10, torch.float32)
    logits[::2] -= 500  # a rank without negatives must not stand for a logit of 0
    compare(world, 3, [
        (loss, logits, make_target(form, ROWS, 10), None, {"k": k})
        for loss, form in itertools.product(LOSSES, ("index", "multihot"))
        for k in loss.ks(None, 1, 6)
        if form == "index" or loss in LOGISTIC
    ], edges)  # fmt: skip


def test_options_mean_what_they_mean_for_whole_rows(world):
    classes = 751
    logits, target = make_logits(ROWS, classes, torch.float32), make_index(ROWS, classes)
    target[::3] = 5
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(3))
    everything = (
        {}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": weight}, {"weight": weight, "reduction": "none"},
        {"ignore_index": 5}, {"ignore_index": 5, "weight": weight}, {"ignore_index": 5, "reduction": "none"},
        {"ratio": 0.01}, {"ratio": 0.5, "ignore_index": 5}, {"ratio": 1.0}, {"check_targets": True},
    )  # fmt: skip
    cases = []
    for label, loss in itertools.product((-(2**63), -(2**63) + 1, 2**63 - 1, 300), LOSSES):
        for k in loss.ks(None, 7):
            ignoring = {"ignore_index": label, "k": k, "reduction": "none"}
            cases.append((loss, logits, target.where(target != 5, label), None, ignoring))
    for loss, options in itertools.product(LOSSES, everything):
        if loss.needs_k and "ratio" not in options:
            options = options | {"k": 7}
        cases.append((loss, logits, target, None, options))
    cases += [(loss, logits, target.int(), None, {"k": 2}) for loss in LOSSES]
    cases += [(loss, logits[0], target[0], None, {"k": 2, "reduction": "none"}) for loss in LOSSES]
    cases += [(loss, logits[0], make_multihot(2, classes)[1], None, {"k": 2}) for loss in LOGISTIC]
    compare(world, 3, cases)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(world, dtype):
    """16-bit logits are picked as they are: ties that float32 would not have are broken as in whole rows."""
    logits = make_logits(ROWS, 1000, dtype)
    cases = [(loss, logits, make_index(ROWS, 1000), None, {"k": k}) for loss in LOSSES for k in loss.ks(None, 9)]
    cases += [(loss, logits, make_multihot(ROWS, 1000), None, {"k": 9}) for loss in LOGISTIC]
    compare(world, 3, cases)


def autocast_losses(group) -> list[list[float]]:
    """Of this rank's classes and of all, with logits of one 16-bit dtype under autocast to the other."""
    shard = ClassShard.split(10, group)
    target, answers = make_index(ROWS, 10), []
    for dtype, other in itertools.permutations((torch.float16, torch.bfloat16)):
        logits, weight = make_logits(ROWS, 10, dtype), make_logits(10, 4, torch.float32)
        x = make_logits(ROWS, 4, dtype)
        with torch.autocast("cpu", other):
            for k in (None, 3):
                mine = fl.cross_entropy(logits[:, columns(shard)], target, k=k, shard=shard)
                answers.append([mine.item(), fl.cross_entropy(logits, target, k=k).item()])
            for rows, options in ((slice(None), {}), (slice(dist.get_rank(group), None, 2), {"gather_input": True})):
                mine = fl.linear_cross_entropy(x[rows], weight[columns(shard)], target[rows], shard=shard, **options)
                answers.append([mine.item(), fl.linear_cross_entropy(x, weight, target).item()])
    return answers


def test_autocast(world):
    for pairs in world.run(2, autocast_losses):
        for mine, of_whole in pairs:
            assert mine == pytest.approx(of_whole, rel=1e-3)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_odd(world):
    """NaN, infinities and masked classes on one rank alone: the row is on every rank what it is as a whole."""
    classes = 11
    logits = make_logits(10, classes, torch.float32)
    target = make_index(10, classes)
    target[:3] = 0
    logits[0, 10] = torch.nan
    logits[1, 4] = -torch.nan
    logits[2, 0] = torch.nan
    logits[3, (target[3] + 6) % classes] = torch.inf
    logits[4, target[4]] = torch.inf
    logits[5, :8] = -torch.inf
    logits[6] = -torch.inf
    logits[7, target[7]] = -torch.inf
    logits[8] = F.one_hot(target[8], classes).log()  # the target alone is finite
    logits[9, :] = 6e4
    cases = []
    for loss in LOSSES:
        for hyper, k in itertools.product(loss.hypers, loss.ks(None, 1, 4)):
            cases.append((loss, logits, target, None, {"k": k, "reduction": "none"} | hyper))
            if loss in LOGISTIC:
                multihot = make_multihot(10, classes)
                cases.append((loss, logits, multihot, None, {"k": k, "reduction": "none"} | hyper))
    for ranks in (2, 4):
        results = compare(world, ranks, cases)
        assert all(grad[:3].isnan().all() for _, grad in results)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_rows_and_nothing_but_ignored_rows(world, rows):
    logits, target = make_logits(rows, 10, torch.float32), torch.full((rows,), -100)
    logits[1:2] = torch.nan
    compare(world, 4, [
        (loss, logits, target, None, {"k": k, "reduction": reduction})
        for loss, reduction in itertools.product(LOSSES, ("mean", "sum", "none"))
        for k in loss.ks(None, 2)
    ])  # fmt: skip


def merged_nan(group) -> list[bool]:
    """Whether the margin is NaN where a door tells of one in m, l or z_y alone."""
    shard, answers = ClassShard.split(10, group), []
    for column, k in itertools.product(range(3), (0, 2)):
        state = torch.zeros(1, 3)
        state[0, column] = torch.nan
        picks = torch.arange(k, dtype=torch.int32)[None], torch.zeros(1, k)
        spec = LossSpec("nllr", [], None, k, None, 0, 10, True)
        (merged,), *_ = merge(shard, (state, *picks), torch.zeros(1, dtype=torch.long), spec)
        answers.append((merged[2] - merged[0] - merged[1]).isnan().item())
    return answers


def test_a_row_that_a_door_calls_nan_is_nan(world):
    assert all(map(all, world.run(2, merged_nan)))


# --- errors -----------------------------------------------------------------------------------------------------------


def shards_of(group, ranges) -> str:
    return refusal(ClassShard, *ranges[dist.get_rank(group)], group)


@pytest.mark.parametrize("ranges", [
    ((0, 4, 10), (5, 10, 10)),  # a gap
    ((0, 5, 10), (4, 10, 10)),  # an overlap
    ((5, 10, 10), (0, 5, 10)),  # not in the order of the ranks
    ((0, 5, 10), (5, 9, 10)),  # not to the end
    ((0, 5, 10), (5, 11, 10)),
    ((0, 5, 10), (5, 10, 11)),  # not the same classes
    ((0, 12, 10), (12, 10, 10)),
    ((0, 0, 0), (0, 0, 0)),
], ids=str)  # fmt: skip
def test_shards_that_do_not_tile_raise_on_every_rank_alike(world, ranges):
    first, second = world.run(2, shards_of, ranges)
    assert first == second
    assert "ValueError: the ranks' class shards must tile" in first and f"of {ranges[0][2]}, [" in first


def outside(group) -> str:
    return refusal(ClassShard.split, 10, dist.new_group([0, 1]))  # which all ranks have to call


def test_ranks_outside_of_the_group(world):
    first, second, *others = world.run(4, outside)
    assert first == second == "no error"
    assert others == [
        f"ValueError: rank {rank} is not one of the group whose ranks share the classes" for rank in (2, 3)
    ]


def errors(group) -> list[str]:
    shard = ClassShard.split(10, group)
    logits, target = torch.zeros(3, len(shard)), torch.tensor([0, 9, 10])
    return [
        refusal(fl.cross_entropy, logits, target, shard=shard),
        refusal(fl.cross_entropy, torch.zeros(3, 9), target, shard=shard),
        refusal(fl.cross_entropy, logits, target, weight=torch.ones(len(shard)), shard=shard),
        refusal(fl.lr_loss, logits, torch.zeros(3, 10), shard=shard),
        refusal(fl.cross_entropy, logits, target, shard=(0, 5)),
    ]


BAD_LABELS = (10, -1, -(2**63), -(2**63) + 1, 2**63 - 1)


def refused_labels(group) -> list[str]:
    """From logits, and linear by picks and in chunks."""
    shard = ClassShard.split(10, group)
    logits, x, weight = torch.zeros(3, len(shard)), torch.zeros(3, 4), torch.zeros(len(shard), 4)
    targets = [torch.tensor([0, 9, bad]) for bad in BAD_LABELS] + [
        torch.tensor([0, 9, 2**64 - 100], dtype=torch.uint64)
    ]
    sparse = fl.LinearLossOptions(sparse_grad=True)
    return [
        said
        for target in targets
        for said in (
            refusal(fl.cross_entropy, logits, target, shard=shard),
            refusal(fl.hs_lr_loss, logits, target, k=2, shard=shard),
            refusal(LR.linear, x, weight, target, shard=shard),
            refusal(CRL.linear, x, weight, target, k=2, shard=shard, options=sparse),
        )
    ]


@pytest.mark.parametrize("ranks", [1, 4])
def test_labels_that_no_rank_has(world, ranks):
    for of_rank in world.run(ranks, refused_labels):
        for bad, said in zip((*BAD_LABELS, 2**63 - 1), zip(*[iter(of_rank)] * 4, strict=True), strict=True):
            assert set(said) == {f"IndexError: Target {bad} is out of bounds. (row 2, 10 classes)"}


def test_errors(world):
    for target, width, weight, multi_hot, kind in world.run(4, errors):  # the last rank has one class
        assert target.startswith("IndexError: Target 10 is out of bounds. (row 2, 10 classes)")
        assert width.startswith("ValueError: expected logits of this rank's") and width.endswith("got (3, 9)")
        assert weight.startswith("ValueError: weight tensor should be defined either for all 10 classes")
        assert multi_hot.startswith("ValueError: multi-hot target size must be the same as logits size")
        assert kind == "TypeError: shard must be a ClassShard, got tuple"


def test_without_torch_distributed():
    for make in (lambda: ClassShard(0, 3, 3), lambda: ClassShard.split(3)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            make()


def sent(group, setups) -> list[list[int]]:
    """Bytes that this rank puts into each collective for one cross-entropy, forward and backward."""
    offered = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_to_all_single")}

    def counting(collective):
        def call(theirs, mine, *arguments, **options):
            offered[-1].append(mine.nbytes)
            return collective(theirs, mine, *arguments, **options)

        return call

    for name, collective in originals.items():
        setattr(dist, name, counting(collective))
    try:
        for setup in setups:
            offered.append([])
            shard = ClassShard.split(setup.classes, group)
            logits = torch.zeros(setup.rows, len(shard), dtype=torch.bfloat16, requires_grad=True)
            target = torch.zeros(setup.rows, dtype=torch.long)
            fl.cross_entropy(logits, target, k=setup.k or None, shard=shard).backward()
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)
    return offered


def test_sends_what_the_formulas_of_bench_scale_say(world):
    setups = [Setup(classes=100, ranks=3, rows=7, k=k) for k in (0, 1, 20, 50)]
    assert world.run(3, sent, setups) == [[setup.collectives() for setup in setups]] * 3


def test_docs_hold_the_tables_of_bench_scale():
    setups = [Setup(c, ranks, k=k) for c in (10**7, 10**8) for ranks in (8, 16, 32, 64) for k in (0, 100)]
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    assert traffic(setups) in text and load(setups) in text


# --- as part of a program ---------------------------------------------------------------------------------------------


def program(group) -> dict:
    shard = ClassShard.split(10, group)
    logits = make_logits(4, 10, torch.float32)[:, columns(shard)].requires_grad_()
    target = make_index(4, 10)
    module = copy.deepcopy(fl.HSLRLoss(k=3, shard=shard))
    before = logits.detach().clone()
    loss = module(logits, target)
    second = refusal(lambda: torch.autograd.grad(loss, logits, create_graph=True)[0].sum().backward())
    loss.backward(torch.tensor(3.0))
    return {
        "twin": torch.equal(loss, fl.hs_lr_loss(logits, target, k=3, shard=shard)),
        "untouched": torch.equal(logits, before),
        "strided": torch.equal(module(logits.detach().t().contiguous().t(), target), loss),
        "repr": f"shard=ClassShard(start={shard.start}, stop={shard.stop}, num_classes=10" in repr(module),
        "second": second.startswith("RuntimeError: the losses of fused_losses are differentiable once"),
        "true": bool(shard),
        "gathered": [part.tolist() for part in gather(shard, torch.tensor([len(shard)]), torch.ones(1, 2).half())],
    }


def test_modules_and_autograd(world):
    for answer in world.run(4, program):
        assert answer.pop("gathered") == [[[3], [3], [3], [1]], [[[1.0, 1.0]]] * 4]
        assert all(answer.values()), answer


def compiled(group) -> list[bool]:
    shard = ClassShard.split(10, group)
    step = torch.compile(
        lambda logits, target: 2 * fl.hs_lr_loss(logits / 2, target, k=3, shard=shard), backend="eager"
    )
    answers = []
    for seed in (0, 1):
        logits, target = make_logits(4, 10, torch.float32, seed=seed)[:, columns(shard)], make_index(4, 10, seed=seed)
        twin = logits.clone().requires_grad_()
        step(logits.requires_grad_(), target).backward()
        (2 * fl.hs_lr_loss(twin / 2, target, k=3, shard=shard)).backward()
        answers.append(torch.equal(logits.grad, twin.grad))
    head = fl.LinearLoss(4, 10, normalize=True, scale="learned", logit_bias=True, shard=shard)
    gradients = []
    for layer in (head, torch.compile(head, backend="eager")):
        head.zero_grad()
        layer(logits.detach()[:, :4], target).backward()
        gradients.append([p.grad.to_local() for p in head.parameters()])
    answers.append(all(map(torch.equal, *gradients)))
    return answers


def test_torch_compile_goes_around_it(world):
    """A graph break: collectives stay in the order in which they were written."""
    assert world.run(2, compiled) == [[True] * 3] * 2
