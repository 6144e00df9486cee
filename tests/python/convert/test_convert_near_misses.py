"""What counts as a network, what is a near miss, and what is neither; and the report that says so."""

import pytest
import torch
import torch.nn.functional as F
from convert_models import EXACT, HIDDEN, D, Inline, SquaredReLU, Stack, relu2
from found_models import Attention, LearnedScale, Scaled, Shifted, TwoLayers, WithThird
from torch import nn

import sparse24


class Residual(TwoLayers):
    def forward(self, x):
        return x + super().forward(x)


class Activation(TwoLayers):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation


def after(change):
    def build():
        module = TwoLayers()
        change(module)
        return module

    return build


class Dropping(TwoLayers):
    """With a child that drops, in training."""

    def __init__(self, activation, residual=False):
        super().__init__(("fc1", "fc2"))
        self.activation, self.residual, self.drop = activation, residual, nn.Dropout(0.1)

    def forward(self, x):
        out = self.fc2(self.drop(self.activation(self.fc1(x))))
        return x + out if self.residual else out


COUNTED = {
    "residual": (Residual, "it adds its input to its output, as a residual connection inside of it does"),
    "plain ReLU": (lambda: Activation(F.relu), "its activation is ReLU, not the square of it"),
    "cube": (lambda: Activation(lambda h: F.relu(h) ** 3), "its activation is ReLU to the power of 3"),
    "scaled": (Scaled, "its result is 0.5 times W2 relu(W1 x)^2"),
    "clipped": (
        lambda: Activation(lambda h: relu2(h).clamp(max=6)),
        "its activation is zero for negative inputs, but not the square of positive ones",
    ),
    "leaky": (
        lambda: Activation(lambda h: F.leaky_relu(h, 0.5).square()),
        "its activation is not zero for negative inputs, as that of a leaky or smoothed variant",
    ),
    "Sequential with ReLU": (
        lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D)),
        "its activation is ReLU, not the square of it (1: ReLU)",
    ),
    "ReLU and dropout": (
        lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, D)),
        "its activation is ReLU, not the square of it (1: ReLU)",
    ),
    "layer with names, ReLU and dropout": (
        lambda: Dropping(F.relu),
        "its activation is ReLU, not the square of it",
    ),
    "residual and dropout": (
        lambda: Dropping(relu2, residual=True),
        "it adds its input to its output, as a residual connection inside of it does",
    ),
    "transformer's layer, with its dropout": (
        lambda: nn.TransformerEncoderLayer(D, 4, HIDDEN),
        "its activation is ReLU, not the square of it",
    ),
    "transformer's layer": (
        lambda: nn.TransformerEncoderLayer(D, 4, HIDDEN, dropout=0.0),
        "its activation is ReLU, not the square of it",
    ),
    "hook": (after(lambda m: m.w1.register_forward_hook(print)), "w1 has hooks"),
    "odd": (lambda: TwoLayers(hidden=168), "168 hidden features are no multiple of 16: it would never run sparse"),
    "attribute": (after(lambda m: setattr(m, "sparse", 1)), "it has an attribute sparse of its own"),
    "int8": (
        after(lambda m: setattr(m.w1, "weight", nn.Parameter(m.w1.weight.to(torch.int8), False))),
        "the weight of w1 is int8",
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counted_with_the_true_reason(name):
    make, reason = COUNTED[name]
    report = sparse24.convert(Stack(make(), TwoLayers()), quiet=True)
    assert report.skipped == {"layers.0": reason} and report.converted == ["layers.1"] and not report.near_misses
    assert str(report) == f"sparse24: converted 1 of 2, skipped 1 ({reason})"


class Tokens(TwoLayers):
    """Each token with the one before it."""

    def forward(self, x):
        return super().forward(x + x.roll(1, -2))


NEITHER = {
    "attention": Attention,
    "attention of torch": lambda: nn.MultiheadAttention(D, 4),
    "recurrent": lambda: nn.RNNCell(D, D, bias=False, nonlinearity="relu"),
    "GELU": lambda: Activation(F.gelu),
    "ELU": lambda: Activation(F.elu),
    "square": lambda: Activation(torch.square),
    "linear": lambda: Activation(nn.Identity()),
    "low rank": lambda: nn.Sequential(nn.Linear(D, 16, bias=False), nn.Linear(16, D, bias=False)),
    "gate": lambda: nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D), nn.Sigmoid()),
    "classifier": lambda: nn.Sequential(nn.Linear(D, 10), nn.Linear(10, 3), nn.Softmax(-1)),
    "a second ReLU": lambda: SecondReLU(),
    "indexer": lambda: Indexer(),
    "attention with squared ReLU": lambda: Attend(),
}


