"""bench/evidence/mechanisms.py against the definitions, by hand."""

import pytest
import torch

pytest.importorskip("sklearn")

import fused_losses as fl
from bench.evidence.data import Split
from bench.evidence.mechanisms import EASY, mechanisms, probe_of

LOGITS = torch.tensor([[2.0, 1.0, -4.0, -5.0, 0.5], [-3.0, 0.0, 3.0, -6.0, -7.0]])
TARGET = torch.tensor([0, 2])


def shares(weights: torch.Tensor, target: torch.Tensor = TARGET) -> float:
    """Of the weights of the negatives, those where the model gives less than 10 %."""
    pulls = [(LOGITS[i, j], weights[i, j]) for i in range(2) for j in range(5) if j != target[i]]
    return float(sum(w for z, w in pulls if z.sigmoid() < EASY) / sum(w for _, w in pulls))


def test_easy_share_of_each_logistic_loss():
    sigma = LOGITS.double().sigmoid()
    assert mechanisms(LOGITS, TARGET, fl.LRLoss())["easy share"] == pytest.approx(shares(sigma), abs=1e-6)
    slope = sigma**2 * (sigma + 2 * (1 - sigma) * torch.nn.functional.softplus(LOGITS.double()))
    assert mechanisms(LOGITS, TARGET, fl.SSLRLoss(gamma=2))["easy share"] == pytest.approx(shares(slope), abs=1e-6)
    picked = sigma.clone()  # the hardest negative of row 0 is 1, of row 1 also
    picked[:, [2, 3, 4]] = 0
    picked[1, 0] = 0
    assert mechanisms(LOGITS, TARGET, fl.HSLRLoss(k=1))["easy share"] == pytest.approx(shares(picked), abs=1e-6)
    assert shares(picked) == 0
    assert shares(sigma) > 2 * shares(slope) > 0


def test_easy_share_leaves_out_every_positive_of_a_multi_hot_row():
    target = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]])
    sigma = LOGITS.double().sigmoid()
    negatives = [(i, j) for i in range(2) for j in range(5) if not target[i, j]]
    easy = sum(sigma[place] for place in negatives if sigma[place] < EASY)
    found = mechanisms(LOGITS, target, fl.LRLoss())["easy share"]
    assert found == pytest.approx(float(easy / sum(sigma[place] for place in negatives)), abs=1e-6)


def test_margin_is_the_target_less_the_largest_other():
    p = LOGITS.double().softmax(1)
    by_hand = ((p[0, 0] - p[0, 1]) + (p[1, 2] - p[1, 1])) / 2
    for criterion in (fl.CrossEntropyLoss(), fl.NLLRLoss(), fl.CRLLoss()):
        assert mechanisms(LOGITS, TARGET, criterion) == {"margin": pytest.approx(by_hand.item())}
    flipped = torch.tensor([3, 3])
    assert mechanisms(LOGITS, flipped, fl.CrossEntropyLoss())["margin"] < -0.5


def test_the_probe_leaves_the_model_as_it_was():
    train = Split(torch.randn(1000, 4), torch.arange(1000) % 5)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 5), torch.nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (probe_of(train)(model, fl.CRLLoss()) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
