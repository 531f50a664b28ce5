"""What is measured on a split: accuracy, identity retrieval, ranking of labels. A model is a network and a classifier.

Every metric is a share in [0, 1], larger is better.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.evidence.data import Split

CHUNK = 1024  # rows at a time: at 100,000 classes their logits take 400 MB


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(rows) for rows in inputs.split(CHUNK)])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> dict[str, float]:
    """How often the largest logit is the target's."""
    best = torch.cat([model(rows).argmax(1) for rows in split.inputs.split(CHUNK)])
    return {"accuracy": (best == split.target).double().mean().item()}


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """(rows,) mean over the relevant items of a row of the precision among all items that score at least as high.

    Equal scores count as one step, as in scikit-learn: their order decides nothing. NaN, of a training that diverged,
    is the lowest score. A row in which nothing is relevant is NaN.
    """
    scores, order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(
        dim=1, descending=True
    )  # (rows, items)
    relevant = relevant.gather(1, order)
    descent = -scores
    at_least = torch.searchsorted(descent, descent, right=True)  # how many items score at least as high
    precision = relevant.cumsum(1).gather(1, at_least - 1).double() / at_least
    return (precision * relevant).sum(1) / relevant.sum(1)


@torch.no_grad()
def retrieval(model: nn.Sequential, split: Split) -> dict[str, float]:
    """Every row is a query against all others, by the cosine of the inputs of the classifier.

    rank-1: how often the nearest row is of the query's class. Every class must have two rows or more; the classifier
    need not know them.
    """
    embeddings = F.normalize(outputs(model[0], split.inputs), dim=1)
    similarity = embeddings @ embeddings.T  # (queries, gallery)
    same = split.target[:, None] == split.target
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    nearest = similarity.masked_fill(itself, -torch.inf).argmax(1)
    gallery = ~itself
    similarity, same = (matrix[gallery].view(len(matrix), -1) for matrix in (similarity, same))  # without the query
    return {
        "mAP": average_precision(similarity, same).mean().item(),
        "rank-1": (split.target[nearest] == split.target).double().mean().item(),
    }


@torch.no_grad()
def label_ranking(model: nn.Module, split: Split) -> dict[str, float]:
    """mAP over labels: each label ranks the rows; mAP over samples: each row ranks the labels.

    A label that no row of the split bears, or a row without labels, has no average precision and is left out.
    """
    logits = outputs(model, split.inputs)  # (rows, labels)
    relevant = split.target != 0
    return {
        "mAP over labels": average_precision(logits.T.contiguous(), relevant.T).nanmean().item(),
        "mAP over samples": average_precision(logits, relevant).nanmean().item(),
    }
