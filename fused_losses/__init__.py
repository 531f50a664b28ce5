"""Discriminative losses for classifiers with very many classes."""

from .class_parallel import ClassShard
from .functional import crl_loss, cross_entropy, hs_lr_loss, lr_loss, nllr_loss, ss_lr_loss
from .linear import (
    LinearLoss,
    LinearLossOptions,
    linear_crl_loss,
    linear_cross_entropy,
    linear_hs_lr_loss,
    linear_lr_loss,
    linear_nllr_loss,
    linear_ss_lr_loss,
)
from .modules import CRLLoss, CrossEntropyLoss, HSLRLoss, LRLoss, NLLRLoss, SSLRLoss
from .ops import show_config

__all__ = [
    "CRLLoss",
    "ClassShard",
    "CrossEntropyLoss",
    "HSLRLoss",
    "LRLoss",
    "LinearLoss",
    "LinearLossOptions",
    "NLLRLoss",
    "SSLRLoss",
    "crl_loss",
    "cross_entropy",
    "hs_lr_loss",
    "linear_crl_loss",
    "linear_cross_entropy",
    "linear_hs_lr_loss",
    "linear_lr_loss",
    "linear_nllr_loss",
    "linear_ss_lr_loss",
    "lr_loss",
    "nllr_loss",
    "show_config",
    "ss_lr_loss",
]
