"""Conversion of the experts of a mixture: what is found, what it computes, and why others are left alone."""

import copy
import pickle
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from convert_models import EXACT, D, assert_near, masked_experts, relu2
from data import normal
from mixture_models import EXPERTS, HIDDEN, TOP, Experts
from torch import nn

import sparse24
from sparse24 import prune24

# Dynamo makes an instance of each autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class WithoutFactors(Experts):
    def forward(self, x, index, factors):
        return super().forward(x, index, torch.ones_like(factors))


class Branching(Experts):
    """Something else for some numbers of tokens."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x, index, factors):
        return super().forward(-x if self.condition(x) else x, index, factors)


class Transposed(Experts):
    """Weights [E, D, F] and [E, F, D], as some have them."""

    def forward(self, x, index, factors):
        up, down = (getattr(self, name)[index] for name in self.names)
        y = self.activation(torch.einsum("td,tkdf->tkf", x, up))
        return torch.einsum("tkf,tkfd,tk->td", y, down, factors)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(EXPERTS, 2 * HIDDEN, D))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, D, HIDDEN))

    def forward(self, x, index, factors):
        return x


class Mixture(nn.Module):
    """A router, experts, and one that all tokens share."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, EXPERTS), Experts()
        self.shared = sparse24.nn.ReLU2MLP(D, HIDDEN)

    def forward(self, x):
        factors, index = self.gate(x).sigmoid().topk(TOP)
        return self.experts(x, index, factors) + self.shared(x)


def inputs(device, dtype=torch.float32, tokens=21):
    x = normal(tokens, D, dtype=dtype, seed=7).to(device)
    factors, index = normal(tokens, EXPERTS, dtype=torch.float32, seed=8).sigmoid().topk(TOP)
    return x, index.to(device), factors.to(device)


def build(device):
    return Experts().to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def of(module, x, index, factors):
    """The output, and the gradients of tokens, factors and weights."""
    x, factors = (t.detach().clone().requires_grad_() for t in (x, factors))
    module.zero_grad()
    out = module(x, index, factors)
    out.float().mul(normal(*out.shape, dtype=torch.float32, seed=9).to(out.device)).sum().backward()
    return [out.detach(), x.grad, factors.grad, *(p.grad for p in module.parameters())]


def test_forward_backward_and_revert(device):
    module = build(device)
    given = inputs(device, module.up_proj.dtype)
    before = of(module, *given)
    with masked_experts(Experts):
        expected = of(module, *given)
    report = sparse24.convert(module, EXACT, quiet=True)
    assert report.converted == [""] and not report.skipped and not report.near_misses
    assert isinstance(module, Experts) and "sparse24: precision=auto" in repr(module)
    assert_near(of(module, *given), expected, 1e-4 if device == "cpu" else 5e-2)
    with sparse24.disabled():
        for a, b in zip(of(module, *given), before, strict=True):
            assert_same_bits(a, b)
    module.sparse = False
    assert_near(of(module, *given), before, 1e-4 if device == "cpu" else 5e-2)
    assert sparse24.revert(module) == [""] and type(module) is Experts
    for a, b in zip(of(module, *given), before, strict=True):
        assert_same_bits(a, b)


def test_experts_of_a_mixture_and_their_neighbours():
    model = Mixture()
    report = sparse24.convert(model, quiet=True)
    assert report.converted == ["experts"] and not report.skipped
    x = normal(30, D, dtype=torch.float32)
    again = pickle.loads(pickle.dumps(model))
    assert_same_bits(copy.deepcopy(model)(x), model(x))
    assert_same_bits(again(x), model(x))


def test_arguments_by_name(device):
    module = build(device)
    sparse24.convert(module, EXACT, quiet=True)
    x, index, factors = inputs(device, module.up_proj.dtype)
    expected = module(x, index, factors)
    assert_same_bits(module(x, factors=factors, index=index), expected)
    with pytest.raises(TypeError):
        module(x, index)


def test_experts_of_other_devices(device):
    """An index of as many as there are is nobody's."""
    module = build(device)
    sparse24.convert(module, EXACT, quiet=True)
    x, index, factors = inputs(device, module.up_proj.dtype)
    index[::2] = EXPERTS
    assert not module(x, index, factors)[::2].any()


