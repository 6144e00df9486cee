"""`python -m bench stalls`: what Nsight Compute prints is read as it is."""

import subprocess
import sys
from collections import Counter

import pytest

from bench.profiling import network, stalls

HEADER = "Address,Source,# Samples,Instructions Executed,stall_barrier,stall_wait,stall_wait (Not Issued)"
GEMM = (
    "void cutlass::device_kernel<x::PersistentGemm<x::Mainloop<int>, x::Adapter<x::FirstEpilogue<float>>>>(T1::Params)"
)
SOURCE = f"""\
"Kernel Name","{GEMM}"
{HEADER}
"0x10","      LDS R8, [R7]","1","64","0","1","1"
"0x20","@P0   PRMT R219, R8, R4, R8","90","64","0","80","80"
"0x30","HGMMA.SP R24, gdesc[UR8], R24","9","64","2","1","1"
"Kernel Name","{GEMM}"
{HEADER}
"0x10","      LDS R8, [R7]","1","64","0","1","1"
"0x20","@P0   PRMT R219, R8, R4, R8","90","64","0","80","80"
"0x30","HGMMA.SP R24, gdesc[UR8], R24","9","64","2","1","1"
"Kernel Name","void sparse24::cuda::(anonymous namespace)::gather<float>(int)"
Address,Source,stall_lg,# Samples,Instructions Executed
"0x10","      EXIT","3","4","2"
"""
RAW = """\
"ID","Kernel Name","gpu__time_duration.sum","sm__cycles_elapsed.max"
"","","ms","cycle"
"0","a","1.5","2,400,000"
"1","b","0.002","3,000"
"""


def test_reads_each_launch_once():
    gemm, gather = stalls.kernels_of(SOURCE.splitlines())
    assert gemm.samples == 100 and gemm.stalls() == Counter(wait=82, barrier=2)
    assert [i.text.split()[0] for i in gemm.instructions] == ["LDS", "@P0", "HGMMA.SP"]
    assert gather.instructions == [stalls.Instruction("EXIT", 2, 4, Counter(lg=3))]  # columns by their names
    assert stalls.short(gemm.name) == "PersistentGemm FirstEpilogue" and stalls.short(gather.name) == "gather"


def test_reads_time_and_cycles():
    assert stalls.facts_of(RAW.splitlines()) == [
        {"time": 1500.0, "cycles": 2_400_000.0},
        {"time": 2.0, "cycles": 3000.0},
    ]


def test_prints_where_warps_were_found(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source.csv"
    source.write_text(SOURCE)
    monkeypatch.setattr(sys, "argv", ["stalls", "--source", str(source), "--kernel", "Gemm", "--rows", "2"])
    assert stalls.main() == 0
    said = capsys.readouterr().out
    assert "waits: wait 82 %, barrier 2 %" in said and "gather" not in said and "LDS" not in said
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert lines["@P0"].endswith("wait 89 %") and " 90.0 " in lines["@P0"]
    assert lines["HGMMA.SP"].endswith("others 67 %")
    (gemm, _) = stalls.kernels_of(SOURCE.splitlines())
    assert "1,500 us, 2,400,000 cycles at 1.60 GHz" in stalls.describe(gemm, stalls.facts_of(RAW.splitlines())[0], 1)


def test_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stalls"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        stalls.main()
    assert "expected Nsight Compute's ncu on PATH, or --source" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--forward"], ["--sparse-weights", "both"], ["--precision", "fp8"]], ids=str)
def test_the_call_that_is_profiled(options):
    command = [sys.executable, "-m", "bench.profiling.network", "--size", "64", "64", "96", *options]
    assert network.main(command[3:]) == 0


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "stalls", "--help"], capture_output=True, text=True, check=True
    )
    assert "--kernel REGEX" in done.stdout
