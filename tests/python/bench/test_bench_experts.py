"""The benchmark of experts: every variant is verified, routing is skewed as it says; its tables, its drawing."""

import argparse
import json

import benches
import pytest
import torch
from made_up_records import record

from bench.cases import experts as command
from bench.reporting import expected, experts_tables, regret
from sparse24.bench.ffn import experts
from sparse24.bench.inputs import Sparsity
from sparse24.bench.options import Options

RIVALS = {"grouped_mm", "fused_dense"}
OURS = {"sparse24", "sparse24_compiled"}


def options(**extra):
    return Options(torch.device("cpu"), True, False, None, 0, argparse.Namespace(**extra))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "experts.json"
    printed = benches.run("experts", "--device", "cpu", "--smoke", "--rounds", "1", "--out", out)
    return printed, json.loads(out.read_text())


def test_all_variants_are_verified(smoke):
    printed, records = smoke
    assert "0 of them not verified" in printed
    assert all(r["verified"] and r["bench"] == "experts" for r in records)
    for race, dtype, names in (
        ("forward", "bf16", RIVALS | OURS),
        ("forward", "fp8", RIVALS | OURS),
        ("training", "bf16", RIVALS | OURS),
        ("training", "fp8", {"fused_dense", "sparse24", "sparse24_kept"}),
    ):
        mine = [r for r in records if (r["race"], r["dtype"]) == (race, dtype)]
        assert {r["variant"] for r in mine} == names
        assert {r["variant"] for r in mine if r["role"] == "dense"} == names & RIVALS
        assert {(r["experts"], r["top_k"], r["routing"]) for r in mine} == {(4, 2, "balanced"), (5, 2, "zipf")}
    ours = [r for r in records if r["variant"] == "sparse24"]
    assert all(0 < r.get("rel_error", r.get("dw1_rel_error")) < 0.3 for r in ours)


@pytest.mark.parametrize("routing", command.ROUTING)
def test_routing(routing):
    m = experts.Mixture(experts.Size(2000, 40, 4, 16, 32, routing=routing), Sparsity(0.9), options())
    counts = torch.tensor([0, *m.ends]).diff()
    assert counts.sum() == 8000 == len(m.x) and (counts <= 2000).all()  # no expert twice
    if routing == "balanced":
        assert counts.max() < 1.4 * counts.min()
    elif routing == "zipf":
        assert counts.max() > 8 * counts.median()
    else:
        assert (counts == 0).sum() == 2 and counts.max() > 2 * counts.median()


def test_what_is_wrong_is_seen():
    m = experts.Mixture(experts.Size(24, 4, 2, 64, 96), Sparsity(0.9), options())
    cases = {(c.variant, c.dtype): c for c in experts.forward(m, options())}
    right = cases["sparse24", "bf16"]
    out = right.run(0)
    right.check(out)
    for wrong in (out.roll(1, 0), 1.1 * out, torch.full_like(out, torch.nan)):
        with pytest.raises(Exception, match="expected"):
            right.check(wrong)
    first = next(experts.training(m, options()))
    found = first.run(0)
    first.check(found)
    for i in range(4):
        with pytest.raises(Exception, match="expected"):
            first.check(tuple(1.2 * t if i == j else t for j, t in enumerate(found)))


def test_sizes_are_those_of_the_models():
    asked = {"models": ["nano", "ultra"], "tokens": [8192, 8], "routing": ["balanced", "zipf"]}
    chosen = options(**asked, races=["forward", "training"])
    chosen.smoke = False
    found = [(size.model[11:], size.tokens, size.routing, trains) for _, size, trains in command.labelled(chosen)]
    assert ("Nano", 8192, "zipf", False) in found and ("Nano", 8192, "balanced", True) in found
    assert ("Ultra", 8192, "balanced", True) in found
    assert [f for f in found if f[1] == 8] == [("Nano", 8, "balanced", False), ("Ultra", 8, "balanced", False)]
    assert len({label for label, *_ in command.labelled(chosen)}) == len(found)


def test_what_the_default_loses():
    """By rows per expert: 2:4 beside our dense kernels, and the other way round."""
    facts = {"bench": "experts", "experts": 128, "top_k": 8, "routing": "balanced"}
    records = []
    for tokens, runs, us, other, others_us in (
        (8192, "2:4", 100.0, "fused_dense", 120.0),
        (512, "dense", 50.0, "always_sparse", 40.0),
    ):
        for variant, role, time in (("sparse24", "sparse24", us), (other, "part", others_us)):
            more = facts | {"runs": runs} if variant == "sparse24" else facts
            records.append(record(tokens, (2688, 1856), "bf16", variant, role, time, **more))
    found = regret.experts(records, "forward", "bf16")
    assert found == {
        (512.0, 128, 2688, 1856, "balanced"): (0.0, True),
        (32.0, 128, 2688, 1856, "balanced"): (0.25, False),
    }


def made_up():
    facts = {"bench": "experts", "experts": 128, "top_k": 6, "model": "Nano", "empty_experts": 0, "runs": "2:4"}
    records = []
    for routing, ours in (("balanced", 100.0), ("zipf", 108.0)):
        more = facts | {"routing": routing, "rows_of_largest": 400}
        for variant, role, us in (
            ("sparse24", "sparse24", ours),
            ("sparse24_compiled", "sparse24", ours + 3),
            ("grouped_mm", "dense", 160.0),
            ("fused_dense", "dense", 120.0),
        ):
            records.append(record(8192, (2688, 1856), "bf16", variant, role, us, **more))
    return records


def test_tables():
    text = experts_tables.all_tables(made_up())
    assert "| Nano | 8,192 | balanced | forward | bf16 | 100 | 2:4 | 160, 1.60 | 120, 1.20 |  | 100 |" in text
    assert "| Nano | 8,192 | forward | bf16 | zipf | 1.08 | 1.00 | 400 | 0 |" in text
    assert expected.rows_of_experts(made_up()) == [["experts", "bf16", 8192, 2688, 1856, 1.6]]


def test_drawing():
    pytest.importorskip("matplotlib")
    from bench.reporting.plots import experts as plots

    figure = plots.draw(made_up())
    (axis,) = figure.axes
    assert {line.get_label() for line in axis.lines} >= {"Nano, balanced", "Nano, zipf"}
    assert plots.draw([]) is None
