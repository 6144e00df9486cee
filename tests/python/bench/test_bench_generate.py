"""The benchmark of generation: every variant is verified, a wrong one is not timed."""

import argparse
import json

import pytest
import torch
from benches import run

import sparse24
from bench.cases import generate, generate_model
from sparse24.bench.options import Options

SMOKE = ("--device", "cpu", "--smoke", "--models", "arcee", "--budget", "1000")
pytest.importorskip("transformers")


@pytest.mark.parametrize("processes", [[], ["--processes"]])
def test_all_variants_are_verified(tmp_path, processes):
    out = tmp_path / "generate.json"
    printed = run("generate", *SMOKE, "--races", "static:1,eager:2", *processes, "--out", out)
    assert "6 records, 0 of them not verified" in printed
    records = json.loads(out.read_text())
    variants = {("dense", "bf16", "dense"), ("sparse24", "bf16", "sparse24"), ("sparse24_fp8", "fp8", "sparse24")}
    assert {(r["variant"], r["dtype"], r["role"]) for r in records} == variants
    assert {(r["bench"], r["race"], r["batch"]) for r in records} == {
        ("generate", "static", 1),
        ("generate", "eager", 2),
    }
    assert all(r["verified"] and r["rel_error"] < (0.15 if r["dtype"] == "fp8" else 0.02) for r in records)
    assert all(0.85 < r["zeros"] < 0.95 for r in records)


def test_a_text_has_as_many_sequences_as_a_race():
    """Fewer would be timed as if they were as many."""
    model = generate.MODELS["arcee"]
    smoke, full = (Options(torch.device("cpu"), smoke, False, None, 0, argparse.Namespace()) for smoke in (True, False))
    assert generate.sized(model, smoke, None, 48).stack.batch == generate.sized(model, full, None, 48).stack.batch == 48
    assert generate.sized(model, full, None, 1) == model
    for races in ("static:0", "eager:8,eager:-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected at least one sequence, got"):
            generate.races_of(races)


def test_a_wrong_network_has_no_time(tmp_path, monkeypatch):
    right = sparse24.relu2_mlp_few
    monkeypatch.setattr("sparse24.mlp.inference.relu2_mlp_few", lambda *a: right(*a) * 1.5)
    out = tmp_path / "generate.json"
    run("generate", *SMOKE, "--races", "static:1", "--out", out, status=1)
    records = {r["variant"]: r for r in json.loads(out.read_text())}
    assert records["dense"]["verified"] and not records["sparse24"]["verified"]
    assert records["sparse24"]["median_us"] is None


def test_times_of_a_round_are_compared():
    """The host was half as fast in the second of three rounds."""
    rounds = [
        {"dense": 100.0, "sparse24": 80.0},
        {"dense": 200.0, "sparse24": 160.0},
        {"dense": 110.0, "sparse24": 88.0},
    ]
    assert generate_model.by_rounds(rounds, "dense") == {"median_us": 110.0}
    assert generate_model.by_rounds(rounds, "sparse24") == {"median_us": 88.0, "speedup_vs_best_dense": 1.25}
    assert generate_model.by_rounds([{"sparse24": 5.0}, {"sparse24": 7.0}, {"sparse24": 6.0}], "sparse24") == {
        "median_us": 6.0
    }
    orders = [generate_model.turns([*"abc"], count) for count in range(4)]
    assert orders == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]


def test_a_variant_that_breaks_has_a_record(tmp_path, monkeypatch):
    def broken(model, name, layers):
        if name == "sparse24_fp8":
            raise RuntimeError("no conversion")

    monkeypatch.setattr("bench.cases.generate_model.convert", broken)
    out = tmp_path / "generate.json"
    run("generate", *SMOKE, "--races", "eager:1", "--out", out, status=1)
    records = {r["variant"]: r for r in json.loads(out.read_text())}
    assert records["dense"]["verified"] and records["sparse24"]["verified"]
    assert records["sparse24_fp8"]["error"] == "RuntimeError: no conversion"


def test_a_model_that_breaks_has_records(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no zeros")

    monkeypatch.setattr("bench.cases.model_stacks.with_zeros", broken)
    out = tmp_path / "generate.json"
    run("generate", *SMOKE, "--races", "eager:1", "--out", out, status=1)
    records = json.loads(out.read_text())
    assert [r["error"] for r in records] == ["RuntimeError: no zeros"] * 3


def test_a_call_that_breaks_breaks_no_other_race(tmp_path, monkeypatch):
    right = generate_model.Variant.token_us

    def broken(self, mode, batch):
        if mode == "static" and self.records[batch]["variant"] == "sparse24":
            raise RuntimeError("no graph")
        return right(self, mode, batch)

    monkeypatch.setattr("bench.cases.generate_model.Variant.token_us", broken)
    out = tmp_path / "generate.json"
    run("generate", *SMOKE, "--races", "static:1,eager:1", "--out", out, status=1)
    found = {(r["race"], r["variant"]): r for r in json.loads(out.read_text())}
    assert len(found) == 6
    assert [key for key, record in found.items() if not record["verified"]] == [("static", "sparse24")]
    assert found["static", "sparse24"]["error"] == "RuntimeError: no graph"
    assert all(record["median_us"] > 0 for key, record in found.items() if key != ("static", "sparse24"))
