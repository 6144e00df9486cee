"""Changes the code in ways that the tests must notice, one at a time, and tells which they do not.

    python tests/mutate.py [--only NAME] [--list]

The changes and the test that each must break are listed in `mutants.toml`. They are made in a copy of the tree,
never in the checkout. Python tests run with the libraries of the installed package; C++ is built there,
without kernels: the host tests everywhere, those that run the kernels' epilogues on the host where there is an nvcc
(its headers are needed) and the CUTLASS headers. The exit status is 1 if a mutant survives, or if one cannot be tried.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
#: What the copy holds.
TREE = ("CMakeLists.txt", "pyproject.toml", "cmake", "cpp", "cuda", "python", "tests")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", ".*")
HOST = "sparse24_host_tests"
TIMEOUT = 900  # of one command, in seconds: what never ends is noticed too
KILLED, SURVIVED, SKIPPED = "killed", "SURVIVED", "skipped"


class Mutant(NamedTuple):
    """A change of one file, and the test that it must break."""

    area: str
    name: str
    file: str
    before: str
    after: str
    test: str  # "file::function" below tests/python, or "executable:Suite.Name"

    @property
    def emulated(self) -> bool:
        """Whether the test runs the kernels' code on the host."""
        return "::" not in self.test and not self.test.startswith(HOST)


def read_mutants() -> list[Mutant]:
    """Those of mutants.toml."""
    mutants = []
    for of_file in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["changes"]:
        file, tests = of_file["file"], of_file["tests"]
        for name, before, after, test in of_file["mutants"]:
            if ":" not in test:
                test = f"{tests}::{test}" if tests.endswith(".py") else f"{tests}:{test}"
            mutants.append(Mutant(of_file["area"], name, file, before, after, test))
    return mutants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="a name, an area or a pattern of either")
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="of the copy and its builds")
    options = parser.parse_args(arguments)
    chosen = list(select(options.only))
    if not chosen:
        print(f"mutate: expected a mutant or an area, got {options.only}")
        return 1
    if options.list:
        for mutant in chosen:
            print(f"{mutant.area}: {mutant.name}  ({mutant.file}; {mutant.test})")
        return 0
    return report(run(chosen, Copy(options.folder.resolve())))


def select(wanted: Iterable[str] | None) -> Iterator[Mutant]:
    """Those whose name or area matches one of `wanted`; all without it."""
    for mutant in read_mutants():
        if wanted is None or any(fnmatch(text, w) for text in (mutant.name, mutant.area) for w in wanted):
            yield mutant


