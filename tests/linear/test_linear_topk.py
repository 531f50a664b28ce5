"""Serving: the classes with the largest logits, without the logits."""

import pytest
import torch
from layers import make_layer

import fused_losses as fl

ROWS, FEATURES = 6, 8


def head_of(classes, dtype=torch.float32, **options) -> fl.LinearLoss:
    torch.manual_seed(classes)
    return fl.LinearLoss(FEATURES, classes, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [{}, {"bias": True}, {"normalize": True, "scale": 16.0}], ids=["w", "bias", "cosine"])
@pytest.mark.parametrize("classes, k", [(1, 1), (5, 5), (100, 3), (10_000, 1), (10_000, 500)])
def test_topk_is_torchs_of_the_logits(classes, k, layer, dtype):
    head, x = head_of(classes, dtype, **layer), torch.randn(ROWS, FEATURES).to(dtype)
    found, logits = head.topk(x, k), head.logits(x)
    assert found.values.dtype == dtype
    torch.testing.assert_close(found.values, logits.topk(k).values)
    torch.testing.assert_close(found.values, logits.gather(1, found.indices))
    assert torch.equal(head.predict(x), head.topk(x, 1).indices[:, 0])


@pytest.mark.parametrize("chunk_bytes", [1, 4096, None])
def test_the_lowest_class_comes_first_among_equals(chunk_bytes):
    head = head_of(9001, options=fl.LinearLossOptions(chunk_bytes=chunk_bytes))
    head.weight.data[:] = (torch.arange(9001) // 3 % 7)[:, None]
    expected = torch.arange(9001)[torch.arange(9001) // 3 % 7 == 6][:50]
    assert torch.equal(head.topk(torch.ones(2, FEATURES), 50).indices, expected.expand(2, 50))


def test_margins_and_smoothing_are_not_applied():
    loss = fl.CrossEntropyLoss(margin=fl.Margin(angle=0.5), label_smoothing=0.1)
    head, x = head_of(50, normalize=True, scale=8.0, loss=loss), torch.randn(ROWS, FEATURES)
    torch.testing.assert_close(head.topk(x, 4).values, head.logits(x).topk(4).values)


def test_one_row_and_errors():
    head, x = head_of(20), torch.randn(ROWS, FEATURES)
    assert torch.equal(head.topk(x[0], 3).indices, head.topk(x, 3).indices[0])
    assert head.predict(x[0]).shape == ()
    assert not head.topk(x.requires_grad_(), 3).values.requires_grad
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 20 classes, got {k}"):
            head.topk(x, k)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        head.topk(x, 2.0)
    with pytest.raises(ValueError, match=r"expected input \(N, D\)"):
        head.topk(torch.randn(2, FEATURES + 1), 3)


@pytest.mark.parametrize("classes", [20, 10_000])
def test_where_nothing_is_the_largest_no_class_is_named(classes):
    head, x = head_of(classes, bias=True), torch.randn(3, FEATURES)
    with torch.no_grad():
        head.bias[4] = -torch.inf
    expected = head.topk(x, 3)
    x[1, 0] = torch.nan
    found = head.topk(x, 3)
    assert found.values[1].isnan().all() and (found.indices[1] == classes).all()
    assert head.predict(x)[1] == classes
    for row in (0, 2):
        torch.testing.assert_close(found.values[row], expected.values[row])
        assert torch.equal(found.indices[row], expected.indices[row])
    with torch.no_grad():
        head.bias[7] = torch.inf
    assert head.topk(x, 3).values.isnan().all() and (head.topk(x, 3).indices == classes).all()


def test_a_class_of_minus_infinity_is_not_found():
    head, x = head_of(20, bias=True), torch.randn(2, FEATURES)
    with torch.no_grad():
        head.bias[4:] = -torch.inf
    found = head.topk(x, 6)
    assert torch.equal(found.indices[:, :4].sort().values, torch.arange(4).expand(2, 4))
    assert (found.values[:, 4:] == -torch.inf).all() and (found.indices[:, 4:] == 20).all()


def test_embeddings_are_an_index_of_the_cosines():
    head, x = head_of(50, normalize=True, scale=8.0), torch.randn(ROWS, FEATURES)
    torch.testing.assert_close(8 * torch.nn.functional.normalize(x) @ head.embeddings().t(), head.logits(x))
    plain = head_of(50)
    assert torch.equal(plain.embeddings(), plain.weight)


def test_a_network_with_topk_is_exported():
    class Serve(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.head = torch.nn.Linear(3, FEATURES), head_of(100, normalize=True, scale=16.0)

        def forward(self, images):
            return tuple(self.head.topk(self.network(images), 4))

    model, images = Serve(), torch.randn(5, 3)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    for rows in (images, torch.randn(9, 3)):
        for found, expected in zip(program.module()(rows), model(rows), strict=True):
            torch.testing.assert_close(found, expected)


def test_never_all_logits_at_a_time():
    (x, w, _) = make_layer(rows=64, classes=200_000, features=FEATURES, dtype=torch.float32)
    head = fl.LinearLoss(FEATURES, 200_000)
    head.weight.data = w
    seen = []
    original = torch.mm

    def mm(*args, out=None, **kwargs):
        seen.append(out.numel())
        return original(*args, out=out, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        head.topk(x, 10)
    assert sum(seen) == 64 * 200_000
    assert max(seen) * 4 <= 4 * 2**20