class SecondReLU(nn.Module):
    """Its second ReLU is called relu2, which is no squared one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.c(self.relu2(self.b(self.relu1(self.a(x)))))


class Indexer(nn.Module):
    """Three layers, a ReLU, and a power that is no square, as of attention that chooses its keys."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.weights = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x):
        return self.weights(x) @ F.relu(self.wq(x) @ self.wk(x).mT * D**-0.5)


class Attend(nn.Module):
    """Attention with squared ReLU in the place of its softmax."""

    def forward(self, q, k, v):
        return F.relu(q @ k.mT).square() @ v


@pytest.mark.parametrize("training", [True, False])
def test_reasons_of_a_mode_are_given_in_that_mode(training):
    """In evaluation dropout is no reason: T5's network is one of plain ReLU."""

    class T5(TwoLayers):
        def forward(self, x):
            return self.w2(F.dropout(F.relu(self.w1(x)), 0.1, self.training))

    report = sparse24.convert(T5().train(training), quiet=True)
    assert report.skipped == {"": "its activation is ReLU, not the square of it"}


@pytest.mark.parametrize("name", NEITHER)
def test_neither_counted_nor_missed(name):
    report = sparse24.convert(Stack(NEITHER[name](), TwoLayers()), quiet=True)
    assert report.converted == ["layers.1"] and not report.skipped and not report.near_misses


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.c(relu2(self.b(relu2(self.a(x)))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), nn.Linear(D, HIDDEN)

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) ** 2 * self.w3(x))


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp_bank = nn.Parameter(torch.zeros(3, 2, HIDDEN, D))

    def forward(self, x):
        for w1, w2 in self.mlp_bank:
            x = x + F.relu(x @ w1.t()).square() @ w2
        return x


class WithArguments(nn.Module):
    def forward(self, x, c_fc, c_proj):
        return F.linear(F.relu(F.linear(x, c_fc)).square(), c_proj.t())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(4, HIDDEN, D)), nn.Parameter(torch.zeros(4, D, HIDDEN))

    def forward(self, x, expert):
        return relu2(x @ self.w1[expert].t()) @ self.w2[expert].t()


class Routed(Experts):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 4)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(D, HIDDEN, 1), nn.Conv1d(HIDDEN, D, 1)

    def forward(self, x):
        return self.b(relu2(self.a(x.mT))).mT


class Square(nn.Module):
    """An activation whose code says what its name does not."""

    def forward(self, h):
        return F.relu(h).square()


class Adapter(nn.Module):
    """The layer is inside, as PEFT has it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features

    def forward(self, x):
        return self.base_layer(x)


class Adapters(TwoLayers):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = Adapter(self.w1), Adapter(self.w2)

    def forward(self, x):
        return self.w2(relu2(self.w1(x)))


class Mixed(TwoLayers):
    """Its further parameter, as RWKV has it, is no bank."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, x):
        return self.w2(relu2(self.w1(x + self.share * x.roll(1, -2))))


class Column(nn.Module):
    """A layer of another library."""

    def __init__(self, d, out):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, d))

    def forward(self, x):
        return F.linear(x, self.weight), None


