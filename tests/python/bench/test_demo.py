"""python -m sparse24 demo: runs, writes what it found, and fails where an op is wrong."""

import json

import pytest
import torch

from sparse24 import cli as command
from sparse24.demo import run, verify
from sparse24.demo.verdict import verdict


@pytest.fixture
def little_text(monkeypatch):
    """One window is evaluated: most of the demo's time."""
    monkeypatch.setattr(run, "_HELD_OUT_WINDOWS", 1)


def demo(path, device="cpu"):
    status = command.main(["demo", "--steps", "3", "--device", device, "--out", str(path)])
    return status, json.loads(path.read_text())


def test_runs_and_verifies(tmp_path, capsys, device):
    status, record = demo(tmp_path / "new" / "out.json", device)
    assert status == 0 and record["verified"]
    assert len(record["checks"]) >= 56 and all(c["passed"] for c in record["checks"])
    assert record["training"]["steps"] == 3
    losses = record["held_out_loss"]
    assert len(losses) == 5 and all(0 < loss < 8 for loss in losses.values())
    for layer in record["layers"]:
        assert 0.2 < layer["zeros"] < 0.8 and layer["feature_nonzeros_dropped"] > 0.05  # nearly untrained
    text = capsys.readouterr().out
    assert "Held-out loss" in text and "Verified" in text
    assert text.splitlines()[-1] == record["verdict"] and record["verdict"].startswith(
        "Verdict: right, and 2:4 changes"
    )
    assert bool(record["speed"]) == (device == "cuda")


def test_is_reproducible(tmp_path, little_text):
    first, second = (demo(tmp_path / f"{i}.json")[1] for i in range(2))
    assert first["held_out_loss"] == second["held_out_loss"] and first["layers"] == second["layers"]


@pytest.mark.parametrize("op", ["compress", "compress_fp8", "linear_compress", "relu2_mlp"])
def test_a_wrong_op_fails(tmp_path, capsys, monkeypatch, little_text, op):
    """One entry of its first result is changed."""
    right = getattr(verify, op)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        first[-1, -1] = torch.tensor(100.0).to(first.dtype)
        return out

    monkeypatch.setattr(verify, op, wrong)
    status, record = demo(tmp_path / "out.json")
    assert status == 1 and not record["verified"]
    text = capsys.readouterr().out
    assert "FAILED" in text and text.splitlines()[-1].startswith("Verdict: ") and "WRONG" in text.splitlines()[-1]


def test_the_verdict_tells_where_it_is_faster():
    losses = {"dense float32": 2.0, "2:4 bf16": 2.00012, "2:4 fp8, row-wise": 1.99999}
    layers = [{"feature_nonzeros_dropped": share} for share in (0.012, 0.1)]
    times = [
        {"bf16 eager": 3.0, "bf16 compiled": 2.4, "bf16 2:4": 2.0, "fp8 compiled": 1.0, "fp8 2:4": 0.5},
        {"bf16 eager": 0.9, "bf16 compiled": None, "bf16 2:4": 1.0, "fp8 compiled": None, "fp8 2:4": 0.5},
    ]
    assert verdict(losses, layers, times, 0) == (
        "Verdict: right, and 2:4 changes the held-out loss by +0.0001 nats/byte in bf16 and +0.0000 nats/byte in fp8, "
        "where it drops 1.2 to 10.0 % of a layer's non-zeros. In bf16 it is 0.90 to 1.20 times as fast as the best "
        "dense network, faster at 1 of 2 sizes. In fp8 it is 2.00 to 2.00 times as fast as the best dense network, "
        "faster at 1 of 1 sizes."
    )
    assert "a GPU has to tell" in verdict(losses, layers, [], 0)


def test_it_keeps_to_its_time():
    """50 s of training at most, and what follows takes 10 s on one idle core: 90 s in all, also on busy ones."""
    assert run.Settings().seconds <= 50
    threads = torch.get_num_threads()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_run", lambda *_: seen.append(torch.get_num_threads()) or 0)
        assert run.run(run.Settings(device="cpu")) == 0
    assert seen == [1] and torch.get_num_threads() == threads


def test_cannot_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert command.main(["demo", "--device", "cuda", "--steps", "1"]) == 2
    assert "error: sparse24.demo: expected a device that runs the kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--out"], ["bench", "--json"], ["bench", "--plot"], ["analyze", ".", "--text", ".", "--csv"]],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, arguments):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as exit:
            command.main([*arguments, str(path)])
        assert exit.value.code == 2
        assert f"expected a file that can be written, got {path}" in capsys.readouterr().err
