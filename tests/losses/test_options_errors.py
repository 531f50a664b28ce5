"""What cannot be: margins, smoothing and labels. Every message names the way out."""

import pytest
import torch
from torch import nn

import fused_losses as fl
from cases import CE, CRL, HS_LR, LOGISTIC, LOSSES, LR, NLLR, SOFTMAX, SS_LR, each
from options import CLASSES, EVERY_LOSS, OWN, ROWS, SCALE, SMOOTHED, make_logits

LOGITS, TARGET = make_logits(torch.float32), torch.tensor([7, 12, 0, 39, 20, 3])
REFUSAL = (TypeError, ValueError)
PAIR = torch.tensor([[7, 8]] * ROWS)


def refused(match: str, loss, *args, **options) -> str:
    with pytest.raises(REFUSAL, match=match) as error:
        loss(*args, **({"k": 5} | options))
    return str(error.value)


# --- margins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.5, {"angle": 0.5}, (0.5, 0.0), torch.tensor(0.5)], ids=str)
@each(EVERY_LOSS)
def test_a_margin_that_is_no_margin(loss, margin):
    refused(r"Margin\(", loss, LOGITS, TARGET, margin=margin)


@pytest.mark.parametrize("name, value", [
    ("angle", 3.2), ("angle", -3.2), ("angle", float("nan")), ("angle", "0.5"), ("angle", 28.6),
    ("cosine", float("inf")), ("cosine", float("nan")), ("cosine", None),
    ("scale", 0.0), ("scale", -1.0), ("scale", float("inf")), ("scale", float("nan")), ("scale", "64"),
], ids=str)  # fmt: skip
def test_numbers_of_a_margin(name, value):
    with pytest.raises(REFUSAL, match=name):
        fl.cross_entropy(LOGITS, TARGET, margin=fl.Margin(**{name: value}))


def test_an_angle_needs_a_scale():
    """Of logits that are no cosines it would make nothing."""
    refused("scale", CE, LOGITS, TARGET, margin=fl.Margin(angle=0.5))
    refused("scale", CE, LOGITS, TARGET, margin=fl.Margin(angle=torch.full((ROWS,), 0.5)))


def test_degrees_are_named():
    """28.6 is what other libraries' default margin is in degrees."""
    with pytest.raises(ValueError, match="radians"):
        fl.Margin(angle=28.6)


@pytest.mark.parametrize("name", ["angle", "cosine"])
@each((CE, LR, OWN))
def test_margins_of_another_number_of_rows(loss, name):
    for shape in ((ROWS - 1,), (ROWS, 1), (CLASSES,), (1,)):
        with pytest.raises(REFUSAL, match=name) as error:
            loss(LOGITS, TARGET, k=5, margin=fl.Margin(**{name: torch.zeros(shape)}, scale=SCALE))
        assert str(ROWS) in str(error.value) or "(N,)" in str(error.value)


@each(LOGISTIC)
def test_a_margin_with_dense_multihot_targets(loss):
    dense = torch.zeros(ROWS, CLASSES).scatter(1, TARGET[:, None], 1)
    refused("Labels", loss, LOGITS, dense, margin=fl.Margin(cosine=0.1))


# --- smoothing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@each(SMOOTHED)
def test_smoothing_out_of_range(loss, value):
    refused("label_smoothing", loss, LOGITS, TARGET, label_smoothing=value)


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]], ids=str)
def test_smoothing_that_is_no_number(value):
    refused("label_smoothing", CE, LOGITS, TARGET, label_smoothing=value)


@each((HS_LR, SS_LR))
def test_smoothing_of_a_loss_that_has_none(loss):
    for make in (
        lambda: loss(LOGITS, TARGET, k=5, label_smoothing=0.1),
        lambda: loss.module_class()(k=5, label_smoothing=0.1),
    ):
        with pytest.raises(REFUSAL, match=r"label_smoothing"):
            make()
    assert loss(LOGITS, TARGET, k=5).isfinite()


@each(SMOOTHED)
def test_smoothing_with_class_weights(loss):
    message = refused("label_smoothing", loss, LOGITS, TARGET, label_smoothing=0.1, weight=torch.ones(CLASSES))
    assert "weight" in message
    with pytest.raises(REFUSAL, match="label_smoothing"):
        loss.module_class()(label_smoothing=0.1, weight=torch.ones(CLASSES))


def test_smoothing_of_targets_without_weights():
    dense = torch.zeros(ROWS, CLASSES).scatter(1, TARGET[:, None], 1)
    for target in (dense, fl.Labels(PAIR)):
        refused("label_smoothing", LR, LOGITS, target, label_smoothing=0.1)


# --- labels -----------------------------------------------------------------------------------------------------------


@each((*SOFTMAX, OWN))
def test_labels_without_weights(loss):
    refused("weight", loss, LOGITS, fl.Labels(PAIR))


@each(EVERY_LOSS)
def test_class_weights_with_labels(loss):
    labels = fl.Labels(PAIR, torch.full((ROWS, 2), 0.5))
    refused("weight", loss, LOGITS, labels, weight=torch.ones(CLASSES))


