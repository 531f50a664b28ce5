"""The nn.Module twins: the functions' values, and what torch users do with modules."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fused_losses as fl
from cases import CRL, HS_LR, LOSSES, SS_LR, each, each_form, make_index, make_logits, make_target, value_and_grad


def needed(loss):
    return {"k": 4} if loss.needs_k else {}


def everything(loss, index=True):
    """Every option away from its default."""
    hyper = dict.fromkeys(loss.hypers[0], 0.7)
    targets = {"weight": torch.linspace(0.5, 2, 12), "ignore_index": 3} if index else {}
    return hyper | {"k": 5, "reduction": "sum", "check_targets": True} | targets


@each_form
def test_twins_agree(loss, form):
    logits, target = make_logits(6, 12), make_target(form, 6, 12)
    for settings in (needed(loss), everything(loss, form == "index"), {"ratio": 0.3, "reduction": "none"}):
        module = loss.module_class()(**settings)
        value, grad = value_and_grad(lambda z, m=module: m(z, target), logits)
        expected, expected_grad = value_and_grad(lambda z, s=settings: loss(z, target, **s), logits)
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad)


@each(LOSSES)
def test_signatures_are_the_twins(loss):
    of_function = dict(inspect.signature(getattr(fl, loss.name)).parameters)
    del of_function["logits"], of_function["target"]
    of_module = dict(inspect.signature(loss.module_class()).parameters)
    assert {n: (p.kind, p.default) for n, p in of_module.items()} == {
        n: (p.kind, p.default) for n, p in of_function.items()
    }
    hyper_parameters = loss.hypers[0]
    for name in set(of_module) - set(hyper_parameters):
        assert of_module[name].annotation == of_function[name].annotation


@each(LOSSES)
def test_is_a_module_without_parameters(loss):
    module = loss.module_class()(**needed(loss))
    assert isinstance(module, nn.Module)
    assert list(module.parameters()) == []
    assert list(module.buffers()) == []
    assert module.state_dict() == {}
    module.train()
    module.eval()


@each(LOSSES)
def test_weight_is_a_buffer(loss):
    weight = torch.rand(12)
    module = loss.module_class()(weight=weight, **needed(loss))
    assert dict(module.named_buffers())["weight"] is weight
    assert list(module.parameters()) == []
    assert torch.equal(module.state_dict()["weight"], weight)
    assert module.to("meta").weight.device.type == "meta"
    assert loss.module_class()(weight=weight, **needed(loss)).to(torch.float64).weight.dtype == torch.float64


@each(LOSSES)
def test_state_dict_round_trip(loss):
    source = loss.module_class()(weight=torch.rand(12), **needed(loss))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    copy_ = loss.module_class()(weight=torch.ones(12), **needed(loss))
    copy_.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(copy_.weight, source.weight)


@each(LOSSES)
def test_half_precision_weight_of_a_half_precision_model(loss):
    """model.half() casts the buffer too; the loss stays float32."""
    weight = torch.arange(12) / 4  # exact in float16
    module = loss.module_class()(weight=weight, **needed(loss)).half()
    logits, target = make_logits(6, 12, torch.float16), make_index(6, 12)
    value = module(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits, target, weight=weight, **needed(loss)))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "copy", "pickle"]
)
@each(LOSSES)
def test_copies_do_the_same(loss, clone):
    logits, target = make_logits(6, 12), make_index(6, 12)
    module = loss.module_class()(**everything(loss))
    twin = clone(module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert torch.equal(twin(logits, target), module(logits, target))
    if clone is copy.deepcopy:
        twin.weight.zero_()
        assert module.weight.sum() > 0


@each(LOSSES)
def test_repr_shows_the_settings(loss):
    text = repr(loss.module_class()(**everything(loss)))
    assert text.startswith(loss.module + "(")
    for name in loss.hypers[0]:
        assert f"{name}=0.7" in text
    for setting in ("k=5", "reduction=sum", "ignore_index=3", "check_targets=True", "weight=<12 classes>"):
        assert setting in text
    assert "ratio=0.25" in repr(loss.module_class()(ratio=0.25))


@each(LOSSES)
def test_repr_of_the_defaults(loss):
    text = repr(loss.module_class()(**needed(loss)))
    for name, value in loss.hypers[0].items():
        assert f"{name}={value}" in text
    assert "None" not in text


def test_repr_within_a_model():
    model = nn.ModuleDict({"criterion": fl.CRLLoss(k=7)})
    assert "(criterion): CRLLoss(" in repr(model)
    assert "k=7" in repr(model)


@each((CRL, SS_LR, HS_LR))
def test_in_a_training_loop(loss):
    """What it is for: the loss falls and the classes are learnt."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(40, 16)
    target = torch.arange(40).repeat(4)
    features = centres[target] + 0.3 * torch.randn(160, 16)
    model, criterion = nn.Linear(16, 40), loss.module_class()(ratio=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        value = criterion(model(features), target)
        value.backward()
        optimizer.step()
        first = first or value.item()
    assert value.item() < first
    assert (model(features).argmax(1) == target).float().mean() > 0.95


@each(LOSSES)
def test_documented(loss):
    for thing in (getattr(fl, loss.name), loss.module_class()):
        assert len(inspect.getdoc(thing)) > 40


# --- assigned anew ----------------------------------------------------------------------------------------------------


@each(LOSSES)
def test_an_assigned_argument_takes_effect(loss):
    """In the value, and in everything that shows or copies the module: as if it had been made so."""
    logits, target = make_logits(6, 12), make_index(6, 12)
    module, wanted = loss.module_class()(**needed(loss)), everything(loss)
    linear = fl.LinearLoss(8, 12, loss=module)
    for name, value in wanted.items():
        before = repr(module)
        setattr(module, name, value)
        assert getattr(module, name) is value
        assert repr(module) != before
    fresh = loss.module_class()(**wanted)
    assert repr(module) == repr(fresh)
    assert torch.equal(module(logits, target), fresh(logits, target))
    assert torch.equal(module(logits, target), loss(logits, target, **wanted))
    assert torch.equal(module.state_dict()["weight"], wanted["weight"])
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        for name in loss.hypers[0]:
            setattr(twin, name, 0.2)
            assert getattr(module, name) == 0.7
    features = torch.randn(6, 8)
    torch.testing.assert_close(
        linear(features, target), loss(features @ linear.weight.t(), target, **wanted), check_dtype=False
    )
    module.weight = None
    assert module.state_dict() == {}


@each(LOSSES)
def test_hyper_parameters_can_be_read(loss):
    module = loss.module_class()(**needed(loss))
    for name, value in loss.hypers[0].items():
        assert getattr(module, name) == value


@each(LOSSES)
def test_k_and_ratio_replace_each_other(loss):
    module = loss.module_class()(k=3)
    module.ratio = 0.25
    assert (module.k, module.ratio) == (None, 0.25)
    module.k = 4
    assert (module.k, module.ratio) == (4, None)
    module.ratio = None
    assert module.k == 4


@each(LOSSES)
def test_assignment_is_checked_and_changes_nothing_if_refused(loss):
    wrong = {
        "k": (0, 2.5, True),
        "ratio": (0.0, 1.5, "1%", True),
        "reduction": ("avg", None),
        "ignore_index": (1.5, "3", False, 2**63),
        "weight": (
            [1.0],
            torch.ones(3, dtype=torch.long),
            torch.ones(3, requires_grad=True),
            torch.ones(3).to_sparse(),
        ),
        "check_targets": ("no", None),
        "shard": (3,),
    }
    wrong |= {name: (-1, float("nan"), float("inf"), "1", None, True) for name in loss.hypers[0]}
    module = loss.module_class()(**everything(loss))
    before = repr(module)
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=name):
                setattr(module, name, value)
            assert repr(module) == before


@each(LOSSES)
def test_hyper_parameters_of_another_loss_cannot_be_assigned(loss):
    module = loss.module_class()(**needed(loss))
    for name in {"alpha", "beta", "gamma"} - set(loss.hypers[0]):
        with pytest.raises(AttributeError, match=f"{loss.module} has no hyper-parameter {name}"):
            setattr(module, name, 1.0)


def test_hard_selection_keeps_a_size():
    module = fl.HSLRLoss(k=3)
    with pytest.raises(ValueError, match="needs k or ratio"):
        module.k = None
    assert module.k == 3


@each(LOSSES)
def test_numpy_numbers_become_pythons(loss):
    """To the compiler NumPy's are arrays."""
    hypers = {name: np.float32(0.5) for name in loss.hypers[0]}
    module = loss.module_class()(ratio=np.float64(0.25), ignore_index=np.int64(3), **hypers)
    assert type(module.ratio) is float and type(module.ignore_index) is int
    module.k = np.int32(4)
    assert type(module.k) is int
    for name in hypers:
        assert type(getattr(module, name)) is float
