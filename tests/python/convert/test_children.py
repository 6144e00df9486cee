"""`ReLU2MLP` looks at its layers: what hooks, wraps, prunes or replaces them runs, and `quantize_` refuses it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from convert_models import HIDDEN, CastLinear, CountOps, D, Wrapper, assert_near, gradients, randomize
from data import normal
from test_convert_compile import counter  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from sparse24.nn import QuantizedLinear, ReLU2MLP


class Adapter(nn.Module):
    """Low-rank, with the interface of PEFT: its weight is that of the layer inside."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Parameter(torch.ones(rank, base.in_features, device=base.weight.device, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.ones(base.out_features, rank, device=base.weight.device, dtype=base.weight.dtype))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.t() @ self.b.t()


class AdaptedLinear(nn.Linear):
    """An adapter that is a layer."""

    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def wrapped(kind):
    def change(mlp):
        mlp.up_proj, mlp.down_proj = kind(mlp.up_proj), kind(mlp.down_proj)

    return change


def replaced(kind):
    def change(mlp):
        for name in ("up_proj", "down_proj"):
            old = getattr(mlp, name)
            new = kind(old.in_features, old.out_features, False, device=old.weight.device, dtype=old.weight.dtype)
            new.load_state_dict(old.state_dict())
            setattr(mlp, name, new)

    return change


def patch(mlp):
    layer = mlp.up_proj
    layer.forward = lambda x: F.linear(x, layer.weight) + 1


#: Changes, and what is said of them.
CHANGES = {
    "forward hook": (lambda m: m.up_proj.register_forward_hook(lambda *a: a[2] + 1), "up_proj has hooks"),
    "forward pre-hook": (lambda m: m.down_proj.register_forward_pre_hook(lambda _, a: a[0] + 1), "down_proj has hooks"),
    "backward hook": (lambda m: m.up_proj.register_full_backward_hook(lambda *_: None), "up_proj has hooks"),
    "backward pre-hook": (lambda m: m.up_proj.register_full_backward_pre_hook(lambda *_: None), "up_proj has hooks"),
    "patched": (patch, "the forward of up_proj is patched"),
    "adapter": (wrapped(Adapter), "up_proj is a test_children.Adapter, not a torch.nn.Linear"),
    "wrapper": (wrapped(Wrapper), "up_proj is a convert_models.Wrapper, not a torch.nn.Linear"),
    "subclass": (replaced(AdaptedLinear), "up_proj is a test_children.AdaptedLinear, not a torch.nn.Linear"),
    "casting subclass": (replaced(CastLinear), "up_proj is a convert_models.CastLinear, not a torch.nn.Linear"),
    "pruned": (lambda m: prune.l1_unstructured(m.up_proj, "weight", 0.5), "up_proj has hooks"),
    "weight norm by hook": (lambda m: weight_norm(m.up_proj), "up_proj has hooks"),
    "spectral norm by hook": (lambda m: spectral_norm(m.up_proj), "up_proj has hooks"),
    "weight norm": (lambda m: parametrizations.weight_norm(m.up_proj), "up_proj is a .*ParametrizedLinear, not a"),
    "parametrised": (
        lambda m: parametrize.register_parametrization(m.down_proj, "weight", Doubled()),
        "down_proj is a .*ParametrizedLinear, not a torch.nn.Linear",
    ),
    "quantised": (
        lambda m: setattr(m.up_proj, "weight", nn.Parameter(TwoTensor(m.up_proj.weight, m.up_proj.weight))),
        "the weight of up_proj is distributed or quantised",
    ),
    "compiled": (
        lambda m: setattr(m, "up_proj", torch.compile(m.up_proj, backend="eager")),
        "up_proj is a .*OptimizedModule, not a torch.nn.Linear",
    ),
}
FILTER = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*deprecated:FutureWarning", "ignore:.*spectral_norm.*deprecated:FutureWarning"
)


def build(device, dtype=torch.bfloat16, **options):
    return randomize(ReLU2MLP(D, HIDDEN, min_tokens=0, **options)).to(device, dtype)


def called(mlp, x):
    return mlp.down_proj(torch.relu(mlp.up_proj(x)).square())


def inputs(device, dtype=torch.bfloat16):
    return normal(21, D, dtype=dtype, seed=5).to(device)


