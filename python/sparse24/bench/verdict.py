"""What records of `sparse24 bench` mean: a table for each size and pass, and sentences."""

import sys
from collections.abc import Iterable, Sequence

from sparse24.bench import results
from sparse24.bench.results import Record
from sparse24.bench.sizes import Size
from sparse24.bench.variants import VARIANTS, variant
from sparse24.mlp import pays
from sparse24.terminal import table

PASSES = {"ffn_forward": "Forward", "ffn_training": "Forward and backward"}
HEAD = ("network", "us", "TFLOP/s", "peak MB", "sparse24 is")
#: Up to where the number of tokens is searched from which on relu2_mlp runs sparse.
MOST_TOKENS = 1 << 17


def show(sizes: Sequence[Size], records: Sequence[Record]) -> None:
    """Print everything: the tables of `sizes`, what follows from them, and how it is with fewer tokens."""
    for size in sizes:
        for bench, name in PASSES.items():
            mine = [r for r in records if r["bench"] == bench and _is(r, size)]
            if mine:
                shown = f"{size.tokens:,} tokens, {size.d_model} -> {size.d_ff} -> {size.d_model}"
                zeros = f", {100 * mine[0]['zeros']:.0f} % zeros"
                _print(f"{name}: {shown}{f', {size.model}' if size.model else ''}{zeros}", rows(mine))
                print("\n".join(sentences(name, mine)), end="\n\n")
    unbuilt = [r for r in records if not r["tokens"]]
    for r in unbuilt:
        print(f"{r['problem']} could not be measured: {r['error']}")
    if len(sizes) == 1:
        print("\n".join(few_tokens(sizes[0], records)))


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row per variant, and how many times as fast as it ours of its precision is."""
    order = list(VARIANTS)
    found = []
    for r in sorted(records, key=lambda r: (r["dtype"], order.index(r["variant"]) if r["variant"] in order else 99)):
        row = (f"{r['dtype']:<4}  {variant(r['variant']).name}",)
        if not r["median_us"]:
            found.append((*row, "not verified", "", "", ""))
            continue
        ours = results.fastest([o for o in records if o["dtype"] == r["dtype"]], "sparse24")
        rate = f"{r['tflops_dense_equivalent']:.0f}" if "tflops_dense_equivalent" in r else ""
        memory = f"{r['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in r else ""
        over = f"{_ratio(r, ours):.2f}x" if ours and r["role"] == "dense" else ""
        found.append((*row, f"{r['median_us']:,.1f}", rate, memory, over))
    return found


def sentences(name: str, records: Sequence[Record]) -> list[str]:
    """Whether it pays, by precision."""
    said = []
    for dtype in dict.fromkeys(r["dtype"] for r in records if r["role"] == "sparse24"):
        mine = [r for r in records if r["dtype"] == dtype]
        wrong = [r for r in mine if r["role"] == "sparse24" and not r["verified"]]
        ours, dense = results.fastest(mine, "sparse24"), results.fastest(mine, "dense")
        if wrong:
            said.append(f"{name} in {dtype}: sparse24 was NOT VERIFIED: {wrong[0].get('error', '')}")
        elif not dense:
            said.append(f"{name} in {dtype}: no dense network ran to compare with.")
        else:
            gain = _ratio(dense, ours)
            verdict = "it pays" if gain > 1.005 else "it does not pay" if gain < 0.995 else "it makes no difference"
            text = f"{name} in {dtype}: sparse24 is {gain:.2f} times as fast as the best dense, "
            text += f"{variant(dense['variant']).name}: {verdict}."
            if name == PASSES["ffn_forward"] and not _pays(ours, dtype):
                text += " relu2_mlp runs dense here by itself."
            said.append(text)
    return said


def few_tokens(size: Size, records: Iterable[Record]) -> list[str]:
    """Where 2:4 loses, by precision: at which of the measured numbers of tokens, and what relu2_mlp does about it."""
    forward = [r for r in records if r["bench"] == "ffn_forward" and (r["d_model"], r["d_ff"]) == size[1:3]]
    said = []
    for dtype in dict.fromkeys(r["dtype"] for r in forward):
        found = {}
        for tokens in sorted({r["tokens"] for r in forward}):
            mine = [r for r in forward if r["dtype"] == dtype and r["tokens"] == tokens]
            ours, dense = results.fastest(mine, "sparse24"), results.fastest(mine, "dense")
            if ours and dense:
                found[tokens] = _ratio(dense, ours)
        if len(found) < 2:
            continue
        losing = [f"{tokens:,} ({gain:.2f}x)" for tokens, gain in found.items() if gain < 0.995]
        if losing:
            text = f"Fewer tokens, {dtype}: 2:4 is slower than the best dense at {_listed(losing)} tokens."
        else:
            text = f"Fewer tokens, {dtype}: 2:4 is nowhere slower, from {min(found):,} tokens on."
        first = next((t for t in range(16, MOST_TOKENS, 16) if _pays({**forward[0], "tokens": t}, dtype)), None)
        if first is None:
            text += " relu2_mlp runs this network dense."
        elif first > 16:
            text += f" relu2_mlp runs dense by itself below about {first:,} tokens."
        said.append(text)
    return said


def _pays(record: Record, dtype: str) -> bool:
    return pays(record["tokens"], record["d_ff"], record["d_model"], fp8=dtype == "fp8")


def _is(record: Record, size: Size) -> bool:
    return (record["tokens"], record["d_model"], record["d_ff"]) == size[:3]


def _ratio(theirs: Record, ours: Record) -> float:
    return theirs["median_us"] / ours["median_us"]


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _print(title: str, lines: list[tuple[str, ...]]) -> None:
    """With rich on a terminal, if it is installed; else plain."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            shown = Table(title=title, title_justify="left")
            for i, name in enumerate(HEAD):
                shown.add_column(name, justify="right" if i else "left")
            for line in lines:
                shown.add_row(*line)
            Console().print(shown)
            return
    print(f"\n{title}\n{table(HEAD, lines)}")
