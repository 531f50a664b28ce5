"""Bad input: which error, and that it says what was got and what was expected. In torch's words where it has them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fused_losses as fl
from cases import CE, CRL, HS_LR, LOGISTIC, LOSSES, LR, SOFTMAX, SS_LR, each, make_index, make_logits, make_multihot

LOGITS, TARGET = make_logits(3, 5, torch.float32), make_index(3, 5)


def options(loss):
    return {"k": 2} if loss.needs_k else {}


def raises_as_torch(error, call_ours, call_torchs):
    """Both raise that error, and ours begins with torch's text."""
    with pytest.raises(error) as torchs:
        call_torchs()
    with pytest.raises(error) as ours:
        call_ours()
    text = str(torchs.value).rstrip(".")
    assert str(ours.value).startswith(text), f"{ours.value!s} does not begin as torch's: {text}"


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@each(LOSSES)
def test_logits_that_are_not_floating(loss, dtype):
    with pytest.raises(TypeError, match=f"floating-point logits.*got {dtype}"):
        loss(LOGITS.to(dtype), TARGET, **options(loss))


@pytest.mark.parametrize("shape", [(), (3, 5, 2), (3, 5, 2, 2)])
@each(LOSSES)
def test_logits_of_a_wrong_rank(loss, shape):
    with pytest.raises(ValueError, match=r"logits of shape \(N, C\) or \(C,\), got \(" + ", ".join(map(str, shape))):
        loss(torch.zeros(shape), TARGET, **options(loss))


def test_image_shaped_logits_get_a_hint_that_works():
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    with pytest.raises(ValueError, match=r"logits\.movedim\(1, -1\)\.flatten\(0, -2\)"):
        fl.cross_entropy(logits, target)
    value = fl.cross_entropy(logits.movedim(1, -1).flatten(0, -2), target.flatten())
    torch.testing.assert_close(value, F.cross_entropy(logits, target))


@each(LOSSES)
def test_logits_without_classes(loss):
    for logits, target in ((torch.zeros(3, 0), TARGET), (torch.zeros(0), torch.tensor(0))):
        with pytest.raises(ValueError, match="at least one class"):
            loss(logits, target, **options(loss))


@each(LOSSES)
def test_arguments_that_are_no_tensors(loss):
    with pytest.raises(TypeError, match="logits must be a Tensor, got list"):
        loss([[1.0, 2.0]], TARGET, **options(loss))
    with pytest.raises(TypeError, match="target must be a Tensor, got int"):
        loss(LOGITS, 3, **options(loss))
    with pytest.raises(TypeError, match="weight must be a Tensor, got list"):
        loss(LOGITS, TARGET, weight=[1.0] * 5, **options(loss))


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64], ids=str)
@each(LOSSES)
def test_index_targets_that_are_no_integers(loss, dtype):
    with pytest.raises(TypeError, match=f"class indices of an integer dtype, got {dtype}"):
        loss(LOGITS, TARGET.to(dtype), **options(loss))


@each(LOSSES)
def test_wrong_batch_size(loss):
    for target in (TARGET[:2], TARGET.repeat(2), TARGET[:0]):
        raises_as_torch(
            ValueError,
            lambda t=target: loss(LOGITS, t, **options(loss)),
            lambda t=target: F.cross_entropy(LOGITS, t),
        )


@each(SOFTMAX)
def test_column_of_indices_gets_torchs_message_and_a_hint(loss):
    raises_as_torch(
        (ValueError, RuntimeError),
        lambda: loss(LOGITS, TARGET[:, None]),
        lambda: F.cross_entropy(LOGITS, TARGET[:, None]),
    )


@each(LOSSES)
def test_column_of_indices_says_squeeze(loss):
    with pytest.raises(ValueError, match=r"got target \(3, 1\) for logits \(3, 5\); for class indices, squeeze"):
        loss(LOGITS, TARGET[:, None], **options(loss))


@each(SOFTMAX)
def test_multihot_targets_for_a_softmax_loss(loss):
    with pytest.raises(ValueError, match="multi-target not supported"):
        loss(LOGITS, make_multihot(3, 5))
    with pytest.raises(ValueError, match="multi-target not supported"):
        loss(LOGITS, make_multihot(3, 5).long())


@each(SOFTMAX)
def test_soft_targets_are_named(loss):
    with pytest.raises(ValueError, match=r"Labels.mixup\(y, y.flip\(0\), lam\).*Labels.from_dense\(target, 2\)"):
        loss(LOGITS, LOGITS.softmax(1))


