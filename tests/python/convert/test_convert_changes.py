"""What a converted module notices when it is called: other children, hooks, attributes, inputs."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from convert_models import EXACT, CountOps, D, Inline, SquaredReLU, WithModule, Wrapper, randomize, relu2
from data import normal
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

import sparse24
from sparse24.convert.again import run_again


class Nested(WithModule):
    """The activation is two modules deep, and a layer of no effect behind it."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Identity(), SquaredReLU()))
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(super().forward(x))


class Attributes(WithModule):
    """What its forward reads is in the instance, in its class, or a method."""

    clip = float("inf")

    def __init__(self):
        super().__init__()
        self.p = 0.0
        self.scale = 1
        self.function = relu2
        self.partial = functools.partial(torch.mul, other=1.0)

    def act(self, h):
        return self.function(h).clamp(max=self.clip)

    def forward(self, x):
        h = self.partial(self.act(self.up_proj(x)))
        return F.dropout(self.scale * self.down_proj(h), self.p, self.training)


LATER = {
    "hook": (
        WithModule,
        lambda m: m.up_proj.register_forward_hook(lambda mod, args, out: out + 1),
        "up_proj has hooks",
    ),
    "pre-hook": (
        WithModule,
        lambda m: m.act_fn.register_forward_pre_hook(lambda mod, args: args[0] + 1),
        "act_fn has hooks",
    ),
    "backward hook": (
        WithModule,
        lambda m: m.up_proj.register_full_backward_hook(lambda *_: None),
        "up_proj has hooks",
    ),
    "hook further down": (
        Nested,
        lambda m: m.act_fn[1].register_forward_hook(lambda mod, args, out: out + 1),
        "act_fn.1 has hooks",
    ),
    "patch": (
        WithModule,
        lambda m: setattr(m.up_proj, "forward", lambda x: x @ m.up_proj.weight.t() + 1),
        "the forward of up_proj is patched",
    ),
    "adapter": (WithModule, lambda m: setattr(m, "up_proj", Wrapper(m.up_proj)), "up_proj is not a Linear any more"),
    "activation": (WithModule, lambda m: setattr(m, "act_fn", nn.GELU()), "act_fn is not a SquaredReLU any more"),
    "activation further down": (
        Nested,
        lambda m: m.act_fn.__setitem__(1, nn.ReLU()),
        "act_fn.1 is not a SquaredReLU any more",
    ),
    "longer": (Nested, lambda m: m.act_fn.append(nn.ReLU()), "the children of act_fn are others than at conversion"),
    "dropout": (
        WithModule,
        lambda m: m.add_module("drop", nn.Dropout()),
        "its children are others than at conversion",
    ),
    "raised dropout": (Nested, lambda m: setattr(m.drop, "p", 0.9), "its attribute drop.p has changed"),
    "functional dropout": (Attributes, lambda m: setattr(m, "p", 0.9), "its attribute p has changed"),
    "clip of the class": (Attributes, lambda m: setattr(m, "clip", 0.5), "its attribute clip has changed"),
    "scale": (Attributes, lambda m: setattr(m, "scale", 2), "its attribute scale has changed"),
    "type of a scale": (Attributes, lambda m: setattr(m, "scale", True), "its attribute scale has changed"),
    "function": (Attributes, lambda m: setattr(m, "function", F.gelu), "its attribute function has changed"),
    "partial": (
        Attributes,
        lambda m: setattr(m, "partial", functools.partial(torch.mul, other=2.0)),
        "its attribute partial has changed",
    ),
    "method": (Attributes, lambda m: setattr(m, "act", torch.tanh), "its attribute act has changed"),
    "deleted": (Attributes, lambda m: delattr(m, "p") or setattr(type(m), "p", 0.5), "its attribute p has changed"),
    "parametrised": (
        WithModule,
        lambda m: parametrizations.weight_norm(m.up_proj),
        "up_proj is not a Linear any more",
    ),
    "pruned": (WithModule, lambda m: prune.l1_unstructured(m.up_proj, "weight", 0.5), "up_proj has hooks"),
    "subclass": (
        WithModule,
        lambda m: setattr(m.up_proj, "weight", nn.Parameter(TwoTensor(m.up_proj.weight, m.up_proj.weight))),
        "the weight of up_proj is distributed or quantised",
    ),
}


