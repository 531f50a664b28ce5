"""bench.speed.gpu on tiny shapes, its ``ours`` through the GPU doors."""

import json

import pytest
import torch
from gpu_doors import INTERPRETED

from bench.speed import cases, cells, cpu, gpu
from fused_losses import ops
from fused_losses.gpu import doors


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """CPU tensors reach the GPU doors; nothing is compiled by torch."""
    if INTERPRETED:
        for door in ("forward", "finish", "backward"):
            monkeypatch.setattr(ops, door, getattr(doors, door))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(cases, "TINY_SHAPES", cases.TINY_SHAPES[:1])


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_providers_compute_the_same_loss(loss, device):
    for shape in cases.TINY_SHAPES:
        found = {}
        for name, provider in cases.providers(loss).items():
            logits, target = cases.make(shape, torch.float32, device.type)
            value = provider(logits, target)
            value.backward()
            found[name] = value.detach(), logits.grad
        for name, other in found.items():
            torch.testing.assert_close(other, found["ours"], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_hard_selection_providers(device):
    found = []
    for provider in cases.providers("hs_lr_loss", k=5).values():
        logits, target = cases.make(cases.TINY_SHAPES[0], torch.float32, device.type)
        provider(logits, target).backward()
        found.append(logits.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_family_writes_after_every_row_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "LOSSES", ("crl_loss",))
    arguments = ["--part", "family", "--tiny", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--seconds", "-1"]) == 3
    monkeypatch.setattr(cases, "DTYPES", {"fp32": torch.float32})
    assert gpu.main(arguments) == 0
    path = tmp_path / "family.json"
    found = json.loads(path.read_text())
    assert {key.split(" | ")[3] for key in found["rows"]} == {"ours", "eager", "authors", "compiled"}
    for key, row in found["rows"].items():
        assert "error" not in row, (key, row)
        assert row["full cold"]["GB/s"] > 0 and row["backward hot"]["median"] > 0
    assert found["torch"] == torch.__version__ and found["copy GB/s"] > 0

    done = path.read_text()
    measured = []
    monkeypatch.setattr(gpu, "measure", lambda *_: measured.append(1))
    assert gpu.main(arguments) == 0 and not measured
    assert json.loads(done)["rows"] == json.loads(path.read_text())["rows"]


@pytest.fixture
def report():
    pytest.importorskip("matplotlib")  # a bare image with a GPU need not have it
    from bench.speed import report

    return report


@pytest.fixture
def drawn(report, monkeypatch):
    """What was drawn: (times, path, caption)."""
    found, honest = [], report.chart.draw
    monkeypatch.setattr(report.chart, "draw", lambda *of: found.append(of) or honest(*of))
    return found


def test_report(tmp_path, monkeypatch, capsys, report, drawn):
    """The table holds the JSON's own numbers, with the device and the versions above it."""
    monkeypatch.setattr(cases, "LOSSES", ("crl_loss", "nllr_loss"))
    monkeypatch.setattr(cases, "DTYPES", {"fp32": torch.float32})
    assert gpu.main(["--part", "family", "--tiny", "--out", str(tmp_path)]) == 0
    path = tmp_path / "family.json"
    found = json.loads(path.read_text())
    shape = cases.TINY_SHAPES[0]
    ours, authors = (found["rows"][f"crl_loss | {shape} | fp32 | {name}"]["full cold"] for name in ("ours", "authors"))
    found["rows"][f"nllr_loss | {shape} | fp32 | eager"] = {"error": "out of memory"}
    path.write_text(json.dumps(found))

    capsys.readouterr()
    arguments = ["--results", str(tmp_path), "--charts", str(tmp_path)]
    report.main(arguments)
    printed = capsys.readouterr().out
    for name in ("device", "torch", "triton"):
        assert found[name] in printed.splitlines()[0]
    header, _, crl, nllr = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")
    )
    crl, nllr = dict(zip(header, crl, strict=True)), dict(zip(header, nllr, strict=True))
    assert (crl["case"], crl["loss"], nllr["loss"]) == (f"{shape} fp32", "CRL", "NLLR")
    assert crl["ours, ms"] == f"{ours['median']:.3f}"
    assert crl["of a copy's speed"] == f"{100 * ours['of_copy']:.0f} %"
    assert crl["authors"] == f"{authors['median']:.3f} ({authors['median'] / ours['median']:.2f}x)"
    assert nllr["eager"] == "failed" and nllr["authors"] == "-"
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    assert drawn[0][0][f"{shape} fp32"]["CRL"]["ours"] == ours["median"] and found["device"] in drawn[0][2]

    report.main([*arguments, "--only", "NLLR", "fp32"])
    printed = capsys.readouterr().out
    assert "| NLLR |" in printed and "CRL" not in printed
    report.main([*arguments, "--only", "bf16"])
    assert "no row holds bf16" in capsys.readouterr().out and len(drawn) == 2


def timed(called: float, graph: float | None = None, processor: float | None = None) -> dict:
    """A row as gpu.measure gives it on a GPU: a graph only where nothing waits, the processor only at small sizes."""
    row = {"kernels_per_step": 4, "peak_bytes": 2_500_000, "full cold": {"median": called, "of_copy": 0.01}}
    if graph is not None:
        row["full graph"] = {"median": graph, "of_copy": 0.42}
    return row if processor is None else row | {"processor": processor}


def test_report_of_several_gpus(tmp_path, capsys, report, drawn):
    """A folder for each: as called, as a CUDA graph and the processor's time in tables of their own."""
    header = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}
    rows = {
        "crl_loss | 256 x 1000 | bf16 | ours": timed(0.8, 0.01, 712.5),
        "crl_loss | 256 x 1000 | bf16 | eager": timed(0.6, 0.04, 530.25),
        "crl_loss | 256 x 1000000 | bf16 | ours": timed(0.9, 0.4),
        "crl_loss | 256 x 1000000 | bf16 | eager": timed(3.3),
    }
    for name, device, found in [
        ("h200", "NVIDIA H200", rows),
        ("other", "Another", {"lr_loss | 2 x 8 | fp32 | ours": timed(5.0)}),
        ("small", "Too small", {"lr_loss | 2 x 8 | fp32 | ours": {"error": "out of memory"}}),
    ]:
        (tmp_path / name).mkdir()
        path = tmp_path / name / "family.json"
        path.write_text(json.dumps(header | {"device": device, "rows": found}))
    report.main(["--results", str(tmp_path), "--charts", str(tmp_path / "charts")])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("|", "All")) and "---" not in line]
    kept = "of a copy's speed | kernels | memory, MB"
    assert lines == [
        "All negatives, as called: NVIDIA H200, torch 2.11.0, Triton 3.6.0",
        f"| case | loss | ours, ms | {kept} | eager |",
        "| 256 x 1000 bf16 | CRL | 0.800 | 1 % | 4 | 2.5 | 0.600 (0.75x) |",
        "| 256 x 1000000 bf16 | CRL | 0.900 | 1 % | 4 | 2.5 | 3.300 (3.67x) |",
        "All negatives, as a CUDA graph: NVIDIA H200, torch 2.11.0, Triton 3.6.0",
        f"| case | loss | ours, ms | {kept} | eager |",
        "| 256 x 1000 bf16 | CRL | 0.010 | 42 % | 4 | 2.5 | 0.040 (4.00x) |",
        "| 256 x 1000000 bf16 | CRL | 0.400 | 42 % | 4 | 2.5 | - |",
        "All negatives, the processor's time: NVIDIA H200, torch 2.11.0, Triton 3.6.0",
        "| case | loss | ours, ms | eager |",
        "| 256 x 1000 bf16 | CRL | 0.713 | 0.530 (0.74x) |",
        "All negatives, as called: Another, torch 2.11.0, Triton 3.6.0",
        f"| case | loss | ours, ms | {kept} |",
        "| 2 x 8 fp32 | LR | 5.000 | 1 % | 4 | 2.5 |",
        "All negatives, as called: Too small, torch 2.11.0, Triton 3.6.0",
        f"| case | loss | ours, ms | {kept} |",
        "| 2 x 8 fp32 | LR | failed | - | - | - |",
    ]
    names = [path.name for _, path, _ in drawn]
    of_h200 = ["h200-family.png", "h200-family-graph.png", "h200-family-processor.png"]
    assert names == [*of_h200, "other-family.png", "small-family.png"]


