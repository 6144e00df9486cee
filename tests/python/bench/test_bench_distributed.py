"""The benchmark of steps on several GPUs, in one process and in two, with gloo at tiny sizes; and what it reports."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from benches import run

from bench.distributed import exchange, model, parallel, profile
from bench.distributed.model import SIZES, SMOKE, VARIANTS
from bench.distributed.parallel import WAYS
from bench.reporting import distributed_tables, tables
from sparse24.bench import results

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
TINY = ("--smoke", "--device", "cpu", "--rounds", "1")


def records_of(tmp_path, *options, status=0):
    out = tmp_path / "distributed.json"
    run("distributed", *TINY, "--out", out, *options, status=status)
    return json.loads(out.read_text())


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_way_is_verified_against_one_gpu(tmp_path, gpus):
    variants = list(VARIANTS) if gpus == 1 else ["sparse24", "sparse24_fp8"]  # where a step takes longest
    records = records_of(tmp_path, "--gpus", gpus, "--variants", ",".join(variants))
    cases = {(r["model"], r["race"], r["variant"]): r for r in records}
    ways = {"smoke": (["fsdp2", "tensor", "ddp"], variants), "smoke, experts": (["expert"], [])}
    ways["smoke, experts"][1].extend(v for v in variants if VARIANTS[v].dtype == "bf16")
    expected = {(m, way, v) for m, (some, vs) in ways.items() for way in ("alone", *some) for v in vs}
    float8 = [v for v in variants if VARIANTS[v].dtype == "fp8"]
    expected |= {("smoke", way, v) for way in ("fsdp2_float8", "fsdp2_float8_once") for v in float8}
    engines = {"fsdp2_engines", "fsdp2_float8_engines"}
    assert set(cases) == expected and {way for _, way, _ in cases} == {"alone", *WAYS} - engines
    for (_, way, variant), r in cases.items():
        assert r["verified"], r
        assert (r["dtype"], r["role"]) == VARIANTS[variant][:2] and 0.85 < r["zeros"] < 0.95
        assert r["gpus"] == (1 if way == "alone" else gpus) and r["tokens"] == 64 * r["gpus"]
        if way != "alone":
            # Tokens of several ranks are pruned in other groups, and summed in another order.
            mixes = WAYS[way].mixes and gpus > 1
            assert r["rel_error"] < (1e-6 if not mixes else 0.2 if r["dtype"] == "fp8" else 0.05)
            assert r["ffn_gradient_error"] < (0.35 if mixes else 0.02)
            assert r["scaling"] == pytest.approx(r["one_gpu_us"] / r["median_us"], rel=1e-2)
            assert ("gain_kept" in r) == (r["role"] == "sparse24" and gpus == 1)
    text = tables.markdown(records)
    assert "**Training steps on several GPUs**" in text and "FSDP2" in text and "not verified" not in text


def test_a_wrong_sum_over_ranks_has_no_time(tmp_path, monkeypatch):
    """In one process, where a sum is what it was."""
    monkeypatch.setattr(exchange, "scattered", lambda x: 1.5 * x)
    ways = ("--gpus", 1, "--ways", "tensor,ddp", "--variants", "fused_dense,sparse24")
    records = {(r["race"], r["variant"]): r for r in records_of(tmp_path, *ways, status=1)}
    for variant in ("fused_dense", "sparse24"):
        wrong = records["tensor", variant]
        assert "expected a relative error" in wrong["error"] and wrong["median_us"] is None
        assert records["ddp", variant]["verified"] and records["alone", variant]["median_us"]
    assert not dist.is_initialized()


def test_parts_make_the_whole():
    """Tensor parallelism shares out every weight, in a dimension that products of parts sum over or stand beside."""
    size = SMOKE["smoke"]
    weights, _ = model.weights_with_zeros(size, torch.device("cpu"), 0)
    built = model.build(size, VARIANTS["sparse24"], ranks=2)
    shapes = {name: p.shape for name, p in built.named_parameters()}
    for name, weight in weights.items():
        parts = [model.part_of(name, weight, rank, 2) for rank in range(2)]
        assert all(part.shape == shapes[name] for part in parts)
        assert sum(part.numel() for part in parts) == weight.numel()
    fits = {name: [n for n in (1, 2, 4, 8) if parallel.TensorParallel.fits(s, n)] for name, s in SIZES.items()}
    assert fits == {"nemotron": [1, 2, 4, 8], "nanochat26": [1], "afm": [1, 2, 4], "nanochat32": [1, 2, 4, 8]} | {
        "nemotron3": []
    }


def test_ranks_of_torchrun(tmp_path, monkeypatch):
    """The environment says which rank this is."""
    out = tmp_path / "distributed.json"
    where = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in where.items():
        monkeypatch.setitem(os.environ, name, value)
    run("distributed", *TINY, "--out", out, "--ways", "fsdp2", "--variants", "sparse24")
    assert {r["race"] for r in json.loads(out.read_text())} == {"alone", "fsdp2"}


def test_it_says_what_it_does_not_know():
    ways = "fsdp2, fsdp2_engines, fsdp2_float8, fsdp2_float8_once, fsdp2_float8_engines, tensor, ddp, expert"
    assert f"expected some of {ways}, got pipeline" in run("distributed", "--ways", "pipeline", status=2)


def test_shares_of_a_step():
    events = [("gemm", 0, 10), ("ncclDevKernel_AllGather", 5, 14), ("ncclDevKernel_ReduceScatter", 12, 20)]
    events += [("copy", 18, 22), ("gemm", 26, 30)]
    assert profile.split(events) == {"kernels_us": 18, "nccl_us": 17, "nccl_alone_us": 8, "idle_us": 4}
    assert set(profile.split([]).values()) == {0}


def made_up(way, gpus, variant, us, **more):
    variants = VARIANTS[variant]
    fields = {"bench": "distributed", "problem": "p", "race": way, "gpus": gpus, "variant": variant, "model": "M"}
    fields |= {"role": variants.role, "dtype": variants.dtype, "layers": 3, "tokens": 1000 * gpus, "d_model": 64}
    fields |= {"d_ff": 256, "zeros": 0.9, "pattern": "iid", "verified": us is not None, "median_us": us}
    fields |= {"tokens_per_s": 1e9 * gpus / us} if us else {"error": "wrong"}
    facts = {"gpu": "Made up", "torch": "2", "cuda": "13", "driver": "1", "sparse24": "0", "commit": "c"}
    return fields | facts | {"date": "2026-01-01"} | more


RECORDS = [
    made_up("alone", 1, "fused_dense", 100.0, peak_gb=9.0),
    made_up("alone", 1, "sparse24", 80.0, peak_gb=7.0, speedup_vs_best_dense=1.25),
    made_up("fsdp2", 4, "fused_dense", 102.0, scaling=0.98, nccl_us=51.0, peak_gb=5.0),
    made_up("fsdp2", 4, "sparse24", 100.0, scaling=0.8, nccl_us=20.0, peak_gb=4.0, speedup_vs_best_dense=1.02),
    made_up("fsdp2", 4, "sparse24_fp8", None),
]
COLLECTIVE = {"race": "collective", "variant": "all_gather_weights", "role": "part", "bytes": 3e8, "gb_per_s": 300.0}


def test_tables():
    collective = made_up("collective", 4, "sparse24", 1000.0) | COLLECTIVE
    speed, memory, alone = distributed_tables.all_tables([*RECORDS, collective]).split("\n\n**")
    assert speed.splitlines()[4:] == [
        "| M, 3 layers | one GPU | 1,000 | 10,000,000 | 12,500,000, 1.25 |  |",
        "| M, 3 layers | FSDP2, 4 | 4,000 | 39,215,686 (98.0 %) | 40,000,000 (80.0 %), 1.02 | not verified |",
    ]
    assert memory.splitlines()[4:] == [
        "| M, 3 layers | one GPU | 1,000 | 9.0 | 7.0 |  |",
        "| M, 3 layers | FSDP2, 4 | 4,000 | 5.0, 50 % | 4.0, 20 % |  |",
    ]
    assert alone.splitlines()[-1] == "| M, 4 | all gather weights, bf16 | 300 | 1,000 | 300 |"


def test_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    results.write_json(tmp_path / "distributed.json", RECORDS)
    assert "distributed.svg" in run("plot", tmp_path)
    drawn = (tmp_path / "distributed.svg").read_text()
    assert "2:4 over dense, of the same precision" in drawn and "FSDP2, 4 GPUs" in drawn
