"""The benchmarks verify what they time: their smoke runs go through every case at small sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("name", ["compress", "mm", "ffn_forward", "tune_mm"])
def test_smoke_run_verifies_every_case(name, tmp_path):
    out = tmp_path / "records.json"
    command = [sys.executable, BENCH / f"{name}.py", "--device", "cpu", "--smoke", "--out", out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 of them not verified" in run.stdout and out.stat().st_size > 100
