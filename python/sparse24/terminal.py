"""What commands share: arguments, and text on the terminal, tables and a progress bar."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

#: How files of drawings end.
DRAWINGS = (".svg", ".png", ".pdf")


def output_file(text: str) -> Path:
    """Take an argument for a file that will be written: where that cannot be, it is said before the work."""
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text}")
    return path


def drawing_file(text: str) -> Path:
    """Take an argument for a file that will be drawn."""
    path = output_file(text)
    if path.suffix.lower() not in DRAWINGS:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(DRAWINGS)}, got {text}")
    return path


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def percent(share: float | None, digits: int = 2) -> str:
    """Format a share: 0.0123 as 1.23."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def progress(losses: Iterable[float], steps: int) -> Iterator[float]:
    """Pass losses through and show how far they are: a bar with rich on a terminal, else a line now and then."""
    bar = _bar() if sys.stdout.isatty() else None
    if bar is None:
        for step, loss in enumerate(losses, start=1):
            if step == 1 or step % max(1, steps // 10) == 0:
                print(f"  step {step}/{steps}  loss {loss:.3f}", flush=True)
            yield loss
        return
    with bar:
        task = bar.add_task("", total=steps, text="")
        for loss in losses:
            bar.update(task, advance=1, text=f"loss {loss:.3f}")
            yield loss


@contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done, whenever the function that it gives is called: on a terminal.

    A bar with rich, else numbers in one line.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    shown = _bar("stderr")
    if shown is None:
        try:
            yield lambda done: print(f"\r{done:,} of {total:,} {what}", end="", file=sys.stderr, flush=True)
        finally:
            print(file=sys.stderr)
        return
    with shown:
        task = shown.add_task("", total=total, text=what)
        yield lambda done: shown.update(task, completed=done)


def _bar(stream: str = "stdout"):
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=stream == "stderr"))
