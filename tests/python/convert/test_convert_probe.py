"""How conversion looks at a module: what it tries, on what, and what it leaves as it was."""

import pytest
import torch
import torch.nn.functional as F
from convert_models import EXACT, HIDDEN, CountOps, D, Inline, SquaredReLU, WithModule, randomize, relu2
from data import normal
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import sparse24
from sparse24 import ConvertConfig
from sparse24.nn import QuantizedLinear


def convert(module, config=None):
    """Why it is skipped; None if it is converted."""
    return sparse24.convert(module, config, quiet=True).skipped.get("")


@pytest.mark.parametrize("name", ["sparse", "sparse24_enabled"])
def test_attributes_of_the_module_are_not_hidden(device, name):
    module = Inline().to(device)
    setattr(module, name, "mine")
    assert convert(module) == f"it has an attribute {name} of its own"
    assert getattr(module, name) == "mine"


def test_dropout_that_drops_nothing_is_no_reason(device):
    module = WithModule(nn.Sequential(SquaredReLU(), nn.Dropout(0.0))).to(device)
    assert convert(module) is None


def test_fp8_needs_outputs_that_are_multiples_of_16(device):
    module = Inline()
    module.c_proj = nn.Linear(HIDDEN, 72, bias=False)
    reason = "fp8 needs multiples of 16 features, it has 64 and 72"
    assert convert(module.to(device), ConvertConfig("fp8")) == reason
    assert convert(module) is None


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
    + ["register_full_backward_pre_hook"],
)
def test_hooks_of_every_kind_are_noticed(device, register):
    """Before conversion and after it."""
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    module = Inline().to(device, torch.bfloat16)
    handle = getattr(module.c_fc, register)(lambda *args: None)
    assert convert(module) == "c_fc has hooks"
    handle.remove()
    assert convert(module, EXACT) is None
    getattr(module.c_fc, register)(lambda *args: None)
    with CountOps() as ops, pytest.warns(UserWarning, match="Inline runs as before conversion: c_fc has hooks"):
        module(x)
    assert ops.sparse == 0


def test_inputs_that_wrap_tensors_run_as_before(device):
    module = randomize(Inline()).to(device, torch.bfloat16)
    assert convert(module, EXACT) is None
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    with CountOps() as ops, pytest.warns(UserWarning, match="the input is a TwoTensor"):
        out = module(TwoTensor(x, x))
    assert ops.sparse == 0 and isinstance(out, TwoTensor)


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_float8_networks_are_judged_too(device, factor):
    """By the precision of float8: what is off by half of the result is another network."""

    class Scaled(nn.Module):
        def forward(self, h):
            return factor * relu2(h)

    for act in (SquaredReLU(), Scaled()):
        module = randomize(WithModule(act)).to(device, torch.bfloat16)
        for name in ("up_proj", "down_proj"):
            setattr(module, name, QuantizedLinear(getattr(module, name)))
        assert (convert(module) is None) == isinstance(act, SquaredReLU)


def test_small_replicas_are_tried(device):
    """Conversion of a large model takes no time: the replica has sizes of its own."""
    shapes = set()

    class Watched(nn.Linear):
        def forward(self, x):
            if not self.weight.is_meta:
                shapes.add(tuple(self.weight.shape))
            return super().forward(x)

    assert convert(Inline(linear=Watched, d=512, hidden=2048).to(device)) is None
    assert shapes and max(rows * columns for rows, columns in shapes) <= 64 * 128


def test_a_module_may_overwrite_its_input(device):
    """It is judged by what it returns; of each try it gets a copy."""

    class Overwriting(Inline):
        def forward(self, x):
            out = super().forward(x)
            x.zero_()
            return out

    assert convert(Overwriting().to(device)) is None


def test_autocast_around_conversion_does_not_matter(device):
    """A module is tried in the dtypes that the trial names."""

    class Watched(Inline):
        def forward(self, x):
            assert not torch.is_autocast_enabled(x.device.type)
            return super().forward(x)

    with torch.autocast(device, torch.bfloat16):
        assert convert(Watched().to(device)) is None


def test_autocast_decides_about_the_dtype(device):
    """The input's own dtype says nothing where autocast replaces it."""
    module = randomize(Inline()).to(device)
    assert convert(module, EXACT) is None
    x = normal(21, D, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16), CountOps() as ops:
        out = module(x)
    assert ops.sparse == 1 and out.dtype == torch.bfloat16


@pytest.mark.parametrize("largest", [1e3, 1e5, torch.finfo(torch.float16).max, 1e30])
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_is_bounded_is_another_network(device, largest, where):
    """However large the bound is."""

    def bounded(h):
        return relu2(h.clamp(max=largest**0.5)) if where == "before" else relu2(h).clamp(max=largest)

    reason = "it is not W2 relu(W1 x)^2 for large inputs, as where something is clipped"
    assert convert(Inline(activation=bounded).to(device)) == reason


