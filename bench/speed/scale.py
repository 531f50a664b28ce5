"""What a class-parallel step sends, holds and computes per rank, from formulas: nothing is measured here.

python -m bench.speed.scale                 the tables of docs/scale.md
python -m bench.speed.scale --classes 29000000 --ranks 8 --rows 1024 --features 512 --k 1000
"""

import argparse
from dataclasses import dataclass

from bench.evidence.tables import table

STATISTICS_BYTES = 12  # m, l, z_y or m, neg, z_y in float32
INDEX_BYTES = 4  # of a picked class


@dataclass(frozen=True)
class Setup:
    """One step; rows are those of all ranks together."""

    classes: int
    ranks: int
    rows: int = 1024
    features: int = 512
    k: int = 0  # 0: all negatives
    element: int = 2  # bytes of an embedding or a logit: 2 for bfloat16
    parameter: int = 4  # bytes of a weight, and of each of its optimiser states

    @property
    def shard(self) -> int:
        """Classes of the largest shard."""
        return -(-self.classes // self.ranks)

    @property
    def others(self) -> float:
        """The share of a gathered tensor that a rank receives."""
        return (self.ranks - 1) / self.ranks

    @property
    def states(self) -> int:
        """Of the optimiser, for every weight: SGD's momentum; over the k hardest, with sparse gradients, SparseAdam's
        two, since SGD's momentum is then a list of all entries that ever were."""
        return 2 if self.k else 1

    @property
    def share(self) -> int:
        """Rows that a rank merges, over the k hardest."""
        return -(-self.rows // self.ranks)

    def offer_bytes(self) -> int:
        """What a rank knows of a row: its statistics, and its picks."""
        return STATISTICS_BYTES + min(self.k, self.shard) * (INDEX_BYTES + self.element)

    def merged_bytes(self) -> int:
        """What the rank that merges a row over the k hardest tells of it: statistics, and the last of the k."""
        return STATISTICS_BYTES + INDEX_BYTES + self.element

    def collectives(self) -> list[int]:
        """What a rank puts into each collective of the loss: an all-gather, or an all-to-all and an all-gather."""
        offered = self.rows * self.offer_bytes()
        return [offered, self.share * self.merged_bytes()] if self.k else [offered]

    def loss_bytes(self) -> int:
        """Received by a rank for the loss."""
        if self.k:
            return (self.ranks - 1) * self.share * (self.offer_bytes() + self.merged_bytes())
        return (self.ranks - 1) * self.rows * self.offer_bytes()

    def input_bytes(self) -> float:
        """Received by a rank for gather_input: embeddings and int64 targets, then the all-reduce of their gradient."""
        gathered = self.rows * (self.features * self.element + 8) * self.others
        return gathered + 2 * self.rows * self.features * self.element * self.others

    def logits_bytes(self) -> float:
        """Received by a rank that gathers the columns of N x C logits instead."""
        return self.rows * self.classes * self.element * self.others

    def partial_fc_bytes(self) -> float:
        """Received by a rank of InsightFace's PartialFC_V2: embeddings and labels gathered, their gradient reduced and
        scattered, three all-reduces of a float32 per row (largest logit, sum, target's probability)."""
        gathered = self.rows * (self.features * self.element + 8) * self.others
        reduced = self.rows * self.features * self.element * self.others
        return gathered + reduced + 3 * 2 * self.rows * 4 * self.others

    def weight_bytes(self) -> int:
        """Held by a rank: the shard's weight and optimiser states, and its gradient, dense or of the picks alone."""
        row = self.features * self.parameter
        gradient = min(self.shard, self.rows * (self.k + 1)) if self.k else self.shard
        return row * (self.shard * (1 + self.states) + gradient)

    def flops(self) -> float:
        """Of a rank: a matmul forward; over all negatives three more backward (logits again, two gradients), over the
        k hardest two gradients through the picks, all of which a single rank may own."""
        matmul = 2 * self.rows * self.shard * self.features
        if self.k == 0:
            return 4 * matmul
        return matmul + 2 * 2 * self.rows * min(self.k + 1, self.shard) * self.features


def amount(number: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000 or prefix == "P":
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000


def traffic(setups: list[Setup]) -> str:
    header = ["identities", "ranks", "k", "our loss", "our input, gradient", "Partial FC, all", "N x C logits"]
    return table(header, [
        [
            f"{s.classes:,}", str(s.ranks), str(s.k or "all"),
            *(amount(n, "B") for n in (s.loss_bytes(), s.input_bytes(), s.partial_fc_bytes(), s.logits_bytes())),
        ]
        for s in setups
    ])  # fmt: skip


def load(setups: list[Setup]) -> str:
    header = ["identities", "ranks", "k", "classes per rank", "weight, states, gradient", "FLOPs per step"]
    return table(header, [
        [
            f"{s.classes:,}", str(s.ranks), str(s.k or "all"), f"{s.shard:,}", amount(s.weight_bytes(), "B"),
            amount(s.flops(), "FLOP"),
        ]
        for s in setups
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--k", type=int, nargs="+", default=[0, 100])
    parser.add_argument("--rows", type=int, default=1024, help="of all ranks together")
    parser.add_argument("--features", type=int, default=512)
    options = parser.parse_args()
    setups = [
        Setup(classes, ranks, options.rows, options.features, k)
        for classes in options.classes
        for ranks in options.ranks
        for k in options.k
    ]
    print(f"{options.rows} rows of all ranks, {options.features} features, bfloat16; received per rank and step\n")
    print(traffic(setups), end="\n\n")
    print("float32 weight, SGD with momentum, over the k hardest SparseAdam; held and computed per rank\n")
    print(load(setups))


if __name__ == "__main__":
    main()