def test_report_of_what_was_recorded(tmp_path, capsys, report, drawn):
    """Every row in bench/results is in a table, and docs/gpu.md quotes these tables, and what was counted."""
    report.main(["--charts", str(tmp_path)])
    printed = capsys.readouterr().out
    for path in report.RESULTS.rglob("family.json"):
        found = json.loads(path.read_text())
        for key, row in found["rows"].items():
            loss, shape, dtype, provider = key.split(" | ")
            if provider == "ours":
                begin = f"| {shape} {dtype} | {cases.NAMES[loss]} | "
                assert f"{begin}{row['full cold']['median']:.3f} | " in printed
                assert f"{begin}{row['full graph']['median']:.3f} | " in printed
        assert f"All negatives, as called: {found['device']}, torch {found['torch']}" in printed
    assert drawn
    page = (report.RESULTS.parents[1] / "docs" / "gpu.md").read_text()
    quoted = [line for line in page.splitlines() if line.startswith("|")]
    counted = [(report.RESULTS / f"{name}.md").read_text() for name in ("roofline", "peers-machine-code")]
    assert len(quoted) > 10 and set(quoted) <= set("\n".join([printed, *counted]).splitlines())


def test_the_page_quotes_the_report_of_the_cpu(tmp_path, capsys, report, drawn):
    report.main(["--device", "cpu", "--charts", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    page = (report.RESULTS.parents[1] / "docs" / "speed.md").read_text()
    quoted = [line for line in page.splitlines() if line.startswith("|")]
    assert len(quoted) > 10 and set(quoted) <= set(printed)


def test_report_of_the_cpu(tmp_path, monkeypatch, capsys, report, drawn):
    case = cases.Case(cases.TINY_SHAPES[0], "fp32", 4)
    monkeypatch.setattr(cases, "CPU_CASES", (case,))
    monkeypatch.setattr(cpu, "BARS", {case: []})
    group = cells.double(case.shape, {"CE": 1.0})
    monkeypatch.setattr(cells, "groups", lambda: [group])
    monkeypatch.setattr(cpu, "RESULTS", tmp_path / "cpu.json")
    threads = torch.get_num_threads()
    try:
        assert cpu.main(["--write", "--rounds", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    report.main(["--device", "cpu", "--results", str(tmp_path), "--charts", str(tmp_path)])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "cpu.json").read_text())
    median = record["cases"][str(case)]
    assert record["groups"][str(group)]["CE, ours"] > 0
    assert torch.__version__ in printed and f"| {case} | HS-LR | {median['HS-LR, ours']:.3f} |" in printed
    assert drawn[0][0][str(case)]["CE"]["eager"] == median["CE, eager"]


@pytest.mark.parametrize("device, command", [("gpu", "bench.speed.gpu"), ("cpu", "bench.speed --write")])
def test_nothing_to_report(tmp_path, capsys, report, device, command):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--device", device, "--results", str(tmp_path)])
    assert command in capsys.readouterr().err


def test_hardest(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(cases, "SHARES", (0.1,))
    monkeypatch.setattr(cases, "INPUTS", ("trained head",))
    assert gpu.main(["--part", "hardest", "--tiny", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "hardest.json").read_text())["rows"]
    assert all("error" not in row for row in rows.values()), rows
    assert {key.split(" | ")[3] for key in rows} == {"ours", "eager", "topk"}


@pytest.mark.parametrize("inputs", cases.INPUTS)
def test_hardest_providers_compute_the_same_loss(inputs, device):
    found = {}
    for name, provider in cases.hardest_providers(4, inputs).items():
        if name not in ("authors", "topk"):  # another formula beyond |z| = 4; no loss
            logits, target = cases.make(cases.TINY_SHAPES[0], torch.float32, device.type, inputs=inputs)
            found[name] = provider(logits, target).item()
    assert len(found) >= 2 and max(found.values()) - min(found.values()) < 1e-5 * max(found.values()), found


def test_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "DTYPES", {"fp32": torch.float32})
    assert gpu.main(["--part", "peers", "--tiny", "--out", str(tmp_path)]) == 0
    assert {"ours", "eager", "compiled"} <= {
        key.split(" | ")[3] for key in json.loads((tmp_path / "peers.json").read_text())["rows"]
    }


def test_options(tmp_path, capsys, report, drawn):
    """Named as they are on the CPU, ours beside the usual calls; the report prints them."""
    arguments = ["--part", "options", "--tiny", "--milliseconds", "1", "--only", "2 x 40.*bf16.*(ours|eager)"]
    assert gpu.main([*arguments, "--out", str(tmp_path / "here")]) == 0
    rows = json.loads((tmp_path / "here" / "options.json").read_text())["rows"]
    assert {f"CE{option} | 2 x 40 | bf16 | ours" for option in ("", " smoothed", " of a mixed pair")} <= rows.keys()
    assert not [key for key, row in rows.items() if "error" in row]
    report.main(["--results", str(tmp_path), "--charts", str(tmp_path / "charts")])
    assert "| 2 x 40 bf16 | CE smoothed | " in capsys.readouterr().out


def test_check(tmp_path):
    assert gpu.main(["--part", "check", "--tiny", "--out", str(tmp_path)]) == 0
    assert "passed" in (tmp_path / "check_tests.log").read_text()
    assert json.loads((tmp_path / "check.json").read_text())["exit codes"]["tests"] == 0


def test_a_gpu_is_asked_for(tmp_path):
    if INTERPRETED:
        with pytest.raises(SystemExit):
            gpu.main(["--part", "family", "--out", str(tmp_path)])


def test_tables_are_tried_and_put_back():
    from bench.speed import launch_tables
    from fused_losses.gpu import device, hardest

    def tables():
        return device._TILES, device._LONG, device._SMALL, hardest._FEW_ROWS, hardest._MANY_ROWS, hardest.block_width

    before = tables()
    on = device.Device(132, 32, nvidia=True)
    cells = list(launch_tables.every_cell())
    for cell in cells:
        tried = launch_tables.changes_for(cell)
        assert next(iter(tried)) == "now" and len(tried) > 2
        for change in tried.values():
            with launch_tables.table_of(change):
                plan = hardest.plan(on, cell.shape.rows, cell.shape.classes, max(1, cell.k), 2, multi_hot=False)
                if isinstance(change, device.Tile):
                    assert device._TILES == () and device._LONG == device._SMALL == change
                    assert plan.held or plan.tile == change
                elif change is not None:
                    assert plan.width == change
    assert before == tables() and len(set(map(str, cells))) == len(cells)
