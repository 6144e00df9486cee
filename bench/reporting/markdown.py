"""How numbers and tables look in markdown."""

from __future__ import annotations

from sparse24.bench import results


def us(record: results.Record) -> str:
    return f"{record['median_us']:.0f}" if record["median_us"] >= 100 else f"{record['median_us']:.1f}"


def rate(record: results.Record) -> str:
    return f"{us(record)} ({record['tflops_dense_equivalent']:.0f})"


def zeros(record: results.Record) -> str:
    return f"{100 * record['zeros']:.0f} %"


def size(record: results.Record) -> str:
    return f"{record['tokens']}, {record['d_model']}, {record['d_ff']}"


def gain(rival: results.Record, ours: results.Record, time: str = "median_us") -> str:
    """Our speed-up; bold where we lose, be it by less than is printed."""
    ratio = rival[time] / ours[time]
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


def gain_both(rival: results.Record, ours: results.Record) -> str:
    """The same, and back to back where that was timed."""
    hot = rival.get("sustained_us") and ours.get("sustained_us")
    return gain(rival, ours) + (f" ({gain(rival, ours, 'sustained_us')})" if hot else "")


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
