"""What ``help()`` shows: every argument with its default, and examples that run.

Docstrings are literal, for editors read them from the sources; so what several of them say is held alike here.
"""

import doctest
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_losses as fl
from cases import LOSSES

# How many different things are said of the arguments of one name, where it is not one thing.
SAID = {
    "alpha": 2,  # CRL's is another one
    "check_ranks": 2,  # of shards; of split, which refers to that
    "classes": 2,  # in lists; those to select
    "device": 2,  # of lists, of a layer
    "gamma": 2,  # SS-LR's, and the one that logistic_sums may do without
    "input": 3,  # of a loss, of serving, of logits()
    "k": 3,  # HS-LR needs one; that of topk
    "loss": 3,  # of the function, of LinearLoss with its default, of RowLoss
    "most": 2,  # labels of a row: of sparse rows, of dense ones
    "num_classes": 3,  # of a layer, of a grown one, of shards
    "options": 2,  # of a layer; of RowLoss
    "ratio": 2,  # HS-LR needs one
    "scale": 3,  # of the functions, of LinearLoss, of a margin
    "shard": 3,  # from logits, of a layer, of a layer that owns its weight
    "target": 6,  # softmax family, logistic family, any loss's module, a linear layer with any loss, one class, dense
    "weight": 4,  # of classes; of labels: the tensor, in lists, in sparse rows
}


def public() -> Iterator[tuple[str, object]]:
    """Names and objects, the methods that this package defines among them."""
    for name in fl.__all__:
        thing = getattr(fl, name)
        yield name, thing
        for method, member in vars(thing).items() if isinstance(thing, type) else ():
            function = member.__func__ if isinstance(member, classmethod) else member
            ours = inspect.isfunction(function) and function.__module__.startswith("fused_losses.")
            if ours and not method.startswith("_"):
                yield f"{name}.{method}", function


PUBLIC = dict(public())
each_public = pytest.mark.parametrize("name", PUBLIC)
# extra_repr is what print() asks of a module; the rest is for this package alone
INSIDE = re.compile(r"\.(extra_repr|of|offers|holds|per_row|loss)$")
# Arguments whose default raises: of k and ratio one is needed; a call without a target says what there is for serving.
NEEDED = {"hs_lr_loss": ("k", "ratio"), "HSLRLoss": ("k", "ratio"), "LinearLoss.forward": ("target",)}
DESCRIBED = [name for name in PUBLIC if not INSIDE.search(name)]


def section(thing: object, title: str) -> str:
    text = inspect.cleandoc(thing.__doc__ or "")
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", text + "\n", re.M)
    return found[1] if found else ""


def entries(thing: object, title: str = "Args") -> dict[str, str]:
    """What a section says of each name, on one line."""
    parts = re.split(r"^    (\w+): ", section(thing, title), flags=re.M)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def parameters(thing: object) -> dict[str, inspect.Parameter]:
    found = inspect.signature(thing.__init__ if thing is fl.RowLoss else thing).parameters
    return {name: parameter for name, parameter in found.items() if name not in ("self", "cls")}


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in DESCRIBED if section(PUBLIC[name], "Example")])
def test_examples(name, one_rank):
    names = {"fl": fl, "torch": torch, "F": F}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), names, name, None, None)
    assert 1 <= len(test.examples) <= 4
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
    assert not failed
    torch.manual_seed(0)


def test_who_has_an_example():
    without = {name for name in DESCRIBED if not section(PUBLIC[name], "Example")}
    assert without == {"RowLoss.forward", "LinearLoss.forward", "LinearLoss.reset_parameters"}


@pytest.mark.parametrize("name", DESCRIBED)
def test_every_argument_is_explained(name):
    thing, said = PUBLIC[name], entries(PUBLIC[name])
    wanted = parameters(thing)
    assert set(said) == set(wanted)
    for argument, parameter in wanted.items():
        default = re.search(r"Default: (.*)$", said[argument])
        if parameter.default is parameter.empty or argument in NEEDED.get(name, ()):
            assert default is None, f"{argument} has no default"
        else:
            assert default, f"{argument} has a default that is not told"
            shown = parameter.default
            shown = f'"{shown}"' if isinstance(shown, str) else f"{shown:g}" if type(shown) is float else repr(shown)
            assert re.match(rf"{re.escape(shown)}[., ]", default[1]), f"{argument}: {default[1]}, and it is {shown}"


@pytest.mark.parametrize("name", DESCRIBED)
def test_results_and_errors_are_told(name):
    thing = PUBLIC[name]
    if not isinstance(thing, type) and inspect.signature(thing).return_annotation not in (None, "None"):
        assert section(thing, "Returns")
    errors = entries(thing, "Raises")
    assert set(errors) <= {"TypeError", "ValueError", "IndexError", "RuntimeError"}
    if name.lower().endswith("loss"):
        assert set(errors) >= {"TypeError", "ValueError"}


def test_one_thing_is_said_of_one_argument():
    said = defaultdict(set)
    for name in DESCRIBED:
        for argument, text in entries(PUBLIC[name]).items():
            said[argument].add(text)
    assert {argument: len(texts) for argument, texts in said.items()} == {name: SAID.get(name, 1) for name in said}


@pytest.mark.parametrize("loss", [*LOSSES, None], ids=str)
def test_twins_say_the_same(loss):
    function, module = (
        (fl.softmax_loss, fl.SoftmaxLoss) if loss is None else (getattr(fl, loss.name), loss.module_class())
    )
    of_function, of_module = entries(function), entries(module)
    assert {name: text for name, text in of_function.items() if name not in ("logits", "target")} == of_module
    assert entries(function, "Raises") == entries(module, "Raises")
    assert inspect.getdoc(function).splitlines()[0] == inspect.getdoc(module).splitlines()[0]
    target = of_function["target"].partition(" (A matrix")[0].rstrip(".")
    assert target in " ".join(module.__doc__.split())


def test_losses_name_their_papers():
    """Those that losses.py names."""
    for loss in LOSSES:
        function, module = getattr(fl, loss.name), loss.module_class()
        made = module(k=1)
        papers = re.findall(r"\d{4}\.\d{5}|Eq\. \d", type(made.loss).__doc__)
        for text in (function.__doc__, module.__doc__):
            assert all(paper in text for paper in papers)
