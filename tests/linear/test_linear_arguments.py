"""A linear layer with a loss: arguments."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from layers import (
    CLASSES,
    ROWS,
    cosines,
    each_chunk,
    each_way,
    k_of,
    make_layer,
    picked_classes,
)
from torch import nn

import fused_losses as fl
from cases import (
    CRL,
    HS_LR,
    LOGISTIC,
    LOSSES,
    LR,
    each,
    make_index,
    make_target,
)


def test_signatures():
    """Those of F.linear_cross_entropy in front, those of the loss from logits with their defaults behind."""
    ours = inspect.signature(fl.linear_cross_entropy).parameters
    theirs = inspect.signature(fl.cross_entropy).parameters
    layer = {"input", "linear_weight", "target", "linear_bias", "normalize", "scale", "gather_input", "options"}
    assert set(ours) == layer | (set(theirs) - {"logits"})
    for name in set(theirs) - {"logits", "target"}:
        assert ours[name].default == theirs[name].default
    of_any = inspect.signature(fl.linear_loss).parameters
    assert set(of_any) == layer | {"loss", "shard", "return_statistics"}
    for parameters in (ours, of_any):
        assert [p for p in parameters if parameters[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == [
            "input", "linear_weight", "target",
        ]  # fmt: skip
    for name in layer & set(of_any):
        assert of_any[name].default == ours[name].default


@each_chunk
@each_way
@each(LOSSES)
def test_a_class_out_of_range_is_named_with_its_row_in_the_batch(loss, k, chunk_bytes):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    target[5] = CLASSES
    w.requires_grad_()
    with pytest.raises(IndexError, match=r"Target 100 is out of bounds.*row 5"):
        loss.linear(x, w, target, k=k_of(loss, k), options=fl.LinearLossOptions(chunk_bytes=chunk_bytes))


@each_chunk
@each(LOGISTIC)
def test_multihot_entries_other_than_0_and_1(loss, chunk_bytes):
    (x, w, _), target = make_layer(), make_target("multihot", ROWS, CLASSES).float()
    target[5, 7] = 0.5
    with pytest.raises(ValueError, match="multi-hot targets must be 0 or 1"):
        loss.linear(x, w, target, k=3, options=fl.LinearLossOptions(chunk_bytes=chunk_bytes))


X, W, B = make_layer()


Y = make_index(ROWS, CLASSES)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "input must be a Tensor, got list", lambda: CRL.linear([1.0], W, Y)),
        (TypeError, "linear_weight must be a Tensor, got NoneType", lambda: CRL.linear(X, None, Y)),
        (TypeError, "linear_bias must be a Tensor, got float", lambda: CRL.linear(X, W, Y, linear_bias=1.0)),
        (TypeError, "floating-point input, got torch.int64", lambda: CRL.linear(X.long(), W, Y)),
        (TypeError, "floating-point linear_weight, got torch.complex128", lambda: CRL.linear(X, W + 0j, Y)),
        (RuntimeError, "input and linear_weight of one dtype", lambda: CRL.linear(X, W.float(), Y)),
        (RuntimeError, "input and linear_bias of one dtype", lambda: CRL.linear(X, W, Y, linear_bias=B.half())),
        (RuntimeError, "linear_weight on meta", lambda: CRL.linear(X, W.to("meta"), Y)),
        (RuntimeError, "target on meta", lambda: CRL.linear(X, W, Y.to("meta"))),
        (ValueError, r"got \(7, 8\) and \(100, 7\)", lambda: CRL.linear(X, W[:, :7], Y)),
        (ValueError, r"got \(1, 7, 8\) and \(100, 8\)", lambda: CRL.linear(X[None], W, Y)),
        (ValueError, r"got \(7, 8\) and \(8,\)", lambda: CRL.linear(X, W[0], Y)),
        (ValueError, r"got \(\) and \(100, 8\)", lambda: CRL.linear(X[0, 0], W, Y)),
        (ValueError, "at least one class", lambda: CRL.linear(X, W[:0], Y)),
        (
            ValueError,
            r"linear_bias of shape \(100,\), got \(99,\)",
            lambda: CRL.linear(X, W, Y, linear_bias=B[1:]),
        ),
        (ValueError, r"batch_size \(7\) to match target batch_size \(6\)", lambda: CRL.linear(X, W, Y[1:])),
        (ValueError, "multi-target not supported", lambda: CRL.linear(X, W, Y[:, None])),
        (ValueError, "multi-hot target size", lambda: LR.linear(X, W, X)),
        (TypeError, "integer dtype, got torch.float32", lambda: CRL.linear(X, W, Y.float())),
        (ValueError, "no bias of each class", lambda: CRL.linear(X, W, Y, linear_bias=B, normalize=True)),
        (ValueError, "no bias of each class", lambda: fl.LinearLoss(8, 100, bias=True, normalize=True)),
        (ValueError, "pass normalize=True", lambda: CRL.linear(X, W, Y, scale=2.0)),
        (
            ValueError,
            "scale must be finite and > 0, got 0",
            lambda: CRL.linear(X, W, Y, normalize=True, scale=0),
        ),
        (ValueError, "scale must be finite", lambda: fl.LinearLoss(8, 100, normalize=True, scale=torch.inf)),
        (ValueError, "a number or \"learned\", got '64'", lambda: fl.LinearLoss(8, 100, normalize=True, scale="64")),
        (TypeError, "scale must be a number, got str", lambda: CRL.linear(X, W, Y, normalize=True, scale="64")),
        (TypeError, "options must be LinearLossOptions, got dict", lambda: CRL.linear(X, W, Y, options={})),
        (TypeError, "options must be LinearLossOptions, got dict", lambda: fl.LinearLoss(8, 100, options={})),
        (ValueError, "chunk_bytes must be at least 1, got 0", lambda: fl.LinearLossOptions(chunk_bytes=0)),
        (TypeError, "dense Tensor.*give input.to_dense", lambda: CRL.linear(X.to_sparse(), W, Y)),
        (TypeError, "dense Tensor.*give linear_weight.to_", lambda: CRL.linear(X, W.to_sparse_csr(), Y)),
        (ValueError, "pass normalize=True", lambda: CRL.linear(X, W, Y, scale=torch.ones(()))),
        (ValueError, r"or a floating tensor \(\)", lambda: CRL.linear(X, W, Y, normalize=True, scale=torch.ones(7))),
        (ValueError, "finite and > 0", lambda: CRL.linear(X, W, Y, normalize=True, scale=torch.tensor(-1.0))),
        (TypeError, "chunk_bytes must be an integer, got float", lambda: fl.LinearLossOptions(chunk_bytes=1e6)),
        (
            TypeError,
            r"loss module, like fused_losses.CrossEntropyLoss\(\), got CrossEntropyLoss",
            lambda: fl.LinearLoss(8, 100, loss=nn.CrossEntropyLoss()),
        ),
        (ValueError, "hs_lr_loss needs k or ratio", lambda: HS_LR.linear(X, W, Y)),
        (ValueError, "k must be at least 1, got 0", lambda: CRL.linear(X, W, Y, k=0)),
        (
            ValueError,
            "median is not a valid value for reduction",
            lambda: CRL.linear(X, W, Y, reduction="median"),
        ),
        (ValueError, "alpha must be finite and >= 0", lambda: CRL.linear(X, W, Y, alpha=-1)),
        (TypeError, "pos_weight", lambda: fl.linear_cross_entropy(X, W, Y, pos_weight=0.1)),
    ],
    ids=itertools.count(),
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("kind", [int, np.int64, np.int32])
def test_chunk_bytes_of_any_integer_type(kind):
    options = fl.LinearLossOptions(chunk_bytes=kind(800))
    assert type(options.chunk_bytes) is int
    assert options == fl.LinearLossOptions(chunk_bytes=800)
    assert torch.equal(
        CRL.linear(X, W, Y, options=options),
        CRL.linear(X, W, Y, options=fl.LinearLossOptions(chunk_bytes=800)),
    )


@pytest.mark.parametrize("check_targets", [False, True])
def test_check_targets_changes_no_value(check_targets):
    assert torch.equal(CRL.linear(X, W, Y, check_targets=check_targets), CRL.linear(X, W, Y))


def test_a_million_classes():
    """A step with sparse gradients makes nothing that grows with the number of classes but a chunk of logits."""
    classes = 1_000_000
    module = fl.LinearLoss(
        4,
        classes,
        loss=fl.CrossEntropyLoss(k=10),
        normalize=True,
        scale=16.0,
        options=fl.LinearLossOptions(sparse_grad=True),
    )
    (x, *_), target = make_layer(4, 4, 4, torch.float32), torch.tensor([0, 7, 999_999, 7])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()
    module(x, target).backward()
    optimizer.step()
    moved = (module.weight.detach() != before).any(1).nonzero().squeeze(1)
    assert torch.equal(moved, picked_classes(cosines(x, before, 16.0), target, 10))
