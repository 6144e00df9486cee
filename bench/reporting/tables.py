"""All tables of a GPU's records, in markdown: report.py puts them into bench/results/<gpu>/README.md."""

from __future__ import annotations

from bench.reporting import (
    distributed_tables,
    experts_tables,
    few_tables,
    ffn_tables,
    model_tables,
    train_table,
    training_tables,
    weight_speed,
)
from bench.reporting.markdown import gain, rate, size, table, us, zeros
from bench.reporting.origins import Origins
from sparse24.bench import results

#: Benches whose times back to back stand in tables of their own.
ELSEWHERE = ("nanochat_step", "experts", "ffn_weights")


def markdown(records: list[results.Record]) -> str:
    """All tables, under a headline for each GPU."""
    gpus = dict.fromkeys(r["gpu"] for r in records)
    return "\n\n".join(_of_one_gpu([r for r in records if r["gpu"] == gpu]) for gpu in gpus)


def _of_one_gpu(records: list[results.Record]) -> str:
    runs = [r for r in records if r["bench"] == "train_gpt"]
    records = [r for r in records if r["bench"] != "train_gpt"]
    usual = [r for r in records if results.usual(r)]
    parts = [_headline(usual)]
    for bench, make in (
        ("compress", _compress_table),
        ("mm", _mm_table),
        ("ffn_forward", ffn_tables.all_tables),
        ("gemm1", _gemm1_table),
        ("ffn_few_tokens", few_tables.markdown),
        ("ffn_training", training_tables.step_table),
        ("ffn_weights", weight_speed.all_tables),
        ("experts", experts_tables.all_tables),
        ("models", _models_table),
        ("distributed", distributed_tables.all_tables),
        ("accuracy", _accuracy_table),
    ):
        # The FFN has a table of other shares of zeros; accuracy is that of a model's own.
        chosen = [r for r in (records if bench in ("ffn_forward", "accuracy") else usual) if r["bench"] == bench]
        if chosen:
            parts.append(make(chosen))
    parts.append(training_tables.fp8_table([r for r in usual if r["bench"] == "ffn_training"]))
    parts += model_tables.all_tables(usual)
    hot = [r for r in usual if r.get("sustained_us") and r["median_us"] and r["bench"] not in ELSEWHERE]
    parts.append(ffn_tables.back_to_back(hot))
    sizes = dict.fromkeys(r["config"]["size"]["dim"] for r in runs)
    parts += [_gpt_table([r for r in runs if r["config"]["size"]["dim"] == dim]) for dim in sizes]
    return "\n\n".join(filter(None, parts))


def _headline(records: list[results.Record]) -> str:
    first, driver = records[0], next(r["driver"] for r in records if "driver" in r)
    clocks = [r["sm_clock_mhz"] for r in records if r.get("sm_clock_mhz")]
    clock = f", SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz while timing" if clocks else ""
    dates = sorted({r["date"][:10] for r in records})
    return (
        f"{first['gpu']}, driver {driver}, torch {first['torch']}, CUDA {first['cuda']}{clock}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Medians of at least 15 interleaved rounds on a cold L2; "
        "every output was verified before it was timed. TFLOP/s are dense-equivalent: 2 x tokens x out x reduction "
        "over the time. Ratios are speed-ups, ours over theirs: above 1 is good. torch.compile has its default mode; "
        "max-autotune was not timed. Each table says of which commits it is, and whether the card paused before the "
        "samples; letters mark what is of another one."
    )


def _compress_table(records: list[results.Record]) -> str:
    origins, rows = Origins(records), []
    for r in records:
        if r["role"] == "roof" or not r["median_us"]:
            continue
        share = f"{100 * r['share_of_copy']:.0f} %" if "share_of_copy" in r else ""
        shape = f"{r['tokens']} x {r['d_ff']}{origins.mark(r)}"
        rows.append([shape, zeros(r), r["variant"], us(r), f"{r['gb_per_s']:.0f}", share])
    head = ["tokens x features", "zeros", "kernel", "us", "GB/s", "of the copy bandwidth"]
    return table(f"**Memory-bound kernels**. {origins.note()}", head, rows)


def _mm_table(records: list[results.Record]) -> str:
    origins, rows = Origins(records), []
    for race in results.group(records, "race", "dtype").values():
        ours, dense, cslt = (results.fastest(race, role) for role in ("sparse24", "dense", "cusparselt"))
        if not ours:
            continue
        first = race[0]
        rows.append(
            [
                f"{first['tokens']} x {first['d_model']} x {first['d_ff']}{origins.mark(ours)}",
                zeros(first),
                first["race"],
                first["dtype"],
                rate(ours),
                f"{rate(dense)} {dense['variant']}" if dense else "",
                rate(cslt) if cslt else "",
                gain(dense, ours) if dense else "",
                gain(cslt, ours) if cslt else "",
            ]
        )
    head = [
        "tokens x out x reduction",
        "zeros",
        "product",
        "dtype",
        "sparse24 us (TFLOP/s)",
        "best dense",
        "cuSPARSELt",
    ]
    return table(f"**Sparse GEMM**. {origins.note()}", [*head, "over dense", "over cuSPARSELt"], rows)


