"""The benchmarks verify what they time: their smoke runs go through every case at small sizes."""

import json

import pytest
import torch
from benches import run

import bench.__main__
import sparse24
from bench.cases import model_stacks
from bench.reporting import train_table
from bench.studies import accuracy
from bench.training import corpus
from sparse24.bench.ffn import masks
from sparse24.bench.reference import Unverified

SMOKE = ("--device", "cpu", "--smoke")


def with_first_gradient_times(factor, relu2_mlp):
    """The function with a wrong gradient of w1."""

    def wrong(x, w1, *rest, **options):
        w1 = w1.view_as(w1)
        if w1.requires_grad:
            w1.register_hook(lambda gradient: gradient * factor)
        return relu2_mlp(x, w1, *rest, **options)

    return wrong


def draw(name, folder) -> None:
    pytest.importorskip("matplotlib")
    run("plot", folder)
    assert "</svg>" in (folder / f"{name}.svg").read_text()


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--help"])
    assert bench.__main__.main() == 0
    printed = capsys.readouterr().out.split("Commands: ")[1]
    assert printed.strip().split(", ") == list(bench.__main__.COMMANDS)


@pytest.mark.parametrize("name", ["compress", "mm", "tune_mm", "ffn_training"])
def test_smoke_run_verifies_every_case(name, tmp_path):
    out = tmp_path / f"{name}.json"
    printed = run(name, *SMOKE, "--out", out)
    assert ", 0 of them not verified" in printed and out.stat().st_size > 100
    if name == "ffn_training":
        draw(name, tmp_path)