def test_names_do_not_matter():
    module = Experts(names=("first", "second"))
    assert sparse24.convert(module, quiet=True).converted == [""]


def test_a_decision_and_a_filter():
    decided = sparse24.convert(Mixture(), sparse24.ConvertConfig(decisions={"experts": False}), quiet=True)
    assert decided.skipped == {"experts": "decided against"}
    assert not sparse24.convert(Mixture(), module_filter_fn=lambda m, n: False, quiet=True).converted


OTHER = "it does not compute the sum of w W2[e] relu(W1[e] x)^2 over the experts of a token"
ANOTHER_NUMBER = "it computes something else for another number of tokens"
REFUSED = {
    "gelu": (lambda: Experts(F.gelu), OTHER),
    "relu": (lambda: Experts(F.relu), OTHER),
    "leaky": (lambda: Experts(lambda h: F.leaky_relu(h, 1e-3).square()), OTHER),
    "without factors": (WithoutFactors, OTHER),
    "clipped": (lambda: Experts(lambda h: relu2(h).clamp(max=1e6)), OTHER),
    "clipped beyond float16": (lambda: Experts(lambda h: relu2(h.clamp(max=1e5))), OTHER),
    "one token": (lambda: Branching(lambda x: len(x) == 1), ANOTHER_NUMBER),
    "many": (lambda: Branching(lambda x: len(x) > 500), ANOTHER_NUMBER),
    "transposed": (Transposed, "its forward does not run: RuntimeError: einsum()"),
    "sizes": (Gated, f"the sizes of up_proj [6, 128, {D}] and down_proj [6, {D}, 64] do not fit"),
    "odd": (lambda: Experts(hidden=72), "72 hidden features are no multiple of 16: it would never run sparse"),
    "float64": (lambda: Experts().double(), "the weight of up_proj is float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_left_alone(name):
    make, reason = REFUSED[name]
    module = nn.Sequential(make())
    report = sparse24.convert(module, quiet=True)
    assert list(report.skipped) == ["0"] and not report.converted
    assert report.skipped["0"].startswith(reason)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (sparse24.ConvertConfig(threshold=0.5), "experts have no threshold"),
        (sparse24.ConvertConfig(recipe=sparse24.Recipe(reuse_mask=False)), "experts reuse the mask"),
    ],
    ids=["threshold", "mask"],
)
def test_options_that_experts_do_not_have(config, reason):
    assert sparse24.convert(Experts(), config, quiet=True).skipped == {"": reason}


def test_changes_are_noticed():
    module = Experts()
    sparse24.convert(module, EXACT, quiet=True)
    module.activation = F.gelu
    given = inputs("cpu")
    with pytest.warns(UserWarning, match="Experts runs as before conversion: its attribute activation has changed"):
        out = module(*given)
    assert_same_bits(out, Experts(F.gelu)(*given))


def test_what_does_not_fit_runs_as_before():
    module = Experts()
    sparse24.convert(module, EXACT, quiet=True)
    x, index, factors = inputs("cpu")
    module.double()
    with pytest.warns(UserWarning, match="runs as before conversion: the input is torch.float64 on cpu"):
        module(x.double(), index, factors)
    with pytest.warns(UserWarning, match="runs as before conversion: it is called with tensors of 2, 1 and 1 dimen"):
        with pytest.raises(ValueError):
            module(x.double(), index[:, 0], factors[:, 0])


def test_float8(device):
    """Copies of the weights in evaluation, which follow them."""
    module = build(device).eval()
    given = inputs(device, module.up_proj.dtype)
    exact = module(*given)
    sparse24.convert(module, sparse24.ConvertConfig(dtype="fp8", decode=True, min_tokens=0), quiet=True)
    assert list(module.state_dict()) == ["up_proj", "down_proj"]
    assert "MB of copies" in repr(module)
    with torch.no_grad():
        out = module(*given)
        assert_near([out], [exact], 0.2)
        module.down_proj.mul_(2)
        assert_near([module(*given)], [2 * out], 1e-6)
    grads = of(module.train(), *given)
    assert all(g.isfinite().all() for g in grads)


