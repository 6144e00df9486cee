"""What the figures of experts are: relu2_experts over torch's products, by model, tokens, precision and pass."""

from __future__ import annotations

from bench.reporting import experts_tables
from bench.reporting.figure_values import figure, records, span
from sparse24.bench import results

MODELS = {"nano": "Nemotron-3 Nano", "super": "Nemotron-3 Super", "ultra": "Nemotron-3 Ultra"}
#: By the figure's name: the rival, its field, and what else a record has.
RIVALS = {
    "": ("grouped_mm", "median_us"),
    "-hot": ("grouped_mm", "sustained_us"),
    "-over-fused": ("fused_dense", "median_us"),
}
#: Decoding batches.
FEW = 64


def gain(model: str, tokens: int, race: str, dtype: str, rival: str, field: str) -> list[float]:
    """Of one model and number of tokens with balanced routing: one number, or none."""
    wanted = {"model": MODELS[model], "tokens": tokens, "race": race, "dtype": dtype, "routing": "balanced"}
    found = [r for r in records("h200", "experts") if all(r.get(key) == value for key, value in wanted.items())]
    ours, theirs = experts_tables.fastest(found), experts_tables.named(found, rival)
    known = ours and theirs and ours.get(field) and theirs.get(field)
    return [theirs[field] / ours[field]] if known else []


def over_16_bits(model: str, tokens: int, variant: str) -> list[float]:
    """Our training step in bf16 over a variant of that in fp8: one number, or none."""
    wanted = {"model": MODELS[model], "tokens": tokens, "race": "training", "routing": "balanced"}
    found = [r for r in records("h200", "experts") if all(r.get(key) == value for key, value in wanted.items())]
    ours = experts_tables.fastest([r for r in found if r["dtype"] == "bf16"])
    float8 = experts_tables.named([r for r in found if r["dtype"] == "fp8"], variant)
    return [ours["median_us"] / float8["median_us"]] if ours and float8 and float8.get("median_us") else []


def few(dtype: str) -> list[float]:
    """Of all models, with few tokens."""
    tokens = {r["tokens"] for r in records("h200", "experts") if r["tokens"] <= FEW}
    gains = (gain(m, t, "forward", dtype, *RIVALS[""]) for m in MODELS for t in sorted(tokens))
    return [one for found in gains for one in found]


def skews() -> list[float]:
    """Times with skewed routing over those with balanced, of as many rows."""
    of_size: dict[tuple, dict[str, results.Record]] = {}
    for problem in experts_tables.problems(records("h200", "experts")):
        ours = experts_tables.fastest(problem)
        if ours is not None:
            key = tuple(ours[name] for name in ("model", "tokens", "race", "dtype"))
            of_size.setdefault(key, {})[ours["routing"]] = ours
    return [
        by[routing]["median_us"] / by["balanced"]["median_us"]
        for by in of_size.values()
        for routing in by
        if routing != "balanced" and by.keys() >= {"balanced", routing}
    ]


for model in MODELS:
    for tokens in (8192, 32768, 65536):
        for race in ("forward", "training"):
            for dtype in ("bf16", "fp8"):
                for name, (rival, field) in RIVALS.items():
                    size = model, tokens, race, dtype, rival, field
                    if gain(*size):
                        full = f"experts-{model}-{tokens // 1024}k-{race}-{dtype}{name}"
                        figure(full, lambda size=size: span(gain(*size)))
        for variant, kept in (("sparse24", ""), ("sparse24_kept", "-kept")):
            known = model, tokens, variant
            if over_16_bits(*known):
                full = f"experts-{model}-{tokens // 1024}k-training-fp8{kept}-over-bf16"
                figure(full, lambda known=known: span(over_16_bits(*known)))
for dtype in ("bf16", "fp8"):
    if few(dtype):
        figure(f"experts-few-{dtype}", lambda dtype=dtype: span(few(dtype)))
figure("experts-skew", lambda: span(skews()))
