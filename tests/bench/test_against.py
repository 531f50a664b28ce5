"""bench.speed.against: this checkout beside itself."""

import pytest
import torch

pytest.importorskip("matplotlib")

from bench.speed import against
from bench.speed.against import OURS


def test_every_cell_has_a_name_of_its_own():
    names = [name for name, _ in (*against.cells(), *against.peers())]
    assert len(names) == len(set(names)) > 100


@pytest.mark.parametrize("kind", ("ascending", "descending", "clustered", "two values", "99 % masked"))
def test_rows_of_a_kind(kind):
    logits, _ = against.draw(3, 1000, "fp32")
    rows = against.rows_of_kind(kind, logits.clone())
    assert rows.shape == logits.shape
    assert not torch.equal(rows, logits)
    with pytest.raises(ValueError):
        against.rows_of_kind("ordinary", logits)


def test_a_checkout_beside_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(against, "SECONDS", 0.01)
    against.main(
        [str(OURS), "--only", "^(LR|F.cross_entropy) fp32 8 x 10$", "--turns", "1", "--write", str(tmp_path / "t")]
    )
    (row,) = (tmp_path / "t").read_text().splitlines()[2:]
    cell, old, new, ratio, of_peer = (part.strip() for part in row.strip("|").split("|"))
    assert cell == "LR fp32 8 x 10"
    assert float(new) / float(old) == pytest.approx(float(ratio), abs=0.02)
    assert float(of_peer) > 0


def test_what_one_checkout_cannot_run_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "fused_losses.py").write_text("")
    monkeypatch.setattr(against, "ask", lambda process, cell: "AttributeError: no such loss")
    against.main([str(OURS), "--only", "^LR fp32 8 x 10$", "--turns", "1"])
    assert "LR fp32 8 x 10: AttributeError" in capsys.readouterr().err
