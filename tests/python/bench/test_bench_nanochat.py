"""The benchmark of nanochat's steps, on a package laid out as it is; on a checkout if SPARSE24_NANOCHAT names one."""

import json
import os
from pathlib import Path

import pytest
import torch
from benches import run

from bench.cases import nanochat_model, nanochat_step
from bench.cases.model_stacks import shared_copy

LIKE_IT = Path(__file__).parents[1] / "nanochat_like"
VARIANTS = {
    "bf16": ("dense", "bf16"),
    "sparse24_bf16": ("sparse24", "bf16"),
    "fp8": ("dense", "fp8"),
    "sparse24_fp8": ("sparse24", "fp8"),
    "sparse24_fp8_16bit_dw": ("sparse24", "fp8"),
}


@pytest.fixture(autouse=True)
def like_it(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    monkeypatch.setattr(nanochat_step, "GIVEN", None)


def steps(tmp_path, checkout, *options, status=0):
    out = tmp_path / "nanochat_step.json"
    smoke = ("--smoke", "--device", "cpu", "--nanochat", checkout)
    return run("nanochat_step", *smoke, "--out", out, *options, status=status), json.loads(out.read_text()), out


def check(printed, records):
    assert "5 records, 3 of sparse24, 0 of them not verified" in printed
    assert {r["variant"]: (r["role"], r["dtype"]) for r in records} == VARIANTS
    for r in records:
        assert (r["bench"], r["race"], r["layers"], r["d_model"], r["d_ff"]) == ("nanochat_step", "step", 2, 128, 512)
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["median_us"] * 1e6, rel=1e-2)
        assert r["zeros"] == pytest.approx(0.9, abs=0.01)
    by_name = {r["variant"]: r for r in records}
    assert by_name["bf16"]["ffn_gradient_error"] == 0
    assert all(by_name[name]["ffn_gradient_error"] > 1e-3 for name in VARIANTS if name != "bf16")
    assert by_name["sparse24_bf16"]["best_dense"] == "bf16" and by_name["sparse24_fp8"]["best_dense"] == "fp8"
    assert by_name["sparse24_fp8"]["loss"] != by_name["sparse24_fp8_16bit_dw"]["loss"]


def test_all_variants_take_verified_steps(tmp_path):
    printed, records, out = steps(tmp_path, LIKE_IT)
    check(printed, records)
    table = run("report", out).partition("**Whole training steps of nanochat's own GPT**")[2].split("\n\n")[1]
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert head == ["T, D, layers", "bf16", "converted", "fp8", "converted, fp8", "converted, fp8 but weight gradients"]
    ours, dense = (next(r for r in records if r["variant"] == name) for name in ("sparse24_fp8_16bit_dw", "fp8"))
    assert row[0] == "64, 128, 2" and row[3] == f"{dense['tokens_per_s']:,.0f}"
    assert row[5].replace("*", "") == f"{ours['tokens_per_s']:,.0f}, {dense['median_us'] / ours['median_us']:.2f}"
    assert "its optimizer says something" not in printed


@pytest.mark.skipif(not nanochat_step.GIVEN, reason="SPARSE24_NANOCHAT names no checkout")
def test_steps_of_a_checkout(tmp_path):
    check(*steps(tmp_path, os.environ["SPARSE24_NANOCHAT"])[:2])


def test_a_wrong_gradient_has_no_time(tmp_path, monkeypatch):
    """Of the first weights, by half of it."""
    from sparse24.convert import run as converted

    relu2_mlp = converted.relu2_mlp

    def wrong(x, w1, *rest, **options):
        w1 = w1.view_as(w1)
        if w1.requires_grad:
            w1.register_hook(lambda gradient: gradient * 1.5)
        return relu2_mlp(x, w1, *rest, **options)

    monkeypatch.setattr(converted, "relu2_mlp", wrong)
    _, records, _ = steps(tmp_path, LIKE_IT, "--variants", "bf16,sparse24_bf16", status=1)
    dense, ours = records
    assert dense["verified"] and dense["median_us"]
    assert "ffn_gradient_error: expected a relative error" in ours["error"] and ours["median_us"] is None


def test_a_network_that_is_not_converted_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        nanochat_step.sparse24, "convert", lambda *args, **options: nanochat_step.sparse24.ConvertReport()
    )
    _, records, _ = steps(tmp_path, LIKE_IT, "--variants", "sparse24_bf16", status=1)
    assert "expected 2 networks to be converted: sparse24: converted 0 of 0" in records[0]["error"]


def test_steps_change_no_weight_and_the_peak_counts_the_optimizer():
    class Options:
        smoke, device = True, torch.device("cpu")

    nanochat = nanochat_model.load(LIKE_IT)
    model = nanochat_model.build(nanochat, nanochat_step.SMOKE, Options.device, 0)
    x, y = torch.randint(256, (2, 2, 32))
    assert nanochat_model.give_zeros(model, x, 0.8, 0) == pytest.approx(0.8, abs=0.01)
    step = nanochat_step.Step(model, x, y, Options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = sum(p.numel() * p.element_size() for p in before.values())
    assert step.state_bytes() == weights
    copy = shared_copy(model)
    nanochat_model.use_fp8(nanochat, copy, but=".mlp.")
    kinds = {name: type(module).__name__ for name, module in copy.named_modules()}
    assert kinds["lm_head"] == kinds["transformer.h.0.attn.c_qkv"] == "Float8Linear"
    assert kinds["transformer.h.1.mlp.c_fc"] == "Linear"
    first, second = step.run(copy), step.run(copy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert step.state_bytes() > 2.9 * weights


def test_it_says_what_it_needs(tmp_path):
    assert "the following arguments are required: --nanochat" in run("nanochat_step", "--smoke", status=2)
    missing = run("nanochat_step", "--smoke", "--nanochat", tmp_path, status=2)
    assert f"expected a checkout of nanochat, got {tmp_path}, which has no nanochat/gpt.py" in missing
    wrong = run("nanochat_step", "--smoke", "--nanochat", LIKE_IT, "--variants", "bf16,fp9", status=2)
    assert "expected some of bf16, sparse24_bf16, fp8" in wrong and "got fp9" in wrong
