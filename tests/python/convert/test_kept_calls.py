"""Calls for inference with float8 copies, which are kept by the shape of the input and compared with the next ones."""

import pytest
import torch
from compare import assert_same_bits
from convert_models import D, WithModule, randomize
from data import normal
from torch import nn

import sparse24

CHANGES = {
    "a new weight": lambda m: setattr(m.up_proj, "weight", nn.Parameter(m.up_proj.weight * 2)),
    "a new bias": lambda m: setattr(m.up_proj, "bias", nn.Parameter(m.up_proj.bias + 1)),
    "no bias": lambda m: setattr(m.down_proj, "bias", None),
    "a weight in place": lambda m: m.up_proj.weight.mul_(2),
    "dense": lambda m: setattr(m, "sparse", False),
    "nothing": lambda m: None,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_sparse_calls_unlike_the_one_before(device, change):
    module = randomize(WithModule(bias=True)).to(device, torch.bfloat16).eval()
    config = sparse24.ConvertConfig(dtype="fp8", min_tokens=0)
    assert sparse24.convert(module, config, quiet=True).converted == [""]

    def check(x):
        operands = [getattr(layer, name) for name in ("weight", "bias") for layer in (module.up_proj, module.down_proj)]
        how = {"precision": "fp8", "min_tokens": 0, "sparse": module.sparse}
        assert_same_bits(module(x), sparse24.relu2_mlp(x, *operands, **how))

    x = normal(70, D, dtype=torch.bfloat16).to(device)
    for shape in ((70, D), (7, 10, D), (70, D)):
        check(x.view(shape))
        check(x.view(shape))
    assert list(module._copies.calls) == [(70, D), (7, 10, D)]
    with torch.inference_mode():
        check(x.clone())
    CHANGES[change](module)
    check(x)
    check(2 * x)
    with torch.enable_grad():
        assert module(x).requires_grad


@torch.no_grad()
def test_few_shapes_are_kept():
    module = randomize(WithModule()).eval()
    sparse24.convert(module, sparse24.ConvertConfig(dtype="fp8", min_tokens=0), quiet=True)
    for tokens in range(1, 100):
        module(normal(tokens, D, dtype=torch.float32))
    assert 0 < len(module._copies.calls) <= 64
