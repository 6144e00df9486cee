"""2:4 weights: forward and in training, beside 2:4 activations alone, over the dense network."""

from __future__ import annotations

from bench.reporting.weight_speed import RACES
from sparse24.bench import results
from sparse24.bench.drawing import bars, finish, plt

NAMES = {"sparse24": "sparse24, 2:4 activations alone"}


def draw(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up over torch.compile, a panel for each pass and precision."""
    panels = {}
    for (race, dtype), (activations, packed, rivals) in RACES.items():
        names = {name: name.replace("_fp8", "") for name in (activations, *packed)}
        chosen = [r for r in records if (r["race"], r["dtype"]) == (race, dtype) and r["median_us"]]
        found = []
        for some in results.group(chosen).values():
            rival = next((r for r in some if r["variant"] == rivals[1]), None)
            if rival is not None:
                found += [
                    r | {"variant": names[r["variant"]], "speedup": rival["median_us"] / r["median_us"]}
                    for r in some
                    if r["variant"] in names
                ]
        if found:
            panels[race, dtype] = found
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 2.9 * len(panels)), squeeze=False)
    for axis, ((race, dtype), found) in zip(axes[:, 0], panels.items(), strict=True):
        bars(axis, found, _size, lambda r: r["speedup"], NAMES, line=1.0)
        axis.set_title(f"{race}, {dtype}", fontsize=9)
        axis.set_ylabel("speed-up over torch.compile", fontsize=8)
    return finish(figure, records)


def _size(record: results.Record) -> str:
    return f"{record['tokens']} tokens\n{record['d_model']} x {record['d_ff']}"
