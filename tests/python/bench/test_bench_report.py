"""Tables, the threshold and the merging of benchmark records, on records made up for tests."""

import json

import pytest
from benches import run
from made_up_records import FACTS, MODELS, NARROW, SWEEPS, WIDE, record, size, sweep

from bench.reporting import merge, report, summary, tables, threshold
from bench.reporting.origins import Origins
from sparse24.bench import results
from sparse24.bench import text as terminal


def test_threshold_is_where_it_never_loses_again():
    found = threshold.points([*SWEEPS, *MODELS])
    swept = threshold.sweeps(found)
    assert set(swept) == {WIDE, NARROW}
    own = {ffn: threshold.threshold([p for p in swept[ffn] if p.dtype == "bf16"]) for ffn in swept}
    assert own == {WIDE: 2048, NARROW: 512}  # not the 512 between two losses
    assert threshold.thresholds(found) == {"bf16": 2048, "fp8": 1024}
    assert threshold.thresholds(found, tolerance=0.015) == {"bf16": 512, "fp8": 1024}
    assert threshold.thresholds([]) == {}


@pytest.mark.parametrize("at, expected", [(8192, None), (1024, 2048), (128, 512)])
def test_threshold_takes_what_is_not_verified_as_slower(at, expected):
    speedups = {128: 1.1, 512: 1.1, 1024: 1.1, 2048: 1.1, 8192: 1.1} | {at: None}
    assert threshold.thresholds(threshold.points(sweep(WIDE, "fp8", speedups))) == {"fp8": expected}


def test_threshold_needs_a_rival_that_was_verified():
    records = [
        r for r in sweep(WIDE, "fp8", {128: 1.1, 512: 1.1, 1024: 1.1}) if r["role"] != "dense" or r["tokens"] > 128
    ]
    assert threshold.thresholds(threshold.points(records)) == {"fp8": 512}


def rows(text, title):
    """The cells of the table under a title."""
    table = text[text.index(title) :].split("\n\n")[1]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]  # after the head
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_show_where_it_loses():
    more = {"model": "Mini-4B", "sizes": "large", "rel_error": 0.025}
    exact_scales = record(8192, (3072, 9216), "fp8", "sparse24_fused", "part", 105.0, **more)
    exact = ["105", "1.31", "1.19"]
    text = tables.markdown([*SWEEPS, *MODELS, exact_scales])
    swept = rows(text, "**FFN forward over the number of tokens**")
    assert "Not slower than the best dense: bf16 from 2,048 tokens on, fp8 from 1,024 tokens on." in text
    assert len(swept) == 5 + 3
    assert ["4096, 16384", "1,024", "100", "99.0 fused_dense", "**0.99**", "100", "110 fused_dense", "1.10"] in swept
    models = rows(text, "**FFN forward of models**")
    assert models == [
        ["nanochat d12", "32768, 768, 3072", "100", "1.06", "**0.96** fused_dense", "1.20", "not verified"] + [""] * 6,
        ["Mini-4B", "8192, 3072, 9216"]
        + ["not verified", "", "", "", "100", "1.38", "1.25 fused_dense", "1.20"]
        + exact,
    ]
    large = ["8192, 3072, 9216", "fp8, exact scales", "105", "104", "138 scaled_mm_row", "125", "120", "1.31", "1.19"]
    assert rows(text, "**FFN forward**, 90 %") == [
        [*large, "2.50 %", "1.60 %"],
        [*large[:1], "fp8, bounded scales", "100", "", *large[4:7], "1.38", "1.25", "", "1.60 %"],
    ]
    assert rows(text, "by the share of zeros") == [["8192, 3072, 9216", "fp8", "100, **0.50**", "100, 1.25"]]


