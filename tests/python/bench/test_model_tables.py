"""The tables of whole models, on records made up for tests."""

from made_up_records import record

from bench.reporting import merge, summary, tables


def generated(batch, variant, us, race="eager"):
    dtype, role = ("fp8" if "fp8" in variant else "bf16"), ("dense" if variant == "dense" else "sparse24")
    more = {"bench": "generate", "race": race, "batch": batch, "layers": 8, "model": "Mini-4B"}
    return record(batch, (3072, 9216), dtype, variant, role, us, **more)


def step(width, variant, us, **more):
    dtype, role = ("fp8" if "fp8" in variant else "bf16"), ("sparse24" if "sparse24" in variant else "dense")
    rate = {"tokens_per_s": 32768 / us * 1e6} if us else {}
    more = {"bench": "nanochat_step", "race": "step", "layers": 6, "model": "nanochat", "sustained_us": us} | more
    return record(32768, (width, 4 * width), dtype, variant, role, us, **rate, **more)


STEPS = [
    step(1664, "bf16", 100e3, peak_gb=17.04),
    step(1664, "sparse24_bf16", 80e3, peak_gb=13.5),
    step(1664, "fp8", 64e3, peak_gb=19.1),
    step(1664, "sparse24_fp8", 80e3),
    step(1664, "sparse24_fp8_16bit_dw", None),
    step(2048, "bf16", 200e3),
]
GENERATED = [
    generated(1, "dense", 5e3),
    generated(1, "sparse24", 4e3),
    generated(1, "sparse24_fp8", 10e3),
    generated(8, "dense", 5e3),
]


def rows(text, title):
    lines = text[text.index(title) :].split("\n\n")[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_whole_models_stand_in_the_readme_and_among_all_tables():
    for make in (summary.headline, tables.markdown):
        text = make([*STEPS, *GENERATED])
        assert rows(text, "**Whole training steps of nanochat's own GPT**") == [
            ["32768, 1664, 6", "327,680 (17.0)", "409,600 (13.5), 1.25", "512,000 (19.1)", "409,600, **0.80**"]
            + ["not verified"],
            ["32768, 2048, 6", "163,840", "", "", "", ""],
        ]
        assert rows(text, "**Tokens per second of transformers' `generate`**") == [
            ["Mini-4B", "200 / 250, 1.25 / 100, **0.50**", "1,600"]
        ]
        assert "6 layers" not in text and "8 layers" in text and "90 % zeros" in text
    assert "Back to back" not in tables.markdown(STEPS)


def test_models_of_two_depths_have_rows_of_their_own():
    deep = [r | {"layers": 36, "median_us": r["median_us"] / 2} for r in GENERATED[:2]]
    both = merge.merge([GENERATED, deep])
    assert len(both) == len(GENERATED) + len(deep)
    text = summary.headline(both)
    assert "`generate`**, 8 and 36 layers" in text
    cells = [["Mini-4B, 8 layers", "200 / 250, 1.25 / 100, **0.50**", "1,600"]]
    cells.append(["Mini-4B, 36 layers", "400 / 500, 1.25", ""])
    assert rows(text, "**Tokens per second of transformers' `generate`**") == cells


def test_kinds_of_caches_are_measured_in_calls_of_their_own():
    static = [generated(1, "dense", 3e3, race="static"), generated(1, "sparse24", 3e3, race="static")]
    assert merge.merge([GENERATED, static]) == [*GENERATED, *static]
    again = [r | {"median_us": 6e3} for r in GENERATED]
    assert merge.merge([GENERATED, static, again]) == [*again, *static]


def test_precisions_of_steps_are_measured_in_calls_of_their_own():
    pair = [step(1664, "fp8", 32e3, commit="b" * 7), step(1664, "sparse24_fp8", 16e3, commit="b" * 7)]
    merged = merge.merge([STEPS, pair])
    assert [r["variant"] for r in merged if r["commit"] != "b" * 7] == ["bf16", "sparse24_bf16", "bf16"]
    first, *_ = rows(tables.markdown(merged), "**Whole training steps of nanochat's own GPT**")
    assert first[1:] == ["327,680 (17.0)", "409,600 (13.5), 1.25", "1,024,000 [a]", "2,048,000, 2.00 [a]"]
