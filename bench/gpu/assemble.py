"""Puts a package sparse24 together around an op library that was built elsewhere.

libsparse24_torch.so needs neither Python nor one version of torch, so it can be carried to a machine; sparse24._C is
tied to a Python, and small: it is compiled there with g++. What the library was built with is read from the file
`build_info.json` beside it, as `python -c "import json, sparse24; print(json.dumps(sparse24.build_info()))"` writes it
on the machine that built it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
#: Folders of the host core, as in CMakeLists.txt.
CORE = ("core", "heuristics", "reference")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]


def assemble(library: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH that holds the package: Python sources, the given library, a freshly compiled _C."""
    package = folder / "sparse24"
    shutil.copytree(ROOT / "python" / "sparse24", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy2(library, package / "libsparse24_torch.so")
    objects = folder / "objects"
    objects.mkdir()
    compile_module(objects, package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", definitions(library))
    return folder


def definitions(library: Path) -> list[str]:
    """What CMake passes to cpp/core/build_info.cpp: from build_info.json, the rest from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = [r.removeprefix("torch>=") for r in project["project"]["dependencies"] if r.startswith("torch>=")]
    facts = {
        "version": project["project"]["version"],
        "cuda": True,
        "cuda_archs": "90a",
        "cuda_version": "",
        "cutlass": "",
        "compiler": "",
        "torch_target": floors[0] if floors else "",
    }
    recorded = library.with_name("build_info.json")
    if recorded.exists():
        given = json.loads(recorded.read_text())
        facts |= {key: given[key] for key in facts.keys() & given.keys()}
    defined = {f"SPARSE24_{key.upper()}": f'"{value}"' for key, value in facts.items() if key != "cuda"}
    defined["SPARSE24_WITH_CUDA"] = str(int(facts["cuda"]))
    return [f"-D{name}={value}" for name, value in defined.items()]


def compile_module(objects: Path, target: Path, defined: list[str]) -> None:
    """The host core and the pybind11 module, all files at once, with the running interpreter's headers."""
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    includes = [ROOT / "cpp" / "include", ROOT / "cpp", pybind11.get_include(), sysconfig.get_path("include")]
    sources = [ROOT / "cpp" / "pybind" / "module.cpp"]
    sources += [path for folder in CORE for path in sorted((ROOT / "cpp" / folder).glob("*.cpp"))]

    def compile_one(source: Path) -> Path:
        result = objects / f"{source.parent.name}_{source.stem}.o"
        own = defined if source.stem == "build_info" else []
        run([compiler, *FLAGS, *own, *(f"-I{path}" for path in includes), "-c", str(source), "-o", str(result)])
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, sources))
    run([compiler, "-shared", "-pthread", *map(str, compiled), "-o", str(target)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
