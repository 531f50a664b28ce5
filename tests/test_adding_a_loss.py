"""CONTRIBUTING's "Adding a loss", held by doing it, and by asking every loss for what the list wants of it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eager
import fused_losses as fl
import paper
from cases import named
from fused_losses import losses
from fused_losses.formulas import FORMULAS

ROOT = Path(__file__).parents[1]

# What somebody writes who adds the focal loss: by page, text of the page and what it becomes.
EDITS = {
    "tests/paper.py": [
        (
            "# Logistic family.",
            '''def focal(logits: Tensor, target: Tensor, k: int | None = None, *, gamma: float) -> Tensor:
    """-(1 - p_y)^gamma log p_y: Lin et al., arXiv 1708.02002."""
    p_target, p_wrong = target_and_wrong(logits, target, k)
    return -(p_wrong**gamma) * torch.log(p_target)


# Logistic family.''',
        )
    ],
    "tests/eager.py": [
        (
            "def lr(",
            """def focal(logits: Tensor, target: Tensor, k: int | None = None, *, gamma: float) -> Tensor:
    log_p, wrong = softmax_terms(logits, target, k)
    return -(wrong**gamma) * log_p


def lr(""",
        )
    ],
    "fused_losses/formulas.py": [
        (
            "# --- logistic losses",
            """def focal_value(d: Tensor, gamma: float) -> Tensor:
    return ss_lr_phi(-d, gamma)


def focal_slope(d: Tensor, gamma: float) -> Tensor:
    return -ss_lr_phi_slope(-d, gamma)


# --- logistic losses""",
        ),
        ('    "lr": Formula(', '    "focal": Formula(focal_value, focal_slope),\n    "lr": Formula('),
    ],
    "fused_losses/losses.py": [
        (
            "@dataclass(frozen=True)\nclass LR(Loss):",
            '''@dataclass(frozen=True)
class Focal(Loss):
    """Focal loss: -(1 - p_y)^gamma log p_y. Lin et al., arXiv 1708.02002."""

    name = "focal_loss"
    formula = "focal"
    gamma: float = 2.0

    @property
    def params(self) -> list[float]:
        return [self.gamma]


@dataclass(frozen=True)
class LR(Loss):''',
        )
    ],
    "fused_losses/functional.py": [
        ("from .losses import CRL,", "from .losses import Focal, CRL,"),
        (
            "def lr_loss(",
            '''def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = Focal.gamma,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Focal loss."""
    options = Options(k, ratio, weight, ignore_index, reduction, check_targets, shard)
    return apply(Focal(gamma), logits, target, options)


def lr_loss(''',
        ),
    ],
    "fused_losses/modules.py": [
        ("from .losses import CRL,", "from .losses import Focal, CRL,"),
        (
            "class LRLoss(RowLoss):",
            '''class FocalLoss(RowLoss):
    """Module twin of :func:`fused_losses.focal_loss`."""

    gamma = _HyperParameter()

    def __init__(self, *, gamma: float = Focal.gamma, **options: Unpack[LossOptions]):
        super().__init__(Focal(gamma), **options)


class LRLoss(RowLoss):''',
        ),
    ],
    "fused_losses/__init__.py": [
        ("from .functional import crl_loss,", "from .functional import focal_loss, crl_loss,"),
        ("from .modules import CRLLoss,", "from .modules import FocalLoss, CRLLoss,"),
        ('    "HSLRLoss",', '    "FocalLoss",\n    "HSLRLoss",'),
        ('    "hs_lr_loss",', '    "focal_loss",\n    "hs_lr_loss",'),
    ],
}
# The same two lines of mathematics in Triton and in C++, for which this test has no device and no compiler.
KERNELS = {"fused_losses/gpu/formulas.py", "csrc/formulas.h", "csrc/dispatch.h"}