@each(LOGISTIC)
def test_soft_targets_for_a_logistic_loss(loss):
    with pytest.raises(ValueError, match=r"must be 0 or 1.*row 1, class 2.*soft targets are Labels with weights"):
        target = make_multihot(3, 5).float()
        target[1, 2] = 0.25
        loss(LOGITS, target, **options(loss))


@pytest.mark.parametrize("wrong", [2, -1, 255])
@each(LOGISTIC)
def test_multihot_entries_other_than_0_and_1(loss, wrong):
    target = make_multihot(3, 5).long()
    target[2, 4] = wrong
    with pytest.raises(ValueError, match=r"must be 0 or 1.*row 2, class 4"):
        loss(LOGITS, target, **options(loss))


@each(LOGISTIC)
def test_multihot_targets_of_a_wrong_shape(loss):
    for shape in ((3, 4), (2, 5), (5, 3)):
        with pytest.raises(
            ValueError, match=rf"target size must be the same.*got target \({shape[0]}, {shape[1]}\) for"
        ):
            loss(LOGITS, torch.zeros(shape), **options(loss))


@each(LOGISTIC)
def test_complex_multihot_targets(loss):
    with pytest.raises(TypeError, match="complex64"):
        loss(LOGITS, make_multihot(3, 5).to(torch.complex64), **options(loss))


@each(LOSSES)
def test_targets_of_a_wrong_rank(loss):
    with pytest.raises(ValueError, match=r"class indices of shape \(3,\): got target \(\)"):
        loss(LOGITS, torch.tensor(1), **options(loss))
    with pytest.raises(ValueError, match=r"got target \(3, 5, 1\)"):
        loss(LOGITS, torch.zeros(3, 5, 1, dtype=torch.long), **options(loss))


@each(LOSSES)
def test_row_in_the_message_of_a_class_out_of_range(loss):
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds\..*row 1.*5 classes"):
        loss(LOGITS, torch.tensor([0, 5, 1]), **options(loss))
    raises_as_torch(
        IndexError,
        lambda: loss(LOGITS[0], torch.tensor(7), **options(loss)),
        lambda: F.cross_entropy(LOGITS[0], torch.tensor(7)),
    )


# Labels that are no classes, by name: what a NaN becomes, the ends of the integers, and what uint64 holds beyond int64.
LARGEST = 2**63 - 1
BAD_LABELS = {
    "int64 min": torch.tensor(-(2**63)),
    "int64 min + 1": torch.tensor(-(2**63) + 1),
    "int64 max": torch.tensor(LARGEST),
    "uint64 max": torch.tensor(2**64 - 1, dtype=torch.uint64),
    "uint64 that wraps to -100": torch.tensor(2**64 - 100, dtype=torch.uint64),
    "uint64 2**63": torch.tensor(2**63, dtype=torch.uint64),
    "uint32 max": torch.tensor(2**32 - 1, dtype=torch.uint32),
    "int32 min": torch.tensor(-(2**31), dtype=torch.int32),
    "uint16 max": torch.tensor(2**16 - 1, dtype=torch.uint16),
    "int8 min": torch.tensor(-128, dtype=torch.int8),
    "int8 max": torch.tensor(127, dtype=torch.int8),
    "uint8 max": torch.tensor(255, dtype=torch.uint8),
}
each_bad_label = pytest.mark.parametrize("bad", BAD_LABELS.values(), ids=BAD_LABELS.keys())


def among_classes(label: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(label), label, torch.full_like(label, 3)])


@each_bad_label
@each(LOSSES)
def test_labels_that_no_class_has(loss, bad):
    """Everywhere: logits, module, linear by picks, at once and again."""
    target, logits = among_classes(bad), make_logits(3, 50, torch.float32)
    x, weight, linear = torch.rand(3, 4), torch.rand(50, 4).requires_grad_(), loss.linear
    calls = [lambda k=k: loss(logits, target, k=k) for k in loss.ks(None, 1, 30)]
    calls += [
        lambda k=k, how=how: linear(x, weight, target, k=k, reduction=how)
        for k in loss.ks(None, 2, 30)
        for how in ("mean", "none")
    ]
    calls += [
        lambda: loss.module_class()(k=2)(logits, target),
        lambda: linear(x, weight, target, k=2, options=fl.LinearLossOptions(sparse_grad=True)),
        lambda: fl.LinearLoss(4, 50, loss=loss.module_class()(k=2))(x, target),
    ]
    said = min(bad.item(), LARGEST)
    for call in calls:
        with pytest.raises(IndexError, match=rf"^Target {said} is out of bounds\. \(row 1, 50 classes\)$"):
            call()


