"""The figures in prose and the generated tables, from the committed records: CI checks that they are what it says.

    python -m bench figures --check     # names what is stale; exit status 1 if anything is
    python -m bench figures --write     # writes it anew
    python -m bench figures --list      # every figure there is

A document writes a figure as `<!-- fig:NAME -->1.18 to 1.20<!-- /fig -->`; figure_values.py says what each name means.
Tables stand between `<!-- bench:begin -->` and `<!-- bench:end -->`. What `sparse24.analyze_model` expects is such a
table, too, in a file of its own.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from bench.reporting import (  # noqa: F401
    expected,
    experts_figures,
    few_tables,
    figure_values,
    fp8_figures,
    report,
    summary,
    tables,
    weight_figures,
    weight_tables,
)
from sparse24.bench import results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FIGURE = re.compile(r"<!-- fig:(?P<name>[\w-]+) -->(?P<text>.*?)<!-- /fig -->", re.DOTALL)
#: The generated tables: of which records, and what writes them.
TABLES: dict[str, tuple[tuple[str, ...], Callable[[list[results.Record]], str]]] = {
    "README.md": (("h200",), summary.headline),
    "docs/performance/index.md": (("h200", "h100"), summary.markdown),
    "docs/guide/decoding.md": (("h200",), few_tables.markdown),
    "docs/guide/sparse_weights.md": (("h200", "cpu"), weight_tables.markdown),
    "bench/results/h200/README.md": (("h200",), tables.markdown),
    "bench/results/h100/README.md": (("h100",), tables.markdown),
}

#: What the library itself reads of the records.
EXPECTED = ROOT / "python" / "sparse24" / "analyze" / "measured.json"


def documents() -> list[Path]:
    """Everything that may have figures."""
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")]
    return sorted(p for p in paths if "_build" not in p.parts)


def records_of(folders: tuple[str, ...]) -> list[results.Record]:
    paths = [p for folder in folders for p in sorted((RESULTS / folder).rglob("*.json"))]
    records = results.read_json(p for p in paths if p.stem != "token_direction")
    return [r for r in records if not results.of_tuning(r)]


def current(path: Path) -> str:
    """The text of a document with every figure and table as the records have them."""
    if path == EXPECTED:
        return expected.text(records_of(("h200",)))
    text = path.read_text()
    known = figure_values.FIGURES

    def value(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise SystemExit(f"{path}: there is no figure {name}")
        return f"<!-- fig:{name} -->{figure_values.value(name)}<!-- /fig -->"

    text = FIGURE.sub(value, text)
    name = path.relative_to(ROOT).as_posix()
    if name in TABLES:
        folders, markdown = TABLES[name]
        text = report.replace_section(text, markdown(records_of(folders)))
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare, write nothing")
    what.add_argument("--write", action="store_true", help="write what is stale")
    what.add_argument("--list", action="store_true", help="print every figure")
    args = parser.parse_args(argv)
    if args.list:
        for name in figure_values.FIGURES:
            print(f"{name}: {figure_values.value(name)}")
        return 0
    stale = {path: text for path in [*documents(), EXPECTED] if (text := current(path)) != path.read_text()}
    for path, text in stale.items():
        print(f"{'written' if args.write else 'stale'}: {path.relative_to(ROOT)}")
        if args.write:
            path.write_text(text)
    return 1 if stale and args.check else 0
