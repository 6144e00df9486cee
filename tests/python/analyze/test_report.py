"""ModelReport: its verdict, table, JSON, CSV and drawing; and the speed that it expects, by size."""

import csv
import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from made_up_records import WIDE

import sparse24
from sparse24.analyze import ModelReport, speed
from sparse24.analyze.columns import COLUMNS
from sparse24.analyze.report import decide
from sparse24.analyze.speed import Calls, speedup

MEASURED = Path(speed.__file__).with_name("measured.json")


def layer(dropped=0.01, error=0.02, d_model=4096, d_ff=16384, **further):
    """A layer as analyze_model makes it, of made-up numbers."""
    y1 = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) - 1
    stats = sparse24.activation_stats(y1, torch.ones(8, 32)).as_dict()
    stats |= {"feature_nonzeros_dropped": dropped, "output_error": error}
    sizes = {"tokens": 64, "d_model": d_model, "d_ff": d_ff, "d_out": d_model}
    density = [share / 20 for share in range(21)]
    made = {**sizes, **stats, "feature_density": density, "state": "dense", **further}
    return made | speed.speedups(made, Calls()) | decide(made)


def report(count=4, **first):
    layers = {f"layers.{i}.mlp": layer(**(first if i == 0 else {})) for i in range(count)}
    return ModelReport(layers)


def test_the_verdict_names_layers_to_keep_and_what_to_expect():
    found = report(24, dropped=0.09)
    gain = speedup("prefill", "bf16", 8192, 4096, 16384, 4096)
    together = 24 / (1 + 23 / gain)
    assert found.verdict == (
        f"convert 23 of 24; expect {together:.2f}x in FFN prefill (8,192 tokens), "
        f"{24 / (1 + 23 / speedup('decode', 'bf16', 8, 4096, 16384, 4096)):.2f}x in decode (8 tokens), "
        f"{24 / (1 + 23 / speedup('training', 'bf16', 16384, 4096, 16384, 4096)):.2f}x in training (16,384 tokens) "
        "in bf16; layers.0.mlp drops 9 % of non-zeros: keep it dense"
    )
    assert found.decisions == {f"layers.{i}.mlp": i > 0 for i in range(24)}
    wrong = report(2, error=0.07)
    assert wrong.verdict.endswith("; layers.0.mlp changes its output by 7 %: keep it dense")


def test_a_verdict_is_a_sentence_however_many_layers_there_are():
    layers = {f"layers.{i}.mlp": layer(dropped=0.2) for i in range(9)}
    text = ModelReport(layers, {"other": "its activation is ReLU, not the square of it"}).verdict
    assert text.startswith("convert 0 of 10; layers.0.mlp drops 20 % of non-zeros: keep it dense; layers.1.mlp")
    assert "; 6 more are to stay dense, too; 1 cannot be converted (its activation is ReLU" in text
    assert "expect" not in text


def test_random_weights_are_recognised():
    sentence = "convert 0 of 2; half of all activations are zeros, as before training: train dense first; a drops 20 %"
    layers = {name: layer(dropped=0.2) for name in "ab"}
    assert ModelReport({name: {**made, "zeros": 0.5} for name, made in layers.items()}).verdict.startswith(sentence)
    assert "before training" not in ModelReport({name: {**made, "zeros": 0.7} for name, made in layers.items()}).verdict


def test_small_networks_are_expected_to_run_dense():
    small = ModelReport({"mlp": layer(d_model=128, d_ff=512)})
    assert "expect no speed-up: for such sizes and numbers of tokens relu2_mlp runs dense" in small.verdict


def test_other_numbers_of_tokens():
    found = report(2)
    few = found.at(prefill=128, training=4096)
    name = "layers.0.mlp"
    assert few.layers[name]["prefill_speedup"] == 1.0 != found.layers[name]["prefill_speedup"]
    assert few.layers[name]["training_speedup"] == speedup("training", "bf16", 4096, 4096, 16384, 4096)
    assert "(128 tokens)" in few.verdict and "(8,192 tokens)" in found.verdict
    with pytest.raises(RuntimeError, match=r"^sparse24\.ModelReport\.at: expected decode to be at least 0, got -1"):
        found.at(decode=-1)
    with pytest.raises(RuntimeError, match=r"^sparse24\.ModelReport\.at: expected prefill to be at least 1, got 0"):
        found.at(prefill=0)


@pytest.mark.parametrize("numbers", [{"dropped": float("nan")}, {"error": float("nan")}], ids=str)
def test_what_is_not_a_number_is_not_converted(numbers):
    assert layer(**numbers)["reason"] == "is not a number on some of these tokens"