def build(make, device, config=EXACT):
    module = randomize(make()).to(device, torch.bfloat16)
    before = copy.deepcopy(module)
    assert sparse24.convert(module, config, quiet=True).converted == [""]
    return module, before


@pytest.fixture
def seeded():
    """Dropout draws the same numbers in both modules."""

    def call(module, x):
        torch.manual_seed(1)
        return module(x)

    yield call
    if hasattr(Attributes, "p"):
        del Attributes.p


@pytest.mark.parametrize("name", LATER)
def test_changed_after_conversion(device, seeded, name):
    """It runs as before conversion, with the change, and says so once."""
    make, change, reason = LATER[name]
    module, before = build(make, device)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    with CountOps() as ops:
        module(x)
    assert ops.sparse == 1
    change(module)
    change(before)
    with CountOps() as ops, pytest.warns(UserWarning) as caught:
        out = seeded(module, x)
    assert [str(w.message) for w in caught] == [f"sparse24: {make.__name__} runs as before conversion: {reason}"]
    assert ops.sparse == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(seeded(module, x), out)
    assert torch.equal(out, seeded(before, x))


@torch.no_grad()
@pytest.mark.parametrize("name", LATER)
def test_changed_after_a_call_was_kept(device, seeded, name):
    """A call like the one before it finds the same changes."""
    make, change, reason = LATER[name]
    module, before = build(make, device, sparse24.ConvertConfig(dtype="bf16", decode=True))
    x = normal(1, D, dtype=torch.bfloat16).to(device)
    out = module(x)
    kept = module._copies.calls[x.shape]
    assert torch.equal(module(x), out)
    assert module._copies.calls[x.shape] is kept
    assert run_again(module, module._sparse24, x) is not None
    change(module)
    change(before)
    assert run_again(module, module._sparse24, x) is None
    with pytest.warns(UserWarning, match=reason):
        out = seeded(module, x)
    assert torch.equal(out, seeded(before, x))


@torch.no_grad()
def test_other_changes_after_a_call_was_kept(device, monkeypatch):
    x = normal(1, D, dtype=torch.bfloat16).to(device)

    def known(module):
        return run_again(module, module._sparse24, x) is not None

    for kind in (nn.Linear, nn.Module, SquaredReLU, WithModule):
        module, _ = build(WithModule, device, sparse24.ConvertConfig(dtype="bf16", decode=True))
        out = module(x)
        assert known(module)
        assert not known(copy.deepcopy(module))
        replica = module._replicate_for_data_parallel()
        assert not known(replica)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "of_a_patch", 1, raising=False)
            assert not known(module)
            assert torch.equal(module(x), out)
            assert known(module)
    module._modules["up_proj"].__class__ = type("Other", (nn.Linear,), {})
    assert not known(module)


def test_a_patched_class(device, monkeypatch):
    """Of a layer, and of the network itself."""
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    for kind, reason in (
        (nn.Linear, "the forward of up_proj is patched in its class"),
        (WithModule, "its forward is patched in its class"),
    ):
        module, _ = build(WithModule, device)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, x: x * 2)
            with pytest.warns(UserWarning, match=reason):
                assert torch.equal(module(x), module._sparse24_base.forward(module, x))
        with CountOps() as ops:
            module(x)
        assert ops.sparse == 1


