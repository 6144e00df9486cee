"""sparse24 bench: what it measures is verified, and it says in words whether it pays."""

import importlib.util
import json
import sys

import pytest
import torch

import sparse24
from sparse24 import cli
from sparse24.bench import command, verdict
from sparse24.bench.command import Plan, measure, report
from sparse24.bench.sizes import PRESETS, Size, preset

CPU = torch.device("cpu")
SIZE = Size(128, 64, 512)


def test_measures_verified_networks_and_writes_them(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plan = Plan((SIZE,), training=True, few_tokens=(32, 64, 4096))
    records = measure(plan, CPU, smoke=True)
    assert report(plan, records, tmp_path / "out.json", tmp_path / "out.svg") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(records))
    assert "</svg>" in (tmp_path / "out.svg").read_text()
    assert all(r["verified"] and r["median_us"] > 0 for r in records)
    measured = {(r["bench"], r["tokens"]) for r in records}
    assert measured == {("ffn_forward", 128), ("ffn_training", 128), ("ffn_forward", 32), ("ffn_forward", 64)}
    names = {(r["bench"], r["dtype"]): {r["variant"] for r in records if r["bench"] == b and r["dtype"] == d}
             for r in records for b, d in [(r["bench"], r["dtype"])]}  # fmt: skip
    assert names["ffn_forward", "bf16"] >= {"torch_compile", "fused_dense", "sparse24"}
    assert names["ffn_forward", "fp8"] >= {"scaled_mm_row", "scaled_mm_tensor", "fused_dense", "sparse24"}
    assert names["ffn_training", "bf16"] >= {"torch_compile", "fused_dense", "sparse24"}
    assert names["ffn_training", "fp8"] >= {"scaled_mm_tensor", "fused_dense_fp8", "sparse24_fp8"}
    said = capsys.readouterr().out
    for pass_ in verdict.PASSES.values():
        for dtype in ("bf16", "fp8"):
            assert f"\n{pass_} in {dtype}: sparse24 is " in said
    assert "Fewer tokens, bf16: " in said and "Fewer tokens, fp8: " in said


def test_one_precision_is_measured_alone():
    records = measure(Plan((SIZE,), ("fp8",), few_tokens=()), CPU, smoke=True)
    assert {r["dtype"] for r in records} == {"fp8"} and {r["race"] for r in records} == {"forward"}


def test_a_wrong_output_is_status_1(monkeypatch, capsys):
    right = sparse24.relu2_mlp
    monkeypatch.setattr(sparse24, "relu2_mlp", lambda *args, **options: 1.12 * right(*args, **options))
    plan = Plan((SIZE,), ("bf16",), few_tokens=())
    assert report(plan, measure(plan, CPU, smoke=True), None, None) == 1
    said = capsys.readouterr().out
    assert "Forward in bf16: sparse24 was NOT VERIFIED: Unverified: expected a relative error" in said


def test_a_size_that_does_not_fit_in_memory_is_told(monkeypatch, capsys):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(command.forward, "problem", no_memory)
    plan = Plan((SIZE,), few_tokens=())
    assert report(plan, measure(plan, CPU, smoke=True), None, None) == 1
    assert "128 tokens, 64 -> 512 -> 64 could not be measured: OutOfMemoryError: no memory" in capsys.readouterr().out


def run(capsys, *arguments):
    status = cli.main(["bench", *arguments])
    return status, capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_a_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for arguments in (("--preset", "nanochat"), ("--tokens", "8192", "--d-model", "4096", "--d-ff", "16384")):
        status, said = run(capsys, *arguments)
        assert status == 2 and said.count("\n") == 1
        assert said.startswith("error: sparse24.bench: expected a device that runs the kernels, got none: ")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "expected --tokens, --d-model and --d-ff, or --preset, got not all of them"),
        (["--tokens", "64", "--d-model", "64"], "or --preset, got not all of them"),
        (["--preset", "afm", "--d-ff", "64"], "expected --preset or --d-model and --d-ff, got both"),
        (["--tokens", "64", "--d-model", "24", "--d-ff", "64"], "--d-model to be a positive multiple of 16, got 24"),
        (["--tokens", "64", "--d-model", "32", "--d-ff", "48"], "--d-ff to be a positive multiple of 32, got 48"),
        (["--tokens", "0", "--d-model", "32", "--d-ff", "64"], "expected --tokens to be positive, got 0"),
    ],
)
def test_what_it_cannot_run_is_one_sentence(capsys, arguments, said):
    status, error = run(capsys, *arguments)
    assert status == 2 and said in error and error.count("\n") == 1


