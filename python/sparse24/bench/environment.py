"""What every record says about the machine and the code it was measured with.

The commit is that of the variable SPARSE24_COMMIT: a wheel does not know its own.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from typing import Any

import torch


def facts(device: torch.device) -> dict[str, Any]:
    """Fields shared by all records of one run: GPU, driver, versions, commit, date."""
    import sparse24

    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": nvidia_smi("driver_version") if on_gpu else None,
        "power_limit_w": _number(nvidia_smi("power.limit")) if on_gpu else None,
        "sparse24": sparse24.__version__,
        "commit": os.environ.get("SPARSE24_COMMIT", "unknown"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def nvidia_smi(field: str) -> str | None:
    """One field of nvidia-smi's query for the first GPU, or None."""
    text = _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"])
    return text.splitlines()[0].strip() if text else None


def clocks(device: torch.device) -> dict[str, float | None]:
    """SM clock, board power and temperature now: call it while the GPU still works."""
    if device.type != "cuda":
        return {}
    readings = {
        "sm_clock_mhz": lambda: float(torch.cuda.clock_rate(device)),
        "power_w": lambda: torch.cuda.power_draw(device) / 1000,
        "temperature_c": lambda: float(torch.cuda.temperature(device)),
    }
    values: dict[str, float | None] = {}
    for name, read in readings.items():
        try:
            values[name] = read()
        except Exception:  # NVML is a courtesy: its absence must not stop a measurement
            values[name] = None
    return values


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
