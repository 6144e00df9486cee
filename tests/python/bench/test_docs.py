"""The documentation: it builds without a warning, and names what exists."""

import ast
import re
from pathlib import Path

import pytest
from benches import run

import sparse24
from bench.reporting import figure_values
from bench.reporting import figures as program

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


@pytest.mark.filterwarnings("ignore")  # of Sphinx and its extensions
def test_documentation_builds(tmp_path):
    """Every public name has an entry in the reference."""
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    from sphinx.cmd.build import main

    assert (
        main(["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path)]) == 0
    )
    pages = "".join(path.read_text() for path in (tmp_path / "api").glob("*.html"))
    documented = set(re.findall(r'id="(sparse24\.[\w.]+)"', pages))
    public = {f"sparse24.{name}" for name in sparse24.__all__} - {"sparse24.nn", "sparse24.__version__"}
    assert not public - documented
    assert "sparse24.nn.ReLU2MLP.quantize_" in documented


def test_tests_that_are_named_exist():
    text = (DOCS / "guide" / "compatibility.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests" / "python").rglob("test_*.py")]
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(named) > 25 and not named - defined
    # test_model_classes.py holds the table of classes against its own tests.
    features, classes, rest = text.partition("## Classes of networks")
    rows = [line for line in (features + rest.partition("\n## ")[2]).splitlines() if "✓" in line]
    assert classes and len(rows) > 25
    assert all(re.search(r"`test_\w+` \|$", row) for row in rows)


def pages():
    found = [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "bench").rglob("*.md")]
    return [page for page in found if "_build" not in page.parts]


def anchors(page):
    """The anchors of headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_to_something():
    """Links between files, in text that GitHub shows too, and their anchors."""
    broken, seen = [], 0
    for page in pages():
        text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            seen += 1
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert seen > 200 and not broken


def test_entries_of_the_log_are_complete_and_indexed():
    index = (DOCS / "log" / "index.md").read_text()
    entries = sorted((DOCS / "log").glob("[0-9]*.md"))
    assert [entry.name[:3] for entry in entries] == [f"{number:03}" for number in range(1, len(entries) + 1)]
    for entry in entries:
        number, text = entry.name[:3], entry.read_text()
        title = re.match(rf"# {number}: (.+)\n\n\*Commit .+\. Measured on: .+\. Verdict: (.+)\.\*\n", text)
        assert title, f"{entry.name}: its head is not that of an entry"
        assert f"| [{number} {title[1]}]({entry.name}) |" in index
        assert f" | {title[2]} |" in index
        assert f"[{number}]({entry.name})" in index  # by subject
        assert "\n**Verdict.** " in text


def test_contributing_has_a_line_for_every_folder():
    text = (DOCS / "contributing.md").read_text()
    told = {name.rstrip("/") for name in re.findall(r"^    (\S+/) {2,}\S", text, re.MULTILINE)}
    assert len(told) > 20 and all((ROOT / folder).is_dir() for folder in told)
    suffixes = {".cpp", ".h", ".cu", ".cuh", ".py"}
    files = (path for top in ("cpp", "cuda", "python") for path in (ROOT / top).rglob("*") if path.suffix in suffixes)
    folders = {path.parent.relative_to(ROOT) for path in files} - {Path("python/sparse24")}
    assert not {folder for folder in folders if not {str(folder), str(folder.parent)} & told}


def test_the_readme_is_short_and_in_its_order():
    text = (ROOT / "README.md").read_text()
    order = ["Is it for you", "Two commands", "Convert a model", "Write a model", "How it works", "Measured", "Links"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [*order, "Limits"]
    assert text.index("![") < text.index("## ") and text.count("![") == 1
    assert len(text.splitlines()) <= 135


def test_the_walk_meets_what_it_names():
    """docs/design/walk.md: each file exists, and the function or class that a step names is a word of its file."""
    text = (DOCS / "design" / "walk.md").read_text()
    steps = re.findall(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    assert [int(number) for number, *_ in steps] == list(range(1, len(steps) + 1)) and len(steps) > 30
    files = re.findall(r"`((?:cpp|cuda|python)/[\w./]+)`", text)
    assert not [name for name in files if not (ROOT / name).is_file()]
    assert not [step for step in steps if not re.search(rf"\b{step[2]}\b", (ROOT / step[1]).read_text())]


def test_figures_and_tables_are_those_of_the_records():
    run("figures", "--check")
    assert "<!-- fig:bf16-over-compile -->" in (ROOT / "README.md").read_text()


def test_a_stale_figure_is_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a <!-- fig:fp8-exact-over-row -->9.99<!-- /fig --> b")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    text = figure_values.value("fp8-exact-over-row")
    assert re.fullmatch(r"1\.\d\d to 1\.\d\d", text)
    assert program.current(page) == f"a <!-- fig:fp8-exact-over-row -->{text}<!-- /fig --> b"
    page.write_text("<!-- fig:no-such -->1<!-- /fig -->")
    with pytest.raises(SystemExit, match="there is no figure no-such"):
        program.current(page)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/performance/index.md"])
def test_measured_numbers_are_computed(page):
    """No ratio and no share stands in prose that `python -m bench figures` did not put there."""
    text = (ROOT / page).read_text()
    marks = (r"<!-- bench:begin -->.*?<!-- bench:end -->", r"<!-- fig:[\w-]+ -->.*?<!-- /fig -->", r"^```.*?^```$")
    for mark in (*marks, r"^    .*?$", r"`[^`]*`", r"\[[^\]]*\]\([^)]*\)"):
        text = re.sub(mark, "", text, flags=re.DOTALL | re.MULTILINE)
    # By the paper, or no measurement.
    said = ("84 to 98 %", "90 % independent zeros", "Python 3.10", "torch 2.11", "nvcc; 13.0")
    for words in said:
        text = text.replace(words, "")
    assert not re.findall(r"\d+\.\d+|\d+ %", text)