@pytest.mark.parametrize("label", [-(2**63), -(2**63) + 1, LARGEST, 3], ids=str)
@each(LOSSES)
def test_any_label_can_be_the_ignored_one(loss, label):
    """A class, too. Only the rows that have this label are ignored, whatever an unsigned one would wrap to."""
    target, logits = among_classes(torch.tensor(label)), make_logits(3, 50, torch.float32)
    target[2] = 7
    weight = torch.rand(50, 4)
    for k in loss.ks(None, 2, 30):
        options = {"k": k, "ignore_index": label, "reduction": "none"}
        for value in (
            loss(logits, target, **options),
            loss.linear(torch.rand(3, 4), weight, target, **options),
        ):
            assert (value == 0).tolist() == [False, True, False]
        beyond = torch.tensor(max(label % 2**64, 2**63), dtype=torch.uint64)
        with pytest.raises(IndexError, match="out of bounds"):
            loss(logits, among_classes(beyond), **options)


@each(LOSSES)
def test_tensors_on_different_devices(loss):
    for name, tensors in {
        "target": (LOGITS, TARGET.to("meta"), None),
        "weight": (LOGITS, TARGET, torch.ones(5, device="meta")),
    }.items():
        logits, target, weight = tensors
        with pytest.raises(RuntimeError, match=f"to be on the same device, but got {name} on meta.*cpu"):
            loss(logits, target, weight=weight, **options(loss))


# --- options ----------------------------------------------------------------------------------------------------------


@each(LOSSES)
def test_unknown_reduction(loss):
    for wrong in ("avg", "", None, "Mean"):
        with pytest.raises(ValueError, match=f"^{wrong} is not a valid value for reduction.*none, mean, sum"):
            loss(LOGITS, TARGET, reduction=wrong, **options(loss))
    raises_as_torch(
        ValueError,
        lambda: loss(LOGITS, TARGET, reduction="avg", **options(loss)),
        lambda: F.cross_entropy(LOGITS, TARGET, reduction="avg"),
    )


@pytest.mark.parametrize("k", [0, -1, -(10**9)])
@each(LOSSES)
def test_k_below_one(loss, k):
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        loss(LOGITS, TARGET, k=k)


@pytest.mark.parametrize("k", [2.0, 0.5, "3", [3]])
@each(LOSSES)
def test_k_that_is_no_integer(loss, k):
    with pytest.raises(TypeError, match=f"k must be an integer, got {type(k).__name__}"):
        loss(LOGITS, TARGET, k=k)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, 5, math.nan, math.inf])
@each(LOSSES)
def test_ratio_outside_its_range(loss, ratio):
    with pytest.raises(ValueError, match=rf"ratio must be in \(0, 1\], got {ratio}"):
        loss(LOGITS, TARGET, ratio=ratio)


@each(LOSSES)
def test_ratio_that_is_no_number(loss):
    with pytest.raises(TypeError, match="ratio must be a number, got str"):
        loss(LOGITS, TARGET, ratio="1%")


@each(LOSSES)
def test_k_and_ratio_together(loss):
    with pytest.raises(ValueError, match=r"got k=2 and ratio=0\.5"):
        loss(LOGITS, TARGET, k=2, ratio=0.5)


def test_hard_selection_without_a_size():
    with pytest.raises(ValueError, match="hs_lr_loss needs k or ratio"):
        fl.hs_lr_loss(LOGITS, TARGET)
    with pytest.raises(ValueError, match="hs_lr_loss needs k or ratio"):
        fl.HSLRLoss()


@pytest.mark.parametrize("name", ["k", "ratio", "alpha"])
def test_a_bool_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be .* got bool"):
        fl.hs_lr_loss(LOGITS, TARGET, **({} if name != "alpha" else {"k": 2}), **{name: True})


@pytest.mark.parametrize("wrong", [-100.0, "3", True, [3], 1j])
@each(LOSSES)
def test_ignore_index_that_is_no_integer(loss, wrong):
    message = f"ignore_index must be an integer, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=message):
        loss(LOGITS, TARGET, ignore_index=wrong, **options(loss))
    with pytest.raises(TypeError, match=message):
        loss.module_class()(ignore_index=wrong, **options(loss))
    with pytest.raises(TypeError, match=message):
        loss.linear(LOGITS, LOGITS, TARGET, ignore_index=wrong, **options(loss))