@FILTER
@pytest.mark.parametrize("name", CHANGES)
def test_layers_are_called(device, name):
    """Dense, with a warning, once; output and gradients are those of the layers."""
    change, reason = CHANGES[name]
    mlp = build(device).eval()
    change(mlp)
    x = inputs(device)
    with CountOps() as ops, pytest.warns(UserWarning, match=rf"ReLU2MLP calls its layers and runs dense: {reason}"):
        mlp(x)
    assert not any("sparse24" in op for op in ops.calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = [None if t is None else t.clone() for t in gradients(mlp, mlp, x)]
        mlp.sparse = False
        assert_same_bits(mlp(x), actual[0])
    assert_near(actual, gradients(mlp, lambda x: called(mlp, x), x), 1e-6)


def test_plain_layers_are_read(device):
    """As are attributes in the place of parameters, tied and swapped weights."""
    mlp, x = build(device), inputs(device)
    expected = mlp(x)

    def check(module, call=None):
        with CountOps() as ops:
            assert_same_bits((call or module)(x), expected)
        assert ops.sparse == 1

    parameters = dict(mlp.named_parameters())
    zeros = build(device)
    check(zeros, lambda x: torch.func.functional_call(zeros, parameters, (x,)))
    zeros.up_proj, zeros.down_proj = mlp.up_proj, mlp.down_proj
    check(zeros)
    attribute = copy.deepcopy(mlp)
    weight = attribute.up_proj._parameters.pop("weight")
    attribute.up_proj.weight = weight.detach()
    check(attribute)
    masked = copy.deepcopy(mlp)
    prune.identity(masked.up_proj, "weight")
    prune.remove(masked.up_proj, "weight")
    check(masked)
    handle = mlp.up_proj.register_forward_hook(print)
    handle.remove()
    check(mlp)


def test_master_weights(device):
    """Layers of torch do not cast float32 weights to the input's dtype."""
    mlp, x = build(device, torch.float32), inputs(device)
    mlp.up_proj.register_forward_hook(lambda *a: a[2] + 1)
    with pytest.warns(UserWarning, match="up_proj has hooks"):
        out = mlp(x)
    assert out.dtype == torch.bfloat16
    assert_near([out], [called(copy.deepcopy(mlp).to(torch.bfloat16), x)], 2e-2)


def test_quantised_layers_are_called(device):
    mlp, x = build(device).quantize_(), inputs(device)
    mlp.up_proj.register_forward_hook(lambda *a: a[2] + 1)
    with pytest.warns(UserWarning, match="up_proj has hooks"):
        assert_same_bits(mlp(x), called(mlp, x))


def test_a_patched_class(device, monkeypatch):
    mlp, x = build(device), inputs(device)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) + 1)
    with pytest.warns(UserWarning, match="the forward of up_proj is patched in its class"):
        assert_same_bits(mlp(x), called(mlp, x))


@pytest.mark.parametrize("name", ["forward hook", "patched", "adapter", "weight norm", "subclass"])
def test_compiled(device, counter, name):  # noqa: F811
    """One graph, without breaks."""
    mlp, x = build(device), inputs(device)
    with torch.no_grad():
        sparse = mlp(x)
        compiled = torch.compile(mlp, backend=counter, fullgraph=True)
        if name in ("adapter", "subclass"):  # Dynamo does not guard on the others
            assert_same_bits(compiled(x), sparse)
        CHANGES[name][0](mlp)
        frames = counter.frame_count
        assert_near([compiled(x)], [called(mlp, x)], 1e-2)
        compiled(x)
    assert counter.frame_count == frames + 1


# ---- quantize_ -------------------------------------------------------------------------------------------------------

UNQUANTISED = {
    **CHANGES,
    "state hook": (lambda m: m.up_proj._register_load_state_dict_pre_hook(lambda *_: None), "up_proj has hooks"),
    "attribute": (
        lambda m: setattr(m.down_proj, "weight", m.down_proj._parameters.pop("weight").detach()),
        "down_proj has more than a weight and a bias, or other than parameters",
    ),
    "buffer": (lambda m: m.up_proj.register_buffer("mask", torch.ones(1)), "up_proj has more than a weight"),
    "child": (lambda m: m.up_proj.add_module("lora", nn.Linear(2, 2)), "up_proj has more than a weight"),
}


