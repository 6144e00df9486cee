"""From records to files and tables: JSON, plain text for the terminal, summaries, and all tables.

    python bench/report.py bench/results/<gpu>/*.json --tables bench/results/<gpu>/README.md

replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->` there by every table; `--readme` and
`--summary` do so with the README's table and that of docs/performance.md. With none it prints the tables. figures.py
does all of that for the committed records, and the figures in prose.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def write_json(path: Path, records: list[Record]) -> None:
    """One record per line: diffs of committed results stay readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")


def read_json(paths: Iterable[Path]) -> list[Record]:
    """Records of files that hold a list of them, or one (a run of train_gpt.py)."""
    contents = [json.loads(path.read_text()) for path in paths]
    return [record for content in contents for record in (content if isinstance(content, list) else [content])]


def problem_of(record: Record) -> tuple:
    return tuple(record[k] for k in ("bench", "tokens", "d_model", "d_ff", "zeros", "pattern"))


def usual(record: Record) -> bool:
    """Independent zeros, about 90 % of them: what tables and drawings show. The records hold the rest."""
    return record.get("pattern") == "iid" and 0.85 < record["zeros"] < 0.93


def group(records: Iterable[Record], *extra: str) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[problem_of(record) + tuple(record[k] for k in extra)].append(record)
    return groups


def fastest(records: Iterable[Record], role: str) -> Record | None:
    timed = [r for r in records if r["role"] == role and r["median_us"]]
    return min(timed, key=lambda r: r["median_us"], default=None)


def add_comparisons(records: list[Record]) -> None:
    """Adds to each of our records its speed-ups over its rivals, and to all the share of the copy bandwidth."""
    for race in group(records, "race", "dtype").values():
        dense, cusparselt = fastest(race, "dense"), fastest(race, "cusparselt")
        for record in race:
            if record["role"] != "sparse24" or not record["median_us"]:
                continue
            if dense:
                record["best_dense"] = dense["variant"]
                record["speedup_vs_best_dense"] = round(dense["median_us"] / record["median_us"], 3)
            if cusparselt:
                record["speedup_vs_cusparselt"] = round(cusparselt["median_us"] / record["median_us"], 3)
    for problem in group(records).values():
        roof = fastest(problem, "roof")
        for record in problem:
            if roof and record.get("gb_per_s") and record is not roof:
                record["share_of_copy"] = round(record["gb_per_s"] / roof["gb_per_s"], 3)


def text_table(records: list[Record]) -> str:
    """A short table for a terminal, one line per record."""
    lines = []
    width = max((len(r["race"]) for r in records), default=0) + 2
    for r in records:
        name = f"{r['dtype']:<8}{r['race']:<{width}}{r['variant']:<36}"
        if not r["median_us"]:
            lines.append(f"{name} NOT VERIFIED: {r.get('error', '')[:160]}")
            continue
        text = f"{name}{r['median_us']:>9.1f} us +-{r['iqr_us']:<7.1f}"
        if "tflops_dense_equivalent" in r:
            text += f"{r['tflops_dense_equivalent']:>7.0f} TFLOP/s"
        if "gb_per_s" in r:
            text += f"{r['gb_per_s']:>7.0f} GB/s"
        if "share_of_copy" in r:
            text += f" {100 * r['share_of_copy']:>4.0f} % of copy"
        if "speedup_vs_best_dense" in r:
            text += f"  {r['speedup_vs_best_dense']:.2f}x {r['best_dense']}"
        if "speedup_vs_cusparselt" in r:
            text += f"  {r['speedup_vs_cusparselt']:.2f}x cuSPARSELt"
        if r.get("repeatable") is False:
            text += "  (bits differ between runs)"
        lines.append(text)
    return "\n".join(lines)


def replace_section(text: str, section: str) -> str:
    """`text` with `section` between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the marks {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, help="gets the README's table")
    parser.add_argument("--summary", type=Path, help="gets a table of times for each GPU")
    parser.add_argument("--tables", type=Path, help="gets all tables")
    args = parser.parse_args()
    import summary  # both import this module
    import tables

    records = read_json(args.json)
    written = ((args.readme, summary.headline), (args.summary, summary.markdown), (args.tables, tables.markdown))
    for path, markdown in written:
        if path:
            path.write_text(replace_section(path.read_text(), markdown(records)))
    if not any(path for path, _ in written):
        print(tables.markdown(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