@pytest.mark.parametrize("wrong", [2**63, -(2**63) - 1, 2**64 - 100])
@each(LOSSES)
def test_ignore_index_beyond_int64(loss, wrong):
    with pytest.raises(ValueError, match=f"ignore_index must be an int64, got {wrong}"):
        loss(LOGITS, TARGET, ignore_index=wrong, **options(loss))


@each(LOSSES)
def test_ignore_index_of_numpy(loss):
    assert torch.equal(
        loss(LOGITS, TARGET, ignore_index=np.int64(TARGET[0]), **options(loss)),
        loss(LOGITS, TARGET, ignore_index=int(TARGET[0]), **options(loss)),
    )


LEAST = -(2**63)


@pytest.mark.parametrize("label", [-1, -2, -100, 5, LEAST, LEAST + 1, LEAST + 2, 2**63 - 1])
@each(LOSSES)
def test_no_label_is_ignored_where_none_is_to_be(loss, label):
    """ignore_index=None: there is no label that could not be somebody's mistake."""
    target = torch.tensor([0, label, 1])
    linear = loss.linear
    for k in (1, 4, 2):
        with pytest.raises(IndexError, match="out of bounds"):
            loss(LOGITS, target, ignore_index=None, k=k)
        with pytest.raises(IndexError, match="out of bounds"):
            linear(LOGITS, LOGITS.repeat(2, 1)[:5], target, ignore_index=None, k=k)
    assert torch.equal(loss(LOGITS, TARGET, ignore_index=None, **options(loss)), loss(LOGITS, TARGET, **options(loss)))


@each(LOGISTIC)
def test_ignore_index_none_with_multihot_targets(loss):
    target = make_multihot(3, 5)
    assert torch.equal(loss(LOGITS, target, ignore_index=None, **options(loss)), loss(LOGITS, target, **options(loss)))


@pytest.mark.parametrize("label", [2**64 - 100, 2**63, 2**64 - 1])
@each(LOSSES)
def test_unsigned_labels_are_never_negative(loss, label):
    """As int64 the first would be the default ignore_index."""
    target = torch.tensor(np.array([0, label, 1], dtype=np.uint64))
    for ignore_index in (-100, None, -1):
        with pytest.raises(IndexError, match="out of bounds"):
            loss(LOGITS, target, ignore_index=ignore_index, **options(loss))
    ignored = torch.tensor(np.array([0, 3, 1], dtype=np.uint64))
    assert loss(LOGITS, ignored, ignore_index=3, reduction="none", **options(loss))[1] == 0


@each(LOSSES)
def test_sparse_tensors_say_the_way_out(loss):
    for sparse in (LOGITS.to_sparse(), LOGITS.to_sparse_csr()):
        with pytest.raises(TypeError, match=r"logits must be a dense Tensor, .* give logits\.to_dense\(\)"):
            loss(sparse, TARGET, **options(loss))
    with pytest.raises(TypeError, match=r"target must be a dense Tensor, .* give target\.to_dense\(\)"):
        loss(LOGITS, make_multihot(3, 5).float().to_sparse(), **options(loss))
    with pytest.raises(TypeError, match=r"weight must be a dense Tensor, .* give weight\.to_dense\(\)"):
        loss(LOGITS, TARGET, weight=torch.ones(5).to_sparse(), **options(loss))
    linear = loss.linear
    with pytest.raises(TypeError, match=r"input must be a dense Tensor, .* give input\.to_dense\(\)"):
        linear(LOGITS.to_sparse(), LOGITS, TARGET, **options(loss))


@each(LOGISTIC)
def test_multihot_target_that_wants_a_gradient(loss):
    target = make_multihot(3, 5).float().requires_grad_()
    with pytest.raises(ValueError, match=r"not differentiable by a multi-hot target: pass target\.detach\(\)"):
        loss(LOGITS, target, **options(loss))
    with pytest.raises(ValueError, match=r"not differentiable by a multi-hot target: pass target\.detach\(\)"):
        loss.linear(LOGITS, LOGITS.repeat(2, 1)[:5], target, **options(loss))


HYPERS = [(CRL, "alpha"), (CRL, "beta"), (HS_LR, "alpha"), (SS_LR, "alpha"), (SS_LR, "gamma")]


