"""Everything that needs a GPU, in one call: tests, sanitizers, benchmarks; results as a few flat files.

    python bench/run_gpu.py --out DIR
    python bench/run_gpu.py --out DIR --lib libsparse24_torch.so --gtest test_mm_gpu --gtest test_compress_gpu
    python bench/run_gpu.py --out DIR --skip-tests --only ffn_training --budget 440
    python bench/run_gpu.py --out DIR --skip-tests --only models --budget 150
    python bench/run_gpu.py --out DIR --skip-tests --only train_gpt --budget 520

Writes to DIR: summary.json, run.log, pytest.xml, and <bench>.json for each benchmark (train_gpt: a folder, one file per
run). With --lib the package is put
together from python/sparse24 and that library (assemble.py); otherwise the installed sparse24 is used. A failing step
is recorded and the next one runs; the exit status is 0 if all steps were well. Needs Python 3.11 or later; models
needs transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also as a script

from bench.gpu import assemble  # noqa: E402
from bench.gpu.steps import Runner, Step, StepFailed  # noqa: E402

DEFAULT_BENCHES = ("compress", "mm", "ffn_forward")
BENCHES = (
    *DEFAULT_BENCHES,
    "tune_mm",
    "tune_linear",
    "ffn_training",
    "ffn_few_tokens",
    "experts",
    "models",
    "nanochat_step",
    "train_gpt",
)
#: Compile every size anew: in parallel, before they time.
COMPILING = ("ffn_forward", "ffn_training", "ffn_few_tokens", "experts")
#: Each has a CUDA context, of about half a gigabyte.
MOST_WORKERS = 12
SANITIZERS = ("memcheck", "initcheck")


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out / "run.log", args.limit)
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if args.commit:
        env["SPARSE24_COMMIT"] = args.commit
    with tempfile.TemporaryDirectory(prefix="sparse24-") as temporary:
        scratch = Path(temporary)
        importable = package(runner, args, env, scratch)
        binaries = [executable(path, scratch) for path in args.gtest]
        if not args.skip_tests:
            for binary in binaries:
                gtest(runner, binary, env, scratch, args)
        if importable:
            runner.command("info", python("-m", "sparse24", "info"), env=env, timeout=90, cwd=scratch, echo=True)
            if not args.skip_tests:
                pytest(runner, args, env)
            benches(runner, args, env)
        if args.sanitizer:
            sanitizers(runner, binaries, env, args)
    return finish(runner, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--lib", type=Path, help="libsparse24_torch.so built elsewhere, build_info.json beside it")
    parser.add_argument("--gtest", type=Path, action="append", default=[], help="a gtest binary (may be repeated)")
    parser.add_argument("--gtest-filter", default="*", help="for the test run")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--pytest-args", default="", help='further arguments of pytest, such as "-x -k compress"')
    parser.add_argument("--only", default=",".join(DEFAULT_BENCHES), help=f"benches, of {','.join(BENCHES)}, or none")
    parser.add_argument("--quick", action="store_true", help="few sizes, fewest rounds")
    parser.add_argument("--patterns", type=Path, help="folder with pattern_layer*.npy")
    parser.add_argument("--budget", type=float, default=90, help="seconds per bench before it starts no new problem")
    parser.add_argument("--bench-args", default="", help='further arguments of every bench, such as "--rounds 40"')
    parser.add_argument("--sanitizer", action="store_true", help="memcheck and initcheck over the gtest binaries")
    parser.add_argument("--sanitizer-filter", default="*", help="gtest filter under the sanitizers")
    parser.add_argument("--sanitizer-pytest", default="", help="pytest -k expression under the sanitizers; empty: none")
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--commit", help="for the records, where the tree has no git")
    args = parser.parse_args()
    args.only = [] if args.only in ("", "none") else args.only.split(",")
    if unknown := set(args.only) - set(BENCHES):
        parser.error(f"expected --only to name benches of {', '.join(BENCHES)}, got {', '.join(sorted(unknown))}")
    args.out = args.out.resolve()
    return args


def workers() -> int:
    return min(os.cpu_count() or 1, MOST_WORKERS)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def package(runner: Runner, args: argparse.Namespace, env: dict[str, str], scratch: Path) -> bool:
    """Make `import sparse24` work for the commands that follow; env is changed."""
    folder = scratch / "package"
    code = "import sparse24; print(sparse24.__file__)"
    if args.lib:

        def build() -> str:
            assemble.assemble(args.lib, folder)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), env.get("PYTHONPATH"))))
            return f"from {args.lib.name}"

        if not runner.call("assemble the package", build).ok:
            return False
        # An editable install goes before PYTHONPATH: another library than the given one would be measured.
        code += f"; assert sparse24.__file__.startswith({str(folder)!r}), 'another sparse24 is installed: remove it'"
    # From a folder without sources, as users import it.
    return runner.command("import", python("-c", code), env=env, timeout=120, cwd=scratch, echo=True).ok


def executable(path: Path, scratch: Path) -> Path:
    """The binary, or a copy of it that may be executed (files lose that bit on some ways here)."""
    if os.access(path, os.X_OK) or not path.exists():
        return path.resolve()
    copy = scratch / path.name
    shutil.copy(path, copy)
    copy.chmod(copy.stat().st_mode | stat.S_IXUSR)
    return copy


def gtest(runner: Runner, binary: Path, env: dict[str, str], scratch: Path, args: argparse.Namespace) -> Step:
    result = scratch / f"{binary.name}.xml"
    command = [str(binary), "--gtest_brief=1", f"--gtest_output=xml:{result}", f"--gtest_filter={args.gtest_filter}"]
    return runner.command(
        f"gtest {binary.name}", command, env=env, timeout=240, cwd=ROOT, detail=lambda: counts(result)
    )


def pytest(runner: Runner, args: argparse.Namespace, env: dict[str, str]) -> Step:
    result = args.out / "pytest.xml"
    options = ["-m", "gpu", "-q", "-ra", "--durations=10", "-p", "no:cacheprovider", f"--junitxml={result}"]
    if find_spec("xdist"):  # most tests wait for the host
        options += ["-n", str(workers())]
    command = python("-m", "pytest", str(ROOT / "tests" / "python"), *options, *args.pytest_args.split())
    return runner.command("pytest", command, env=env, timeout=360, cwd=ROOT, detail=lambda: counts(result))


def counts(xml: Path) -> str:
    """Totals and the first failing names of a JUnit or gtest report; a run that skipped everything proves nothing."""
    root = ElementTree.parse(xml).getroot()
    cases = list(root.iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None or c.get("result") == "skipped"]
    names = ", ".join(f"{c.get('classname')}.{c.get('name')}" for c in failed[:8])
    passed = len(cases) - len(failed) - len(skipped)
    text = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    if not passed or failed:
        raise StepFailed(f"{text} ({names})" if names else text)
    return text


def benches(runner: Runner, args: argparse.Namespace, env: dict[str, str]) -> None:
    for name in args.only:
        command, result, timeout = training_run(args) if name == "train_gpt" else bench(name, args)
        runner.command(
            f"bench {name}",
            command + args.bench_args.split(),
            env=env,
            timeout=timeout,
            cwd=ROOT,
            echo=True,
            detail=lambda path=result: verified(path),
        )


def bench(name: str, args: argparse.Namespace) -> tuple[list[str], Path, float]:
    """Command, its records, and after how many seconds it is stopped."""
    result = args.out / f"{name}.json"
    command = python("-m", "bench", name, "--out", str(result), "--budget", str(args.budget))
    command += ["--workers", str(workers())] if name in COMPILING else []
    command += ["--quick"] if args.quick else []
    command += ["--patterns", str(args.patterns.resolve())] if args.patterns else []
    return command, result, args.budget + 90


def training_run(args: argparse.Namespace) -> tuple[list[str], Path, float]:
    """The same for train_gpt, which ends by itself within the budget; called again, it goes on."""
    result = args.out / "train_gpt"
    command = python("-m", "bench", "train_gpt", "--out", str(result), "--time-limit", str(args.budget))
    # --quick: what the claim rests on; else the ablations too.
    command += ["--seeds", "0"] if args.quick else ["--recipe", "default,no_mask_reuse,no_permutation,no_split"]
    return command, result, args.budget + 15


def verified(path: Path) -> str:
    # Nothing of sparse24 is imported here: the package is there for the commands alone.
    files = [path] if path.is_file() else sorted(path.glob("*_seed*.json"))
    contents = [json.loads(file.read_text()) for file in files]
    records = [record for content in contents for record in (content if isinstance(content, list) else [content])]
    unfinished = sum(not r.get("complete", True) for r in records)
    text = f"{sum(r['verified'] for r in records)} of {len(records)} records verified"
    return f"{text}, {unfinished} runs unfinished" if unfinished else text


def sanitizers(runner: Runner, binaries: list[Path], env: dict[str, str], args: argparse.Namespace) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # Without torch's cache every tensor is an allocation of its own, so that a step beyond its end is seen.
    plain = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in SANITIZERS:
        base = [tool, "--tool", kind, "--error-exitcode", "99", "--print-limit", "20"]
        for binary in binaries:
            command = [*base, str(binary), "--gtest_brief=1", f"--gtest_filter={args.sanitizer_filter}"]
            runner.command(f"{kind} {binary.name}", command, env=env, timeout=300, cwd=ROOT)
        if args.sanitizer_pytest:
            tests = [str(ROOT / "tests" / "python"), "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"]
            command = [*base, "--target-processes", "all", *python("-m", "pytest", *tests)]
            command += ["-k", args.sanitizer_pytest]
            runner.command(f"{kind} pytest", command, env=plain, timeout=300, cwd=ROOT)


def finish(runner: Runner, args: argparse.Namespace) -> int:
    """summary.json, and the short table that ends the output."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    smi = shutil.which("nvidia-smi")
    machine = ""
    if smi:
        done = subprocess.run([smi, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        machine = done.stdout.strip()
    summary = {"ok": runner.ok, "machine": machine, "seconds": round(runner.elapsed(), 1), "steps": runner.records()}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\n{'step':<34}{'status':<12}{'seconds':>8}  detail")
    for step in runner.steps:
        print(f"{step.name[:33]:<34}{step.status:<12}{step.seconds:>8.1f}  {step.detail[:200]}")
    print(f"{'ALL WELL' if runner.ok else 'FAILED'} after {runner.elapsed():.0f} s; {machine}")
    return 0 if runner.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
