"""Calls for inference with float8 copies, which are kept by the shape of the input and compared with the next ones."""

from importlib import import_module

import pytest
import torch
from compare import assert_same_bits
from convert_models import HIDDEN, D, WithModule, randomize
from data import normal
from torch import nn

import sparse24
from sparse24 import _C
from sparse24.mlp import choice

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


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_dense_float8_calls_predict_the_scale(monkeypatch, bias):
    """As on CUDA: the activation leaves as codes, by the bound of w1's float8 copy, again and after a change."""
    given = []

    def counted(*args):
        given.append(args)
        return sparse24.relu2_mlp_dense(*args)

    def would(*sizes, fp8, is_cuda):
        return choice.runs_dense_few(*sizes, fp8=fp8, is_cuda=True)

    # Not by their names: `sparse24.convert` is a function.
    run, again, inference = (import_module(f"sparse24.{n}") for n in ("convert.run", "convert.again", "mlp.inference"))
    for module in (run, inference):
        monkeypatch.setattr(module, "runs_dense_few", would)
    monkeypatch.setattr(inference, "relu2_mlp_dense", counted)
    monkeypatch.setitem(again._BELOW, counted, counted)
    monkeypatch.setattr(choice, "_dense", {(8, D, HIDDEN): 64})
    module = randomize(WithModule(bias=bias)).to(torch.bfloat16).eval()
    assert sparse24.convert(module, sparse24.ConvertConfig(dtype="fp8"), quiet=True).converted == [""]
    up, down = module.up_proj, module.down_proj
    x = normal(20, D, dtype=torch.bfloat16)
    for _ in range(2):
        (w1, s1), (w2, s2) = sparse24.quantize_fp8(up.weight), sparse24.quantize_fp8(down.weight)
        factor = None if bias else sparse24.bounding_factor(w1, s1)
        operands = x, w1, w2, up.bias, down.bias, s1, s2, None, factor
        given.clear()
        for _ in range(3):
            assert_same_bits(module(x), sparse24.relu2_mlp_dense(*operands))
        assert len(given) == 3 and all((len(args) < 9 or args[8] is None) == bias for args in given)
        up.weight.mul_(2)
    module(normal(65, D, dtype=torch.bfloat16))
    assert len(given) == 3