USE = """
from pathlib import Path
import torch, paper
import fused_losses as fl
from cases import LOSSES, assert_as_accurate, make_index, make_logits, value_and_grad
from test_adding_a_loss import missing

assert Path(fl.__file__).is_relative_to(Path.cwd())
assert missing() == []
focal = next(loss for loss in LOSSES if loss.name == "focal_loss")
assert (focal.module, focal.family, focal.hypers) == ("FocalLoss", "softmax", ({"gamma": 2.0},))
for dtype in (torch.float64, torch.float32):
    logits, target = make_logits(6, 11, dtype), make_index(6, 11)
    upstream = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (None, 4):
        for gamma in (2.0, 0.0, 0.7):
            truth = value_and_grad(lambda z: paper.focal(z, target, k, gamma=gamma), logits.double(), upstream)
            torchs = value_and_grad(lambda z: focal.eager(z, target, k, gamma=gamma), logits, upstream)
            rows = {"gamma": gamma, "k": k, "reduction": "none"}
            ours = {
                "function": lambda z: fl.focal_loss(z, target, **rows),
                "module": lambda z: fl.FocalLoss(**rows)(z, target),
                "linear": lambda z: fl.linear_loss(z, torch.eye(11, dtype=dtype), target, loss=fl.FocalLoss(**rows)),
            }
            for name, function in ours.items():
                got = value_and_grad(function, logits, upstream)
                for what, *compared in zip(("value", "gradient"), got, torchs, truth):
                    assert_as_accurate(*compared, f"{name}, {what}")
"""


def missing(page=losses, package=fl) -> list[str]:
    """What the losses on the page lack of what the list asks for."""
    lacks = []
    for loss in named(page):
        module, formula = f"{loss.__name__}Loss", loss.name.removesuffix("_loss")
        wanted = {
            f"no row in formulas.FORMULAS: {loss.formula}": loss.formula in FORMULAS,
            f"not exported: {loss.name}": loss.name in package.__all__ and callable(getattr(package, loss.name, None)),
            f"not exported: {module}": module in package.__all__ and hasattr(package, module),
            f"no formula in paper.py: {formula}": hasattr(paper, formula),
            f"nothing to compare with in eager.py: {formula}": hasattr(eager, formula),
        }
        lacks += [lack for lack, there in wanted.items() if not there]
    return lacks


def test_every_loss_has_what_the_list_asks_for():
    assert missing() == []
    assert len(named()) == 6


def test_a_loss_that_lacks_everything_is_found():
    class Stranger(losses.Loss):
        name = "stranger_loss"
        formula = "stranger"

    page = SimpleNamespace(**vars(losses), Stranger=Stranger)
    assert len(missing(page)) == 5
    unexported = SimpleNamespace(__all__=[name for name in fl.__all__ if name not in ("nllr_loss", "CRLLoss")])
    for name in unexported.__all__:
        setattr(unexported, name, getattr(fl, name))
    assert missing(losses, unexported) == ["not exported: nllr_loss", "not exported: CRLLoss"]


def test_a_loss_is_added_by_the_edits_of_the_list(tmp_path):
    shutil.copytree(
        ROOT / "fused_losses", tmp_path / "fused_losses", ignore=shutil.ignore_patterns("_C.*", "__pycache__")
    )
    (tmp_path / "tests").mkdir()
    for name in ("paper", "eager", "cases", "test_adding_a_loss"):
        shutil.copy(ROOT / "tests" / f"{name}.py", tmp_path / "tests")
    for page, edits in EDITS.items():
        path = tmp_path / page
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{page}: {old!r}"
            text = text.replace(old, new)
        path.write_text(text)
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'tests']\n{USE}"],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


def test_the_list_is_the_edits():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a loss")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {page for row in rows for page in re.findall(r"`([^`]+)`", row)} == set(EDITS) | KERNELS


def test_the_backends_have_the_same_losses():
    triton = (ROOT / "fused_losses/gpu/formulas.py").read_text().partition("_FORMULAS = {")[2].partition("\n}")[0]
    cpp = (ROOT / "csrc/formulas.h").read_text().partition("kFormulas[] = {")[2].partition("\n};")[0]
    assert re.findall(r'^    "(\w+)":', triton, re.MULTILINE) == list(FORMULAS)
    assert re.findall(r'\{"(\w+)",', cpp) == list(FORMULAS)
