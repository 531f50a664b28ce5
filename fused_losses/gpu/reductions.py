"""From the terms of the rows to the loss in one launch, where PyTorch takes several: N numbers cost only launches.

The sums are made by one program in a fixed order: the loss has the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reductions
from .launch import launch
from .sums import add, finish

_MOST_WARPS = 8


@triton.jit
def reduce_terms_kernel(
    loss_ptr, slopes_ptr, terms_ptr, target_ptr, target_stride, num_rows, ignore_index, neg_scale,
    COLUMNS: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """slopes (rows, COLUMNS); terms (rows, 1): the values, or (rows, 2): pos and neg."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, num_rows, BLOCK):
        row = (begin + lanes).to(tl.int64)
        inside = row < num_rows
        value = tl.load(terms_ptr + row * COLUMNS, inside, 0.0)
        if COLUMNS == 2:
            value += neg_scale * tl.load(terms_ptr + row * 2 + 1, inside, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, value, inside)
        total, rest = add(total, rest, value)
        if REDUCTION == "mean":
            counted += (tl.load(target_ptr + row * target_stride, inside, ignore_index) != ignore_index).to(tl.int32)
    divisor = 1.0
    if REDUCTION == "mean":
        divisor = tl.sum(counted, 0).to(tl.float32)
    if REDUCTION != "none":
        tl.store(loss_ptr, finish(total, rest) / divisor)
    for begin in range(0, num_rows, BLOCK):
        row = (begin + lanes).to(tl.int64)
        inside = row < num_rows
        tl.store(slopes_ptr + row * COLUMNS, tl.zeros((BLOCK,), tl.float32) + 1.0 / divisor, inside)
        if COLUMNS == 2:
            tl.store(slopes_ptr + row * 2 + 1, tl.zeros((BLOCK,), tl.float32) + neg_scale / divisor, inside)


def reduce_terms(
    terms: Tensor,
    target: Tensor,
    weight: Tensor | None,
    positives: Tensor | None,
    alpha: float | None,
    num_classes: int,
    k: int,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """loss and slopes; class weights and multi-hot targets are served by ``fused_losses.reductions.reduce_terms``."""
    if weight is not None or target.dim() == 2:
        return reductions.reduce_terms(terms, target, weight, positives, alpha, num_classes, k, ignore_index, reduction)
    terms = terms.contiguous()
    num_rows, columns = terms.shape[0], terms.dim()
    loss = terms.new_empty((num_rows,) if reduction == "none" else ())
    slopes = torch.empty_like(terms)
    block = min(1024, triton.next_power_of_2(max(1, num_rows)))
    with torch.cuda.device_of(terms):
        launch(
            reduce_terms_kernel, (1,), max(1, min(_MOST_WARPS, block // 128)), loss, slopes, terms,
            target, target.stride(0), num_rows, ignore_index, reductions.term_scales(alpha, None, num_classes, k).neg,
            COLUMNS=columns, REDUCTION=reduction, BLOCK=block,
        )  # fmt: skip
    return loss, slopes
