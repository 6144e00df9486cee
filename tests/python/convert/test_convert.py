"""Conversion of the networks of a model: what is found, what it computes, what stays as it was, how it is undone."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from compare import assert_same_bits
from convert_models import (
    EXACT,
    HIDDEN,
    PAIRS,
    BothParameters,
    CastLinear,
    CountOps,
    D,
    Inline,
    Stack,
    WithModule,
    assert_near,
    gradients,
    masked,
    randomize,
)
from data import normal
from torch import nn

import sparse24


def inputs(device, dtype=torch.bfloat16, shape=(3, 11)):
    return normal(*shape, D, dtype=dtype, seed=5).to(device)


def build(make, device, dtype=torch.bfloat16):
    return randomize(make()).to(device, dtype)


NETWORKS = {
    **{f"{up}, {down}": (lambda n=(up, down): Inline(n), (up, down)) for up, down in PAIRS},
    "bias": (lambda: Inline(bias=True), PAIRS[0]),
    "bias of the first": (lambda: Inline(linear=lambda i, o, bias: nn.Linear(i, o, bias=o == HIDDEN)), PAIRS[0]),
    "activation module": (lambda: WithModule(bias=True), ("up_proj", "down_proj")),
    "parameters": (BothParameters, PAIRS[0]),
    "square parameters": (lambda: BothParameters(D, D), PAIRS[0]),
    "pow": (lambda: Inline(activation=lambda h: torch.relu(h) ** 2), PAIRS[0]),
    "clamp": (lambda: Inline(activation=lambda h: h.clamp(min=0).float().pow(2).type_as(h)), PAIRS[0]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_found_and_run_sparse(device, name):
    """Output and all gradients are those of the dense network with the mask on its activation."""
    make, names = NETWORKS[name]
    module = build(make, device)
    before = copy.deepcopy(module)
    report = sparse24.convert(module, EXACT, quiet=True)
    assert report.converted == [""] and not report.skipped
    with CountOps() as ops:
        actual = gradients(module, module, inputs(device))
    assert ops.sparse == 2  # the forward's, and the gradient of x
    assert_near(actual, gradients(before, lambda x: masked(before, names, x), inputs(device)), 2e-2)


def test_float32_weights_that_are_cast_in_the_call(device):
    """Gradients of master weights are in float32."""
    module = randomize(Inline(linear=CastLinear, bias=True)).to(device)
    before = copy.deepcopy(module)
    sparse24.convert(module, EXACT, quiet=True)
    actual = gradients(module, module, inputs(device))
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert_near(actual, gradients(before, lambda x: masked(before, PAIRS[0], x), inputs(device)), 2e-2)


def test_autocast(device):
    """As in a module whose weights and input are cast by hand."""
    module = randomize(Inline(bias=True)).to(device)
    cast = copy.deepcopy(module).to(torch.bfloat16)
    sparse24.convert(module, EXACT, quiet=True)
    sparse24.convert(cast, EXACT, quiet=True)
    x = inputs(device, torch.float32)
    with torch.autocast(device, torch.bfloat16), CountOps() as ops:
        out = module(x)
    assert ops.sparse == 1
    assert_same_bits(out, cast(x.to(torch.bfloat16)))


def test_zero_weights_hide_nothing(device):
    """An output layer that starts at zero makes every activation look the same."""
    zero = Stack(Inline(), Inline(activation=nn.functional.gelu), BothParameters()).to(device)
    for p in zero.parameters():
        nn.init.zeros_(p)
    assert sparse24.convert(zero, quiet=True).converted == ["layers.0", "layers.2"]


@pytest.mark.parametrize("linear", [nn.Linear, CastLinear])
def test_weights_on_the_meta_device(device, linear):
    with torch.device("meta"):
        module = Stack(Inline(linear=linear), BothParameters(), Inline(activation=nn.functional.gelu))
    assert sparse24.convert(module, EXACT, quiet=True).converted == ["layers.0", "layers.1"]
    assert all(p.is_meta for p in module.parameters())
    module = randomize(module.to_empty(device=device)).to(torch.bfloat16)
    with CountOps() as ops:
        module(inputs(device))
    assert ops.sparse == 2


@pytest.mark.parametrize("weights", ["tied", "second frozen", "both frozen"])
def test_tied_and_frozen_weights(device, weights):
    module = build(lambda: Inline(hidden=D if weights == "tied" else HIDDEN), device)
    if weights == "tied":
        module.c_proj.weight = module.c_fc.weight
    else:
        module.c_proj.requires_grad_(False)
        module.c_fc.requires_grad_(weights != "both frozen")
    before = copy.deepcopy(module)
    assert sparse24.convert(module, EXACT, quiet=True).converted == [""]
    with CountOps() as ops:
        actual = gradients(module, module, inputs(device))
    assert ops.sparse == 2
    assert_near(actual, gradients(before, lambda x: masked(before, PAIRS[0], x), inputs(device)), 2e-2)
    learns = [p.grad is not None for p in (module.c_fc.weight, module.c_proj.weight)]
    assert learns == {"tied": [True, True], "second frozen": [True, False], "both frozen": [False, False]}[weights]


def test_looking_changes_nothing(device):
    """Neither random numbers, nor modes, tensors, gradients or attributes."""

    class Random(Inline):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    module = build(lambda: Stack(Inline(bias=True), WithModule(nn.GELU()), Random()), device)
    module.layers[1].eval()
    state = {name: t.clone() for name, t in module.state_dict().items()}
    tensors = [id(t) for t in module.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(2, device=device)
    torch.manual_seed(3)
    sparse24.convert(module, quiet=True)
    assert_same_bits(torch.rand(2, device=device), expected)
    assert [id(t) for t in module.parameters()] == tensors
    assert [m.training for m in module.modules()] == [True] * 5 + [False] * 4 + [True] * 3
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert list(module.state_dict()) == list(state)
    for name, t in module.state_dict().items():
        assert_same_bits(t, state[name])
    assert set(module.layers[0].__dict__) == {*Inline().__dict__, "_sparse24"}


def test_what_is_around_a_module_stays(device):
    """Its hooks run, its class is a subclass, its signature and keyword arguments are its own."""
    module = build(WithModule, device)
    called = []
    module.register_forward_hook(lambda *_: called.append("hook"))
    signature = inspect.signature(module.forward)
    sparse24.convert(module, EXACT, quiet=True)
    assert isinstance(module, WithModule) and inspect.signature(module.forward) == signature
    x = inputs(device)
    with CountOps() as ops:
        assert_same_bits(module(hidden_states=x), module(x))
    assert ops.sparse == 2 and called == ["hook"] * 2
    handle = nn.modules.module.register_module_forward_hook(lambda mod, args, out: called.append(type(mod).__name__))
    with CountOps() as ops:
        module(x)
    handle.remove()
    assert ops.sparse == 1 and called[2:] == ["Sparse24WithModule", "hook"]  # an observer of all modules
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        module(x=x)
    assert "sparse24: precision=auto, min_tokens=0" in repr(module)


def test_revert(device):
    """Bit for bit, and nothing is left behind."""
    module = build(lambda: Stack(Inline(), WithModule(), nn.Linear(D, D)), device)
    before = copy.deepcopy(module)
    sparse24.convert(module, EXACT, quiet=True)
    sparse24.Schedule(10, dense_warmup_steps=1).apply(module, 0)
    module.layers[0].sparse24_enabled = False
    assert sparse24.revert(module) == ["layers.0", "layers.1"]
    for new, old in zip(module.modules(), before.modules(), strict=True):
        assert type(new) is type(old) and set(new.__dict__) == set(old.__dict__)
    for new, old in zip(*(gradients(m, m, inputs(device)) for m in (module, before)), strict=True):
        assert_same_bits(new, old)
    assert sparse24.revert(module) == []
    assert sparse24.convert(module, quiet=True).converted == ["layers.0", "layers.1"]


COPIES = {
    "deepcopy": copy.deepcopy,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("name", [*COPIES, "save"])
def test_copies_are_converted(device, name):
    module = build(lambda: Stack(Inline(), WithModule()), device)
    sparse24.convert(module, EXACT, quiet=True)
    module.layers[1].sparse = False
    if name == "save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = COPIES[name](module)
    with CountOps() as ops:
        out = other(inputs(device))
    assert ops.sparse == 1
    assert_same_bits(out, module(inputs(device)))
    nn.init.zeros_(other.layers[0].c_proj.weight)  # a copy of its own, not one that runs the first
    assert not torch.equal(other(inputs(device)), out)
    assert sparse24.revert(other) == ["layers.0", "layers.1"] and type(other.layers[0]) is Inline


def test_a_state_dict_is_that_of_the_model(device):
    module = build(Inline, device)
    sparse24.convert(module, EXACT, quiet=True)
    plain = Inline().to(device, torch.bfloat16)
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    with sparse24.disabled():
        assert_same_bits(module(inputs(device)), plain(inputs(device)))