@pytest.mark.parametrize("wrong", [-1, -1e-30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss, name", HYPERS, ids=str)
def test_hyper_parameters_outside_their_range(loss, name, wrong):
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got {wrong}"):
        loss(LOGITS, TARGET, **options(loss), **{name: wrong})
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got {wrong}"):
        loss.module_class()(**options(loss), **{name: wrong})


@pytest.mark.parametrize("wrong", ["1", None, [1.0], 1j])
@pytest.mark.parametrize("loss, name", HYPERS, ids=str)
def test_hyper_parameters_that_are_no_numbers(loss, name, wrong):
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(wrong).__name__}"):
        loss(LOGITS, TARGET, **options(loss), **{name: wrong})


@pytest.mark.parametrize("shape", [(4,), (6,), (), (5, 1), (1, 5)])
@each(LOSSES)
def test_weight_of_a_wrong_shape(loss, shape):
    message = (
        rf"either for all 5 classes or no classes but got weight tensor of shape: \[{', '.join(map(str, shape))}\]"
    )
    with pytest.raises(ValueError, match=message):
        loss(LOGITS, TARGET, weight=torch.ones(shape), **options(loss))


def test_weight_of_wrong_length_in_torchs_words():
    raises_as_torch(
        (ValueError, RuntimeError),
        lambda: fl.cross_entropy(LOGITS, TARGET, weight=torch.ones(4)),
        lambda: F.cross_entropy(LOGITS, TARGET, weight=torch.ones(4)),
    )


@each(LOSSES)
def test_weight_that_is_not_floating_or_wants_a_gradient(loss):
    with pytest.raises(TypeError, match=r"floating-point weight, got torch\.int64"):
        loss(LOGITS, TARGET, weight=torch.ones(5, dtype=torch.long), **options(loss))
    with pytest.raises(ValueError, match="not differentiable by weight"):
        loss(LOGITS, TARGET, weight=torch.ones(5, requires_grad=True), **options(loss))


@each(LOGISTIC)
def test_what_multihot_targets_exclude(loss):
    target = make_multihot(3, 5)
    with pytest.raises(ValueError, match=r"weight.*multi-hot"):
        loss(LOGITS, target, weight=torch.ones(5), **options(loss))
    for ignore_index in (0, -1, 255):
        with pytest.raises(ValueError, match=r"ignore_index.*multi-hot"):
            loss(LOGITS, target, ignore_index=ignore_index, **options(loss))
    loss(LOGITS, target, ignore_index=-100, **options(loss))  # the default, spelt out


@pytest.mark.parametrize("name", ["pos_weight", "sample_weight", "size_average", "reduce", "use_gpu"])
@each(LOSSES)
def test_arguments_not_in_this_version_are_named(loss, name):
    with pytest.raises(TypeError, match=name):
        loss(LOGITS, TARGET, **options(loss), **{name: 0.1})
    with pytest.raises(TypeError, match=name):
        loss.module_class()(**options(loss), **{name: 0.1})


@pytest.mark.parametrize(
    "loss, name", [(CE, "alpha"), (CE, "gamma"), (LR, "alpha"), (HS_LR, "gamma"), (CRL, "gamma")], ids=str
)
def test_hyper_parameters_of_another_loss_are_named(loss, name):
    with pytest.raises(TypeError, match=name):
        loss(LOGITS, TARGET, **options(loss), **{name: 1.0})


@each(LOSSES)
def test_options_are_keyword_only(loss):
    with pytest.raises(TypeError, match="positional"):
        loss(LOGITS, TARGET, 2)
    with pytest.raises(TypeError, match=r"takes its arguments by name, \w+\(k=100\), got 2"):
        loss.module_class()(2)


@each(LOSSES)
def test_modules_check_their_options_when_made(loss):
    """Not in the first step of a training run."""
    for wrong in ({"k": 0}, {"ratio": 2.0}, {"k": 1, "ratio": 0.5}, {"reduction": "avg", "k": 1}):
        with pytest.raises(ValueError, match=r"k|ratio|reduction"):
            loss.module_class()(**wrong)


@each(LOSSES)
def test_an_error_touches_nothing(loss):
    """Inputs as before, and no gradient half written."""
    logits, target = LOGITS.clone().requires_grad_(), torch.tensor([0, 1, 99])
    with pytest.raises(IndexError):
        loss(logits, target, **options(loss)).backward()
    assert logits.grad is None
    assert torch.equal(logits.detach(), LOGITS)
    assert target.tolist() == [0, 1, 99]
