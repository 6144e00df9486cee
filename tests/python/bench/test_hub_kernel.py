"""What a wheel holds, as a wheel and as a kernel of the package `kernels`: `tests/wheel.py`, `tests/hub_kernel.py`.

The wheel is the running package, zipped.
"""

import importlib.util
import json
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import sparse24
from sparse24 import _C

ROOT = Path(__file__).parents[3]
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def tool(name):
    """A program of tests/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_kernel = tool("hub_kernel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = (
        tmp_path_factory.mktemp("wheel") / f"sparse24-0.1.0-{PYTHON}-{PYTHON}-manylinux_2_28_{platform.machine()}.whl"
    )
    package, compiled = Path(sparse24.__file__).parent, Path(_C.__file__)
    files = {
        source.relative_to(package): source
        for source in package.rglob("*")
        if source.suffix in (".py", ".pyi", ".typed")
    }
    files |= {Path(source.name): source for source in (compiled, compiled.with_name("libsparse24_torch.so"))}
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in files.items():
            archive.write(source, Path("sparse24") / name)
    return path


@pytest.fixture(scope="module")
def kernel(wheel, tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel")
    return out, hub_kernel.write([wheel], out, ["2.13"])


def python(code, cwd):
    """What a program prints, in a process that has not imported sparse24."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_of_builds():
    info = {"cuda": True, "cuda_version": "13.0.88", "torch_target": "2.10"}
    assert hub_kernel.variants(info, "aarch64", ["2.12", "2.13"]) == [
        "torch-stable-abi210-cu130-aarch64-linux",
        "torch212-cxx11-cu130-aarch64-linux",
        "torch213-cxx11-cu130-aarch64-linux",
    ]
    info = {"cuda": False, "cuda_version": "", "torch_target": "2.10"}
    assert hub_kernel.variants(info, "x86_64", []) == ["torch-stable-abi210-cpu-x86_64-linux"]


def test_imports_become_relative():
    lines = [
        "from sparse24 import _C, ops",
        "    from sparse24.mlp.scale import factor_of",
        "from sparse24.ops import (",
    ]
    text = "\n".join(lines)
    assert hub_kernel.relative(text, 0) == text.replace(" sparse24.", " .").replace(" sparse24 ", " . ")
    assert hub_kernel.relative(text, 1) == text.replace(" sparse24.", " ..").replace(" sparse24 ", " .. ")
    with pytest.raises(AssertionError, match="no relative form: import sparse24"):
        hub_kernel.relative("import sparse24\n", 0)


def test_a_kernel_is_imported_by_another_name(kernel):
    """As `kernels` does it: by the file, under the id, with no package sparse24 in sight."""
    out, (folder, *further) = kernel
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["name"] == "sparse24" and re.fullmatch(r"sparse24_[0-9a-f]{12}", metadata["id"])
    assert metadata["backend"]["type"] == ("cuda" if sparse24.build_info()["cuda"] else "cpu")
    assert [path.name for path in further] and all((path / "_C.pyi").is_file() for path in further)
    assert not any((folder / name).exists() for name in hub_kernel.LEFT_OUT)
    code = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location({metadata["id"]!r}, {str(folder / "__init__.py")!r})
kernel = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
x, w1, w2 = torch.randn(8, 64), torch.randn(128, 64), torch.randn(64, 128)
expected = kernel.relu2_mlp(x, w1, w2)
module = torch.nn.Module()
module.up_proj, module.down_proj = torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(128, 64, bias=False)
module.up_proj.weight.data, module.down_proj.weight.data = w1, w2
assert torch.equal(kernel.layers.ReLU2MLP.forward(module, x), expected)
assert kernel.nn.ReLU2MLP(64, 128)(x).shape == (8, 64)
assert not any(name == "sparse24" or name.startswith("sparse24.") for name in sys.modules), "an absolute import"
print(kernel.__version__)
"""
    assert python(code, out).strip() == sparse24.__version__


def test_the_package_kernels_loads_it(kernel):
    pytest.importorskip("kernels")
    out, _ = kernel
    code = f"""
import pathlib, torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize
from kernels import use_kernel_forward_from_hub, use_kernel_mapping

kernel = get_local_kernel(pathlib.Path({str(out)!r}))

@use_kernel_forward_from_hub("ReLU2MLP")
class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu().square())

layer = LocalLayerRepository(repo_path=pathlib.Path({str(out)!r}), layer_name="ReLU2MLP")
mlp, x = MLP(), torch.randn(8, 64)
with use_kernel_mapping({{"ReLU2MLP": {{"cpu": layer}}}}):
    mlp = kernelize(mlp, mode=Mode.TRAINING, device="cpu")
up, down = mlp.up_proj, mlp.down_proj
assert torch.equal(mlp(x), kernel.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias))
print(kernel.__name__)
"""
    assert python(code, out).startswith("sparse24_")


def test_wheels_of_several_pythons_make_one_kernel(wheel, tmp_path):
    other = tmp_path / wheel.name.replace(PYTHON, "cp39")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(other, "w") as theirs:
        for name in ours.namelist():
            theirs.writestr(name.replace(f"-{PYTHON[2:]}-", "-39-"), ours.read(name))
    (folder,) = hub_kernel.write([wheel, other], tmp_path / "kernel", [])
    modules = sorted(path.name for path in folder.glob("_C.*.so"))
    assert len(modules) == 2 and any("-39-" in name for name in modules)
    with pytest.raises(SystemExit, match="no wheel is for Python"):
        hub_kernel.write([other], tmp_path / "none", [])
    foreign = tmp_path / wheel.name.replace(
        platform.machine(), "aarch64" if platform.machine() == "x86_64" else "x86_64"
    )
    foreign.write_bytes(wheel.read_bytes())
    with pytest.raises(SystemExit, match="this machine is"):
        hub_kernel.write([foreign], tmp_path / "none", [])


def test_audit(wheel, tmp_path):
    """It passes ours, and refuses a wheel with a library of torch's Python side."""
    pytest.importorskip("elftools")
    import torch

    audit = tool("wheel").audit
    needed = audit(wheel)["libsparse24_torch.so"]
    assert "libtorch.so" in needed["needed"] and any(name.startswith("aoti_torch_") for name in needed["torch"])
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.write(Path(torch.__file__).parent / "lib" / "libtorch_python.so", "sparse24/_C.so")
    with pytest.raises(AssertionError, match="_C.so needs .*libtorch"):
        audit(tmp_path / "bad.whl")


def test_smoke():
    """The test of an installed package runs where this one is installed."""
    if not Path(sparse24.__file__).is_relative_to(sysconfig.get_path("platlib")):
        pytest.skip("sparse24 is not installed for this Python")
    done = subprocess.run([sys.executable, ROOT / "tests" / "smoke.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"sparse24 {sparse24.__version__} works")


def test_wheels_that_cibuildwheel_builds():
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux", ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = {f"cp3{minor}-manylinux_{machine}" for minor in range(10, 15) for machine in ("x86_64", "aarch64")}
    assert set(done.stdout.split()) == expected
