"""torch.utils.flop_counter counts the products of the dense network."""

import subprocess
import sys

import pytest
import torch
from data import normal
from torch.utils.flop_counter import FlopCounterMode

import sparse24
from sparse24 import Recipe

T, D, F = 128, 32, 192


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dense_features=0.0), Recipe(weight_gradients="dense")], ids=str)
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_network(device, precision, sparse, recipe):
    model = sparse24.nn.ReLU2MLP(
        D, F, precision=precision, min_tokens=0, recipe=recipe, device=device, dtype=torch.bfloat16
    )
    model.sparse = sparse
    x = normal(T, D, dtype=torch.bfloat16).to(device).requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(x)
    assert forward.get_total_flops() == 4 * T * D * F
    with FlopCounterMode(display=False) as step:
        model(x).sum().backward()
    assert step.get_total_flops() == 12 * T * D * F


def test_ops(device):
    x, w = normal(T, D, dtype=torch.bfloat16).to(device), normal(F, D, dtype=torch.bfloat16, seed=1).to(device)
    y = sparse24.linear_relu2(x, w)[0]
    along_features, along_tokens = sparse24.compress(y), sparse24.compress(y, dim=-2)
    grad = normal(T, 16, dtype=torch.bfloat16, seed=2).to(device)
    w2 = normal(16, F, dtype=torch.bfloat16, seed=3).to(device)
    for run, flops in (
        (lambda: sparse24.linear_relu2(x, w), 2 * T * D * F),
        (lambda: sparse24.linear_compress(x, w), 2 * T * D * F),
        (lambda: sparse24.mm(*along_features, w2.t()), 2 * T * F * 16),
        (lambda: sparse24.mm(*along_tokens, x, dim=-2, transpose_out=True), 2 * T * F * D),
        (lambda: sparse24.linear_gradient(grad, w2, *along_features), 2 * T * 16 * F),
        (lambda: sparse24.linear_relu2_gradient(grad, w2, y), 2 * T * 16 * F),
        (lambda: sparse24.mm_active(y[:7], w2.t()), 2 * 7 * F * 16),
        (lambda: sparse24.relu2_mlp_few(x[:6].view(2, 3, D), w, w2.t()), 2 * 6 * F * (D + 16)),
        (lambda: sparse24.relu2_mlp_dense(x[:6].view(2, 3, D), w, w2), 2 * 6 * F * (D + 16)),
        (lambda: sparse24.compress(y), 0),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == flops


def test_the_counter_is_imported_by_who_wants_it():
    program = (
        "import sys, sparse24; assert 'torch.utils.flop_counter' not in sys.modules; import torch;"
        "from torch.utils.flop_counter import flop_registry; assert torch.ops.sparse24.mm in flop_registry"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
