"""The benchmark of few tokens: every variant is verified, in the way that it runs; sizes can be chosen; the drawing."""

import argparse
import json

import benches
import pytest
import torch
from made_up_records import record

import sparse24
from bench.cases import ffn_few_tokens
from bench.reporting import few_tables
from bench.tuning import few_tokens as table
from sparse24.bench import results
from sparse24.bench.ffn import few_tokens
from sparse24.bench.reference import Unverified

SMOKE = ("--device", "cpu", "--smoke")
VARIANTS = {
    "bf16": {"eager", "torch_compile", "fused_dense"},
    "fp8": {"scaled_mm_row", "scaled_mm_tensor", "scaled_mm_static", "fused_dense"},
}
OURS = {"sparse24", "sparse24_few", "sparse24_dense_few", "sparse24_dense"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "ffn_few_tokens.json"
    printed = benches.run("ffn_few_tokens", *SMOKE, "--out", out)
    return out, printed, json.loads(out.read_text())


def test_all_variants_are_verified(smoke):
    _, printed, records = smoke
    assert "12 of sparse24, 0 of them not verified" in printed  # 3 sizes and 3 other shares of zeros, 2 precisions
    assert all(r["verified"] and r["bench"] == "ffn_few_tokens" and r["race"] == "forward" for r in records)
    for dtype, rivals in VARIANTS.items():
        for tokens in (1, 5, 70):
            mine = [r for r in records if (r["dtype"], r["tokens"], round(r["zeros"], 1)) == (dtype, tokens, 0.9)]
            few = tokens <= 64
            assert {r["variant"] for r in mine} == rivals | (OURS if few else OURS - {"sparse24_few"})
            assert {r["variant"] for r in mine if r["role"] == "dense"} == rivals
            (ours,) = (r for r in mine if r["role"] == "sparse24")
            assert ours["runs"] == ("few" if few else "2:4") and "speedup_vs_best_dense" in ours
            assert ours["rel_error"] < (1e-2 if few or dtype == "bf16" else 1e-1)  # few are exact in float8 too
            assert all(r["eager_host_us"] > 0 for r in mine)
            assert all(r["stack_us"] > 0 and r["layers"] == 2 for r in mine) and "speedup_in_stack" in ours
            assert ours["before_host_us"] > 0 and ours["converted_host_us"] > 0
            assert all(r["bias"] for r in mine) if tokens == 5 else not any("bias" in r for r in mine)


def test_the_table_is_made_of_its_records(smoke):
    slow = [r | {"median_us": 2.0 if r["variant"] in (table.FEW, table.DENSE_FEW) else 1.0} for r in smoke[2]]
    rows = table.rows_of(slow, "smoke")
    assert {(row["bits"], row["d_model"], row["d_ff"]) for row in rows} >= {(16, 64, 160), (8, 64, 160)}
    assert all(row["tokens"] == row["dense"] == 0 for row in rows)


def test_recorded_patterns(tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "pattern_layer7.npy", numpy.random.default_rng(0).integers(0, 2, (64, 8), dtype="uint8"))
    out = tmp_path / "records.json"
    benches.run("ffn_few_tokens", *SMOKE, "--patterns", tmp_path, "--zeros", "0.9", "--out", out)
    patterns = {r["pattern"] for r in json.loads(out.read_text())}
    assert patterns == {"iid", "pattern_layer7"}


@pytest.mark.parametrize("wrong", ["relu2_mlp_few", "linear_relu2"])
def test_a_wrong_variant_has_no_time(tmp_path, monkeypatch, wrong):
    right = getattr(sparse24, wrong)

    def changed(*args, **options):
        out = right(*args, **options)
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 1.05

    if wrong == "relu2_mlp_few":
        monkeypatch.setattr("sparse24.mlp.inference.relu2_mlp_few", changed)
    else:
        monkeypatch.setattr(sparse24, wrong, lambda *a, **o: (torch.zeros_like(right(*a, **o)[0]),))
    out = tmp_path / "records.json"
    status = 1 if wrong == "relu2_mlp_few" else 0
    benches.run("ffn_few_tokens", *SMOKE, "--zeros", "0.9", "--out", out, status=status)
    failed = {r["variant"] for r in json.loads(out.read_text()) if not r["verified"]}
    assert failed == ({"sparse24"} if wrong == "relu2_mlp_few" else {"fused_dense"})


def test_a_stack_with_a_wrong_layer_has_no_time(monkeypatch):
    """The last layer has other weights than it is verified with."""
    right = few_tokens.stacked

    def wrong(*arguments):
        *layers, last = right(*arguments)
        getattr(last, "w2" if hasattr(last, "w2") else "q2").zero_()
        return [*layers, last]

    monkeypatch.setattr(few_tokens, "stacked", wrong)
    options = argparse.Namespace(device=torch.device("cpu"), seed=0, smoke=True)
    cases = few_tokens.problem(ffn_few_tokens.SMOKE[0], ffn_few_tokens.Sparsity(), options).cases
    (eager,) = (case for case in cases if case.variant == "eager")
    with pytest.raises(Unverified, match="expected a relative error"):
        eager.verify()
    (by_row,) = (case for case in cases if case.variant == "scaled_mm_row")
    with pytest.raises(Unverified, match="expected a relative error"):
        by_row.verify()


def labels(*arguments, patterns=None, quick=False):
    parser = argparse.ArgumentParser()
    ffn_few_tokens.arguments(parser)
    options = argparse.Namespace(smoke=False, quick=quick, patterns=patterns, extra=parser.parse_args(arguments))
    return [(size.tokens, size.d_model, size.d_ff, s.name, s.zeros) for _, size, s in ffn_few_tokens.labelled(options)]


def test_sizes_and_tokens_can_be_chosen():
    found = labels()
    assert len(found) == len(set(found))
    assert sorted(ffn_few_tokens.TOKENS) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [size[:3] for size in found[:6]] == [*((16, *pair) for pair in ffn_few_tokens.DECODE), (32, 4096, 16384)]
    first = {(t, *pair, "iid", 0.9) for pair in ffn_few_tokens.DECODE for t in ffn_few_tokens.TOKENS}
    assert set(found[: len(first)]) == first
    users = {size[1:3] for size in found if size[4] == 0.9}
    assert len(users) == len({size[1:3] for size in few_tokens_users()}) >= 25
    others = [size for size in found if size[4] != 0.9]
    assert {size[1:3] for size in others} == set(ffn_few_tokens.DECODE) and {size[4] for size in others} == {
        0.5,
        0.8,
        0.95,
    }
    chosen = labels("--sizes", "4096x16384,100x200", "--tokens", "3,7", "--zeros", "0.9,0.5")
    sizes = [(t, *pair) for t in (3, 7) for pair in ((4096, 16384), (100, 200))]
    assert [size[:3] for size in chosen] == sizes * 2
    assert {size[0] for size in labels(quick=True)} == {1, 8, 64}


def few_tokens_users():
    from sparse24.bench import sizes

    return sizes.USERS


def test_jobs_are_what_is_compiled(monkeypatch):
    """Compiled before: the same functions with operands of the same shapes."""
    called = []

    def compiled(function, options, dynamic=False):
        def run(*operands):
            called.append((function, tuple(None if t is None else (tuple(t.shape), t.dtype) for t in operands)))
            return function(*operands)

        return run

    monkeypatch.setattr(few_tokens, "compiled", compiled)
    options = argparse.Namespace(device=torch.device("cpu"), seed=0, smoke=True)
    for size in ffn_few_tokens.SMOKE[:2]:
        called.clear()
        few_tokens.problem(size, ffn_few_tokens.Sparsity(), options)
        jobs = few_tokens.compilations(*size[:3], size.bias)
        expected = {(job.function, tuple(o and (o.shape, o.dtype) for o in job.operands)) for job in jobs}
        assert set(called) == expected


def test_the_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    records = []
    for tokens in (1, 8, 64):
        for dtype, rival in (("bf16", "eager"), ("fp8", "scaled_mm_static")):
            for pattern, zeros in (("iid", 0.9), ("iid", 0.5), ("pattern_layer5", 0.97)):
                facts = {"bench": "ffn_few_tokens", "pattern": pattern, "zeros": zeros}
                for variant, role, us in ((rival, "dense", 100.0), ("sparse24", "sparse24", 60.0 + tokens)):
                    stack = {"stack_us": us - 5} if tokens == 8 else {}
                    records.append(record(tokens, (4096, 16384), dtype, variant, role, us) | facts | stack)
    results.write_json(tmp_path / "ffn_few_tokens.json", records)
    assert "nothing to draw for ffn_forward" in benches.run("plot", tmp_path)
    drawn = (tmp_path / "ffn_few_tokens.svg").read_text()
    for text in (
        "bf16 weights, 90 % independent zeros",
        "float8 weights, 4096 x 16384",
        "as layer 6 of a GPT",
        "dense is faster",
        "in a stack of layers",
    ):
        assert text in drawn


def test_the_table_has_single_calls_and_those_in_a_stack():
    records = []
    for tokens, us, stack_us in ((1, 50.0, 40.0), (16, 110.0, None), (64, 80.0, 101.0)):
        for variant, role, dense_us in (("eager", "dense", 100.0), ("torch_compile", "dense", 99.0)):
            dense = record(tokens, (1664, 6656), "bf16", variant, role, dense_us, model="m")
            records.append(dense | {"stack_us": dense_us + 1})
        records.append(record(tokens, (1664, 6656), "bf16", "sparse24", "sparse24", us, model="m"))
        records[-1] |= {"stack_us": stack_us} if stack_us else {}
    records.append(record(1, (4096, 16384), "bf16", "sparse24", "sparse24", 10.0))  # with nothing to compare
    text = few_tables.markdown([r | {"bench": "ffn_few_tokens"} for r in records])
    assert "bf16 weights" in text and "float8 weights" not in text
    rows = [line for line in text.splitlines() if line.startswith("| 1664")]
    assert rows == ["| 1664, 6656 | m | 1.98 / 2.50 | **0.90** | 1.24 / **0.99** |"]
    assert few_tables.markdown([]) == ""
