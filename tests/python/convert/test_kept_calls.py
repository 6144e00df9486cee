"""Calls for inference with float8 copies, which are kept by the shape of the input and compared with the next ones."""

import pytest
import torch
from compare import assert_same_bits
from convert_models import D, WithModule, randomize
from data import normal
from torch import nn

import sparse24
from sparse24 import _C

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
@pytest.mark.usefixtures("not_by_few_tokens")
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


def test_facts():
    """One at a time: what does not hold of a dictionary or an object."""
    other, names = nn.ReLU(), {"a": 1.5, "hooks": {}, "more": {1: 2}, "module": object()}
    version = _C.class_version(nn.ReLU)
    facts = (
        ((names, "a", names["a"]), (names, "a", 2.5), (names, "b", None)),
        ((names, "b"), (names, "a"), (names, "more")),
        ((names, "module", id(names["module"])), (names, "module", id(other)), (names, "b", id(other))),
        ((names, "hooks"), (names, "more"), (names, "b")),
        ((names, 4), (names, 3), ({}, 1)),
        ((other, nn.ReLU, version), (other, nn.GELU, _C.class_version(nn.GELU)), (other, nn.ReLU, version + 1)),
    )
    holds = tuple(kind[0] for kind in facts)
    assert version != 0
    assert _C.unchanged(holds)
    assert _C.unchanged(tuple(2 * fact for fact in holds))
    for i, (_, *wrong) in enumerate(facts):
        for fact in wrong:
            assert not _C.unchanged((*holds[:i], fact, *holds[i + 1 :]))
            assert not _C.unchanged((*holds[:i], holds[i] + fact, *holds[i + 1 :]))
    for wrong in ((), holds[:-1], list(holds), (*holds[:-1], [])):
        with pytest.raises(TypeError, match="expected a tuple of six tuples"):
            _C.unchanged(wrong)
    with pytest.raises(TypeError, match="expected a class"):
        _C.class_version(other)
