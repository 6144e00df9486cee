"""A few sizes in one table: the README's, of speed-ups, and that of docs/performance, of times."""

from __future__ import annotations

from bench.reporting import model_tables
from bench.reporting.ffn_tables import by_default, compiled
from bench.reporting.markdown import gain, gain_both, table, us
from bench.reporting.origins import Origins
from sparse24.bench import results, sizes

# The large sizes, few tokens, and a narrow network.
SHOWN = (
    *(size[:3] for size in sizes.LARGE),
    (16384, 4096, 16384),
    (128, 4096, 16384),
    (32768, 768, 3072),
)
# What is timed: bench, dtype, race, our variant; in fp8 with exact scales, as its rival in torch has them.
TIMED = {
    "forward bf16": ("ffn_forward", "bf16", "forward", "sparse24"),
    "forward fp8": ("ffn_forward", "fp8", "forward", "sparse24_fused"),
    "training bf16": ("ffn_training", "bf16", "training", "sparse24"),
    "training fp8": ("ffn_training", "fp8", "training", "sparse24_fp8"),
}
# What relu2_mlp runs where 2:4 does not pay; in a float8 step that is the fused dense one, its rival.
DENSE = {False: "sparse24_fallback", True: "fused_dense_fp8"}
BOUNDED = ("ffn_forward", "fp8", "forward", "sparse24")
CAPTION = (
    "Speed-ups of the FFN, ours over theirs: above 1 is good, bold where we lose. As relu2_mlp runs by default, 90 % "
    "independent zeros of random weights; medians of at least 15 interleaved rounds on a cold L2, every output "
    "verified before it was timed. torch.compile in its default mode; in fp8 around `_scaled_mm`, by row or tensor, "
    "what is faster; fused dense has the activation in the first GEMM's epilogue, as ours has it (fp8: and one scale "
    "of the activation)"
)


def headline(records: list[results.Record]) -> str:
    """From the records of one GPU: speed-ups of the FFN, and the tables of whole models."""
    whole = model_tables.all_tables([r for r in records if results.usual(r)])
    return "\n\n".join(filter(None, [_headline(records), *whole]))


def _headline(records: list[results.Record]) -> str:
    """From the records of ffn_forward and ffn_training: speed-ups, in brackets back to back."""
    records = _chosen(records)
    if not records:
        return ""
    origins = _origins(records)
    rows = []
    for size, model, here in _sizes(records):
        row = [", ".join(map(str, size)), model]
        for name, timed in TIMED.items():
            ours, mine = _ours(here, timed)
            rivals = (compiled(mine, timed[1]), _fused(mine))
            mark = origins[name].mark(ours) if ours else ""
            row += [gain_both(rival, ours) + mark if ours and rival else "" for rival in rivals]
        rows.append(row)
    head = ["T, D, F", "FFN of"]
    for name in ("forward bf16", "forward fp8, exact scales", "training bf16", "training fp8"):
        head += [f"{name}: over torch.compile", "over fused dense"]
    first = records[0]
    title = (
        f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}. {CAPTION}. In brackets: called again and "
        f"again, on a card that never pauses. {_notes(origins)}"
    )
    return table(title, head, rows)


def markdown(records: list[results.Record]) -> str:
    """From the same records of any GPUs: our times and speed-ups, a table for each GPU."""
    chosen = _chosen(records)
    gpus = dict.fromkeys(r["gpu"] for r in chosen)
    return "\n\n".join(_of_one_gpu([r for r in chosen if r["gpu"] == gpu]) for gpu in gpus)


def _of_one_gpu(records: list[results.Record]) -> str:
    origins = _origins(records)
    timed = {**TIMED, "forward fp8, bounded": BOUNDED}
    timed = {
        name: timed[name]
        for name in ("forward bf16", "forward fp8", "forward fp8, bounded", "training bf16", "training fp8")
    }
    rows = []
    for size, model, here in _sizes(records):
        row = [", ".join(map(str, size)), model]
        for name, what in timed.items():
            ours, mine = _ours(here, what)
            if ours is None:
                row += ["", "", ""]
                continue
            kind = " (dense)" if ours["variant"] in DENSE.values() else ""
            row.append(us(ours) + kind + origins[name if name in TIMED else "forward fp8"].mark(ours))
            row += [gain(r, ours) if r else "" for r in (compiled(mine, what[1]), _fused(mine))]
        rows.append(row)
    head = ["T, D, F", "FFN of"]
    for name in timed:
        head += [f"{name}{', exact' if name == 'forward fp8' else ''} us", "over torch.compile", "over fused dense"]
    first = records[0]
    title = (
        f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}. {CAPTION}; exact and bounded are our scales of "
        f"the activation. {_notes(origins)}"
    )
    return table(title, head, rows)


def _chosen(records: list[results.Record]) -> list[results.Record]:
    return [r for r in records if r["bench"] in ("ffn_forward", "ffn_training") and results.usual(r)]


def _sizes(records: list[results.Record]):
    """Each size that is shown and was measured: the model that has it, and its records."""
    for size in SHOWN:
        here = [r for r in records if (r["tokens"], r["d_model"], r["d_ff"]) == size]
        if any(_ours(here, timed)[0] for timed in (*TIMED.values(), BOUNDED)):
            yield size, next((r["model"] for r in here if r.get("model")), ""), here


def _origins(records: list[results.Record]) -> dict[str, Origins]:
    """Of what is shown alone, the forward passes together."""
    shown = [r for r in records if (r["tokens"], r["d_model"], r["d_ff"]) in SHOWN]
    benches = {bench: Origins(r for r in shown if r["bench"] == bench) for bench in ("ffn_forward", "ffn_training")}
    return {name: benches[bench] for name, (bench, *_) in TIMED.items()}


def _notes(origins: dict[str, Origins]) -> str:
    said = {"Forward": origins["forward bf16"].note(), "Training": origins["training bf16"].note()}
    return ". ".join(f"{name}: {note[0].lower()}{note[1:]}" for name, note in said.items() if note)


def _ours(records: list[results.Record], timed: tuple[str, ...]) -> tuple[results.Record | None, list[results.Record]]:
    """What relu2_mlp runs by default, and the records of its race."""
    bench, dtype, race, variant = timed
    race_records = [r for r in records if (r["bench"], r["race"]) == (bench, race) and r["median_us"]]
    mine = [r for r in race_records if r["dtype"] == dtype]
    step = (bench, dtype) == ("ffn_training", "fp8")
    return by_default(mine, variant, DENSE[step], fp8=dtype == "fp8", step=step), mine


def _fused(records: list[results.Record]) -> results.Record | None:
    return next((r for r in records if r["variant"] in ("fused_dense", "fused_dense_fp8")), None)
