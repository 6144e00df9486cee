"""What the bench says of 2:4 weights: runs that train with them, a model pruned afterwards, and the tables of both."""

import json

import pytest
from benches import run

from bench.reporting import weight_tables
from bench.training.weights import WEIGHTS

SMOKE = ("--device", "cpu", "--smoke")


def test_train_gpt_with_sparse_weights(tmp_path):
    runs = tmp_path / "train_gpt"
    ways = ("weights", "weights_adapters")
    printed = run("train_gpt", *SMOKE, "--seeds", "0", "--recipe", ",".join(ways), "--out", runs)
    assert "3 records, 0 of them not verified" in printed
    dense, ended, adapted = (
        json.loads((runs / f"{name}_seed0.json").read_text()) for name in ("dense", *(f"sparse_{way}" for way in ways))
    )
    assert (ended["first_sparse_step"], ended["sparse_steps"], adapted["sparse_steps"]) == (1, 7, 9)
    assert adapted["adapters_from_step"] == 9 and "adapters_from_step" not in ended
    assert ended["loss"][:8] and [a for _, a, _ in ended["loss"][:8]] == [a for _, a, _ in adapted["loss"][:8]]
    for record in (ended, adapted):
        assert record["held_out_loss"] == pytest.approx(dense["held_out_loss"], rel=0.05)
        assert all(0 <= rate < 0.5 for _, rate in record["flip_rate"])


def test_pruned_weights_of_the_demo(tmp_path):
    out = tmp_path / "pruned.json"
    printed = run("pruned_weights", *SMOKE, "--out", out)
    records = json.loads(out.read_text())
    assert "both  outputs " in printed and len(records) == 16
    for record in records:
        assert abs(record["loss"] / record["dense_loss"] - 1) < 0.05 and record["loss"] != record["dense_loss"]


def test_tables():
    config = {"size": {"layers": 12, "dim": 768}}
    facts = {"bench": "train_gpt", "config": config, "complete": True, "steps": 10, "tokens": 5e6, "gpu": "H200"}
    facts |= {"commit": "1234567890"}
    losses = {("", 0): 4.0, ("", 1): 5.0, ("weights", 0): 4.02, ("weights", 1): 5.0, ("weights_no_end", 0): 4.1}
    records = [
        facts
        | {"ffn": "sparse" if recipe else "dense", "recipe": recipe, "seed": seed, "held_out_loss": loss}
        | {"sparse_steps": 7 if recipe == "weights" else 9}
        for (recipe, seed), loss in losses.items()
    ]
    other = {"size": {"layers": 16, "dim": 1280}}
    records.append(records[0] | {"config": other, "held_out_loss": 1.0})
    text = weight_tables.markdown(records)
    assert "| both weights, as recommended | 70 | +0.50 | +0.00 | +0.25 |" in text and "of commit" not in text
    assert "| no dense end | 90 | +2.50 |  | +2.50 |" in text and "768 wide, 10 steps, 5 million" in text
    assert weight_tables.markdown(records[:2]) == ""
    assert set(weight_tables.WAYS) == set(WEIGHTS)
