"""What each named figure of the documents is: a function of the committed records. `figures` puts them in."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from bench.reporting import ffn_tables, regret, train_table
from bench.reporting.origins import Origins
from sparse24.bench import results, sizes

RESULTS = Path(__file__).resolve().parents[1] / "results"
Size = tuple[int, int, int]
Names = str | tuple[str, ...]

LARGE = [size[:3] for size in sizes.LARGE]
#: FFNs of models with many tokens, but for the large sizes.
OTHERS = [size[:3] for size in sizes.USERS if size.tokens >= 8192 and size[:3] not in LARGE]
ROW_AND_TENSOR = ffn_tables.TORCH["fp8"]
#: The most that `_scaled_mm` offers by torch.compile, forward; and what has our epilogue.
COMPILED, FUSED = {"bf16": "torch_compile", "fp8": ROW_AND_TENSOR}, "fused_dense"
#: Variants of ours in fp8 by the activation's scales.
EXACT, BOUNDED, ONE = "sparse24_fused", "sparse24", "sparse24_fused_static"

FIGURES: dict[str, Callable[[], str]] = {}


@cache
def value(name: str) -> str:
    return FIGURES[name]()


def figure(name: str, make: Callable[[], str]) -> None:
    if name in FIGURES:
        raise ValueError(f"two figures are called {name}")
    FIGURES[name] = make


def span(values: Iterable[float], form: str = ".2f") -> str:
    """The least and the largest, or the one that both are."""
    values = list(values)
    low, high = (f"{v:{form}}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


@cache
def records(gpu: str, file: str) -> list[results.Record]:
    return results.read_json([RESULTS / gpu / f"{file}.json"])


@cache
def times(gpu: str, file: str, race: str, field: str = "median_us") -> dict[Size, dict[tuple[str, str], float]]:
    """By size and (dtype, variant), at 90 % independent zeros."""
    found: dict[Size, dict[tuple[str, str], float]] = {}
    for r in records(gpu, file):
        if results.usual(r) and r["race"] == race and r["median_us"] and r.get(field) is not None:
            found.setdefault((r["tokens"], r["d_model"], r["d_ff"]), {})[r["dtype"], r["variant"]] = r[field]
    return found


def speedups(
    of: dict[Size, dict[tuple[str, str], float]],
    dtype: str,
    ours: str,
    theirs: Names,
    where=None,
    rival_dtype: str = "",
) -> list[float]:
    """Ours over the fastest of theirs, at the sizes that are in `where` (all) and have both."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    found = []
    for size in of if where is None else where:
        us = of.get(size, {})
        rivals = [us[key] for name in theirs if (key := (rival_dtype or dtype, name)) in us]
        if (dtype, ours) in us and rivals:
            found.append(min(rivals) / us[dtype, ours])
    return found


def forward() -> None:
    """H200, after pauses and (hot) back to back."""
    for hot, field in (("", "median_us"), ("-hot", "sustained_us")):

        def large(dtype: str, ours: str, theirs: Names, race: str = "forward", field: str = field) -> Callable[[], str]:
            return lambda: span(speedups(times("h200", "ffn_forward", race, field), dtype, ours, theirs, LARGE))

        figure(f"bf16-over-compile{hot}", large("bf16", "sparse24", COMPILED["bf16"]))
        figure(f"bf16-over-fused{hot}", large("bf16", "sparse24", FUSED))
        for name, ours in (("exact", EXACT), ("bounded", BOUNDED), ("one", ONE)):
            if name != "one":  # one scale is compared with one
                figure(f"fp8-{name}-over-row{hot}", large("fp8", ours, "scaled_mm_row"))
            figure(f"fp8-{name}-over-fused{hot}", large("fp8", ours, FUSED))
        for dtype in COMPILED:
            figure(f"gemm1-{dtype}-over-torch{hot}", large(dtype, "linear_compress", "dense", "gemm1"))

    def others(dtype: str, ours: str, theirs: Names) -> Callable[[], str]:
        return lambda: span(speedups(times("h200", "ffn_forward", "forward"), dtype, ours, theirs, OTHERS))

    figure("others-bf16-over-compile", others("bf16", "sparse24", COMPILED["bf16"]))
    figure("others-bf16-over-fused", others("bf16", "sparse24", FUSED))
    for name, ours in (("exact", EXACT), ("bounded", BOUNDED)):
        figure(f"others-fp8-{name}-over-compile", others("fp8", ours, COMPILED["fp8"]))
        figure(f"others-fp8-{name}-over-fused", others("fp8", ours, FUSED))
    figure("forward-h200-origin", lambda: origin("h200", "ffn_forward", "forward"))
    figure("others-fp8-exact-slower", lambda: span(slower_than_fused(), ",.0f"))
    figure("fp8-exact-error", lambda: errors("fp8", EXACT))
    figure("fp8-bounded-error", lambda: errors("fp8", BOUNDED))
    figure("fp8-row-error", lambda: errors("fp8", "scaled_mm_row"))
    figure("pruning-error", lambda: errors("fp8", EXACT, "pruning_error"))
    figure("bounded-error-over-exact", lambda: span(error_ratios()))
    for kind in ffn_tables.DEFAULTS:
        name = kind.replace(", ", "-").replace(" ", "-")
        figure(f"default-{name}-least", lambda kind=kind: f"{by_default(kind):.2f}")
        figure(f"default-{name}-regret", lambda kind=kind: f"{100 * most_regret(kind):.1f}")
    figure("hot-time", lambda: span(slower_hot()))


