"""SPARSE24_SM_MARGIN, which is read once in a process: kernels on fewer multiprocessors compute the same."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch, sparse24
torch.manual_seed(0)
x, w1, w2 = (torch.randn(*shape, device="cuda").mul(0.05).bfloat16().requires_grad_()
             for shape in ((3000, 1024), (4096, 1024), (1024, 4096)))
out = sparse24.relu2_mlp(x, w1, w2, min_tokens=0)
y = torch.relu(x.float() @ w1.float().t()).bfloat16().float().square()
y = y * sparse24.analyze.top2_mask(y)
error = (out.float() - y @ w2.float().t()).norm() / out.float().norm()
out.sum().backward()
assert error < 2e-2 and all(t.grad.isfinite().all() for t in (x, w1, w2)), error
print("right", out.float().abs().sum().item())
"""


def run(margin):
    env = {**os.environ, "SPARSE24_SM_MARGIN": margin}
    return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("margin", ["", "0", "20", "129"])
def test_kernels_on_fewer_multiprocessors(cuda, margin):
    done = run(margin)
    assert done.returncode == 0 and done.stdout.startswith("right"), done.stderr


@pytest.mark.parametrize("margin", ["-1", "1000", "half"])
def test_what_is_no_margin(cuda, margin):
    done = run(margin)
    assert done.returncode != 0
    assert "expected SPARSE24_SM_MARGIN to be from 0 to " in done.stderr and f", got {margin}" in done.stderr
