"""What the figures of training in fp8 are, all six products in float8: of a step of the FFN, and of a GPT."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from bench.reporting import train_table
from bench.reporting.figure_values import RESULTS, figure, records, span
from bench.reporting.training_tables import hidden_share, hot
from sparse24.bench import results

OURS = ("sparse24_fp8", "sparse24_fp8_compiled")
#: From so many features on six products are the default.
FEATURES = 1280
#: Fewer tokens are an expert's, or one device's of many.
TOKENS = 4096


def races(few: bool = False) -> list[dict[str, results.Record]]:
    """The steps of each size that was measured so, by variant; `few`: those of few tokens."""
    usual = [r for r in records("h200", "ffn_training") if results.usual(r) and r["race"] == "training"]
    usual = [r for r in usual if (r["tokens"] < TOKENS) == few]
    by_size = [{r["variant"]: r for r in some if r["median_us"]} for some in results.group(usual).values()]
    return [of for of in by_size if OURS[0] in of and of[OURS[0]]["d_model"] >= FEATURES]


def gains(rivals: Callable[[results.Record], bool], is_hot: bool, few: bool = False) -> Iterable[float]:
    for of in races(few):
        of = {name: hot(r) if is_hot else r for name, r in of.items()}
        ours = min(of[name]["median_us"] for name in OURS if name in of)
        times = [r["median_us"] for r in of.values() if r["role"] == "dense" and rivals(r)]
        if times:
            yield min(times) / ours


def step() -> None:
    figure("step-fp8-sizes", lambda: str(len(races())))
    figure("step-fp8-saved", lambda: span((hidden_share(of[OURS[0]]) for of in races()), ".3f"))
    rivals: dict[str, Callable[[results.Record], bool]] = {
        "dense-fp8": lambda r: r["variant"] == "scaled_mm_tensor",
        "fused-fp8": lambda r: r["variant"] == "fused_dense_fp8",
        "compile": lambda r: r["variant"] == "torch_compile",
        "best": lambda r: True,
    }
    for name, chosen in rivals.items():
        figure(f"step-fp8-over-{name}", lambda chosen=chosen: span(gains(chosen, False)))
        figure(f"step-fp8-over-{name}-hot", lambda chosen=chosen: span(gains(chosen, True)))
    figure("step-fp8-few-over-best", lambda: span(gains(rivals["best"], False, few=True)))


def gpt(folder: str, name: str) -> None:
    """Losses against dense runs of the same seeds, rates, and times to dense fp8's loss."""

    def runs(variant: str) -> list[results.Record]:
        return [r for r in train_table.read(RESULTS / "h200" / folder) if r["variant"] == variant and r["complete"]]

    def loss(variant: str, kind: str) -> str:
        dense = train_table.dense_runs(train_table.read(RESULTS / "h200" / folder), kind)
        return f"{train_table.difference(runs(variant), dense)[1]:+.1f}"

    def rate(variant: str, phase: str) -> float:
        return statistics.mean(r["tokens_per_s"][phase] for r in runs(variant))

    def seconds(variant: str) -> str:
        other = {r["seed"]: r["held_out"][-1][1] for r in runs("dense_fp8")}
        times = [train_table.seconds_to(r, other[r["seed"]]) for r in runs(variant)]
        return f"{statistics.mean(times):.0f}" if None not in times else "no"

    for variant in ("dense", "dense_fp8", "sparse_default", "sparse_default_fp8"):
        short = variant.replace("_default", "").replace("_", "-")
        figure(f"{name}-{short}-seconds", lambda v=variant: seconds(v))
        if variant != "dense":
            figure(f"{name}-{short}-loss", lambda v=variant: loss(v, "bf16"))
    figure(f"{name}-sparse-fp8-loss-to-fp8", lambda: loss("sparse_default_fp8", "fp8"))
    for kind in ("", "_fp8"):
        figure(
            f"{name}-sparse{kind.replace('_', '-')}-rate",
            lambda kind=kind: f"{rate(f'sparse_default{kind}', 'sparse') / rate(f'dense{kind}', 'dense'):.2f}",
        )


step()
gpt("train_gpt_1280", "gpt-1280")