def origin(gpu: str, file: str, race: str) -> str:
    """Commits and pauses of the usual records of a race, in words."""
    note = Origins(r for r in records(gpu, file) if results.usual(r) and r["race"] == race).note()
    return note[0].lower() + re.sub(r"\[[a-z]\] ", "some of ", note[1:])


def slower_than_fused() -> list[int]:
    """Features of the other models whose fp8 forward with exact scales is slower than fused dense with one."""
    of = times("h200", "ffn_forward", "forward")
    return [size[1] for size in OTHERS if of[size]["fp8", EXACT] > of[size]["fp8", FUSED]]


def errors(dtype: str, variant: str, key: str = "rel_error") -> str:
    """In percent, at all sizes."""
    found = records("h200", "ffn_forward")
    mine = [
        r for r in found if results.usual(r) and (r["race"], r["dtype"], r["variant"]) == ("forward", dtype, variant)
    ]
    return span((100 * r[key] for r in mine if key in r and not r.get("bias")), ".1f")


def error_ratios() -> list[float]:
    of = times("h200", "ffn_forward", "forward", "rel_error")
    return [us["fp8", BOUNDED] / us["fp8", EXACT] for us in of.values() if ("fp8", BOUNDED) in us]


def by_default(name: str) -> float:
    """The least speed-up of what relu2_mlp runs over the best dense variant of as many scales, at any size."""
    how, dtype, ours, fallback, rivals = ffn_tables.DEFAULTS[name]
    usual = [r for r in records("h200", "ffn_forward") if results.usual(r) and r["race"] == "forward"]
    found = []
    for problem in results.group(usual).values():
        mine = [r for r in problem if r["dtype"] == dtype and r["median_us"]]
        chosen = ffn_tables.by_default(mine, ours, fallback, **how)
        dense = [r["median_us"] for r in mine if r["variant"] in rivals]
        if chosen and dense:
            found.append(min(dense) / chosen["median_us"])
    return min(found)


def most_regret(kind: str) -> float:
    return max(loss for loss, _ in regret.choices(records("h200", "ffn_forward"), kind).values())


def slower_hot() -> list[float]:
    """Times back to back over those after pauses, of all networks and products at the large sizes."""
    found = []
    for race in ("forward", "gemm1"):
        cool, hot = (times("h200", "ffn_forward", race, field) for field in ("median_us", "sustained_us"))
        found += [hot[size][key] / cool[size][key] for size in LARGE for key in hot[size] if key[1] != "cusparselt"]
    return found


def products() -> None:
    """H200: the sparse GEMM and the memory-bound kernels."""

    def mm(theirs: str, wanted: Callable[[int], bool]) -> Callable[[], str]:
        key = f"speedup_vs_{theirs}"
        return lambda: span(
            r[key]
            for r in records("h200", "mm")
            if results.usual(r) and r["role"] == "sparse24" and wanted(r["tokens"]) and r.get(key)
        )

    figure("mm-over-dense", mm("best_dense", lambda t: t >= 1024))
    figure("mm-over-dense-few", mm("best_dense", lambda t: t < 1024))
    figure("mm-over-cusparselt", mm("cusparselt", lambda t: t >= 1024))
    figure("mm-over-cusparselt-few", mm("cusparselt", lambda t: t < 1024))

    def copied(variant: str) -> Callable[[], str]:
        shares = [r for r in records("h200", "compress") if results.usual(r) and r["variant"] == variant]
        return lambda: span((100 * r["share_of_copy"] for r in shares if r["median_us"]), ".0f")

    figure("compress-share", copied("compress relu2 dim=-1"))
    figure("compress-fp8-share", copied("compress_fp8 relu2 row dim=-1"))