def test_a_plot_without_matplotlib_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "sparse24.bench.drawing", raising=False)
    monkeypatch.delattr(sparse24.bench, "drawing", raising=False)
    with pytest.raises(RuntimeError, match="expected matplotlib for --plot, got none"):
        command._drawing()


def test_a_terminal_gets_a_table_of_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    verdict._print("Forward", [("bf16  sparse24", "100.0", "1,000", "12", "")])
    said = capsys.readouterr().out
    assert "bf16  sparse24" in said and "peak MB" in said and "\u2502" in said  # rich draws lines


def test_presets_are_sizes_of_models():
    assert {"nanochat", "nemotron", "afm", "jais2"} <= PRESETS.keys()
    for name in PRESETS:
        plan = command.planned(parsed("--preset", name))
        assert plan.sizes == tuple(preset(name)) and all(size.model for size in plan.sizes)
    assert {size.tokens for size in command.planned(parsed("--preset", "nanochat", "--tokens", "96")).sizes} == {96}
    assert Size(16384, 2560, 18432, "AFM-4.5B") in preset("afm")


def parsed(*arguments):
    return cli._parser().parse_args(["bench", *arguments])


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_the_command_on_a_gpu(cuda, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    sizes = ("--tokens", "1024", "--d-model", "256", "--d-ff", "1024")
    drawn = ("--plot", str(plot)) if importlib.util.find_spec("matplotlib") else ()
    status = cli.main(["bench", *sizes, "--training", "--json", str(out), *drawn])
    said = capsys.readouterr().out
    assert status == 0, said
    records = json.loads(out.read_text())
    assert {r["tokens"] for r in records} == {128, 512, 1024} and all(r["verified"] for r in records), said
    assert all(r["peak_bytes"] > 0 for r in records) and (plot.stat().st_size > 0 if drawn else True)
    assert "Forward and backward in fp8: sparse24 is " in said and "Fewer tokens, fp8: " in said


def made_up(tokens, dtype, variant, role, us, bench="ffn_forward"):
    names = {"bench": bench, "tokens": tokens, "d_model": 4096, "d_ff": 16384, "dtype": dtype, "variant": variant}
    return names | {"role": role, "median_us": us, "verified": True, "zeros": 0.9}


def test_it_says_where_it_loses():
    """By the best dense network of the precision; and what relu2_mlp does there by itself."""
    records = []
    for tokens, gain in ((128, 0.8), (512, 0.97), (2048, 1.1), (8192, 1.2)):
        records += [
            made_up(tokens, "bf16", "torch_compile", "dense", 150.0 * gain),
            made_up(tokens, "bf16", "fused_dense", "dense", 100.0 * gain),
            made_up(tokens, "bf16", "sparse24", "sparse24", 100.0),
        ]
    (said,) = verdict.few_tokens(Size(8192, 4096, 16384), records)
    assert "2:4 is slower than the best dense at 128 (0.80x) and 512 (0.97x) tokens." in said
    first = min(t for t in range(16, 8192, 16) if verdict.pays(t, 16384, 4096, fp8=False))
    assert said.endswith(f" relu2_mlp runs dense by itself below about {first:,} tokens.")
    large, small = ([r for r in records if r["tokens"] == tokens] for tokens in (8192, 128))
    assert verdict.sentences("Forward", large) == [
        "Forward in bf16: sparse24 is 1.20 times as fast as the best dense, fused dense: it pays."
    ]
    (said,) = verdict.sentences("Forward", small)
    assert said.endswith("fused dense: it does not pay. relu2_mlp runs dense here by itself.")
    assert [row[-1] for row in verdict.rows(large)] == ["1.80x", "1.20x", ""]