def pruned_by_hand(module, choice):
    """A copy whose weights are 2:4."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.up_proj.copy_(prune24(other.up_proj, -1))
        if choice == "both":
            other.down_proj.copy_(prune24(other.down_proj, -2))
    return other


@pytest.mark.parametrize("choice", ["up", "both"])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@pytest.mark.parametrize("least", [0, 1000], ids=["many", "few"])
def test_weights_that_are_2_4(device, choice, dtype, least):
    """One network with any number of tokens; pruned before they are quantised; and merged."""
    module = build(device).eval()
    given = inputs(device, module.up_proj.dtype)
    by_hand = pruned_by_hand(module, choice)
    options = {"dtype": dtype, "min_tokens": least}
    sparse24.convert(by_hand, sparse24.ConvertConfig(**options), quiet=True)
    sparse24.convert(module, sparse24.ConvertConfig(sparse_weights=choice, **options), quiet=True)
    with torch.no_grad():
        assert_same_bits(module(*given), by_hand(*given))
    both = of(module, *given), of(by_hand, *given)
    if device == "cuda" and dtype == "fp8":  # codes of weights that are pruned anew are not kept: other products
        assert_near(*both, 0.2)
    else:
        for a, b in zip(*both, strict=True):
            assert_same_bits(a, b)
    module.sparse = by_hand.sparse = False
    with torch.no_grad():
        assert not torch.equal(module(*given), by_hand(*given))  # a dense phase prunes no weight
    assert sparse24.revert(module, merge=True) == [""]
    for a, b in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("least", [0, 1000], ids=["many", "few"])
def test_float8_copies_are_pruned_once(device, least, monkeypatch):
    module = build(device).eval()
    given = inputs(device, module.up_proj.dtype)
    options = {"dtype": "fp8", "min_tokens": least}
    sparse24.convert(module, sparse24.ConvertConfig(sparse_weights="both", **options), quiet=True)

    def again(*_):
        raise AssertionError("pruned again")

    with torch.no_grad():
        out = module(*given)
        for name in ("convert.run_experts", "experts"):
            monkeypatch.setattr(import_module(f"sparse24.{name}"), "pruned", again)
        assert_same_bits(module(*given), out)


def test_compiled_whole(device):
    torch._dynamo.reset()
    module = build(device)
    sparse24.convert(module, EXACT, quiet=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (21, 40):
        given = inputs(device, module.up_proj.dtype, tokens)
        with torch.no_grad():
            assert_near([compiled(*given)], [module(*given)], 1e-5 if device == "cpu" else 2e-2)
    torch._dynamo.reset()


def test_analyze_lists_them():
    model = Mixture()
    report = sparse24.analyze_model(model, [normal(50, D, dtype=torch.float32, seed=s) for s in range(2)])
    layer = report.layers["experts"]
    assert (layer["tokens"], layer["experts"], layer["d_model"], layer["d_ff"]) == (100 * TOP, EXPERTS, D, HIDDEN)
    with torch.no_grad():
        y = [0, 0]
        for x in (normal(50, D, dtype=torch.float32, seed=s) for s in range(2)):
            _, index = model.gate(x).sigmoid().topk(TOP)
            h = torch.einsum("td,tkfd->tkf", x, model.experts.up_proj[index])
            y = [y[0] + (h <= 0).sum().item(), y[1] + h.numel()]
    assert layer["zeros"] == pytest.approx(y[0] / y[1], abs=1e-3)
    assert report.decisions.keys() == {"experts"} and layer["prefill_speedup"] is None
    assert "experts" in report.table()
    sparse24.convert(model, sparse24.ConvertConfig(decisions=report.decisions), quiet=True)


def test_analyze_lists_modules_of_this_library():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = sparse24.nn.ReLU2Experts(EXPERTS, D, HIDDEN)

        def forward(self, x):
            index = torch.arange(len(x))[:, None] % EXPERTS
            return self.experts.routed(x, index, torch.ones(len(x), 1))

    report = sparse24.analyze_model(Own(), [normal(50, D, dtype=torch.float32)])
    layer = report.layers["experts"]
    assert layer["state"] == "ReLU2Experts" and layer["tokens"] == 50 and not report.decisions