def test_models_are_verified_before_and_after_conversion(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "models.json"
    printed = run("models", *SMOKE, "--out", out)
    assert "15 records, 9 of sparse24, 0 of them not verified" in printed
    records = json.loads(out.read_text())
    prefill, training = ([r for r in records if r["race"] == race] for race in ("prefill", "training"))
    assert [r["variant"] for r in prefill] == ["dense", "sparse24", "sparse24_fp8"] * 3
    assert [r["variant"] for r in training] == ["dense", "sparse24"] * 3
    assert {r["model"] for r in records} == {"Nemotron-Mini-4B", "Persimmon-8B", "nanochat d26"}
    assert all(r["zeros"] == pytest.approx(0.9, abs=1e-2) for r in records)  # versions of torch draw other weights
    for dense, ours, fp8 in zip(*(prefill[i::3] for i in range(3)), strict=True):
        # What pruning drops is told from rounding, and float8 from bfloat16.
        assert dense["rel_error"] < ours["pruning_error"] and ours["rel_error"] < ours["pruning_error"]
        assert 2 * ours["rel_error"] < fp8["rel_error"]
    for ours in training[1::2]:
        assert 0 < ours["gradient_error"] < 0.05 and 0 < ours["ffn_gradient_error"] < 0.05


def test_a_model_with_a_wrong_gradient_has_no_time(tmp_path, monkeypatch):
    """Of the first weights, by 6 %; the output is right."""
    pytest.importorskip("transformers")
    from sparse24.convert import run as conversion_run

    monkeypatch.setattr(conversion_run, "relu2_mlp", with_first_gradient_times(1.06, conversion_run.relu2_mlp))
    monkeypatch.setattr(model_stacks, "SMOKE", model_stacks.SMOKE[:1])
    out = tmp_path / "records.json"
    run("models", *SMOKE, "--out", out, status=1)
    records = json.loads(out.read_text())
    assert all(r["verified"] for r in records if r["race"] == "prefill")
    (record,) = (r for r in records if r["race"] == "training")
    assert "mlp.up_proj.weight: expected a relative error" in record["error"] and record["median_us"] is None


def test_accuracy_adds_up(tmp_path):
    """In a model of three steps pruning drops a lot: with it, fp8 and 2:4 are independent errors."""
    out = tmp_path / "accuracy.json"
    printed = run("accuracy", "--smoke", "--out", out, "--checkpoint", tmp_path / "model.pt")
    assert "trained 3 steps" in printed and "2:4 fp8 predicted x 2" in printed
    records = json.loads(out.read_text())
    names = [r["variant"] for r in records if r["layer"] == 0]
    assert len(set(names)) == len(names) == 15 and len(records) == 4 * 15
    for layer in range(4):
        error = {r["variant"]: r["rel_error"] for r in records if r["layer"] == layer}
        assert 0.03 < error["pruning alone"] < 0.2 and 1e-3 < error["dense bf16"] < 1e-2
        assert 0.015 < error["dense fp8 row-wise"] < 0.06
        independent = (error["pruning alone"] ** 2 + error["dense fp8 row-wise"] ** 2) ** 0.5
        for record in (r for r in records if r["layer"] == layer and r["variant"].startswith("2:4 fp8")):
            assert record["rel_error"] == pytest.approx(independent, rel=0.06)
            assert record["over_root_of_squares"] == pytest.approx(record["rel_error"] / independent)
            assert record["within_sum"] and record["over_sum"] < record["over_root_of_squares"]
    given = [r for r in records if "nonzeros" in r]
    assert all(r["nonzeros"] > 1e5 and 0 < r["underflowed"] < 0.02 * r["nonzeros"] for r in given)
    assert not any(r["saturated"] for r in given if r["variant"].endswith("x 2"))
    # The stored model gives the same figures.
    assert run("accuracy", "--smoke", "--checkpoint", tmp_path / "model.pt") in printed


def test_accuracy_fails_above_the_sum():
    statistics = accuracy.Statistics(nonzeros=10, saturated=3, underflowed=1)
    measured = {
        "pruning alone": (0.03, None),
        "dense fp8 row-wise": (0.04, None),
        "2:4 fp8 row": (0.052, None),
        "2:4 fp8 static": (0.074, statistics),
    }
    pruned, dense, row, static = accuracy.judged(measured, {"layer": 2, "zeros": 0.9}, {})
    assert "within_sum" not in pruned and "within_sum" not in dense
    assert row["over_root_of_squares"] == pytest.approx(1.04) and row["within_root_of_squares"]
    assert static["over_sum"] == pytest.approx(0.074 / 0.07) and not static["within_sum"]
    assert static["saturated"] == 3 and static["layer"] == 2
    assert "1.057 (more), 1.480 (more); of 10 saturated 3, zero 1" in accuracy.text([pruned, dense, row, static])


def test_ffn_training_reports_an_ffn_with_a_wrong_gradient(tmp_path, monkeypatch):
    """The verification is not empty: a weight gradient that is 3 % too large has no time."""
    monkeypatch.setattr(sparse24, "relu2_mlp", with_first_gradient_times(1.03, sparse24.relu2_mlp))
    out = tmp_path / "records.json"
    run("ffn_training", *SMOKE, "--budget", "0.5", "--out", out, status=1)
    ours = [r for r in json.loads(out.read_text()) if r["variant"] == "sparse24" and r["race"] == "training"]
    assert ours and all("dw1" in r["error"] and r["median_us"] is None for r in ours)


def test_train_gpt_compares_runs_of_the_same_data_and_goes_on(tmp_path):
    runs = tmp_path / "train_gpt"
    arguments = (*SMOKE, "--seeds", "0", "--recipe", "default,dense_dw", "--out", runs)
    printed = run("train_gpt", *arguments, "--ffn", "dense")
    assert "1 records, 0 of them not verified" in printed
    printed = run("train_gpt", *arguments)
    assert "dense_seed0: finished before" in printed and "3 records, 0 of them not verified" in printed

    names = ("dense", "sparse_default", "sparse_dense_dw")
    dense, sparse, exact = (json.loads((runs / f"{name}_seed0.json").read_text()) for name in names)
    switch = sparse["first_sparse_step"]
    assert all(r["verified"] and r["complete"] and r["tokens"] == 2560 for r in (dense, sparse, exact))
    losses = [torch.tensor([loss for _, loss, _ in r["loss"]]) for r in (dense, sparse, exact)]
    # The same weights and batches: equal while all run dense, up to rounding, and with one forward at the first
    # sparse step, where the dropped fifth of the activation shows.
    torch.testing.assert_close(losses[1][:switch], losses[0][:switch], rtol=1e-4, atol=0)
    assert losses[1][switch] == losses[2][switch]
    assert abs(losses[1][switch] - losses[0][switch]) > 1e-4
    assert 0.4 < sparse["activations"][0]["zeros"][0] < 0.6  # at initialisation
    shares = [sparse["activations"][-1][f"{kind}token_nonzeros_dropped"][0] for kind in ("recipe_", "")]
    assert 0 < shares[0] < shares[1]  # the densest features go through a dense product

    draw("train_gpt", tmp_path)


def test_train_gpt_in_float8_is_compared_with_dense_float8(tmp_path):
    """All six products in float8: the losses are those of bf16 up to rounding, and the table has dense fp8 too."""
    runs = tmp_path / "train_gpt"
    corpus_file = tmp_path / "corpus.pt.xz"
    text = corpus.read(2560, 8 * 65, corpus.BYTES, stdlib_only=True)
    corpus.write(text, corpus_file)
    assert corpus.load(corpus_file).digest == text.digest
    assert torch.equal(corpus.load(corpus_file).train, text.train)
    printed = run(
        "train_gpt", *SMOKE, "--seeds", "0", "--precision", "bf16,fp8", "--corpus", corpus_file, "--out", runs
    )
    assert "4 records, 0 of them not verified" in printed
    names = ("dense", "dense_fp8", "sparse_default", "sparse_default_fp8")
    records = {name: json.loads((runs / f"{name}_seed0.json").read_text()) for name in names}
    losses = {name: torch.tensor([loss for _, loss, _ in r["loss"]]) for name, r in records.items()}
    for name in names[1:]:
        torch.testing.assert_close(losses[name], losses["dense"], rtol=5e-3, atol=0)
    assert not torch.equal(losses["dense"], losses["dense_fp8"])
    assert 0.02 < min(records["sparse_default_fp8"]["ffn_error"]) and max(records["sparse_default"]["ffn_error"]) < 0.02
    head, _, *rows = next(part for part in printed.split("\n\n") if part.startswith("| FFN")).splitlines()
    column = head.split(" | ").index("to dense fp8, in %")
    filled = {row.split(" | ")[0].strip("| "): bool(row.split(" | ")[column].strip()) for row in rows}
    assert filled == {name: name != "dense_fp8" for name in names}


def test_time_to_a_loss_is_along_the_curve():
    run = {"tokens": 1000, "steps": 10, "tokens_per_s": {"dense": 50.0, "sparse": 100.0}, "first_sparse_step": 5}
    run["held_out"] = [[5, 4.0], [7, 3.0], [10, 2.0]]
    assert train_table.training_seconds(run, 10) == 15
    assert train_table.seconds_to(run, 3.5) == 11
    assert train_table.seconds_to(run, 4.5) == 10
    assert train_table.seconds_to(run, 1.9) is None


def test_kept_entries_are_those_of_the_ffn(monkeypatch):
    """An FFN of plain torch with given masks: they are found through its weight gradients alone."""
    monkeypatch.setattr(masks, "ROWS", 16)  # several passes
    generator = torch.Generator().manual_seed(0)
    x, w1, w2, dy = (torch.randn(*s, generator=generator) for s in ((40, 8), (32, 8), (8, 32), (40, 8)))
    kept_y, kept_dh = (torch.rand(40, 32, generator=generator) < 0.5 for _ in range(2))

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w1, w2):
            ctx.save_for_backward(x, w1, w2)
            return (x @ w1.t()).relu().square() @ w2.t()

        @staticmethod
        def backward(ctx, grad):
            x, w1, w2 = ctx.saved_tensors
            root = (x @ w1.t()).relu()
            dh = grad @ w2 * 2 * root
            return dh @ w1, (dh * kept_dh).t() @ x, grad.t() @ (root.square() * kept_y)

    active = x @ w1.t() > 0
    y_mask = masks.kept_activation(Masked.apply, x, w1)
    assert torch.equal(y_mask, active & kept_y)
    assert torch.equal(masks.kept_gradient(Masked.apply, x, w1, w2, dy), active & kept_dh)
    y = (x @ w1.t()).relu().square()
    with pytest.raises(Unverified, match="to drop at most"):  # half, not the smaller ones
        masks.check_tokens("y", y_mask, active, y)
    with pytest.raises(Unverified, match="no entry of y that the forward pass dropped"):
        masks.check_tokens("y", y_mask, active & ~y_mask, y)
