"""How numbers and tables look in markdown."""

from __future__ import annotations

import report


def us(record: report.Record) -> str:
    return f"{record['median_us']:.0f}" if record["median_us"] >= 100 else f"{record['median_us']:.1f}"


def rate(record: report.Record) -> str:
    return f"{us(record)} ({record['tflops_dense_equivalent']:.0f})"


def zeros(record: report.Record) -> str:
    return f"{100 * record['zeros']:.0f} %"


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
