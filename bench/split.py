"""Rows of a data set and what they are to be recognised as."""

from typing import NamedTuple

from torch import Tensor


class Split(NamedTuple):
    inputs: Tensor  # (rows, ...)
    target: Tensor  # (rows,) class indices, or (rows, classes) multi-hot