@each(EVERY_LOSS)
def test_labels_of_another_number_of_rows(loss):
    for rows in (ROWS - 1, 1):
        refused(r"labels \(N, P\)", loss, LOGITS, fl.Labels(PAIR[:rows], torch.ones(rows, 2)))
    refused(r"labels \(N, P\)", loss, LOGITS[0], fl.Labels(PAIR, torch.ones(ROWS, 2)))
    refused(r"labels \(N, P\)", loss, LOGITS, fl.Labels(PAIR[0], torch.ones(2)))


@pytest.mark.parametrize("bad", [CLASSES, -2, -100, 2**40])
@each(EVERY_LOSS)
def test_labels_that_are_no_classes(loss, bad):
    index = PAIR.clone()
    index[3, 1] = bad
    for k in (5, CLASSES - 1):
        with pytest.raises(IndexError, match=str(bad)):
            loss(LOGITS, fl.Labels(index, torch.full((ROWS, 2), 0.5)), k=k)


def test_what_labels_are_made_of():
    weight = torch.full((ROWS, 2), 0.5)
    for index, given in (
        (PAIR.float(), weight),
        (PAIR.bool(), weight),
        (PAIR.tolist(), weight),
        (PAIR, weight.long()),
        (PAIR, weight[:, :1]),
        (PAIR, weight[:3]),
        (PAIR, 0.5),
        (PAIR[None], weight[None]),
        (torch.zeros(ROWS, 0, dtype=torch.long), torch.zeros(ROWS, 0)),
    ):
        with pytest.raises(REFUSAL):
            fl.cross_entropy(LOGITS, fl.Labels(index, given))


def test_what_mixup_is_made_of():
    other = torch.tensor([8, 12, 1, 0, 3, 20])
    for a, b, lam in (
        (TARGET, other[:3], 0.5),
        (TARGET.float(), other, 0.5),
        (TARGET, other, torch.rand(3)),
        (TARGET, other, None),
        (TARGET, other, torch.rand(ROWS, 1)),
        (PAIR, PAIR, 0.5),
    ):
        with pytest.raises((*REFUSAL, RuntimeError)):
            fl.cross_entropy(LOGITS, fl.Labels.mixup(a, b, lam))


@each((*SOFTMAX, OWN))
def test_dense_soft_targets_are_shown_the_line(loss):
    soft = torch.full((ROWS, CLASSES), 1 / CLASSES)
    message = refused("Labels", loss, LOGITS, soft)
    assert "from_dense" in message
    refused("Labels", loss, LOGITS, soft.double())


def test_the_line_for_timms_mixup_works():
    from test_paper import peer

    value = fl.cross_entropy(
        peer("mixup_batch", "logits"), fl.Labels.from_dense(peer("mixup_batch", "plain_target"), 2), label_smoothing=0.1
    )
    torch.testing.assert_close(value, peer("mixup_batch", "value"), rtol=1e-12, atol=0)


@each(SOFTMAX)
def test_padding_in_a_plain_target_is_shown_labels(loss):
    """(N, P) class indices with -1, as data sets pad them."""
    refused("Labels", loss, LOGITS, torch.tensor([[7, -1]] * ROWS))


@each(LOGISTIC)
def test_padded_indices_for_a_logistic_loss(loss):
    refused("Labels", loss, LOGITS, torch.tensor([[7, -1]] * ROWS))


def test_a_class_index_of_minus_1():
    """What pads elsewhere is here no class."""
    target = TARGET.clone()
    target[2] = -1
    with pytest.raises(IndexError, match="-1"):
        fl.cross_entropy(LOGITS, target)


# --- arguments in the wrong place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_positional_k(loss):
    """HSLRLoss(100): the message says k=100."""
    with pytest.raises(TypeError) as error:
        loss.module_class()(100)
    if loss == HS_LR:
        assert "k=100" in str(error.value)


@pytest.mark.parametrize("loss", (CE, NLLR, CRL, LR, SS_LR), ids=str)
def test_swapped_arguments(loss):
    message = refused("logits come first", loss, TARGET, LOGITS)
    assert "logits" in message and "target" in message


def test_a_layer_without_target():
    head = fl.LinearLoss(4, CLASSES)
    with pytest.raises(TypeError, match="logits") as error:
        head(torch.randn(3, 4))
    if hasattr(head, "topk"):
        assert "topk" in str(error.value)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), "ce", fl.CrossEntropyLoss], ids=str)
def test_a_layer_with_anothers_loss(loss):
    """The message names one of ours."""
    with pytest.raises(TypeError, match=r"(fl|fused_losses)\.[A-Z]\w+Loss"):
        fl.LinearLoss(4, CLASSES, loss=loss)


def test_a_layer_with_sequences():
    head = fl.LinearLoss(4, CLASSES)
    with pytest.raises(ValueError, match="flatten"):
        head(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    head(torch.randn(2, 3, 4).flatten(0, 1), torch.zeros(2, 3, dtype=torch.long).flatten())
