"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the linear losses: their matmuls, as of ``nn.Linear``.

It sees ops, not what they do inside. Its module takes longer to import than this package, so the formulas wait until
somebody imports it.
"""

import importlib.util
import math
import sys
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"


def _all_classes(input, weight) -> int:
    """One product of the rows with all classes."""
    return 2 * math.prod(input) * weight[0]


def _forward(input, weight, *_, **__) -> int:
    return _all_classes(input, weight)


def _at_once(share, label_weight, margin, input, weight, bias, norms, target, chunk_bytes, wanted, *_, **__) -> int:
    return (1 + sum(wanted[:2])) * _all_classes(input, weight)


def _backward(
    coefficients, statistics, pick_index, pick_logit, input, weight, bias, norms, target, chunk_bytes, wanted, *_, **__
) -> int:  # fmt: skip
    """The logits once more, then the gradients."""
    return (1 + sum(wanted[:2])) * _all_classes(input, weight)


def _backward_picks(
    coefficients, statistics, pick_index, pick_logit, input, weight, bias, norms, target, chunk_bytes, wanted, *_, **__
) -> int:  # fmt: skip
    """Each row with its labels and its picks."""
    labels = target[1] if len(target) == 2 else 1
    return sum(wanted[:2]) * 2 * math.prod(input) * (labels + pick_index[1])


FORMULAS = {
    "linear_forward": _forward,
    "linear_forward_picks": _forward,
    "linear_at_once": _at_once,
    "linear_backward": _backward,
    "linear_backward_picks": _backward_picks,
    "linear_backward_sparse": _backward_picks,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fused_losses, name))(formula)


class _AfterImport:
    """A finder of modules that waits for the counter's, and then is none any more."""

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport)
