"""Discriminative losses for classifiers with very many classes.

The examples in the docstrings take for granted::

    import torch
    import torch.nn.functional as F
    import fused_losses as fl
"""

from .finish import RowStatistics
from .functional import crl_loss, cross_entropy, hs_lr_loss, lr_loss, nllr_loss, softmax_loss, ss_lr_loss
from .labels import Labels
from .linear import LinearLoss, LinearLossOptions, linear_cross_entropy, linear_loss
from .linear_topk import TopK
from .margin import Margin
from .modules import CRLLoss, CrossEntropyLoss, HSLRLoss, LRLoss, NLLRLoss, RowLoss, SoftmaxLoss, SSLRLoss
from .ops import __version__ as __version__
from .ops import show_config
from .primitives import log_odds, logistic_sums, row_statistics
from .shard import ClassShard

__all__ = [
    "CRLLoss",
    "ClassShard",
    "CrossEntropyLoss",
    "HSLRLoss",
    "LRLoss",
    "Labels",
    "LinearLoss",
    "LinearLossOptions",
    "Margin",
    "NLLRLoss",
    "RowLoss",
    "RowStatistics",
    "SSLRLoss",
    "SoftmaxLoss",
    "TopK",
    "crl_loss",
    "cross_entropy",
    "hs_lr_loss",
    "linear_cross_entropy",
    "linear_loss",
    "log_odds",
    "logistic_sums",
    "lr_loss",
    "nllr_loss",
    "row_statistics",
    "show_config",
    "softmax_loss",
    "ss_lr_loss",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