SHAPE = "it computes something else for inputs of another shape"
SIZES = "it computes something else at its own sizes than at smaller ones"
LEAKY = "its activation is not zero for negative inputs, as that of a leaky or smoothed variant"
BRANCHES = {
    "one token": (lambda x: x.shape[-2] == 1, SHAPE),
    "many tokens": (lambda x: x.shape[-2] > 4096, SHAPE),
    "very many tokens": (lambda x: x.shape[-2] > 50_000, SHAPE),
    "seven tokens": (lambda x: x.numel() == 7 * D, SHAPE),
    "64 tokens": (lambda x: x.shape[-2] == 64, SHAPE),
    "a large batch": (lambda x: x.dim() == 3 and x.shape[0] > 1000, SHAPE),
    "a batch of one": (lambda x: x.shape[0] == 1, SHAPE),
    "tokens without a batch": (lambda x: x.dim() == 2, SHAPE),
    "one token alone": (lambda x: x.dim() == 1, SHAPE),
    "four dimensions": (lambda x: x.dim() == 4, SHAPE),
    "strides": (lambda x: not x.is_contiguous(), SHAPE),
    "features": (lambda x: x.shape[-1] == D, SIZES),
    **{str(t): (lambda x, t=t: x.dtype == t, f"in {str(t)[6:]} {LEAKY}") for t in (torch.bfloat16, torch.float16)},
    "float32": (lambda x: x.dtype == torch.float32, f"in float32 {LEAKY}"),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_what_depends_on_its_input_is_another_network(device, name):
    """On the shape, the sizes or the type of it: squared ReLU for some inputs, and something else for others."""
    condition, reason = BRANCHES[name]

    class Branching(Inline):
        def forward(self, x):
            h = self.c_fc(x)
            return self.c_proj(F.gelu(h) if condition(x) else relu2(h))

    assert convert(Branching().to(device)) == reason


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_what_depends_on_sizes_of_its_own_is_another_network(where):
    """Of weights that are too large to be tried at their own sizes, unless they call other operators there."""

    class Branching(Inline):
        def forward(self, x):
            h = self.c_fc(x)
            return self.c_proj(h.relu() ** 1.5 if h.shape[-1] > self.most else h.relu() ** 2)

    class Small(Branching):
        most = 5000

    class Large(Branching):
        most = 10_000

    assert convert(Small(hidden=8192).to(where)) == SIZES
    assert convert(Large(hidden=8192).to(where)) is None


def test_outputs_have_the_type_of_the_input(device):
    class Float(Inline):
        def forward(self, x):
            return super().forward(x).float()

    assert convert(Float().to(device)) == "in bfloat16 its forward returns float32 for bfloat16"


def test_what_cuts_its_input_into_parts_is_the_network(device):
    """What it computes does not depend on the shape; what it refuses says nothing."""

    class Parts(Inline):
        def forward(self, x):
            assert x.dim() == 3 and x.shape[0] < 100
            parent = super().forward
            return torch.cat([parent(part) for part in x.split(2, 1)], 1)

    assert convert(Parts().to(device)) is None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return relu2(h)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def scaled(y):
    return y.detach() + 0.5 * (y - y.detach())


class DetachedInput(Inline):
    def forward(self, x):
        return super().forward(x.detach())


OTHER_GRADIENTS = {
    "detached activation": lambda: Inline(activation=lambda h: relu2(h).detach()),
    "detached input": DetachedInput,
    "straight through": lambda: Inline(activation=StraightThrough.apply),
    "scaled": lambda: Inline(activation=lambda h: scaled(relu2(h))),
}


@pytest.mark.parametrize("name", OTHER_GRADIENTS)
def test_gradients_belong_to_the_network(device, name):
    reason = "its gradients are not those of W2 relu(W1 x)^2, as where something is detached"
    assert convert(OTHER_GRADIENTS[name]().to(device)) == reason


def test_without_any_gradients_it_is_the_network(device):
    """As code for inference alone is, also if conversion runs in inference mode."""

    class Inference(Inline):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    assert convert(Inference().to(device)) is None
    with torch.inference_mode():
        assert convert(Inline().to(device)) is None


def test_symbolic_traces_are_those_of_before_conversion():
    """`torch.fx` traces with something that is no tensor, through the modules of a model."""
    model = torch.nn.Sequential(randomize(Inline()))
    expected = torch.fx.symbolic_trace(model).code
    assert convert(model[0]) is None
    with pytest.warns(UserWarning, match="the input is a Proxy"):
        assert torch.fx.symbolic_trace(model).code == expected


def test_modules_that_are_alike_are_tried_on_all_inputs_once(device):
    """Not those with another attribute, such as a function of their own."""
    shapes = []

    class Watched(Inline):
        def __init__(self, **options):
            super().__init__(**options)
            self.most = 10**6

        def forward(self, x):
            if not x.is_meta:
                shapes.append(tuple(x.shape))
            h = self.c_fc(x)
            return self.c_proj(F.gelu(h) if x.shape[0] > self.most else relu2(h))

    def tried_with_many(*models):
        shapes.clear()
        report = sparse24.convert(torch.nn.ModuleList(models).to(device), quiet=True)
        return sum(shape[-2:-1] > (1000,) for shape in shapes), report

    count, report = tried_with_many(*(Watched() for _ in range(5)))
    assert count == 1 and len(report.converted) == 5
    other = Watched()
    other.most = 1000
    count, report = tried_with_many(Watched(), other, Watched(hidden=320), Watched(activation=lambda h: h))
    assert count == 4 and report.skipped == {"1": SHAPE} and len(report.converted) == 3
