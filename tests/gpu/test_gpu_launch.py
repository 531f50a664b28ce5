"""The launcher: tables, splits, layouts, who is served."""

import pytest
import torch
import triton
from gpu_doors import DTYPES, INTERPRETED, make

import fused_losses as fl
from fused_losses import ops
from fused_losses.gpu import device as gpu
from fused_losses.gpu import doors, hardest
from fused_losses.gpu.formulas import formulas
from fused_losses.gpu.layout import gradient_row_stride

tile_for = gpu.tile_for  # before the fixtures put a small one in its place
HOPPER = gpu.Device(132, 32, nvidia=True)
AMD = gpu.Device(304, 64, nvidia=False)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_length_has_a_tile(itemsize):
    warps = [tile_for(2**power, itemsize).warps for power in range(31)]
    assert warps == sorted(warps), "longer rows never get fewer warps"
    assert warps[0] == tile_for(1000, 2).warps == 1, "one warp per short row"
    for power in range(31):
        tile = tile_for(2**power, itemsize)
        assert triton.next_power_of_2(tile.rows * tile.warps) == tile.rows * tile.warps
        assert 32 * tile.warps * 32 <= 1024 * 32


def test_short_rows_fit_one_tile():
    tile = tile_for(1000, 2)
    assert tile.rows * tile.warps * 32 * 8 >= 1000


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 132, 256, 263])
def test_few_long_rows_are_split_to_fill_the_device_once(rows):
    parts = gpu.parts_for(HOPPER, rows, 122)
    assert 1 < parts <= 64 and 122 / parts >= 2
    at_once = 4 * HOPPER.multiprocessors
    assert rows * parts <= at_once
    assert rows * (parts + 1) > at_once or 122 / (parts + 1) < 2


@pytest.mark.parametrize("rows, tiles", [(265, 1000), (8192, 4), (1, 1), (1, 3), (131, 2)])
def test_other_rows_are_whole(rows, tiles):
    assert gpu.parts_for(HOPPER, rows, tiles) == 1


@pytest.mark.parametrize(
    "rows, classes, small, merged, tile, parts",
    [
        (256, 21841, False, True, gpu.Tile(8, 4), 1),
        (256, 21841, False, False, gpu.Tile(8, 2), 2),  # halved, so that two programs share a row
        (300, 21841, False, False, gpu.Tile(8, 4), 1),
        (256, 1_000_003, True, False, gpu.Tile(4, 4), 2),  # shared as it is
        (4096, 21841, True, True, gpu.Tile(4, 4), 1),
        (2, 1000, False, False, gpu.Tile(1, 4), 1),  # one tile: halves of it would be no parts
    ],
)
def test_walks(rows, classes, small, merged, tile, parts, monkeypatch):
    monkeypatch.setattr(gpu, "tile_for", tile_for)
    monkeypatch.setattr(gpu, "profile", lambda device: HOPPER)
    walk = gpu.walk_of(torch.empty((rows, 1), dtype=torch.bfloat16), classes, small, merged=merged)
    assert (walk.warps, walk.rows, walk.parts) == (tile.warps, tile.rows, parts)
    assert walk.lanes == 8 * 32 * tile.warps


def test_many_rows_are_walked_by_small_programs(monkeypatch):
    monkeypatch.setattr(gpu, "profile", lambda device: HOPPER)
    found = [gpu.are_many(torch.empty(rows, 1)) for rows in (2048, 4096)]
    tiles = [hardest.plan(HOPPER, rows, 21841, 218, 2, multi_hot=False).tile for rows in (264, 265)]
    assert found == [False, True] and tiles == [gpu.Tile(8, 4), gpu.Tile(4, 8)]


def test_gradient_rows():
    assert gradient_row_stride(21841, (21841, 1), 2) == 21841, "contiguous logits, contiguous gradient"
    assert gradient_row_stride(21841, (21848, 1), 2) == 21848
    assert gradient_row_stride(75, (0, 1), 4) == 76
    assert gradient_row_stride(75, (1, 75), 4) == 75, "copied first"
    for classes in range(1, 40):
        for stride in range(classes, 60):
            for itemsize in (2, 4):
                found = gradient_row_stride(classes, (stride, 1), itemsize)
                assert classes <= found < classes + 16 // itemsize
                assert (found - stride) * itemsize % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_who_is_served(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    device = torch.device("cuda", 0)
    assert doors.unserved(device, dtype, 21841) is None
    assert "float64" in doors.unserved(device, torch.float64, 21841)
    assert "classes" in doors.unserved(device, dtype, 2**31 - 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0" in doors.unserved(device, dtype, 21841)
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1 is older than 3.6" in doors.unserved(device, dtype, 21841)


def test_the_default_exponent_has_its_own_formula():
    assert formulas("ss_lr", [2.0])[:2] != formulas("ss_lr", [1.5])[:2] == formulas("ss_lr", [2.5])[:2]


@pytest.mark.parametrize("tile", [gpu.Tile(8, 4), gpu.Tile(4, 2), gpu.Tile(8, 8)])
def test_rows_are_shared_out_by_the_tiles_that_there_are(tile, monkeypatch):
    monkeypatch.setattr(hardest, "_FEW_ROWS", tile)
    found = hardest.plan(HOPPER, 1, 1_000_003, 1000, 2, multi_hot=False)
    assert found.parts == 1_000_003 // (tile.rows * tile.warps * 32 * 8) // 2 and found.tile is tile


@pytest.mark.skipif(not INTERPRETED, reason="is what every call on a device does")
def test_calls_past_the_dispatcher(monkeypatch):
    """The doors are called by themselves: loss and gradient are those of the ops."""
    logits, target = make(4, 50, torch.float32)
    layer = fl.LinearLoss(8, 50, loss=fl.HSLRLoss(k=5))
    x = torch.randn((4, 8), generator=torch.Generator().manual_seed(0))

    def step(call, *given):
        given = [part.clone().requires_grad_() for part in given]
        value = call(*given)
        return value.detach(), *torch.autograd.grad(value, given)

    calls = {
        "CRL": (lambda z: fl.crl_loss(z, target), logits),
        "HS-LR": (lambda z: fl.hs_lr_loss(z, target, k=5), logits),
        "smoothed": (lambda z: fl.lr_loss(z, target, label_smoothing=0.1), logits),
        "layer": (lambda x: layer(x, target), x),
    }
    expected = {name: step(*of) for name, of in calls.items()}
    taken = []
    monkeypatch.setattr(ops, "_is_cuda", lambda _: True)
    monkeypatch.setattr(ops, "_triton_backend", lambda *_: taken.append(1) or doors)
    for name, of in calls.items():
        taken.clear()
        for ours, theirs in zip(step(*of), expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert len(taken) >= (1 if name == "layer" else 2)  # whose backward is the op that overwrites logits