def test_equal_values_are_no_change(device):
    """Nor are further attributes, modes, and what libraries mark modules with."""
    module, _ = build(Attributes, device)
    module.p, module.scale, module.clip = -0.0, 3 - 2, float("inf")
    module.further, module._is_hf_initialized, module.gradient_checkpointing = 1, True, True
    with CountOps() as ops:
        module.eval()(normal(21, D, dtype=torch.bfloat16).to(device))
    assert ops.sparse == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_not_changed(device, duplicate):
    module = duplicate(build(Attributes, device)[0])
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    with CountOps() as ops:
        module(x)
    assert ops.sparse == 1
    module.p = 0.5
    with pytest.warns(UserWarning, match="its attribute p has changed"):
        module(x)


def test_changes_are_guarded_on(device):
    """A compiled module is traced again; coming back needs no other graph."""
    torch._dynamo.reset()
    module, before = build(Attributes, device)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        sparse = module(x)
        assert torch.equal(compiled(x), sparse)
        for name, value, first in (("scale", 2, 1), ("function", torch.relu, relu2)):
            frames = counter.frame_count
            setattr(module, name, value)
            setattr(before, name, value)
            assert torch.equal(compiled(x), before(x)) and counter.frame_count == frames + 1
            setattr(module, name, first)
            setattr(before, name, first)
            assert torch.equal(compiled(x), sparse) and counter.frame_count == frames + 1
    torch._dynamo.reset()


def test_inputs_that_the_kernels_have_not(device):
    dtype = torch.float32 if device == "cuda" else torch.float64
    module = randomize(Inline()).to(device)
    before = copy.deepcopy(module).to(dtype)
    sparse24.convert(module, EXACT, quiet=True)
    x = normal(21, D, dtype=dtype).to(device)
    with pytest.warns(UserWarning, match=f"the input is {dtype} on {device}"):
        assert torch.equal(module.to(dtype)(x), before(x))
    if device == "cuda":
        with torch.autocast(device, torch.bfloat16), CountOps() as ops:
            module(x)
        assert ops.sparse == 1


# ---- arguments -------------------------------------------------------------------------------------------------------


class Masked(Inline):
    def forward(self, x, mask=None, factor=1, *, scores=False, **further):
        out = super().forward(x) * factor
        return out if mask is None and not further.get("mask") else out * 0


SPARSE_CALLS = {
    "positional": lambda m, x: m(x, None),
    "keyword": lambda m, x: m(x, mask=None),
    "input by name": lambda m, x: m(mask=None, x=x),
    "default": lambda m, x: m(x, None, 1, scores=False),
    "anything": lambda m, x: m(x, position_ids=None),
}
DENSE_CALLS = {
    "mask": lambda m, x: m(x, x),
    "mask by name": lambda m, x: m(x, mask=x),
    "factor": lambda m, x: m(x, None, 3),
    "scores": lambda m, x: m(x, scores=True),
    "position_ids": lambda m, x: m(x, position_ids=x),
}
WRONG_CALLS = {
    "none": lambda m, x: m(),
    "twice": lambda m, x: m(x, x=x),
    "many": lambda m, x: m(x, None, 1, None),
}


def test_arguments_that_say_nothing(device):
    module, _ = build(Masked, device)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    expected = module(x)
    for call in SPARSE_CALLS.values():
        with CountOps() as ops:
            assert torch.equal(call(module, x), expected)
        assert ops.sparse == 1


def test_further_arguments_are_for_the_module(device):
    module, before = build(Masked, device)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    for call in DENSE_CALLS.values():
        with CountOps() as ops, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(call(module, x), call(before, x))
        assert ops.sparse == 0
    for name in ("mask", "factor"):
        other, _ = build(Masked, device)
        with pytest.warns(UserWarning, match=f"Masked runs as before conversion: it is called with {name}"):
            DENSE_CALLS[name](other, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DENSE_CALLS[name](other, x)  # once


def test_wrong_arguments_are_the_modules(device):
    module, _ = build(Masked, device)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    for call in WRONG_CALLS.values():
        with pytest.raises(TypeError, match=r"forward\(\)"):
            call(module, x)