def test_what_runs_back_to_back_has_a_table():
    """By the sustained times, whatever the medians say; of fp8 the variant with as many scales as fused_dense."""

    def hot(dtype, race, variant, us):
        bench = "gemm1" if race == "gemm1" else "ffn_forward"
        return record(8192, WIDE, dtype, variant, "part", 1.0, race=race, bench=bench, sustained_us=us)

    records = [
        hot("fp8", "gemm1", "linear_compress", 100.0),
        hot("fp8", "gemm1", "linear_relu2", 101.0),
        hot("fp8", "gemm1", "dense", 99.0),
        hot("fp8", "forward", "sparse24", 160.0),
        hot("fp8", "forward", "scaled_mm_row", 200.0),
        hot("fp8", "forward", "sparse24_fused", 170.0),
        hot("fp8", "forward", "sparse24_fused_static", 150.0),
        hot("fp8", "forward", "fused_dense", 180.0),
        hot("bf16", "forward", "sparse24", 300.0),
        hot("bf16", "forward", "fused_dense", 330.0),
    ]
    assert rows(tables.markdown([*records, *SWEEPS]), "**Back to back**") == [
        ["8192, 4096, 16384", "fp8, exact scales", "100, 1.01", "100, **0.99**", "170, 1.18", "170, 1.06"],
        ["8192, 4096, 16384", "fp8, bounded scales", "", "", "160, 1.25", "160, 1.12"],
        ["8192, 4096, 16384", "fp8, one scale", "", "", "150, 1.33", "150, 1.20"],
        ["8192, 4096, 16384", "bf16", "", "", "", "300, 1.10"],
    ]
    assert "Back to back" not in tables.markdown(SWEEPS)


def of_a_summary():
    """A few tokens, where bf16 runs dense; a large size, with exact scales too and back to back; a step of it."""
    exact = record(8192, WIDE, "fp8", "sparse24_fused", "part", 110.0, sustained_us=120.0)
    large = [r | {"sustained_us": 1.2 * r["median_us"]} for r in size(8192, WIDE, "fp8", 1.25, model="P")]
    few = [
        record(128, WIDE, "bf16", "torch_compile", "dense", 118.0),
        record(128, WIDE, "bf16", "fused_dense", "dense", 99.0),
        record(128, WIDE, "bf16", "sparse24", "sparse24", 120.0),
        record(128, WIDE, "bf16", "sparse24_fallback", "part", 100.0),
    ]
    training = {"bench": "ffn_training", "race": "training", "commit": "d", "pause_us": 1000.0}
    step = [
        record(8192, WIDE, "bf16", "torch_compile", "dense", 240.0, **training),
        record(8192, WIDE, "fp8", "scaled_mm_tensor", "dense", 180.0, **training),
        record(8192, WIDE, "fp8", "fused_dense_fp8", "dense", 135.0, **training),
        record(8192, WIDE, "fp8", "sparse24_fp8", "sparse24", 150.0, **training),
        record(8192, WIDE, "bf16", "sparse24", "sparse24", 200.0, **training),
        record(128, WIDE, "bf16", "torch_compile", "dense", 240.0, **training | {"commit": "e"}),
        record(128, WIDE, "bf16", "sparse24_fallback", "part", 240.0, **training | {"commit": "e"}),
    ]
    return [*large, exact, *step, *few, *size(77, WIDE, "fp8", 2.0)]


def test_the_readme_has_speed_ups():
    """What it runs by itself, over what users run and the best dense; bold where that is faster; hot in brackets."""

    text = summary.headline(of_a_summary())
    assert [row for row in rows(text, "Made up, torch 2") if any(row)] == [
        ["8192, 4096, 16384", "P", "", "", "1.25 (1.38)", "1.14 (1.25)", "1.20", "", "1.20", "**0.90**"],
        ["128, 4096, 16384", "", "1.18", "**0.99**", "", "", "1.00 [a]", "", "", ""],
    ]
    assert (
        "Forward: of commit c, without pauses. Training: of commit d, pauses of 1 ms before the samples; [a] " in text
    )
    assert summary.headline([]) == ""


def test_a_summary_has_times():
    steps = ["200", "1.20", "", "150", "1.20", "**0.90**"]  # in bf16, and in fp8
    text = summary.markdown(of_a_summary())
    assert [row for row in rows(text, "Made up, torch 2") if any(row)] == [
        ["8192, 4096, 16384", "P", "", "", "", "110", "1.25", "1.14", "100", "1.38", "1.25", *steps],
        ["128, 4096, 16384", "", "100 (dense)", "1.18", "**0.99**", *[""] * 6, "240 (dense) [a]", "1.00", *[""] * 4],
    ]


