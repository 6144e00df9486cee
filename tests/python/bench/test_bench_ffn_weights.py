"""The benchmark of 2:4 weights: every variant is verified, and what is packed is."""

import argparse
import json

import benches
import pytest
import torch

from bench.reporting import weight_speed
from sparse24.bench import results
from sparse24.bench.ffn import forward, weights
from sparse24.bench.options import Options
from sparse24.bench.sizes import Size
from sparse24.mlp.weights import kept24

VARIANTS = {
    ("bf16", "forward"): "torch_compile fused_dense sparse24 sparse24_up",
    ("fp8", "forward"): "scaled_mm_row scaled_mm_tensor fused_dense sparse24 sparse24_up sparse24_up_row",
    ("bf16", "gemm1"): "linear_compress linear_compress_packed",
    ("fp8", "gemm1"): "linear_compress linear_compress_packed",
    ("bf16", "training"): "torch_compile fused_dense sparse24 sparse24_up sparse24_both sparse24_adapters",
    ("fp8", "training"): "scaled_mm_tensor fused_dense_fp8 sparse24_fp8 sparse24_up sparse24_both sparse24_adapters",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "ffn_weights.json"
    printed = benches.run("ffn_weights", "--device", "cpu", "--smoke", "--rounds", "1", "--out", out)
    return printed, json.loads(out.read_text())


def test_all_variants_are_verified(smoke):
    printed, records = smoke
    assert "0 of them not verified" in printed
    assert all(r["verified"] for r in records)
    assert all(r["bench"] == "ffn_weights" for r in records)  # also the first GEMM, which has no table with dense ones
    for (dtype, race), names in VARIANTS.items():
        mine = {r["variant"] for r in records if (r["dtype"], r["race"]) == (dtype, race)}
        assert mine == set(names.split()), (dtype, race)
    assert all(r["zeros"] == pytest.approx(0.9, abs=0.03) for r in records)


def test_table_and_drawing(smoke, tmp_path):
    records = [r | {"median_us": 100.0 + len(r["variant"]), "sustained_us": 100.0} for r in smoke[1]]
    text = weight_speed.speed_table(records)
    rows = [line for line in text.splitlines() if line.startswith("| 128, 64, 256")]
    assert len(rows) == 9 and "| training | bf16 | w1 and w2 | 113 | 111, **0.98** (1.00) | 113, 1.00 (1.00) |" in text
    assert weight_speed.all_tables([]) == ""
    text = weight_speed.all_tables(records)
    assert "| 128 x 256 x 64 | bf16 | 115 | 122, **0.94** (1.00) |" in text and "| 128 x 256 x 64 | fp8 | 115 |" in text
    assert weight_speed.gains(records, "training", "bf16", "sparse24_both", "torch_compile", "median_us") == [1.0]
    pytest.importorskip("matplotlib")
    results.write_json(tmp_path / "ffn_weights.json", records)
    benches.run("plot", tmp_path)
    drawn = (tmp_path / "ffn_weights.svg").read_text()
    for label in ("sparse24, 2:4 activations alone", "sparse24, w1 2:4", "sparse24, w1 and w2 2:4"):
        assert label in drawn
    assert "sparse24 " + records[0]["sparse24"] in drawn
    compact = [{name: value for name, value in r.items() if name != "sparse24"} for r in records]
    results.write_json(tmp_path / "ffn_weights.json", compact)
    benches.run("plot", tmp_path)
    assert "sparse24 0" not in (tmp_path / "ffn_weights.svg").read_text()


def test_the_weights_are_pruned_and_a_wrong_result_is_seen():
    options = Options(torch.device("cpu"), True, False, None, 0, argparse.Namespace())
    size = Size(96, 64, 128)
    x, w1, w2 = weights.operands(size, 0.9, options.device, options.seed)
    assert torch.equal(w1 != 0, kept24(w1) & (w1 != 0)) and torch.equal(w2 != 0, kept24(w2, 0) & (w2 != 0))
    cases = weights.bf16(forward.Operands(x, w1, w2, None, None, torch.arange(96)), options)
    packed = next(case for case in cases if case.variant == "sparse24_up")
    out = packed.run(0)
    packed.check(out)
    for wrong in (out.roll(1, 0), 1.1 * out, torch.full_like(out, torch.nan)):
        with pytest.raises(Exception, match="expected"):
            packed.check(wrong)
