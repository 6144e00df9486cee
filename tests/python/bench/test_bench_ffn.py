"""The benchmark of the FFN forward: every variant is verified, a wrong one is not timed, and a call can go on."""

import json

import benches
import pytest
import torch

import sparse24
from sparse24.bench import compile_cache, sizes
from sparse24.bench.ffn import checks
from sparse24.bench.reference import Unverified, prune24

SMOKE = ("--device", "cpu", "--smoke")
VARIANTS = {
    ("bf16", "forward"): "torch_compile eager fused_dense cusparselt sparse24 sparse24_fused sparse24_composed "
    "sparse24_fallback",
    ("fp8", "forward"): "scaled_mm_row scaled_mm_tensor fused_dense cusparselt sparse24 sparse24_composed "
    "sparse24_fused sparse24_fused_static sparse24_fused_predicted sparse24_fallback sparse24_fallback_static",
    ("bf16", "gemm1"): "dense linear_relu2 linear_compress",
    ("fp8", "gemm1"): "dense linear_relu2 linear_compress",
    ("bf16", "gemm2"): "dense sparse",
    ("fp8", "gemm2"): "dense dense_tensor sparse",
}


def run(*arguments, status=0):
    return benches.run("ffn_forward", *SMOKE, *arguments, status=status)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "ffn_forward.json"
    printed = run("--out", out)
    return out, printed, json.loads(out.read_text())


def test_all_variants_are_verified_at_every_share_of_zeros(smoke):
    _, printed, records = smoke
    assert ", 12 of sparse24, 0 of them not verified" in printed  # 2 sizes, 3 shares, 2 precisions
    for (dtype, race), names in VARIANTS.items():
        mine = [r for r in records if (r["dtype"], r["race"]) == (dtype, race)]
        assert {r["variant"] for r in mine} == set(names.split())
        assert {r["bench"] for r in mine} == {"gemm1" if race == "gemm1" else "ffn_forward"}
        assert all(("sustained_us" in r) == (race != "gemm2" and r["verified"]) for r in mine)
    # torch has cuSPARSELt on CUDA only.
    assert {r["variant"] for r in records if not r["verified"]} <= {"cusparselt"}
    ours = {(r["d_ff"], r["dtype"], round(20 * r["zeros"]) / 20): r for r in records if r["role"] == "sparse24"}
    assert len(ours) == 12 and all("speedup_vs_best_dense" in r for r in ours.values())
    assert all(("bias" in r) == (d_ff == 96) for (d_ff, _, _), r in ours.items())
    for d_ff in (96, 128):
        for dtype in ("bf16", "fp8"):
            errors = [ours[d_ff, dtype, zeros]["pruning_error"] for zeros in (0.5, 0.9, 0.95)]
            assert errors == sorted(errors, reverse=True) and errors[-1] > 0  # more zeros, less to drop


def test_goes_on_where_an_earlier_call_ended(smoke, tmp_path):
    out, _, records = smoke
    missing, failed = (sorted({r["problem"] for r in records})[i] for i in (0, 1))
    kept = [dict(r) for r in records if r["problem"] != missing]
    for record in kept:
        record["verified"] &= record["problem"] != failed or record["role"] != "sparse24"
        record["median_us"] = -1.0  # to be told from new ones
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(kept))
    printed = run("--resume", earlier, "--out", tmp_path / "all.json")
    assert "records of 4 problems are from before" in printed
    again = json.loads((tmp_path / "all.json").read_text())
    assert {r["problem"] for r in again if r["median_us"] != -1.0} == {missing, failed}
    names = ("problem", "dtype", "race", "variant")
    assert sorted([r[k] for k in names] for r in again) == sorted([r[k] for k in names] for r in records)

    earlier.write_text(json.dumps([record | {"commit": "another"} for record in kept]))
    assert "expected records of commit" in run("--resume", earlier, status=1)
    run("--resume", tmp_path / "missing.json", "--out", out, status=2)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_wrong_ffn_has_no_time(tmp_path, monkeypatch, dtype):
    """The output is 12 % too large; fp8 itself errs by some percent."""
    right = sparse24.relu2_mlp

    def wrong(x, *rest, precision, **options):
        out = right(x, *rest, precision=precision, **options)
        return out * 1.12 if (precision == "fp8") == (dtype == "fp8") else out

    monkeypatch.setattr(sparse24, "relu2_mlp", wrong)
    out = tmp_path / "records.json"
    run("--zeros", "0.9", "--out", out, status=1)
    records = json.loads(out.read_text())
    for record in records:
        wrong = record["dtype"] == dtype and record["variant"].startswith("sparse24")
        if wrong and record["variant"] != "sparse24_fused_predicted":  # put together from the ops
            assert not record["verified"] and record["median_us"] is None and "relative error" in record["error"]
        elif record["variant"] != "cusparselt":
            assert record["verified"] and record["median_us"] > 0


