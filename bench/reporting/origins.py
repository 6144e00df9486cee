"""Of which commit, and with which pauses, the times of a table are: said beside it, and marked where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from string import ascii_lowercase

from sparse24.bench import results

Origin = tuple[str, float]


def origin(record: results.Record) -> Origin:
    return record["commit"][:7], record.get("pause_us", 0.0) / 1e3


class Origins:
    """Most records of a table have one origin; the others' rows or cells get a letter."""

    def __init__(self, records: Iterable[results.Record]) -> None:
        counts = Counter(origin(r) for r in records if r["median_us"])
        ordered = sorted(counts, key=lambda o: (-counts[o], o))
        self._letters = {o: f" [{ascii_lowercase[i]}]" for i, o in enumerate(ordered[1:])}
        self._usual = ordered[0] if ordered else None

    def mark(self, record: results.Record) -> str:
        """What to write behind a cell: nothing, or the letter of its origin."""
        return self._letters.get(origin(record), "")

    def note(self) -> str:
        """One sentence without its stop: the usual origin, then those with letters."""
        if self._usual is None:
            return ""
        said = [_words(self._usual), *(f"{letter.strip()} {_words(o)}" for o, letter in self._letters.items())]
        return "Of " + "; ".join(said)


def _words(of: Origin) -> str:
    commit, ms = of
    return f"commit {commit}, {f'pauses of {ms:g} ms before the samples' if ms else 'without pauses'}"
