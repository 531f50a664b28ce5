"""bench/charts.py: the pictures of README and docs/ show what was recorded, and can be read."""

import itertools
import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from bench import charts
from bench.evidence import records


@pytest.fixture(params=list(charts.PICTURES))
def picture(request):
    with matplotlib.rc_context(charts.STYLE):
        yield charts.PICTURES[request.param]()


def undrawn_ticks(picture) -> set[Text]:
    """Labels of ticks outside of the axes' limits, and where labels are switched off."""
    found = set()
    for axes in picture.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not tick.label1.get_visible() or not min(limits) <= tick.get_loc() <= max(limits):
                    found |= {tick.label1, tick.label2}
    return found


def test_no_text_covers_another_or_leaves_the_picture(picture):
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    renderer, edge, undrawn = canvas.get_renderer(), picture.bbox, undrawn_ticks(picture)
    shown = [text for text in picture.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = {text: text.get_window_extent(renderer) for text in shown if text not in undrawn}
    for text, box in boxes.items():
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1, text.get_text()
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        across, along = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 1, (one.get_text(), other.get_text())


def test_the_same_record_gives_the_same_bytes(tmp_path, capsys):
    for folder in ("a", "b"):
        charts.main(["accuracy", "steps", "--folder", str(tmp_path / folder)])
    for name in ("accuracy", "steps"):
        drawn = (tmp_path / "a" / f"{name}.svg").read_bytes()
        assert drawn == (tmp_path / "b" / f"{name}.svg").read_bytes()
        assert drawn.startswith(b"<?xml")
    assert {path.stem for path in charts.FOLDER.glob("*.svg")} == set(charts.PICTURES)


def test_what_is_drawn_is_what_was_recorded():
    record = records.read(records.RESULTS / "digits-10000-runs.json")["losses"]["HS-LR"]["test"]["accuracy"]
    assert charts.accuracies()["HS-LR"][10_000] == [100 * score for score in record]
    cases = json.loads((charts.RESULTS / "linear.json").read_text())["cases"]
    for case, names in (("100k classes, k 100", charts.HARDEST), ("100k classes, CRL and CE", charts.ALL)):
        memory = charts.memory_of(case, names)
        assert list(memory) == names
        assert all(memory[name] == cases[case][name]["bytes"] / 2**20 for name in names)


def test_pulls_are_gradients():
    found = charts.pulls(50, 5)
    for name, pull in found.items():
        assert pull.shape == (49,) and (pull >= 0).all(), name
    assert (found["CE, k = 5"] > 0).tolist() == (found["HS-LR, k = 5"] > 0).tolist() == [True] * 5 + [False] * 44
    assert (found["CE"].diff() <= 0).all() and (found["LR"].diff() <= 0).all()  # the hardest first
    assert 0 < found["CE"].sum() < 1
    torch.testing.assert_close(found["LR"], found["LR"].clamp(0, 1))