def _gemm1_table(records: list[results.Record]) -> str:
    records = [r for r in records if r.get("sizes", "large") == "large"]
    origins, rows = Origins(records), []
    for race in results.group(records, "dtype").values():
        first = race[0]
        by_name = {r["variant"]: r for r in race if r["median_us"]}
        ours = by_name.get("linear_compress")
        others = [by_name.get(name) for name in ("linear_relu2", "dense")]
        row = [f"{first['tokens']} x {first['d_ff']} x {first['d_model']}{origins.mark(first)}", first["dtype"]]
        row += [rate(r) if r else "" for r in (ours, *others)]
        rows.append(row + [gain(r, ours) if r and ours else "" for r in others])
    head = ["tokens x out x reduction", "dtype", "linear_compress us (TFLOP/s)", "linear_relu2"]
    head += ["plain GEMM of torch", "over linear_relu2", "over torch's"]
    title = "**First GEMM alone**. torch's is in fp8 `_scaled_mm` row-wise; tensor-wise was not timed here. "
    return table(title + origins.note(), head, rows) if rows else ""


def _models_table(records: list[results.Record]) -> str:
    """A row per model and phase: the model as it is, and converted."""
    origins, rows = Origins(records), []
    for race in results.group(records, "race").values():
        first = race[0]
        times = {r["variant"]: r for r in race if r["median_us"]}
        dense = times.get("dense")
        row = [first["model"], size(first) + origins.mark(first), zeros(first), first["race"]]
        row.append(us(dense) if dense else "")
        for name in ("sparse24", "sparse24_fp8"):
            ours = times.get(name)
            if ours:
                row.append(f"{us(ours)}, {gain(dense, ours)}" if dense else us(ours))
            else:
                row.append("not verified" if any(r["variant"] == name for r in race) else "")
        rows.append(row)
    layers = next((r["layers"] for r in records if "layers" in r), 0)
    title = (
        f"**Models before and after `sparse24.convert`**: {layers} layers with attention and norms, each compiled; us, "
        "and speed-up over bfloat16 before it. In the last column the FFNs are fp8 too, and gain by that as well. "
    )
    head = ["model", "T, D, F", "zeros", "phase", "before", "converted", "converted, fp8"]
    return table(title + origins.note(), head, rows)


def _gpt_table(records: list[results.Record]) -> str:
    first = records[0]
    commits = ", ".join(dict.fromkeys(r["commit"][:7] for r in records))
    shape = first["config"]["size"]
    title = (
        f"**A GPT in training**, {shape['layers']} layers, {shape['dim']} wide, {first['tokens'] / 1e6:.0f} million "
        "tokens of Python sources. "
        f"Loss on held-out text, mean over the seeds. Of commits {commits}: rates are those of the default recipe's "
        "runs alone, since the other recipes ran with older kernels in part; over the run's own dense steps, they are "
        "of one process"
    )
    return f"{title}\n\n{train_table.table(train_table.in_order(records))}"


def _accuracy_table(records: list[results.Record]) -> str:
    """Errors of every layer; of fp8 and 2:4 together also the largest ratio to the two apart."""
    first = records[0]
    layers = sorted({r["layer"] for r in records})
    rows = [["share of zeros", *(zeros(next(r for r in records if r["layer"] == i)) for i in layers), "", "", ""]]
    for name in dict.fromkeys(r["variant"] for r in records):
        mine = {r["layer"]: r for r in records if r["variant"] == name}
        row = [name, *(f"{100 * mine[i]['rel_error']:.2f} %" for i in layers)]
        for key in ("over_sum", "over_root_of_squares"):
            ratios = [r[key] for r in mine.values() if key in r]
            row.append(f"{max(ratios):.3f}" if ratios else "")
        counts = [r for r in mine.values() if "nonzeros" in r]
        row.append(f"{sum(r['saturated'] for r in counts)} of {sum(r['nonzeros'] for r in counts):,}" if counts else "")
        rows.append(row)
    title = (
        f"**Error of the FFN outputs** of the demo's model ({first['steps']} steps) to float32, on held-out text, "
        f"{first['gpu']}. Last columns: the largest ratio to dense fp8 row-wise and pruning alone, as their sum and as "
        "the root of the sum of their squares; what saturated"
    )
    head = ["", *(f"layer {i}" for i in layers), "over sum", "over root", "saturated"]
    return table(title, head, rows)
