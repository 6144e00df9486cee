"""What `relu2_mlp` runs by default, against the records: the faster of sparse and dense, but for a few percent."""

import pytest

from bench.reporting import regret
from bench.reporting.figure_values import RESULTS
from sparse24.bench import results


@pytest.fixture
def choices():
    records = results.read_json([RESULTS / "h200" / "ffn_forward.json"])
    return lambda kind: regret.choices(records, kind)


# Experts of 1,400 to 1,536 tokens run dense in 16 bits: sparse is up to 6 % faster forward, and slower in training.
@pytest.mark.parametrize("kind, most", [("bf16", 0.06), ("fp8, a scale per row", 0.02), ("fp8, one scale", 0.02)])
def test_the_default_is_seldom_wrong_and_never_by_much(choices, kind, most):
    found = choices(kind)
    assert len(found) > 40 and {chosen for _, chosen in found.values()} == {True, False}
    wrong = {size: round(loss, 3) for size, (loss, _) in found.items() if loss > 0.02}
    assert all(loss <= most for loss in wrong.values()), wrong
    assert all(1400 <= tokens <= 1536 or loss < 0.025 for (tokens, *_), loss in wrong.items()), wrong


def test_float8_steps_run_the_faster_way():
    """Few products run dense, and narrow ones, where a 2:4 step is up to 4 % slower."""
    found = regret.training(results.read_json([RESULTS / "h200" / "ffn_training.json"]))
    assert len(found) >= 30 and found[32768, 1024, 4096][1]
    dense = {(1408, 2048, 5120), (1536, 2688, 1856), (8192, 1024, 3584), (32768, 768, 3072)}
    assert not any(found[size][1] for size in dense)
    # Few rows are dense because that is exact, which may cost some of the time.
    assert all(loss <= (0.02 if sparse else 0.06) for loss, sparse in found.values()), found


def test_experts_run_the_faster_way_forward():
    found = regret.experts(results.read_json([RESULTS / "h200" / "experts.json"]), "forward", "bf16")
    assert len(found) >= 7 and all(sparse == (rows >= 64) for (rows, *_), (_, sparse) in found.items())
    # Few rows are dense because that is exact, which may cost some of the time.
    assert all(loss <= (0.02 if sparse else 0.06) for loss, sparse in found.values()), found


def test_another_rule_would_lose(choices, monkeypatch):
    """The fp8 threshold of before, 40e9 and 256 tokens, ran dense where sparse is faster."""
    monkeypatch.setattr(regret, "pays", lambda t, d_ff, d, **how: t <= 256 or t * d_ff * d >= 40e9)
    wrong = {size for size, (loss, _) in choices("fp8, a scale per row").items() if loss > 0.05}
    assert wrong == {(512, 1664, 6656), (1408, 2048, 5120), (2048, 1664, 6656), (8192, 1024, 3584)}
