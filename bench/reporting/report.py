"""The tables of records, into documents.

    python -m bench report bench/results/<gpu>/*.json --tables bench/results/<gpu>/README.md

replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->` there by every table; `--readme` and
`--summary` do so with the README's table and that of docs/performance. With none it prints the tables. `figures`
does all of that for the committed records, and the figures in prose.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.reporting import summary, tables
from sparse24.bench import results

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def replace_section(text: str, section: str) -> str:
    """`text` with `section` between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the marks {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, help="gets the README's table")
    parser.add_argument("--summary", type=Path, help="gets a table of times for each GPU")
    parser.add_argument("--tables", type=Path, help="gets all tables")
    args = parser.parse_args(argv)
    records = results.read_json(args.json)
    written = ((args.readme, summary.headline), (args.summary, summary.markdown), (args.tables, tables.markdown))
    for path, markdown in written:
        if path:
            path.write_text(replace_section(path.read_text(), markdown(records)))
    if not any(path for path, _ in written):
        print(tables.markdown(records))
    return 0