def training() -> None:
    """A step of the FFN; models are those of at least 4,096 tokens, so that experts, which run dense, are left out."""

    def step(gpu: str, ours: tuple[str, str], theirs: tuple[str, str], features=(0, 1 << 20)) -> Callable[[], str]:
        def values() -> str:
            of = times(gpu, "ffn_training", "training")
            where = [size for size in of if size[0] >= 4096 and features[0] <= size[1] < features[1]]
            return span(speedups(of, *ours, theirs[1], where, rival_dtype=theirs[0]))

        return values

    bf16, fp8 = ("bf16", "sparse24"), ("fp8", "sparse24_fp8_16bit_dw")
    compile_, fused, dense_fp8 = ("bf16", "torch_compile"), ("bf16", FUSED), ("fp8", "scaled_mm_tensor")
    narrow, wide = (0, 1280), (1280, 1 << 20)
    for gpu in ("h200", "h100"):
        figure(f"step-{gpu}-origin", lambda gpu=gpu: origin(gpu, "ffn_training", "training"))
        figure(f"step-{gpu}-over-compile", step(gpu, bf16, compile_))
        figure(f"step-{gpu}-over-fused", step(gpu, bf16, fused))
        figure(f"step-{gpu}-over-dense-fp8", step(gpu, bf16, dense_fp8))
        figure(f"step-{gpu}-fp8-over-dense-fp8", step(gpu, fp8, dense_fp8))
        figure(f"step-{gpu}-fp8-over-bf16", step(gpu, fp8, bf16))
        figure(f"weight-gradients-{gpu}-fp8-over-bf16", lambda gpu=gpu: span(fp8_weight_gradients(gpu)))
    figure("step-h200-over-compile-wide", step("h200", bf16, compile_, wide))
    figure("step-h100-over-fused-wide", step("h100", bf16, fused, wide))
    figure("step-h100-over-fused-narrow", step("h100", bf16, fused, narrow))
    figure("step-h100-over-dense-fp8-wide", step("h100", bf16, dense_fp8, wide))
    figure("step-h100-over-dense-fp8-narrow", step("h100", bf16, dense_fp8, narrow))
    figure("step-h200-saved", lambda: span((100 * share for share in saved("h200")), ".0f"))
    figure("step-h200-sizes", lambda: str(sum(size[0] >= 4096 for size in times("h200", "ffn_training", "training"))))


def saved(gpu: str) -> list[float]:
    """Bytes kept for the backward pass beside x, over those of torch.compile."""
    of = times(gpu, "ffn_training", "training", "saved_bytes")
    found = []
    for (tokens, d_model, _), kept in of.items():
        x = 2 * tokens * d_model
        found.append((kept["bf16", "sparse24"] - x) / (kept["bf16", "torch_compile"] - x))
    return found


def fp8_weight_gradients(gpu: str) -> list[float]:
    """Speed of a weight gradient in fp8, with what brings its operands there, over that in bf16."""
    found = []
    for race in ("dw1", "dw2"):
        for us in times(gpu, "ffn_training", race).values():
            if ("fp8", "sparse_fp8_composed") in us:
                found.append(us["bf16", "sparse"] / us["fp8", "sparse_fp8_composed"])
    return found


def whole_models() -> None:
    def layers(race: str, dtype: str, variant: str) -> Callable[[], str]:
        return lambda: span(speedups(times("h100", "models", race), dtype, variant, "dense", rival_dtype="bf16"))

    figure("model-prefill", layers("prefill", "bf16", "sparse24"))
    figure("model-prefill-fp8", layers("prefill", "fp8", "sparse24_fp8"))
    figure("model-training", layers("training", "bf16", "sparse24"))

    def nanochat(ours: str, theirs: str) -> Callable[[], str]:
        def values() -> str:
            rates = {(r["d_model"], r["variant"]): r["tokens_per_s"] for r in records("h200", "nanochat_step")}
            return span(rates[width, ours] / rates[width, theirs] for width in {width for width, _ in rates})

        return values

    def generating(race: str, variant: str) -> Callable[[], str]:
        def values() -> str:
            mine = [r for r in records("h200", "generate") if (r["race"], r["variant"]) == (race, variant)]
            return span(r["speedup_vs_best_dense"] for r in mine)

        return values

    def few(dtype: str, *tokens: int) -> Callable[[], str]:
        def values() -> str:
            ours = [r for r in records("h200", "ffn_few_tokens") if r["role"] == "sparse24" and results.usual(r)]
            mine = [r for r in ours if r["dtype"] == dtype and r["tokens"] in tokens]
            return span(r["speedup_vs_best_dense"] for r in mine)

        return values

    for dtype in ("bf16", "fp8"):
        for tokens in (1, 4, 8, 16):
            figure(f"few-{dtype}-{tokens}", few(dtype, tokens))
        figure(f"few-{dtype}-more", few(dtype, 32, 64))
        figure(f"few-{dtype}-128", few(dtype, 128))
    for race in ("eager", "static"):
        figure(f"generate-{race}-bf16", generating(race, "sparse24"))
        figure(f"generate-{race}-fp8", generating(race, "sparse24_fp8"))
    figure("nanochat-bf16", nanochat("sparse24_bf16", "bf16"))
    figure("nanochat-fp8", nanochat("sparse24_fp8", "fp8"))


