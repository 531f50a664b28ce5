"""Every file of examples/ runs, in a process of its own and a directory of its own, and says what it promises."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
NEEDS_TORCHVISION = pytest.mark.torchvision

# What is run, what must be installed beside torch, and the beginning of a line that is printed.
EXAMPLES = [
    pytest.param([["own_loss.py"]], ["sklearn"], "trained with it: ", id="own_loss"),
    pytest.param([["multilabel.py"]], ["sklearn"], "precision@5: ", id="multilabel"),
    pytest.param(
        [[*TORCHRUN, "2", "arcface.py", "80"], [*TORCHRUN, "1", "arcface.py", "120"]],
        ["sklearn", "PIL"],
        "steps 80 to 120 on 1 ranks",
        id="arcface",
    ),
    pytest.param([["walkthrough.py"]], ["sklearn", "PIL", "matplotlib"], "recognised: ", id="walkthrough"),
    pytest.param([["hf_trainer.py"]], ["transformers", "accelerate"], "over the 50 hardest of ", id="hf_trainer"),
    pytest.param(
        [["hf_trainer_linear.py"]],
        ["transformers", "accelerate"],
        "loaded into the ordinary model: the same loss",
        id="hf_trainer_linear",
    ),
    pytest.param([["accelerate_loop.py"]], ["accelerate", "sklearn"], "four batches of 32, ", id="accelerate_loop"),
    pytest.param(
        [["lightning_module.py"]],
        ["lightning", "sklearn"],
        "test accuracy of the loaded checkpoint: ",
        id="lightning_module",
    ),
    pytest.param([["timm_train.py"]], ["timm", "sklearn"], "test accuracy: ", marks=NEEDS_TORCHVISION, id="timm_train"),
    pytest.param(
        [["torchreid_engine.py"]],
        ["torchreid", "sklearn"],
        "torchreid's smoothed cross-entropy: the same number",
        marks=NEEDS_TORCHVISION,
        id="torchreid_engine",
    ),
]


@pytest.mark.examples
@pytest.mark.parametrize("commands, needs, says", EXAMPLES)
def test_example(commands, needs, says, tmp_path, pytestconfig):
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing and not pytestconfig.getoption("markexpr").startswith(("examples", "torchvision")):
        pytest.skip(f"needs {', '.join(missing)}")  # who asks for the examples by their mark is told what fails
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    printed = ""
    for command in commands:
        command = [str(ROOT / "examples" / word) if word.endswith(".py") else word for word in command]
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    assert any(line.startswith(says) for line in printed.splitlines()), printed


def test_every_example_is_run_and_listed():
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"photographs"}  # which the others import
    assert files == {example.id for example in EXAMPLES}
    listed = (ROOT / "examples" / "README.md").read_text()
    assert all(f"`{name}.py`" in listed for name in files)
