"""What is not converted, with its reason."""

import pytest
import torch
import torch.nn.functional as F
from convert_models import HIDDEN, CastLinear, D, Inline, Stack, WithModule, Wrapper, relu2
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


class Residual(Inline):
    def __init__(self, share=1.0, **options):
        super().__init__(**options)
        self.share = share

    def forward(self, x):
        return self.share * x + super().forward(x)


class Normed(Inline):
    def forward(self, x):
        return super().forward(F.rms_norm(x, (x.shape[-1],)))


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
RELU = "its activation is ReLU, not the square of it"
OTHER = "it does not compute W2 relu(W1 x)^2"
MORE = "it computes more than an activation of each feature between its layers, as with a norm"
RESIDUAL = "its input to its output, as a residual connection inside of it does"
REFUSALS = {
    "leaky": (lambda: Inline(activation=lambda h: F.leaky_relu(h, 0.5).square()), LEAKY),
    "hardly leaky": (lambda: Inline(activation=lambda h: F.leaky_relu(h, 1e-3).square()), LEAKY),
    "softplus": (lambda: Inline(activation=lambda h: F.softplus(h, 50).square()), LEAKY),
    "smoothed": (lambda: Inline(activation=smoothed), OTHER),
    "gelu": (lambda: WithModule(nn.GELU()), f"{LEAKY} (act_fn: GELU)"),
    "relu": (lambda: WithModule(nn.ReLU()), f"{RELU} (act_fn: ReLU)"),
    "relu, doubled": (
        lambda: Inline(activation=lambda h: 2 * F.relu(h)),
        "its activation is ReLU, not the square of it",
    ),
    "cubed": (lambda: Inline(activation=lambda h: torch.relu(h) ** 3), "its activation is ReLU to the power of 3"),
    "scaled": (lambda: Inline(activation=lambda h: 1.001 * relu2(h)), "its result is 1.001 times W2 relu(W1 x)^2"),
    "shifted": (lambda: Inline(activation=lambda h: relu2(h) + 0.5), "it adds 0.5 to its activation or its output"),
    "clipped": (
        lambda: Inline(activation=lambda h: relu2(h).clamp(max=6)),
        "its activation is zero for negative inputs, but not the square of positive ones",
    ),
    "clipped at a thousand": (
        lambda: Inline(activation=lambda h: relu2(h).clamp(max=1e3)),
        "it is not W2 relu(W1 x)^2 for large inputs, as where something is clipped",
    ),
    "square": (lambda: Inline(activation=torch.square), LEAKY),
    "linear": (lambda: Inline(activation=lambda h: h), "it has no activation between its layers"),
    "residual": (Residual, f"it adds {RESIDUAL}"),
    "half a residual": (lambda: Residual(0.5), f"it adds 0.5 times {RESIDUAL}"),
    "residual and ReLU": (lambda: Residual(activation=torch.relu), f"it adds {RESIDUAL}"),
    "norm before": (Normed, MORE),
    "gated": (Gated, f"gated: {FURTHER} (gate_proj.weight)"),
    "gated, in one layer": (
        changed(Inline, lambda m: setattr(m, "c_fc", nn.Linear(D, 2 * HIDDEN))),
        f"gated: the sizes of c_fc [{2 * HIDDEN}, {D}] and c_proj [{D}, {HIDDEN}] do not fit",
    ),
    "norm inside": (
        lambda: WithModule(nn.RMSNorm(HIDDEN)),
        f"{FURTHER} (act_fn.weight)",
    ),
    "norm without weight": (lambda: Inline(activation=lambda h: relu2(F.layer_norm(h, (HIDDEN,)))), MORE),
    "adapter": (
        lambda: Inline(linear=Adapted),
        f"{FURTHER} (c_fc.lora_a, c_fc.lora_b, c_proj.lora_a)",
    ),
    "wrapper": (
        changed(Inline, lambda m: setattr(m, "c_fc", Wrapper(m.c_fc))),
        "c_fc is a convert_models.Wrapper, not a torch.nn.Linear",
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
    "functional dropout": (
        Functional,
        "it computes something else in training than in evaluation, as dropout does",
    ),
    "random input": (WithRandomInput, "its output is random"),
    "tokens mix": (Shifted, "its tokens depend on each other"),
    "tuple": (Tuple, "its forward returns a tuple"),
    "experts": (Experts, "a mixture of experts: the weight of up_proj has 3 dimensions"),
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


def test_reasons_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        model = Stack(Residual(), WithModule(nn.ReLU()))
        report = sparse24.convert(model, quiet=True)
    assert list(report.skipped.values()) == [f"it adds {RESIDUAL}", f"{RELU} (act_fn: ReLU)"]


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


@pytest.mark.parametrize("names", [("query", "key", "value"), ("key", "value", "receptance", "output")])
def test_attention_is_no_candidate(names):
    attention = nn.ModuleDict({name: nn.Linear(D, D) for name in names})
    report = sparse24.convert(attention, quiet=True)
    assert not report.skipped and not report.converted
    report = sparse24.convert(sparse24.nn.ReLU2MLP(D, HIDDEN), quiet=True)
    assert not report.skipped and not report.converted