def gpt() -> None:
    """A GPT of 768 wide in training; zeros are those of the dense runs at their end, by layer."""

    @cache
    def runs(variant: str) -> list[results.Record]:
        return [r for r in train_table.read(RESULTS / "h100" / "train_gpt") if r["variant"] == variant]

    def at_the_end(key: str) -> list[float]:
        return [100 * v for r in runs("dense") for v in r["activations"][-1][key]]

    def losses() -> list[float]:
        dense = {r["seed"]: r["held_out_loss"] for r in runs("dense")}
        return [100 * (r["held_out_loss"] / dense[r["seed"]] - 1) for r in runs("sparse_default")]

    def of_layer(layer: int, key: str) -> Callable[[], str]:
        return lambda: span((100 * r["activations"][-1][key][layer] for r in runs("dense")), ".0f")

    def spread() -> float:
        dense = [r["held_out_loss"] for r in runs("dense")]
        return 100 * (max(dense) / min(dense) - 1)

    def mean_rate(variant: str, phase: str) -> float:
        return statistics.mean(r["tokens_per_s"][phase] for r in runs(variant))

    def mean_loss() -> float:
        dense = {r["seed"]: r for r in runs("dense")}
        return train_table.difference(runs("sparse_default"), dense)[1]

    figure("gpt-zeros", lambda: span(at_the_end("zeros"), ".0f"))
    figure("gpt-zeros-first-layer", of_layer(0, "zeros"))
    figure("gpt-dropped", lambda: span(at_the_end("feature_nonzeros_dropped"), ".1f"))
    figure("gpt-dropped-first-layer", of_layer(0, "feature_nonzeros_dropped"))
    figure("gpt-dropped-last-layer", of_layer(-1, "feature_nonzeros_dropped"))
    figure("gpt-dropped-mean", lambda: f"{statistics.mean(at_the_end('feature_nonzeros_dropped')):.1f}")
    figure("gpt-energy", lambda: span(at_the_end("feature_energy_dropped"), ".2f"))
    figure("gpt-loss-mean", lambda: f"{mean_loss():+.1f}")
    figure("gpt-loss-seeds", lambda: span(losses(), "+.1f"))
    figure("gpt-dense-spread", lambda: f"{spread():.1f}")
    figure("gpt-over-dense-runs", lambda: f"{mean_rate('sparse_default', 'sparse') / mean_rate('dense', 'dense'):.2f}")
    figure("gpt-over-own-dense", lambda: f"{train_table.own_gain(runs('sparse_default')):.2f}")


def several_gpus() -> None:
    """Of the most GPUs that were measured, in percent: speed beside one GPU, and the gain of 2:4 beside that there."""

    def steps(way: str, *variants: str) -> list[results.Record]:
        mine = [r for r in records("h200", "distributed") if r["race"] == way and r["variant"] in variants]
        mine = [r for r in mine if r["median_us"] and "sm_margin" not in r and "nccl_max_ctas" not in r]
        return [r for r in mine if r["gpus"] == max(r["gpus"] for r in mine)]

    def percent(field: str, way: str, *variants: str) -> Callable[[], str]:
        return lambda: span((100 * r[field] for r in steps(way, *variants) if field in r), ".0f")

    figure("gpus", lambda: span((r["gpus"] for r in steps("fsdp2", "sparse24")), ".0f"))
    for way in ("fsdp2", "ddp", "tensor"):
        figure(f"gpus-{way}-dense", percent("scaling", way, "fused_dense", "fused_dense_fp8"))
        figure(f"gpus-{way}-sparse", percent("scaling", way, "sparse24", "sparse24_fp8"))
        figure(f"gpus-{way}-kept", percent("gain_kept", way, "sparse24", "sparse24_fp8"))


for make in (forward, products, training, whole_models, gpt, several_gpus):
    make()
