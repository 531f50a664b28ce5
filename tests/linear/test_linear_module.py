"""A linear layer with a loss: the module."""

import pytest
import torch
import torch.nn.functional as F
from layers import CLASSES, FEATURES, ROWS, Watch, assert_same, cosines, each_layer, make_layer, value_and_grads
from torch import nn

import fused_losses as fl
from cases import (
    LOSSES,
    each,
    make_index,
)


@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_of_nn_linear_and_linear_loss_are_interchangeable(bias):
    theirs = nn.Linear(FEATURES, CLASSES, bias=bias)
    ours = fl.LinearLoss(FEATURES, CLASSES, bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, _, _ = make_layer(dtype=torch.float32)
    assert not torch.equal(ours.logits(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.logits(x), theirs(x))
    fresh = nn.Linear(FEATURES, CLASSES, bias=bias)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), theirs(x))


@pytest.mark.parametrize("bias", [False, True])
def test_initialisation_is_that_of_nn_linear(bias):
    torch.manual_seed(3)
    theirs = nn.Linear(FEATURES, CLASSES, bias=bias)
    torch.manual_seed(3)
    ours = fl.LinearLoss(FEATURES, CLASSES, bias=bias)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), parameter)
    before = ours.weight.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.weight, before)


def test_logits_of_cosines_are_differentiable_and_copy_no_weight(monkeypatch):
    monkeypatch.setattr("fused_losses.linear.MIB", 100 * 300)
    x, w, _ = make_layer(3, 300, 500)
    module = fl.LinearLoss(300, 500, normalize=True, scale=16.0, dtype=torch.float64)
    module.weight = nn.Parameter(w)
    with torch.no_grad(), Watch() as watch:
        module.logits(x)
    assert watch.largest < w.numel()
    expected = value_and_grads(lambda x, w: cosines(x, w, 16.0).square().sum(), x, w)
    value = module.logits(x.requires_grad_()).square().sum()
    assert_same([value.detach(), *torch.autograd.grad(-1.7 * value, (x, module.weight))], expected)


@each_layer
@each(LOSSES)
def test_module_is_the_function_with_the_options_of_its_loss(loss, normalize):
    (x, *_), target = make_layer(), make_index(ROWS, CLASSES)
    target[0] = 9
    arguments = {
        **loss.hypers[1 % len(loss.hypers)],
        "k": 3,
        "weight": torch.rand(CLASSES),
        "ignore_index": 9,
        "reduction": "sum",
    }
    layer = {"normalize": True, "scale": 8.0} if normalize else {}
    module = fl.LinearLoss(
        FEATURES, CLASSES, loss=loss.module_class()(**arguments), bias=not normalize, dtype=torch.float64, **layer
    )
    value = module(x, target)
    expected = loss.linear(x, module.weight, target, linear_bias=module.bias, **arguments, **layer)
    assert torch.equal(value, expected)
    torch.testing.assert_close(value, loss(module.logits(x), target, **arguments))
    assert set(module.state_dict()) == {"weight", "loss.weight"} | ({"bias"} if not normalize else set())


def test_module_defaults_to_cross_entropy_and_shows_its_settings():
    (x, *_), target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)
    module = fl.LinearLoss(FEATURES, CLASSES)
    torch.testing.assert_close(module(x, target), F.cross_entropy(module.logits(x), target))
    assert "in_features=8, num_classes=100, bias=False" in repr(module)
    shown = repr(
        fl.LinearLoss(
            FEATURES,
            CLASSES,
            loss=fl.HSLRLoss(k=3),
            normalize=True,
            scale=8.0,
            options=fl.LinearLossOptions(sparse_grad=True),
        )
    )
    for part in ("normalize=True, scale=8.0", "sparse_grad=True", "HSLRLoss", "k=3"):
        assert part in shown


def test_a_training_step_of_the_module_is_that_of_nn_linear_and_the_loss():
    (x, *_), target = make_layer(), make_index(ROWS, CLASSES)
    theirs, loss = nn.Linear(FEATURES, CLASSES, dtype=torch.float64), fl.HSLRLoss(k=3)
    ours = fl.LinearLoss(FEATURES, CLASSES, loss=loss, bias=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    for model, value in ((ours, lambda: ours(x, target)), (theirs, lambda: loss(theirs(x), target))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
