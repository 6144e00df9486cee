"""What is not converted, with its reason, and what a converted module notices when it is called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_models import EXACT, HIDDEN, CastLinear, CountOps, D, Inline, Stack, WithModule, randomize, relu2
from data import normal
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

import sparse24


class Gated(WithModule):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(D, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Adapted(nn.Linear):
    """A low-rank adapter, whose second matrix starts at zero."""

    def __init__(self, d, out, bias):
        super().__init__(d, out, bias)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, d)), nn.Parameter(torch.zeros(out, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_a.t() @ self.lora_b.t()


class Wrapper(nn.Module):
    """Of an adapter library: the layer is inside."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x)


class Rounded(nn.Linear):
    """A layer that quantises on the fly."""

    def forward(self, x):
        return F.linear(x.to(torch.float8_e4m3fn).to(x.dtype), self.weight, self.bias)


class NoBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Functional(Inline):
    """Dropout that no module shows."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class WithRandomInput(Inline):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.rand_like(x))


class Shifted(Inline):
    """Mixes each token with the one before it, as RWKV does."""

    def forward(self, x):
        return super().forward(0.5 * (x + F.pad(x, (0, 0, 1, -1))))


class Tuple(Inline):
    def forward(self, x):
        return super().forward(x), None


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = (nn.Parameter(torch.zeros(2, *s)) for s in ((HIDDEN, D), (D, HIDDEN)))


def changed(make, change):
    """Another module after `change` has been applied to it."""

    def build():
        module = make()
        change(module)
        return module

    return build


def smoothed(h):
    """Quadratic only beyond a narrow band, and zero for negative inputs."""
    return torch.where(h > 0.01, h.square(), torch.relu(h) * 0.01)


LEAKY = "its activation is not zero for negative inputs, as that of a leaky or smoothed variant"
FURTHER = "it has parameters or buffers beside its two layers"
OTHER = "it does not compute W2 relu(W1 x)^2"
REFUSALS = {
    "leaky": (lambda: Inline(activation=lambda h: F.leaky_relu(h, 0.5).square()), LEAKY),
    "hardly leaky": (lambda: Inline(activation=lambda h: F.leaky_relu(h, 1e-3).square()), LEAKY),
    "softplus": (lambda: Inline(activation=lambda h: F.softplus(h, 50).square()), LEAKY),
    "smoothed": (lambda: Inline(activation=smoothed), OTHER),
    "gelu": (lambda: WithModule(nn.GELU()), f"{LEAKY} (act_fn: GELU)"),
    "relu": (lambda: WithModule(nn.ReLU()), f"{OTHER} (act_fn: ReLU)"),
    "cubed": (lambda: Inline(activation=lambda h: torch.relu(h) ** 3), OTHER),
    "scaled": (lambda: Inline(activation=lambda h: 1.001 * relu2(h)), OTHER),
    "clipped": (lambda: Inline(activation=lambda h: relu2(h).clamp(max=6)), OTHER),
    "gated": (Gated, f"gated: {FURTHER} (gate_proj.weight)"),
    "gated, in one layer": (
        changed(Inline, lambda m: setattr(m, "c_fc", nn.Linear(D, 2 * HIDDEN))),
        f"gated: the sizes of c_fc [{2 * HIDDEN}, {D}] and c_proj [{D}, {HIDDEN}] do not fit",
    ),
    "norm inside": (
        lambda: WithModule(nn.RMSNorm(HIDDEN)),
        f"{FURTHER} (act_fn.weight)",
    ),
    "norm without weight": (lambda: Inline(activation=lambda h: relu2(F.layer_norm(h, (HIDDEN,)))), LEAKY),
    "adapter": (
        lambda: Inline(linear=Adapted),
        f"{FURTHER} (c_fc.lora_a, c_fc.lora_b, c_proj.lora_a)",
    ),
    "wrapper": (
        changed(Inline, lambda m: setattr(m, "c_fc", Wrapper(m.c_fc))),
        "c_fc is a test_convert_refusals.Wrapper, not a torch.nn.Linear",
    ),
    "unused bias": (lambda: Inline(linear=NoBias, bias=True), f"{OTHER} (c_fc: NoBias, c_proj: NoBias)"),
    "quantising": (lambda: Inline(linear=Rounded), f"{OTHER} (c_fc: Rounded, c_proj: Rounded)"),
    "int8": (
        changed(Inline, lambda m: setattr(m.c_fc, "weight", nn.Parameter(m.c_fc.weight.to(torch.int8), False))),
        "the weight of c_fc is int8",
    ),
    "subclass": (
        changed(Inline, lambda m: setattr(m.c_fc, "weight", nn.Parameter(TwoTensor(*[torch.ones(HIDDEN, D)] * 2)))),
        "the weight of c_fc is a TwoTensor",
    ),
    "parametrised": (
        changed(Inline, lambda m: parametrizations.weight_norm(m.c_fc)),
        f"{FURTHER} ({', '.join(f'c_fc.parametrizations.weight.original{i}' for i in (0, 1))})",
    ),
    "pruned": (
        changed(Inline, lambda m: prune.l1_unstructured(m.c_fc, "weight", 0.5)),
        f"{FURTHER} (c_fc.weight_orig, c_fc.weight_mask)",
    ),
    "hook": (changed(Inline, lambda m: m.c_proj.register_forward_hook(print)), "c_proj has hooks"),
    "pre-hook": (changed(WithModule, lambda m: m.act_fn.register_forward_pre_hook(print)), "act_fn has hooks"),
    "backward hook": (changed(Inline, lambda m: m.c_fc.register_full_backward_hook(print)), "c_fc has hooks"),
    "patched child": (
        changed(Inline, lambda m: setattr(m.c_fc, "forward", torch.relu)),
        "the forward of c_fc is patched",
    ),
    "patched": (changed(Inline, lambda m: setattr(m, "forward", torch.relu)), "its forward is patched"),
    "dropout": (lambda: WithModule(nn.Dropout(0.1)), "it has dropout (act_fn, p=0.1)"),
    "functional dropout": (Functional, OTHER),
    "random input": (WithRandomInput, LEAKY),
    "tokens mix": (Shifted, OTHER),
    "tuple": (Tuple, "its forward returns a tuple"),
    "experts": (Experts, "the weight of up_proj has 3 dimensions"),
    "sizes": (
        changed(Inline, lambda m: setattr(m, "c_proj", nn.Linear(HIDDEN - 1, D))),
        f"the sizes of c_fc [{HIDDEN}, {D}] and c_proj [{D}, {HIDDEN - 1}] do not fit",
    ),
    "odd": (lambda: Inline(hidden=168), "168 hidden features are no multiple of 16: it would never run sparse"),
    "attribute": (changed(Inline, lambda m: setattr(m, "sparse", 1)), "it has an attribute sparse of its own"),
    "scripted": (lambda: torch.jit.script(WithModule()), "it is scripted"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_refused(device, name):
    make, reason = REFUSALS[name]
    module = Stack(make(), Inline()).to(device)
    before = type(module.layers[0])
    report = sparse24.convert(module, quiet=True)
    assert report.skipped == {"layers.0": reason} and report.converted == ["layers.1"]
    assert type(module.layers[0]) is before


def test_a_forward_that_fails(device):
    class Insisting(Inline):
        def forward(self, x):
            assert x.dtype == torch.int8, "int8 please"
            return super().forward(x)

    reason = "its forward does not run: AssertionError: int8 please"
    assert sparse24.convert(Insisting().to(device), quiet=True).skipped == {"": reason}


@pytest.mark.parametrize(
    ("weights", "x_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_a_forward_that_insists(device, weights, x_dtype):
    """On its sizes and on a dtype: it is tried that way too."""

    class Insisting(Inline):
        def forward(self, x):
            assert x.dtype == x_dtype
            return super().forward(x.view(-1, D)).view(x.shape)

    module = Insisting(linear=CastLinear).to(device, weights)
    assert sparse24.convert(module, quiet=True).converted == [""]


def test_attention_is_no_candidate():
    attention = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
    report = sparse24.convert(attention, quiet=True)
    assert not report.skipped and not report.converted
    report = sparse24.convert(sparse24.nn.ReLU2MLP(D, HIDDEN), quiet=True)
    assert not report.skipped and not report.converted


# ---- after conversion ------------------------------------------------------------------------------------------------

LATER = {
    "hook": (lambda m: m.up_proj.register_forward_hook(lambda mod, args, out: out + 1), "up_proj has hooks"),
    "pre-hook": (lambda m: m.act_fn.register_forward_pre_hook(lambda mod, args: args[0] + 1), "act_fn has hooks"),
    "patch": (
        lambda m: setattr(m.up_proj, "forward", lambda x: x @ m.up_proj.weight.t() + 1),
        "forward of up_proj is pa",
    ),
    "adapter": (lambda m: setattr(m, "up_proj", Wrapper(m.up_proj)), "up_proj is not a Linear any more"),
    "activation": (lambda m: setattr(m, "act_fn", nn.GELU()), "act_fn is not a SquaredReLU any more"),
    "dropout": (lambda m: m.add_module("drop", nn.Dropout()), "its children are others than at conversion"),
    "parametrised": (lambda m: parametrizations.weight_norm(m.up_proj), "up_proj is not a Linear any more"),
    "subclass": (
        lambda m: setattr(m.up_proj, "weight", nn.Parameter(TwoTensor(m.up_proj.weight, m.up_proj.weight))),
        "the weight of up_proj is distributed or quantised",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_changed_after_conversion(device, name):
    """It runs as before conversion, with the change, and says so."""
    change, reason = LATER[name]
    module = randomize(WithModule()).to(device, torch.bfloat16)
    before = copy.deepcopy(module)
    sparse24.convert(module, EXACT, quiet=True)
    change(module)
    change(before)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    with CountOps() as ops, pytest.warns(UserWarning, match=f"WithModule runs as before conversion: .*{reason}"):
        out = module(x)
    assert ops.sparse == 0
    assert torch.equal(out, before(x))


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
