"""python -m sparse24 demo: runs, writes what it found, and fails where an op is wrong."""

import json

import pytest
import torch

from sparse24 import cli as command
from sparse24.demo import run, verify


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
    assert "FAILED" in capsys.readouterr().out


def test_cannot_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert command.main(["demo", "--device", "cuda", "--steps", "1"]) == 2
    assert "error: sparse24.demo: expected a device that runs the kernels" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["demo", "--out"], ["bench", "--json"], ["bench", "--plot"]], ids=" ".join)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, arguments):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as exit:
            command.main([*arguments, str(path)])
        assert exit.value.code == 2
        assert f"expected a file that can be written, got {path}" in capsys.readouterr().err