class Copy:
    """A copy of the tree that is built and tested."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.builds = {True: folder / "emulated", False: folder / "host"}
        self._sound: dict[str, bool] = {}
        self.refresh()

    def refresh(self) -> None:
        """Make it equal the checkout. What did not change keeps its time: builds stay incremental."""
        fresh = self.tree.with_name("fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        for name in TREE:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, fresh / name, ignore=NOT_COPIED)
            else:
                fresh.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, fresh / name)
        for path in fresh.rglob("*"):
            before = self.tree / path.relative_to(fresh)
            if path.is_file() and before.is_file() and before.read_bytes() == path.read_bytes():
                shutil.copystat(before, path)
            elif path.is_file():
                os.utime(path)
        shutil.rmtree(self.tree, ignore_errors=True)
        fresh.rename(self.tree)
        package = importlib.util.find_spec("sparse24")
        for folder in (package and package.submodule_search_locations) or ():
            for library in Path(folder).glob("*.so"):
                shutil.copy2(library, self.tree / "python" / "sparse24")

    def check(self, tests: Iterable[str]) -> None:
        """Run those of pytest at once, on the tree as it is: much faster than each by itself."""
        selectors = sorted({test for test in tests if "::" in test})
        if selectors and self._passes_pytest(*selectors):
            self._sound |= dict.fromkeys(selectors, True)

    def sound(self, test: str) -> bool:
        """Whether a test passes on the tree as it is; run once."""
        if test not in self._sound:
            self._sound[test] = self.passes(test)
        return self._sound[test]

    def passes(self, test: str) -> bool:
        """Run the test of a mutant."""
        if "::" in test:
            return self._passes_pytest(test)
        executable, name = test.split(":")
        build = self._build(executable)
        suite, case = name.split(".")
        tests = f"--gtest_filter={suite}.{case}:*/{suite}.{case}/*:{suite}/*.{case}"
        out = _call([build / "tests" / "cpp" / executable, tests, "--gtest_brief=1"], cwd=build)
        if out.returncode == 0 and " 0 tests " in out.stdout:
            raise LookupError(f"no test is called {name}")
        return out.returncode == 0

    def _passes_pytest(self, *tests: str) -> bool:
        # Forked from a process that has imported torch, which takes longer than most tests.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "torch", "torch._dynamo", "torch.testing._internal.two_tensor"])
        log = self.tree.with_name("pytest.log")
        process = context.Process(target=_run_pytest, args=(self.tree, tests, log))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
        elif process.exitcode not in (0, 1):  # of pytest: tests passed, or some failed
            raise LookupError(f"{tests} cannot be run:\n{log.read_text()[-2000:]}")
        return process.exitcode == 0

    def _build(self, executable: str) -> Path:
        emulated = executable != HOST
        build = self.builds[emulated]
        configured = build / "configured"
        if not configured.exists():
            # Compiled quickly rather than well; and a mutant may leave something unused.
            options = ["-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DCMAKE_COMPILE_WARNING_AS_ERROR=OFF"]
            options += ["-DSPARSE24_TESTS=ON", "-DSPARSE24_PYTHON=OFF"]
            options += [f"-DSPARSE24_CUDA={'ON' if emulated else 'OFF'}", f"-DPython_EXECUTABLE={sys.executable}"]
            if emulated:
                options.append(f"-DCUTLASS_INCLUDE_DIR={_cutlass()}")
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            self._make(["cmake", "-S", self.tree, "-B", build, *generator, *options])
            configured.touch()
        self._make(["cmake", "--build", build, "--parallel", str(os.cpu_count()), "--target", executable])
        return build

    def _make(self, command: list[object]) -> None:
        out = _call(command, cwd=self.tree)
        if out.returncode != 0:
            raise RuntimeError(f"it does not compile:\n{out.stdout[-3000:]}")


def run(mutants: list[Mutant], copy: Copy, baseline: bool = True) -> list[tuple[Mutant, str, float]]:
    """Try each of `mutants`; with `baseline` see first that its tests pass without it."""
    results = []
    if baseline:
        copy.check(mutant.test for mutant in mutants)
    for mutant in mutants:
        begin = time.monotonic()
        result = _try(mutant, copy, baseline)
        results.append((mutant, result, time.monotonic() - begin))
        print(f"{result:9} {results[-1][2]:6.1f} s  {mutant.area}: {mutant.name}", flush=True)
    return results


def _try(mutant: Mutant, copy: Copy, baseline: bool) -> str:
    if mutant.emulated and not (shutil.which("nvcc") and _cutlass()):
        return SKIPPED
    file = copy.tree / mutant.file
    text = file.read_text()
    if text.count(mutant.before) != 1:
        return f"BROKEN: its text stands {text.count(mutant.before)} times in {mutant.file}"
    try:
        if baseline and not copy.sound(mutant.test):
            return f"BROKEN: {mutant.test} fails without it"
        file.write_text(text.replace(mutant.before, mutant.after))
        return SURVIVED if copy.passes(mutant.test) else KILLED
    except (LookupError, RuntimeError) as problem:
        return f"BROKEN: {problem}"
    finally:
        file.write_text(text)


def report(results: list[tuple[Mutant, str, float]]) -> int:
    """Print the score by area; 1 unless every mutant that was tried is killed."""
    areas: dict[str, Counter[str]] = {}
    for mutant, result, _ in results:
        areas.setdefault(mutant.area, Counter())[result.partition(":")[0]] += 1
    print("\n| area | killed | of | skipped |\n|---|---|---|---|")
    total = Counter(result for of_area in areas.values() for result in of_area.elements())
    for area, counts in (*areas.items(), ("all", total)):
        print(f"| {area} | {counts[KILLED]} | {counts.total() - counts[SKIPPED]} | {counts[SKIPPED]} |")
    return 0 if total[KILLED] + total[SKIPPED] == len(results) else 1


def _run_pytest(tree: Path, tests: tuple[str, ...], log: Path) -> None:
    """Run tests on the package of `tree`, in a process of its own."""
    import pytest

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree / "python"))
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={tree}", f"--config-file={tree / 'pyproject.toml'}"]
    status = pytest.main([*options, *(f"tests/python/{test}" for test in tests)])
    origin = str(getattr(sys.modules.get("sparse24"), "__file__", tree))
    sys.exit(int(status) if Path(origin).is_relative_to(tree) else f"{origin} was imported, not that of the copy")


def _cutlass() -> str:
    """Headers of CUTLASS: those of the build's own environment, else of the Python package."""
    given = os.environ.get("CUTLASS_INCLUDE_DIR")
    package = importlib.util.find_spec("cutlass_library")
    folders = (
        [given] if given else [f"{f}/source/include" for f in (package and package.submodule_search_locations) or ()]
    )
    return next((f for f in folders if Path(f, "cutlass", "version.h").exists()), "")


def _call(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            **options,  # type: ignore[call-overload]
        )
    except subprocess.TimeoutExpired as expired:
        return subprocess.CompletedProcess(command, 1, stdout=str(expired.stdout or ""))


if __name__ == "__main__":
    sys.exit(main())
