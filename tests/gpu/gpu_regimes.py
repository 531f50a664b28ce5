"""How the k hardest of a row are found, forced on short rows."""

import math

from fused_losses.gpu.device import Tile
from fused_losses.gpu.hardest import Plan

REGIMES = ("held", "walked", "blocks of 8", "blocks of 16", "blocks of 32", "blocks of 8, split")


def forced_plan(regime, on, num_rows, num_classes, k, itemsize, multi_hot) -> Plan:
    lanes = Tile(1, 1).lanes(on, itemsize)
    tiles = max(1, 2 ** math.ceil(math.log2(num_classes)) // lanes)
    if regime == "held":
        return Plan(Tile(1, tiles), held=True)
    if regime == "walked" or multi_hot:
        return Plan(Tile(1, 1))
    width = int(regime.split()[2].rstrip(","))
    rows = max(2, 16 // itemsize * width // lanes)  # the maxima of a tile fill vectors
    return Plan(Tile(1, rows), width=width, listed=2, parts=3 if "split" in regime else 1)
