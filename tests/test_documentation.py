"""README and docs/: their code runs, their links lead somewhere, their numbers are those of the records, and the site
builds without a warning.

What stands between ```python and ``` runs, in the order of the page, with what a comment `<!-- run ... -->` puts in
between unseen; `<!-- torchrun ... -->` instead, and two processes run the page. Code of tools that are not installed
is skipped.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^(?:```python|<!-- (?:run|torchrun))\n(.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- code -------------------------------------------------------------------------------------------------------------


def code_of(page: str) -> str:
    """Every line of it where it stands on the page, so that a traceback names it."""
    lines = [""] * page.count("\n")
    for block in CODE.finditer(page):
        first = page.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def missing_of(code: str) -> list[str]:
    """The packages that the code imports and that are not installed."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return sorted(name for name in found if importlib.util.find_spec(name) is None)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page.read_text()).strip()], ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    text = page.read_text()
    code = code_of(text)
    if missing := missing_of(code):
        pytest.skip(f"not installed: {', '.join(missing)}")
    if "<!-- torchrun" in text:
        script = tmp_path / "page.py"
        # A block goes on with the names of others: a DDP module outlives the group, and gloo may abort the process.
        script.write_text(f"{code}\n\nimport os\n\nos._exit(0)\n")
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, str(page), "exec"), {"__name__": page.stem})


def test_code_is_where_it_stands():
    page = "a\n<!-- run\nx = 1\n-->\n\n```python\ny = x\nassert y == 2\n```\n\n```\nnot code\n```\n"
    assert code_of(page).split("\n") == ["", "", "x = 1", "", "", "", "y = x", "assert y == 2", "", "", "", "", ""]
    assert missing_of("import torch.nn, no_such_thing\nfrom also_not.x import y") == ["also_not", "no_such_thing"]


# --- links ------------------------------------------------------------------------------------------------------------


def without_code(page: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```|~~~).*?^\1$", "", page, flags=re.DOTALL | re.MULTILINE))


def anchors_of(page: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and anchor not in anchors_of(to.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("## One of `them`, *here*\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[x](b.md) [x](b.md#one-of-them-here) [x](b.md#two) ![x](c.svg) [x](https://x.org) `[x](no.md)`\n"
        '<img src="d.svg">\n'
    )
    assert broken_links(page) == ["b.md#two", "c.svg", "d.svg"]


def test_every_picture_is_on_a_page():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text())
        for link in link
        if link
    }
    assert set((ROOT / "docs" / "figures").iterdir()) <= shown


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "evidence.md"], ids=name_of)
def test_accuracies_are_those_of_the_evidence(page):
    """A mean and its spread stand on docs/evidence.md, which is made of the records."""
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    assert [number for number in re.findall(r"\d+\.\d+ ± \d+\.\d+", page.read_text()) if number not in evidence] == []


def test_the_readme_quotes_the_costs():
    found = json.loads((ROOT / "bench" / "results" / "linear.json").read_text())["cases"]["100k classes, k 100"]
    ours, others = found["ours, HS-LR"], found["linear + F.cross_entropy"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    sizes = [f"{of['bytes'] / 2**20:.0f}" for of in (ours, others)]
    assert f"takes {sizes[0]} MiB where `linear` and `F.cross_entropy` take {sizes[1]}" in readme
    assert "a quarter of their processor's time" in readme and 0.22 < ours["ms"] / others["ms"] < 0.28


LOSSES_OF_THE_TABLE = ("CE", "CRL", "NLLR", "LR", "HS-LR", "SS-LR")
RATES = {
    "digits": "digits", "Omniglot": "omniglot", "digits among 1,000": "digits-1000",
    "digits among 10,000": "digits-10000", "digits among 100,000": "digits-100000",
}  # fmt: skip


def test_the_learning_rates_that_are_quoted_were_chosen():
    section = (ROOT / "docs" / "choosing.md").read_text().partition("## The learning rate")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    quoted = {row[0]: row[2:] for row in rows if row[0] in RATES}
    assert set(quoted) == set(RATES)
    for name, record in RATES.items():
        losses = json.loads((ROOT / "bench" / "results" / f"{record}.json").read_text())["losses"]
        rates = [f"{losses[loss]['settings']['lr']:g}" if loss in losses else "" for loss in LOSSES_OF_THE_TABLE]
        assert quoted[name] == rates, name


def test_the_readme_is_short():
    """A newcomer reads one screen, and finds the rest in docs/."""
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    assert len(readme.split()) <= 1600


# --- errors -----------------------------------------------------------------------------------------------------------

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
WHERE_USERS_MEET_THEM = (
    "arguments", "autograd", "functional", "labels", "linear", "linear_checkpoint", "losses", "margin", "modules",
    "primitives", "shard",
)  # fmt: skip


def text_of(node: ast.expr, constants: dict[str, object]) -> str:
    """A message with ... where something is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left, constants) + text_of(node.right, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), str):
        return str(constants[node.id])
    return "..."


def messages_of(module: str) -> list[str]:
    constants = vars(importlib.import_module(f"fused_losses.{module}"))
    tree = ast.parse((ROOT / "fused_losses" / f"{module}.py").read_text())
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return [text_of(error.args[0], constants) for error in raised if error.args]


def pieces(message: str) -> list[str]:
    """What stands between the gaps."""
    return [piece.strip(" :,()") for piece in message.split("...")]


@pytest.mark.parametrize("module", WHERE_USERS_MEET_THEM)
def test_every_error_is_explained(module):
    """An error without a line in docs/troubleshooting.md fails here: add one, its message in backticks."""
    page = TROUBLESHOOTING.read_text()
    begins = [max(pieces(message), key=len)[:32] for message in messages_of(module)]
    assert [begin for begin in begins if begin not in page] == []


def test_every_message_that_is_explained_exists():
    """What stands in the first column is what the package says, or PyTorch."""
    said = " ".join(message for module in (*WHERE_USERS_MEET_THEM, "reference") for message in messages_of(module))
    strange = []
    for table in re.findall(
        r"^\| message \| what it means.*?(?:\n\n|\Z)", TROUBLESHOOTING.read_text(), re.DOTALL | re.MULTILINE
    ):
        for row in table.splitlines()[2:]:
            first = row.split(" | ")[0]
            if "(PyTorch)" not in first:
                spans = [piece for span in re.findall(r"`([^`]+)`", first) for piece in pieces(span)]
                strange += [piece for piece in spans if len(piece) > 3 and piece not in said]
    assert strange == []


# --- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    for needed in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(needed)
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "site")]
    ran = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()


def test_the_api_page_has_every_public_name():
    import fused_losses

    listed = re.findall(
        r"^\.\. auto(?:function|class):: (\w+)$",
        (ROOT / "docs" / "api.md").read_text(),
        re.MULTILINE,
    )
    assert set(listed) == set(fused_losses.__all__)