def test_sizes_come_in_the_order_of_their_weight():
    order = sizes.with_zeros(sizes.chosen(sizes.SETS), [0.5, 0.9, 0.95])
    assert [size for _, size, _ in order[:4]] == list(sizes.LARGE)
    assert [zeros for _, _, zeros in order] == [0.9] * (len(order) - 8) + [0.5] * 4 + [0.95] * 4
    problems = [(*size[:3], zeros) for _, size, zeros in order]
    assert len(set(problems)) == len(problems)
    usual = {size[:3] for _, size, zeros in order if zeros == 0.9}
    assert usual == {size[:3] for some in sizes.SETS.values() for size in some}
    # Where d_ff is not a multiple of 32, relu2_mlp would run dense in fp8.
    assert all(d_model % 16 == 0 and d_ff % 32 == 0 for _, d_model, d_ff in usual)
    assert [zeros for *_, zeros in sizes.with_zeros([("large", sizes.LARGE[0])], [0.5])] == [0.5]


def test_sampled_rows_are_one_of_each_stretch():
    place = {"device": torch.device("cpu"), "seed": 0}
    assert torch.equal(checks.sampled_rows(5, **place, count=7), torch.arange(5))
    rows = checks.sampled_rows(1000, **place, count=30)
    edges = [1000 * i // 30 for i in range(31)]
    assert all(low <= row < high for low, row, high in zip(edges, rows.tolist(), edges[1:], strict=False))
    assert not torch.equal(rows, checks.sampled_rows(1000, device=torch.device("cpu"), seed=1, count=30))


def test_rows_beside_the_sample_must_be_written():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.tensor([3, 40])
    assert checks.expect_rows(x, rows, x[rows].double(), 1e-6) == 0
    x[5, 2] = float("nan")
    with pytest.raises(Unverified, match="in 1 of 64 rows"):
        checks.expect_rows(x, rows, x[rows].double(), 1e-6)
    with pytest.raises(Unverified, match="relative error"):
        checks.expect_rows(x.nan_to_num(), rows, x[rows].double() * 1.1, 0.05)


@pytest.mark.parametrize("fp8", [False, True])
def test_kept_entries_must_be_the_largest(fp8):
    """The two smallest of each four, with their right values, are refused."""
    y = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    smallest = y - prune24(y, -1)
    rows = torch.arange(0, 40, 3)
    compress = (lambda x: sparse24.compress_fp8(x, torch.ones(1), scaling="tensor")[:2]) if fp8 else sparse24.compress
    limit = checks.BOUNDS["fp8" if fp8 else "bf16"]
    right = compress(y.bfloat16())
    assert 0 < checks.check_kept(*right, y.shape, rows, y[rows].double(), limit)["rel_error"] < limit
    with pytest.raises(Unverified, match="energy of the two largest"):
        checks.check_kept(*compress(smallest.bfloat16()), y.shape, rows, y[rows].double(), limit)
    with pytest.raises(Unverified, match="relative error"):
        checks.check_kept(*right, y.shape, rows, 1.2 * y[rows].double(), limit)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_graphs_are_found_again(tmp_path, monkeypatch):
    """With empty caches of its own the second compilation compiles nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")  # no trial of every instruction set in each empty cache
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_inductor_cache

    file = tmp_path / "folder" / "graphs"
    counted = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with fresh_inductor_cache():
            compile_cache.load(file)
            torch.compile(lambda x: x @ x)(torch.ones(8, 8))  # a call of cuBLAS or MKL: no C++ is compiled
            compile_cache.save(file)
        counted.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
    assert counted == [(1, 0), (0, 1)]
