"""Try an installed sparse24, with nothing of this repository: python tests/smoke.py

Run from any folder, with the Python it is installed for. It needs torch and NumPy alone: no compiler, no GPU.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import sparse24


def masked(h: torch.Tensor) -> torch.Tensor:
    """The squared ReLU with the two largest of each four kept, the lower index first where they are equal."""
    y = h.relu().square()
    groups = y.unflatten(-1, (-1, 4))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups).scatter(-1, order[..., :2], 1)
    return (groups * keep).flatten(-2)


def main() -> None:
    home = Path(sparse24.__file__).parent
    assert home.is_relative_to(sysconfig.get_path("platlib")), f"sparse24 is of {home}, and not installed"
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(100, 64), torch.randn(256, 64), torch.randn(64, 256)

    values, meta = sparse24.compress(x @ w1.t(), "relu2")
    assert torch.equal(sparse24.decompress(values, meta, 100, 256), masked(x @ w1.t()))
    w1.requires_grad_(), w2.requires_grad_()
    out = sparse24.relu2_mlp(x, w1, w2)
    torch.testing.assert_close(out, masked(x @ w1.t()) @ w2.t(), rtol=1e-4, atol=1e-2)
    out.sum().backward()
    assert w1.grad.isfinite().all() and w2.grad.isfinite().all()

    mlp = sparse24.nn.ReLU2MLP(64, 256, dtype=torch.bfloat16).quantize_()
    assert mlp(x.bfloat16()).isfinite().all()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), sparse24.nn.ReLU2MLP(64, 256))
    assert str(sparse24.convert(model, quiet=True)).startswith("sparse24: converted")
    info = subprocess.run([sys.executable, "-m", "sparse24", "info"], capture_output=True, text=True, check=True).stdout
    assert sparse24.__version__ in info and torch.__version__ in info
    assert importlib.util.find_spec("sparse24.vllm") and (home / "py.typed").is_file()
    compilers = [name for name in ("cc", "gcc", "c++", "g++", "clang", "nvcc") if shutil.which(name)]
    print(
        f"sparse24 {sparse24.__version__} works under torch {torch.__version__}, Python {sys.version.split()[0]}; ",
        end="",
    )
    print(f"compilers here: {', '.join(compilers) or 'none'}")


if __name__ == "__main__":
    main()