def test_other_commits_and_pauses_are_marked():
    """Rows or cells that are of another call than most of their table bear a letter, and it says whose."""

    usual = size(8192, WIDE, "bf16", 1.25, pause_us=1000.0)
    other = size(8192, WIDE, "bf16", 1.25, zeros=0.5, commit="other67890")
    assert rows(tables.markdown([*usual, *other]), "by the share of zeros")[0][2:] == ["100, 1.25 [a]", "100, 1.25"]
    note = "Of commit c, pauses of 1 ms before the samples; [a] commit other67, without pauses"
    assert note in tables.markdown([*usual, *other])
    origins = Origins([*usual, *other[:1]])
    assert (origins.mark(usual[0]), origins.mark(other[0])) == ("", " [a]") and origins.note() == note


def test_tables_stand_in_the_readme(tmp_path):
    results.write_json(tmp_path / "a.json", SWEEPS)
    accuracy = {"bench": "accuracy", "layer": 0, "zeros": 0.87, "steps": 3, **FACTS}
    more = {"over_sum": 0.9, "over_root_of_squares": 1.08, "nonzeros": 5000, "saturated": 7}
    results.write_json(
        tmp_path / "accuracy.json",
        [
            accuracy | {"variant": "pruning alone", "rel_error": 0.0134},
            accuracy | {"variant": "2:4 fp8 static", "rel_error": 0.02454} | more,
        ],
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    command = ["report", tmp_path / "a.json", tmp_path / "accuracy.json", "--tables", readme]
    run(*command)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    short = [*command[:-2], "--readme", readme.with_name("SUMMARY.md")]
    short[-1].write_text(f"{report.BEGIN}{report.END}")
    run(*short)
    assert "4096, 16384" in short[-1].read_text() and "Error of" not in short[-1].read_text()
    assert rows(text, "**Error of the FFN outputs**") == [
        ["share of zeros", "87 %", "", "", ""],
        ["pruning alone", "1.34 %", "", "", ""],
        ["2:4 fp8 static", "2.45 %", "0.900", "1.080", "7 of 5,000"],
    ]
    readme.write_text("no marks")
    run(*command, status=1)
    assert readme.read_text() == "no marks"


def test_text_tells_the_races_apart():
    lines = terminal.table(
        [record(8, WIDE, "bf16", "dense", "part", 1.0, race=race) for race in ("gemm1", "gemm2", "forward")]
    ).splitlines()
    assert [line.split()[:3] for line in lines] == [["bf16", race, "dense"] for race in ("gemm1", "gemm2", "forward")]
    assert len({line.index("dense") for line in lines}) == 1


def test_merge_takes_a_problem_from_the_last_call_that_has_it(tmp_path):
    first = [*size(128, WIDE, "bf16", 0.7), *size(512, WIDE, "bf16", 0.9), *size(1024, WIDE, "bf16", 1.1)]
    failed = [record(0, (0, 0), "", "sparse24", "sparse24", None, problem=first[0]["problem"], zeros=0.0)]
    again = [r for r in size(512, WIDE, "bf16", 1.4) if r["variant"] != "cusparselt"]
    assert merge.merge([failed, first]) == first
    merged = merge.merge([first, again])
    assert {
        r["tokens"]: results.fastest([r], "dense")["median_us"] for r in merged if r["variant"] == "fused_dense"
    } == {
        128: pytest.approx(70),
        512: pytest.approx(140),
        1024: pytest.approx(110),
    }
    assert not any(r["tokens"] == 512 and r["variant"] == "cusparselt" for r in merged)  # nothing of the older call
    # The first GEMM is another bench, with the same problems.
    gemm1 = [r | {"bench": "gemm1"} for r in first[:1]]
    assert merge.merge([first, gemm1]) == first + gemm1


def test_committed_records_and_drawings_are_small():
    """Compact, as `merge` writes them."""
    from bench.reporting import compact
    from bench.reporting.figure_values import RESULTS

    files = list(RESULTS.rglob("*.json"))
    assert sum(path.stat().st_size for path in files) <= 2e6
    assert sum(path.stat().st_size for path in RESULTS.rglob("*.*g")) <= 0.5e6
    for path in files:
        content = json.loads(path.read_text())
        if isinstance(content, list):
            assert compact.compact(content) == content, path


def test_models_before_and_after_conversion():
    facts = {"bench": "models", "model": "Mini-4B", "layers": 2, "race": "prefill"}
    ffn = (3072, 9216)
    records = [
        record(8192, ffn, "bf16", "dense", "dense", 2000.0, **facts),
        record(8192, ffn, "bf16", "sparse24", "sparse24", 1600.0, **facts),
        record(8192, ffn, "fp8", "sparse24_fp8", "sparse24", 1000.0, **facts),
        record(8192, ffn, "bf16", "dense", "dense", 6000.0, **facts | {"race": "training"}),
        record(8192, ffn, "bf16", "sparse24", "sparse24", None, **facts | {"race": "training"}),
    ]
    text = tables.markdown(records)
    assert "convert`**: 2 layers" in text
    assert rows(text, "**Models before and after") == [
        ["Mini-4B", "8192, 3072, 9216", "90 %", "prefill", "2000", "1600, 1.25", "1000, 2.00"],
        ["Mini-4B", "8192, 3072, 9216", "90 %", "training", "6000", "not verified", ""],
    ]


def test_a_training_step_beside_its_rivals():
    times = {"torch_compile": 120.0, "fused_dense": 110.0, "sparse24": 100.0, "sparse24_no_split": 96.0}
    saved = {"torch_compile": 4.5, "sparse24": 1.62}  # bytes per element of the activation, a half of it x
    records = [
        record(
            1024,
            WIDE,
            "bf16",
            name,
            "sparse24" if name.startswith("sparse24") else "dense",
            time,
            bench="ffn_training",
            race="training",
            saved_bytes=int(saved.get(name, 2) * 1024 * WIDE[1]),
        )
        for name, time in times.items()
    ]
    records.append(record(1024, WIDE, "bf16", "dense", "part", 9.0, bench="ffn_training", race="dx"))
    text = tables.markdown(records)
    row = "| 1024, 4096, 16384 | 100 | 96.0 |  | 120 | 110 |  | 1.20 (1.25) | 1.10 (1.15) |  | 0.28 |"
    assert row in text and text.count("| 1024, 4096, 16384 |") == 1
    # Without its rivals there is nothing to compare.
    assert "1024, 4096" not in tables.markdown([r for r in records if r["variant"] != "fused_dense"])


def test_runs_of_training_are_files_of_one_record(tmp_path):
    losses = {("dense", ""): 2.0, ("sparse", "no_split"): 2.02, ("sparse", "default"): 1.99}
    paths = []
    for (ffn, recipe), loss in losses.items():
        run = FACTS | {"bench": "train_gpt", "variant": f"{ffn}_{recipe}".rstrip("_"), "ffn": ffn, "recipe": recipe}
        run |= {"seed": 0, "complete": True, "verified": True, "held_out_loss": loss, "tokens": 20_000_000}
        run |= {"config": {"size": {"layers": 12, "dim": 768}}}
        run |= {"tokens_per_s": {ffn: 1e6}, "peak_bytes": {ffn: 1e9}, "activations": [{"zeros": [0.9, 0.8]}]}
        paths.append(tmp_path / f"{run['variant']}_seed0.json")
        paths[-1].write_text(json.dumps(run))
    results.write_json(tmp_path / "ffn.json", size(1024, WIDE, "bf16", 1.1))
    text = tables.markdown(results.read_json([*paths, tmp_path / "ffn.json"]))
    assert text.index("**FFN forward**") < text.index("**A GPT in training**, 12 layers, 768 wide, 20 million")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| dense", "| sparse_"))]
    assert [row[0] for row in rows] == ["| dense", "| sparse_default", "| sparse_no_split"]
    assert [row[4] for row in rows] == ["", "-0.50", "+1.00"]
    assert [row[5] for row in rows] == ["1,000,000", "1,000,000", ""]  # another recipe's kernels may be older