class Columns(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = Column(D, HIDDEN), Column(HIDDEN, D), SquaredReLU()

    def forward(self, x):
        return self.second(self.act(self.first(x)[0]))


class ReturnsTuple(TwoLayers):
    def forward(self, x):
        return self.w2(relu2(self.w1(x))), None


MISSED = {
    "three layers": (Three, "it has 3 layers (a, b, c)"),
    "gated": (Gated, "it has 3 layers (w1, w2, w3)"),
    "bank": (Bank, f"a bank of weights: mlp_bank [3, 2, {HIDDEN}, {D}]"),
    "weights as arguments": (WithArguments, "its weights are arguments of its forward"),
    "experts": (Experts, "a mixture of experts: the weight of w1 has 3 dimensions"),
    "experts with a router": (lambda: Routed(), "a mixture of experts: the weight of w1 has 3 dimensions"),
    "convolutions": (lambda: Convolutions(), "a is a torch.nn.modules.conv.Conv1d, not a torch.nn.Linear"),
    "adapters": (lambda: Adapters(), f"w1 is a {__name__}.Adapter, not a torch.nn.Linear"),
    "two networks in one Sequential": (
        lambda: nn.Sequential(nn.Linear(D, D), Square(), nn.Linear(D, D), nn.Linear(D, D), Square(), nn.Linear(D, D)),
        "it has 4 layers (0, 2, 3, 5)",
    ),
    "mixed along tokens": (lambda: Mixed(), "it has parameters or buffers beside its two layers (share)"),
    "a scale": (lambda: LearnedScale(), "it has parameters or buffers beside its two layers (b_out)"),
    "no bias": (lambda: Shifted(("b_in", "b_out")), "it has parameters or buffers beside its two layers (b_in, b_out)"),
    "biases and more": (
        lambda: WithThird(("b_in", "b_out")),
        "it has parameters or buffers beside its two layers (b_in, b_out, third)",
    ),
    "layers of another library": (Columns, f"first is a {__name__}.Column, not a torch.nn.Linear"),
    "norm inside": (
        lambda: nn.Sequential(nn.RMSNorm(D), nn.Linear(D, HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, D)),
        "it has parameters or buffers beside its two layers (0.weight)",
    ),
    "gated, in one layer": (
        lambda: nn.Sequential(nn.Linear(D, 2 * HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, D)),
        f"gated: the sizes of 0 [{2 * HIDDEN}, {D}] and 2 [{D}, {HIDDEN}] do not fit",
    ),
    "tuple": (ReturnsTuple, "its forward returns a tuple"),
    "tokens mix": (lambda: _with(Tokens, "squared_relu"), "its tokens depend on each other"),
    "activation after": (
        lambda: nn.Sequential(nn.Linear(D, HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, D), SquaredReLU()),
        "its output is not linear in its second layer (1: SquaredReLU, 3: SquaredReLU)",
    ),
    "patched": (after(lambda m: setattr(m, "forward", torch.relu)), "its forward is patched"),
}


def _with(kind, activation_name):
    module = kind()
    module.hidden_act = activation_name
    return module


@pytest.mark.parametrize("name", MISSED)
def test_near_misses(name):
    make, reason = MISSED[name]
    report = sparse24.convert(Stack(make(), TwoLayers()), quiet=True)
    assert report.near_misses == {"layers.0": reason}
    assert report.converted == ["layers.1"] and not report.skipped


def test_the_text_says_what_was_looked_for(capsys):
    report = sparse24.convert(Stack(Bank(), *(Three() for _ in range(5)), Attention()))
    text = (
        "sparse24: converted 0 of 0: none of 8 modules has two linear layers or weights, [F, D] and [D_out, F], and a "
        "squared ReLU between them\n"
        "near misses, of which parts can run `sparse24.relu2_mlp`:\n"
        f"  layers.0: a bank of weights: mlp_bank [3, 2, {HIDDEN}, {D}]\n"
        "  layers.1, layers.2, layers.3 and 2 more: it has 3 layers (a, b, c)"
    )
    assert str(report) == text and capsys.readouterr().out == text + "\n"


def test_the_text_of_a_near_miss_alone():
    assert str(sparse24.convert(Bank(), quiet=True)).startswith(
        "sparse24: converted 0 of 0: none of 1 module has two linear layers or weights, [F, D] and [D_out, F], and a "
        "squared ReLU between them\nnear misses, of which parts can run `sparse24.relu2_mlp`:\n  the model: a bank"
    )


def test_names_that_methods_of_torch_hide():
    """Such a module cannot run, and is no reason to raise."""
    report = sparse24.convert(Stack(TwoLayers(("forward_", "type")), TwoLayers()), quiet=True)
    assert report.converted == ["layers.1"] and not report.skipped


def test_filters_and_decisions_of_networks_of_any_name():
    """They are asked for networks alone, and may name nothing else."""
    model, asked = Stack(TwoLayers(), Attention(), Activation(F.gelu), TwoLayers(), Inline()), []

    def keep(module, name):
        asked.append(name)
        return name != "layers.3"

    report = sparse24.convert(model, sparse24.ConvertConfig(decisions={"layers.0": False}), keep, quiet=True)
    assert report.converted == ["layers.4"] and asked == ["layers.3", "layers.4"]
    assert report.skipped == {"layers.0": "decided against", "layers.3": "filtered out"}
    with pytest.raises(RuntimeError, match='name feed-forward networks of model, got "layers.1"'):
        sparse24.convert(model, sparse24.ConvertConfig(decisions={"layers.1": False}), quiet=True)


def test_converted_networks_are_counted():
    model = Stack(TwoLayers(), Attention())
    assert sparse24.convert(model, EXACT, quiet=True).converted == ["layers.0"]
    report = sparse24.convert(model, EXACT, quiet=True)
    assert report.skipped == {"layers.0": "already converted"} and not report.near_misses