@FILTER
@pytest.mark.parametrize("name", UNQUANTISED)
def test_more_than_weights_is_not_quantised(device, name):
    mlp = build(device)
    change, reason = UNQUANTISED[name]
    change(mlp)
    before = [(type(m), dict(m.__dict__)) for m in mlp.modules()]
    with pytest.raises(
        RuntimeError, match=rf"^sparse24\.nn\.ReLU2MLP: expected layers of a .* to quantise, got: {reason}"
    ):
        mlp.quantize_()
    assert [(type(m), dict(m.__dict__)) for m in mlp.modules()] == before


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ((32, 40, 32), "w1 to have a multiple of 16 rows for fp8, got 40"),
        ((32, 64, 20), "w2 to have a multiple of 16 rows for fp8, got 20"),
        ((20, 64, 32), "w1 to have a multiple of 16 columns for fp8, got 20"),
    ],
)
def test_sizes_that_are_not_quantised(device, sizes, rule):
    mlp = ReLU2MLP(*sizes, device=device, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {rule}"):
        mlp.quantize_()
    assert [type(m) for m in mlp.children()] == [nn.Linear] * 2
    mlp(torch.ones(4, sizes[0], device=device, dtype=torch.bfloat16))


def test_weights_that_are_not_quantised(device):
    """The second layer's; and one that is quantised already stays."""
    mlp = build(device)
    mlp.down_proj.double()
    with pytest.raises(RuntimeError):
        mlp.quantize_()
    assert [type(m) for m in mlp.children()] == [nn.Linear] * 2
    mlp.down_proj.bfloat16()
    mlp.up_proj = QuantizedLinear(mlp.up_proj)
    first = mlp.up_proj
    assert mlp.quantize_().up_proj is first and type(mlp.down_proj) is QuantizedLinear


# ---- states ----------------------------------------------------------------------------------------------------------


def tensors(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_float_state_into_a_quantised_module(device, bias, strict):
    """Is quantised."""
    source, x = build(device, bias=bias), inputs(device)
    target = build(device, bias=bias)
    for p in target.parameters():
        nn.init.zeros_(p)
    model = nn.Sequential(target.quantize_())
    given = {f"0.{name}": t for name, t in source.state_dict().items()}
    assert not any(model.load_state_dict(given, strict=strict))
    assert list(given) == [f"0.{name}" for name in source.state_dict()]
    assert_same_bits(model(x), copy.deepcopy(source).quantize_()(x))
    layer = QuantizedLinear(nn.Linear(D, HIDDEN, bias=bias, device=device, dtype=torch.bfloat16))
    layer.load_state_dict(source.up_proj.state_dict(), strict=strict)
    assert_same_bits(layer.weight, target.up_proj.weight)


@pytest.mark.parametrize("strict", [False, True])
def test_quantised_state_into_a_float_module(device, strict):
    """Is dequantised."""
    source, x = build(device, bias=True).quantize_(), inputs(device)
    target = build(device, torch.float32, bias=True)
    assert not any(target.load_state_dict(source.state_dict(), strict=strict))
    assert [type(m) for m in target.children()] == [nn.Linear] * 2
    for layer, quantised in zip(target.children(), source.children(), strict=True):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, quantised.weight.float() * quantised.weight_scale.unsqueeze(1))
    assert_near([called(target.bfloat16(), x)], [called(source, x)], 2e-2)


def test_a_part_of_a_state(device):
    target, source = build(device).quantize_(), build(device)
    before = tensors(target)
    target.load_state_dict({"up_proj.weight": torch.zeros_like(source.up_proj.weight)}, strict=False)
    assert target.up_proj.weight.float().count_nonzero() == 0
    assert_same_bits(target.down_proj.weight, before["down_proj.weight"])


WRONG_STATES = {
    "no scale": lambda s: s.pop("down_proj.weight_scale"),
    "no weight": lambda s: s.pop("down_proj.weight"),
    "scales": lambda s: s.update({"down_proj.weight_scale": torch.ones(3)}),
    "shape": lambda s: s.update({"down_proj.weight": torch.ones(3, 3)}),
    "float beside a scale": lambda s: s.update({"down_proj.weight": torch.ones(D, HIDDEN)}),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", WRONG_STATES)
def test_states_that_do_not_fit(device, name, strict):
    """Are refused before either layer has changed."""
    target, state = build(device).quantize_(), dict(build(device, bias=False).quantize_().state_dict())
    state = {key: torch.zeros_like(t) if t.dtype == torch.float32 else t for key, t in state.items()}
    WRONG_STATES[name](state)
    before = tensors(target)
    with pytest.raises(RuntimeError, match=r"^sparse24\.nn: expected the state to have down_proj\.weight"):
        target.load_state_dict(state, strict=strict)
    for key, t in target.state_dict().items():
        assert_same_bits(t, before[key])
    if name in ("no scale", "scales"):
        target = build(device)
        before = tensors(target)
        with pytest.raises(RuntimeError, match=r"^sparse24\.nn: expected the state to have down_proj\.weight_scale"):
            target.load_state_dict(state, strict=strict)
        for key, t in target.state_dict().items():
            assert_same_bits(t, before[key])
