"""The tables of experts: every number of tokens and routing, beside torch's grouped products and our dense ones."""

from __future__ import annotations

from collections.abc import Iterable

from bench.reporting.markdown import gain_both, table, us
from bench.reporting.origins import Origins
from sparse24.bench import results

#: Ours, as it comes and as part of a compiled model.
OURS = ("sparse24", "sparse24_compiled")


def all_tables(records: list[results.Record]) -> str:
    """From the records of bench "experts"."""
    return "\n\n".join(filter(None, (_races(records), _skew(records))))


def problems(records: Iterable[results.Record]) -> list[list[results.Record]]:
    """Records of one size, routing, race and precision together."""
    return list(results.group(records, "experts", "top_k", "routing", "race", "dtype").values())


def fastest(records: Iterable[results.Record]) -> results.Record | None:
    """Ours, of one problem."""
    return results.fastest([r for r in records if r["variant"] in OURS], "sparse24")


def named(records: Iterable[results.Record], variant: str) -> results.Record | None:
    """A variant of one problem, if it was timed."""
    return next((r for r in records if r["variant"] == variant and r["median_us"]), None)


def _races(records: list[results.Record]) -> str:
    origins, rows = Origins(records), []
    for problem in sorted(problems(records), key=_order):
        ours, first = fastest(problem), problem[0]
        row = [f"{first.get('model', '')}{origins.mark(first)}", f"{first['tokens']:,}", first["routing"]]
        row += [first["race"], first["dtype"]]
        if ours is None:
            rows.append([*row, "not verified", *[""] * 5])
            continue
        row += [us(ours), ours.get("runs", "")]
        for name in ("grouped_mm", "fused_dense", "loop"):
            rival = named(problem, name)
            row.append(f"{us(rival)}, {gain_both(rival, ours)}" if rival else "")
        rows.append([*row, f"{ours['tflops_dense_equivalent']:.0f}"])
    if not rows:
        return ""
    head = ["model", "tokens", "routing", "pass", "precision", "relu2_experts us", "runs"]
    head += ["torch._grouped_mm, compiled: us, over it", "own dense: us, over it", "loop of relu2_mlp: us, over it"]
    title = (
        "**Experts**, 90 % zeros, rows sorted by expert: relu2_experts, what is faster of a call alone and in a "
        "compiled model. In parentheses: back to back, at the card's power limit. In fp8 torch's product is "
        f"_scaled_grouped_mm with a scale per row. {origins.note()}"
    )
    return table(title, [*head, "TFLOP/s"], rows)


def _skew(records: list[results.Record]) -> str:
    """What skewed routing costs: times of the same rows, over those of balanced routing."""
    by_routing: dict[tuple, dict[str, list[results.Record]]] = {}
    for problem in problems(records):
        first = problem[0]
        key = tuple(first[k] for k in ("experts", "top_k", "d_model", "d_ff", "tokens", "race", "dtype"))
        by_routing.setdefault(key, {})[first["routing"]] = problem
    rows = []
    for found in by_routing.values():
        balanced = fastest(found.get("balanced", []))
        for routing, problem in found.items():
            ours = fastest(problem)
            if routing == "balanced" or not ours or not balanced:
                continue
            row = [ours.get("model", ""), f"{ours['tokens']:,}", ours["race"], ours["dtype"], routing]
            for pair in ((balanced, ours), *((named(p, "grouped_mm") for p in (found["balanced"], problem)),)):
                before, after = pair
                row.append(f"{after['median_us'] / before['median_us']:.2f}" if before and after else "")
            rows.append([*row, f"{ours['rows_of_largest']:,}", str(ours["empty_experts"])])
    if not rows:
        return ""
    head = ["model", "tokens", "pass", "precision", "routing", "relu2_experts", "torch._grouped_mm"]
    title = "**What skewed routing costs**: the time over that of balanced routing, for as many rows"
    return table(title, [*head, "rows of the largest", "experts without rows"], sorted(rows))


def _order(problem: list[results.Record]) -> tuple:
    first = problem[0]
    return first["race"], first["dtype"], first.get("model", ""), first["routing"], first["tokens"]