@pytest.mark.parametrize("phase", ["prefill", "training"])
@pytest.mark.parametrize("dtype", speed.PRECISIONS)
def test_speed_is_that_of_the_nearest_record(phase, dtype):
    rows = json.loads(MEASURED.read_text())["rows"]
    measured = {tuple(row[:-1]) for row in rows}
    for race, of_dtype, tokens, d_model, d_ff, gain in rows:
        if (race, of_dtype) == ("training" if phase == "training" else "forward", dtype):
            pays = sparse24.mlp.pays(tokens, d_ff, d_model, fp8=dtype == "fp8")
            assert speedup(phase, dtype, tokens, d_model, d_ff, d_model) == (gain if pays else 1.0)
            if (race, of_dtype, tokens - 1, d_model, d_ff) in measured:
                continue  # a record of its own
            if pays and sparse24.mlp.pays(tokens - 1, d_ff, d_model, fp8=dtype == "fp8"):
                assert speedup(phase, dtype, tokens - 1, d_model, d_ff, d_model) == gain


def test_decoding_is_that_of_prepared_networks(monkeypatch):
    """Where few tokens were measured: up to as many as run that way."""
    assert speedup("decode", "bf16", 4, 4096, 16384, 4096) == 1.0 or speed._nearest("decode", "bf16", (4, *WIDE))
    monkeypatch.setattr(speed, "_table", lambda: ("Made up", (speed._Row("decode", "bf16", (4, *WIDE), 2.4),)))
    monkeypatch.setattr(speed, "few_tokens", lambda d_ff, d_out, fp8: 8)
    assert speedup("decode", "bf16", 8, 4096, 16384, 4096) == speedup("decode", "bf16", 1, 4096, 16384, 4096) == 2.4
    assert speedup("decode", "bf16", 9, 4096, 16384, 4096) == speedup("prefill", "bf16", 8, 4096, 16384, 4096) == 1.0
    assert speedup("decode", "fp8", 8, 4096, 16384, 4096) is None  # sparse, and not measured


def test_what_was_not_measured_has_no_speed():
    assert speedup("prefill", "bf16", 1 << 20, 4096, 16384, 4096) is None
    assert speedup("training", "bf16", 16384, 1 << 16, 16384, 1 << 16) is None
    unknown = ModelReport({"mlp": layer(d_ff=1 << 20)})
    assert "an unmeasured speed in training" in unknown.verdict and " -  " in unknown.table()
    assert speedup("prefill", "bf16", 8192, 4096, 16384 + 8, 4096) == 1.0  # never sparse


def test_the_table_has_a_row_for_each_layer():
    found = ModelReport({"a": layer(), "b": layer(dropped=0.3)}, {"c": "gated"}, {"d": "it has 3 layers"})
    text = found.table()
    assert text == str(found) and text.endswith(found.verdict) and "not looked at: c: gated" in text
    assert "near miss: d: it has 3 layers" in text
    assert all(short in text.splitlines()[0] for short, _ in COLUMNS.values())
    assert max(map(len, text.partition("\n\n")[0].splitlines())) <= 140
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line[:2] in ("a ", "b ")}
    assert rows == {"a": "yes", "b": "no"}
    assert "in fp8 over torch.compile" in ModelReport({"a": layer()}, precision="fp8").table()


def test_json_and_csv_have_everything():
    found = report(2, dropped=0.3)
    content = json.loads(json.dumps(found.as_dict()))
    assert content["verdict"] == found.verdict and content["decisions"] == found.decisions
    assert content["tokens_per_call"] == {"prefill": 8192, "decode": 8, "training": 16384}
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["layer"] for row in rows] == list(found.layers)
    for row, (name, of_layer) in zip(rows, found.layers.items(), strict=True):
        assert (
            content["layers"][name].keys()
            == of_layer.keys()
            >= row.keys() - {"layer"} - {f"groups_of_{number}" for number in range(5)}
        )
        assert float(row["feature_nonzeros_dropped"]) == of_layer["feature_nonzeros_dropped"]
        assert float(row["groups_of_4"]) == of_layer["nonzeros_per_group"][4]
    assert ModelReport({}).csv() == "layer\r\n"


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_drawing_names_everything(tmp_path, count):
    pytest.importorskip("matplotlib")
    found = report(count)
    path = tmp_path / "layers.svg"
    found.plot(path)
    written = {element.text for element in ElementTree.parse(path).iter() if element.tag.endswith("text")}
    assert {long for _, long in COLUMNS.values()} | set(found.layers) <= written
    assert {"0 non-zeros", "1 non-zero", "4 non-zeros", "tokens that light it, %"} <= written
    first = path.read_bytes()
    found.plot(str(path))
    assert path.read_bytes() == first  # the same report, the same file


def test_a_drawing_needs_matplotlib_and_a_layer(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(RuntimeError, match="expected a report with at least one layer, got none"):
        ModelReport({}).plot(tmp_path / "a.svg")
    monkeypatch.delitem(sys.modules, "sparse24.analyze.drawing", raising=False)
    monkeypatch.delattr(sparse24.analyze, "drawing", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"^sparse24\.ModelReport\.plot: expected matplotlib, got none"):
        report().plot(tmp_path / "a.svg")
