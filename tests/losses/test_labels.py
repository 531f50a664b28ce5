"""Labels: how they are made, and put in order."""

import pytest
import torch

import fused_losses as fl
from fused_losses import labels, ops


def by_hand(index, weight):
    """One row at a time."""
    places, rows, shares = index.shape[1], [], []
    for classes, weights in zip(index.tolist(), weight.tolist(), strict=True):
        total = {}
        for c, w in zip(classes, weights, strict=True):
            if c != -1:
                total[c] = total.get(c, 0) + w
        found = sorted(total, key=lambda c: c % 2**64)  # what is no class stands behind all classes
        rows.append(found + [-1] * (places - len(found)))
        shares.append([total[c] for c in found] + [0.0] * (places - len(found)))
    return torch.tensor(rows).view(index.shape), torch.tensor(shares, dtype=weight.dtype).view(index.shape)


@pytest.mark.parametrize("door", [labels.in_order, ops.in_order], ids=["python", "op"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, places", [(0, 3), (1, 1), (50, 2), (50, 3), (20, 9), (3, 200)])
def test_in_order(door, rows, places, dtype):
    generator = torch.Generator().manual_seed(places)
    index = torch.randint(-1, 5 + places // 2, (rows, places), generator=generator)
    if rows > 1:
        index[1, 0], index[1, -1] = -(2**63), 2**63 - 1
    weight = (torch.randint(0, 9, (rows, places), generator=generator) / 8).to(dtype)
    expected, shares = by_hand(index, weight)
    for given in ((index, weight), (index.t().contiguous().t(), weight.t().contiguous().t())):
        found = door(*given)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], shares)
    found, none = door(index, None)
    assert torch.equal(found, expected)
    assert none.numel() == 0


@pytest.mark.filterwarnings("ignore")  # its dispatch test runs backward through an op that has none
def test_in_order_is_an_op():
    index, weight = torch.tensor([[3, -1, 3], [2, 1, -1]]), torch.rand(2, 3)
    torch.library.opcheck(torch.ops.fused_losses.in_order.default, (index, weight))
    torch.library.opcheck(torch.ops.fused_losses.in_order.default, (index, None))


def test_mixup():
    a, b = torch.tensor([0, 4, 2]), torch.tensor([1, 4, 0])
    for lam in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.25, 0.25])):
        found = fl.Labels.mixup(a, b, lam)
        assert torch.equal(found.index, torch.tensor([[0, 1], [4, 4], [2, 0]]))
        torch.testing.assert_close(found.weight, torch.tensor([[0.25, 0.75]]).expand(3, 2))
    assert fl.Labels.mixup(a[0], b[0], 0.25).index.tolist() == [0, 1]


def test_from_lists_and_from_csr():
    lists = [[3, 1], [], [7], [0, 2, 4]]
    found = fl.Labels.from_lists(lists)
    assert found.index.tolist() == [[3, 1, -1], [-1, -1, -1], [7, -1, -1], [0, 2, 4]]
    assert found.weight is None
    crow, col = torch.tensor([0, 2, 2, 3, 6]), torch.tensor([3, 1, 7, 0, 2, 4])
    assert torch.equal(fl.Labels.from_csr(crow, col).index, found.index)
    weight = torch.arange(6.0)
    of_csr = fl.Labels.from_csr(crow, col, weight)
    of_lists = fl.Labels.from_lists(lists, [[0.0, 1.0], [], [2.0], [3.0, 4.0, 5.0]])
    assert torch.equal(of_csr.weight, of_lists.weight)
    assert fl.Labels.from_csr(crow, col, most=1).index.tolist() == [[3], [-1], [7], [0]]
    assert fl.Labels.from_csr(crow[:1], col[:0]).index.shape == (0, 1)
    assert fl.Labels.from_csr(torch.tensor([0, 0, 0]), col[:0], weight[:0]).index.tolist() == [[-1], [-1]]
    assert fl.Labels.from_lists([[], []]).index.tolist() == [[-1], [-1]]
    with pytest.raises(ValueError, match="a weight for every class"):
        fl.Labels.from_lists([[1, 2]], [[1.0]])


def test_from_dense_and_to():
    soft = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = fl.Labels.from_dense(soft, 2)
    assert found.index.tolist() == [[2, 1], [3, -1]]
    torch.testing.assert_close(found.weight, torch.tensor([[0.7, 0.3], [1.0, 0.0]]))
    moved = found.to("meta")
    assert moved.index.is_meta and moved.weight.is_meta
    cast = found.to(torch.float64)
    assert cast.index.dtype == torch.int64 and cast.weight.dtype == torch.float64
