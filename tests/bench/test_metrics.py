"""bench/evidence/metrics.py against scikit-learn and against answers that are known."""

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from sklearn.metrics import average_precision_score

from bench.evidence.data import Split
from bench.evidence.metrics import accuracy, average_precision, label_ranking, retrieval


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])  # of the scores: many ties, few, none
def test_average_precision_is_scikit_learns(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (50, 40), generator=generator).float()
    relevant = torch.rand(50, 40, generator=generator) < 0.2
    ours = average_precision(scores, relevant)
    for row in range(50):
        if relevant[row].any():
            expected = average_precision_score(relevant[row].numpy(), scores[row].numpy())
            assert ours[row].item() == pytest.approx(expected, abs=1e-12)
        else:
            assert ours[row].isnan()


def test_a_query_is_compared_with_all_others_but_not_with_itself():
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.3], [0.1, 1.0], [0.0, 3.0]])
    target = torch.tensor([0, 0, 1, 1, 1, 1])
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    found = retrieval(model, Split(directions, target))
    assert found["rank-1"] == pytest.approx(5 / 6)  # the nearest to row 3 is row 1
    similarity = torch.nn.functional.normalize(directions, dim=1)
    similarity = similarity @ similarity.T
    by_hand = []
    for query in range(6):
        others = [row for row in range(6) if row != query]
        relevant = (target[others] == target[query]).numpy()
        by_hand.append(average_precision_score(relevant, similarity[query, others].numpy()))
    assert found["mAP"] == pytest.approx(sum(by_hand) / 6, abs=1e-7)


def test_equal_embeddings_earn_nothing_by_their_order():
    target = torch.arange(10).repeat_interleave(4)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 10))
    assert retrieval(model, Split(torch.ones(40, 3), target))["mAP"] == pytest.approx(3 / 39)


def test_label_ranking_leaves_out_labels_that_no_row_bears():
    logits = torch.tensor([[3.0, 1.0, 2.0, 9.0], [0.0, 2.0, 1.0, 9.0], [1.0, 2.0, 3.0, 9.0]])
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = label_ranking(nn.Identity(), Split(logits, target))
    # the labels: rows 0, 2, 1 for label 0, rows {1, 2} before 0 for label 1, rows 2, 0, 1 for label 2
    assert found["mAP over labels"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # the rows: labels 3, 0, 2, 1; labels 3, 1, 2, 0; labels 3, 2, 1, 0
    assert found["mAP over samples"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 2 + 1 / 4) / 3)


def test_accuracy_counts_the_largest_logit():
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0], [5.0, 4.0]])
    assert accuracy(nn.Identity(), Split(logits, torch.tensor([1, 0, 0, 0])))["accuracy"] == 0.75
