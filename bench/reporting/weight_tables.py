"""The tables of 2:4 weights: what they cost a GPT that trains with them, and a model that was trained dense."""

from __future__ import annotations

import statistics

from bench.reporting import train_table
from bench.reporting.markdown import table
from sparse24.bench import results

#: What differs in each run of train_gpt with 2:4 weights, by its recipe.
WAYS = {
    "weights": "both weights, as recommended",
    "weights_half": "sparse for half of the steps",
    "weights_up": "the first weight alone",
    "weights_soft": "soft threshold (S-STE)",
    "weights_static": "static masks",
    "weights_decay": "masks of 40 steps, masked decay (FST)",
    "weights_unsettled": "the dense end starts with the dense weights",
    "weights_no_warmup": "no dense start",
    "weights_no_end": "no dense end",
    "weights_adapters": "no dense end, adapters in the last tenth",
    "weights_soft_no_end": "soft threshold, no dense end",
    "weights_slope": "static masks, double pruning (SLoPe), no dense end",
}


def markdown(records: list[results.Record]) -> str:
    """Both tables, of the records that there are."""
    runs = [r for r in records if r["bench"] == "train_gpt"]
    after = [r for r in records if r["bench"] == "pruned_weights"]
    return "\n\n".join(filter(None, (trained(runs), pruned(after))))


def trained(records: list[results.Record]) -> str:
    """From runs of train_gpt with 2:4 weights: the loss over that of the dense run of the same seed."""
    found = {recipe: of_recipe(records, recipe) for recipe in WAYS}
    if not any(found.values()):
        return ""
    seeds = sorted({seed for losses in found.values() for seed in losses})
    rows = []
    for recipe, losses in found.items():
        if losses:
            by_seed = [f"{losses[seed]:+.2f}" if seed in losses else "" for seed in seeds]
            mean = f"{statistics.mean(losses.values()):+.2f}"
            rows.append([WAYS[recipe], f"{100 * sparse_share(records, recipe):.0f}", *by_seed, mean])
    first = next(r for r in records if r["recipe"] in WAYS)
    shape = first["config"]["size"]
    commits = ", ".join(dict.fromkeys(r["commit"][:7] for r in records if r["recipe"] in WAYS))
    title = (
        f"**Trained with 2:4 weights**: a GPT of {shape['layers']} layers, {shape['dim']} wide, {first['steps']} "
        f"steps, {first['tokens'] / 1e6:.0f} million tokens; activations 2:4 in the same steps. Held-out loss to that "
        f"of dense of the same seed in %. {first['gpu']}, commit {commits}"
    )
    return table(title, ["", "sparse steps, %", *(f"seed {seed}" for seed in seeds), "mean"], rows)


def of_recipe(records: list[results.Record], recipe: str) -> dict[int, float]:
    """Loss over that of dense in %, by seed."""
    runs = [r for r in records if r["recipe"] == recipe and r["complete"]]
    dense = train_table.dense_runs([r for r in records if r["config"] in [run["config"] for run in runs]])
    pairs = {r["seed"]: (r["held_out_loss"], dense[r["seed"]]["held_out_loss"]) for r in runs if r["seed"] in dense}
    return {seed: 100 * (ours / theirs - 1) for seed, (ours, theirs) in sorted(pairs.items())}


def sparse_share(records: list[results.Record], recipe: str) -> float:
    """Which part of the steps had 2:4 weights."""
    return statistics.mean(r["sparse_steps"] / r["steps"] for r in records if r["recipe"] == recipe and r["complete"])


def pruned(records: list[results.Record]) -> str:
    """From the records of bench "pruned_weights": the loss over that of the dense model, by rank of the adapters."""
    if not records:
        return ""
    ranks = sorted({r["rank"] for r in records})
    rows = []
    for kind in dict.fromkeys((r["weights"], r["chosen_by"]) for r in records):
        mine = {r["rank"]: r for r in records if (r["weights"], r["chosen_by"]) == kind}
        rows.append(["w1" if kind[0] == "up" else "w1 and w2", kind[1], *(_over_dense(mine[rank]) for rank in ranks)])
    first = records[0]
    title = (
        f"**Pruned after training**: the demo's model ({first['dim']} wide, {first['steps']} steps, held-out loss "
        f"{first['dense_loss']:.3f} as it is), loss to that in %. Outputs: magnitudes times the norms of the inputs on "
        f"training text. Nothing is trained after pruning. {first['gpu']}, commit {first['commit'][:7]}"
    )
    head = ["pruned", "by", "without adapters", *(f"rank {rank}" for rank in ranks if rank)]
    return table(title, head, rows)


def _over_dense(record: results.Record) -> str:
    return f"{100 * (record['loss'] / record['dense_loss'] - 1):+.2f}"
