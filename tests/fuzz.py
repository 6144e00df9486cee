#!/usr/bin/env python3
"""Random calls of every op and of the networks, legal and not, against plain torch and between devices.

    python tests/fuzz.py --seconds 60                     on the CPU
    python tests/fuzz.py --count 50000 --device cuda      on a GPU, also bit for bit against the CPU
    python tests/fuzz.py --seed 3 --start 17 --count 1    one set again, as a failure names it

Each set is a pure function of seed and number. An op has to refuse what is illegal with its sentence, and to return
what tests/python/fuzzing/contract.py says of what is legal; the same bits in a second run; and inputs as they were. All
fresh memory is poisoned. A failure is printed as a program. Exit status 1 if there was any.

With --isolate the sets run in a child process, which is started again behind a set that ends it: a crash is then one
failure among others.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch: poison() makes cuBLAS ask for it
sys.path.insert(0, str(Path(__file__).parent / "python"))

import torch
from fuzzing.session import Session, set_of


def poison() -> None:
    """Every fresh tensor holds NaN (bytes: 255), so that what an op does not write shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def isolate(options: dict) -> int:
    """Run the sets in children, each from behind where the one before died; 1 if there was any failure."""
    end, deadline = options["start"] + options["count"], time.monotonic() + options["seconds"]
    status, crashes = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "set"
        while options["start"] < end and time.monotonic() < deadline and crashes < options["failures"]:
            left = {"count": end - options["start"], "seconds": deadline - time.monotonic(), "note": note}
            flags = [f"--{name}={value}" for name, value in (options | left).items() if name != "fakes"]
            flags += [] if options["fakes"] else ["--no-fakes"]
            child = subprocess.run([sys.executable, "-X", "faulthandler", __file__, *flags])
            status = status or int(child.returncode != 0)
            if child.returncode in (0, 1):
                return status
            crashes += 1
            last = int(note.read_text())
            what = f"--seed {options['seed']} --start {last} --count 1"
            print(f"\n== failure: {what}\nthe process ended with status {child.returncode}\n")
            print(set_of(options["seed"], last, options["device"]).code(options["device"]), flush=True)
            options["start"] = last + 1
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first set")
    parser.add_argument("--count", type=int, help="how many sets")
    parser.add_argument("--seconds", type=float, help="end after so long; without a count 60")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="sets between two synchronisations of the device")
    parser.add_argument("--failures", type=int, default=20, help="end after so many")
    parser.add_argument("--no-fakes", dest="fakes", action="store_false", help="leave out the fake functions")
    parser.add_argument("--isolate", action="store_true", help="survive crashes, in a child process")
    parser.add_argument("--show", action="store_true", help="print the calls, and run none")
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    isolated, show = options.pop("isolate"), options.pop("show")
    if options["seconds"] is None:
        options["seconds"] = 60.0 if options["count"] is None else float("inf")
    options["count"] = 10**9 if options["count"] is None else options["count"]
    if show:
        for index in range(options["start"], options["start"] + options["count"]):
            print(set_of(options["seed"], index, options["device"]).code(options["device"]), end="\n\n")
        return 0
    if isolated:
        del options["note"]
        return isolate(options)
    poison()
    return int(Session(**options).run() > 0)


if __name__ == "__main__":
    sys.exit(main())
