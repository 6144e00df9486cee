"""Networks are found by what they compute: layers of any names, in lists, in Sequential, in layers of torch."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from convert_models import EXACT, HIDDEN, CountOps, D, SquaredReLU, assert_near, gradients, randomize, relu2
from data import normal
from found_models import (
    Attention,
    InList,
    Optional,
    Parameters,
    Scaled,
    TwoLayers,
    WithBiases,
    WithMask,
    encoder,
    feed_forward,
)
from torch import nn

import sparse24
from sparse24.analyze import top2_mask

NAMES = [
    ("w1", "w2"), ("up", "down"), ("linear1", "linear2"), ("w_in", "w_out"), ("wi", "wo"), ("fc_in", "fc_out"),
    ("lin1", "lin2"), ("second", "first"),
]  # fmt: skip
NETWORKS = {
    **{", ".join(names): lambda n=names: TwoLayers(n) for names in NAMES},
    "the second layer first": lambda: TwoLayers(reverse=True),
    "square": lambda: TwoLayers(hidden=D),
    "bias of the second": lambda: TwoLayers(bias=(False, True)),
    "another width of the output": lambda: TwoLayers(d_out=48),
    "Sequential": lambda: nn.Sequential(nn.Linear(D, HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, D)),
    "Sequential in Sequential": feed_forward,
    "ModuleList": InList,
    "parameters [F, D] and [D, F]": lambda: Parameters(False, False),
    "parameters [F, D] and [F, D]": lambda: Parameters(False, True),
    "parameters [D, F] and [D, F]": lambda: Parameters(True, False),
    "parameters [D, F] and [F, D]": lambda: Parameters(True, True),
    "parameters and biases": lambda: WithBiases(("b_in", "b_out")),
    "parameters [D, F] and [F, D], the second bias first": lambda: WithBiases(("b_out", "b_in"), HIDDEN, (True, True)),
    "square parameters and biases": lambda: WithBiases(("b_out", "b_in"), D),
    "parameters and the first bias": lambda: WithBiases(("b_in",), D),
    "parameters and the second bias": lambda: WithBiases(("b_out",), D),
    "a further argument that is None": Optional,
    "a further argument that has to be given": WithMask,
}


def inputs(device="cpu"):
    return normal(3, 11, D, dtype=torch.bfloat16, seed=5).to(device)


def masked_relu2(h):
    y = relu2(h)
    return y * top2_mask(y)


def call(module, x):
    return module(x, None) if isinstance(module, WithMask) else module(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_found_under_any_name(name):
    """Output and gradients are those of the network with a 2:4 mask."""
    module = randomize(NETWORKS[name]()).to(torch.bfloat16)
    expected = copy.deepcopy(module)
    for part in expected.modules():
        if hasattr(part, "activation"):
            part.activation = masked_relu2
        for key, child in part.named_children():
            if isinstance(child, SquaredReLU):
                setattr(part, key, nn.Identity())
                getattr(part, key).forward = masked_relu2
    report = sparse24.convert(module, EXACT, quiet=True)
    assert report.converted == [""] and not report.skipped and not report.near_misses
    with CountOps() as ops:
        actual = gradients(module, lambda x: call(module, x), inputs())
    assert ops.sparse == 2
    assert_near(actual, gradients(expected, lambda x: call(expected, x), inputs()), 2e-2)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("activation", [relu2, SquaredReLU()], ids=["function", "module"])
def test_layers_of_torch(kind, activation):
    """The network inside of a transformer's layer; what stands around it is as it was."""
    layer = kind(D, 4, HIDDEN, dropout=0.0, activation=activation, batch_first=True)
    x = normal(2, 11, D, dtype=torch.float32, seed=5)
    arguments = (x,) if kind is nn.TransformerEncoderLayer else (x, x)
    expected = copy.deepcopy(layer)
    expected.activation = nn.Identity()
    expected.activation.forward = masked_relu2
    dense = layer(*arguments)
    report = sparse24.convert(layer, EXACT, quiet=True)
    assert report.converted == [""] and not report.skipped
    with CountOps() as ops:
        out = layer(*arguments)
    assert ops.sparse == 1
    assert_near([out], [expected(*arguments)], 1e-4)
    with sparse24.disabled():
        assert_same_bits(layer(*arguments), dense)
    layer.self_attn.register_forward_hook(lambda *_: None)  # is none of the network's
    with CountOps() as ops:
        assert_same_bits(layer(*arguments), out)
    assert ops.sparse == 1
    assert sparse24.revert(layer) == [""] and type(layer) is kind
    assert_same_bits(layer(*arguments), dense)


def test_an_encoder_of_torch():
    """Also compiled, and with phases."""
    model = encoder(activation=relu2, dropout=0.0).eval()
    assert sparse24.convert(model, EXACT, quiet=True).converted == ["layers.0", "layers.1"]
    x = normal(2, 11, D, dtype=torch.float32, seed=5)
    with CountOps() as ops, torch.no_grad():
        out = model(x)
    assert ops.sparse == 2
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near([torch.compile(model, backend="aot_eager", fullgraph=True)(x)], [out], 1e-5)
    torch._dynamo.reset()
    sparse24.Schedule(10, dense_warmup_steps=1).apply(model, 0)
    with CountOps() as ops, torch.no_grad():
        model(x)
    assert ops.sparse == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["Sequential in Sequential", "ModuleList", "parameters [D, F] and [F, D]"])
def test_compiled(name):
    module = randomize(NETWORKS[name]()).to(torch.bfloat16)
    sparse24.convert(module, EXACT, quiet=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, e in zip(*(gradients(module, f, inputs()) for f in (compiled, module)), strict=True):
        assert_same_bits(a, e)
    torch._dynamo.reset()


def test_the_innermost_is_converted():
    model = nn.Sequential(nn.Sequential(TwoLayers()), Attention(), feed_forward())
    assert sparse24.convert(model, EXACT, quiet=True).converted == ["0.0", "2"]
    sequential = nn.Sequential(nn.Sequential(nn.Linear(D, HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, D)))
    assert sparse24.convert(sequential, EXACT, quiet=True).converted == ["0"]


def test_slices_of_a_converted_sequential_are_plain():
    module = feed_forward()
    sparse24.convert(module, EXACT, quiet=True)
    part = module[:2]
    assert type(part) is nn.Sequential and "sparse24" not in repr(part)
    assert_same_bits(part(inputs().float()), relu2(module[0][0](inputs().float())))


class WithDropout(TwoLayers):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class WithFunctionalDropout(TwoLayers):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


DROPS = "it computes something else in training than in evaluation, as dropout does"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithDropout, "it has dropout (drop, p=0.5)"),
        (WithFunctionalDropout, DROPS),
        (lambda: feed_forward(0.5), "it has dropout (1, p=0.5)"),
        (lambda: nn.TransformerEncoderLayer(D, 4, HIDDEN, 0.5, relu2), "it has dropout (dropout, p=0.5)"),
    ],
)
def test_dropout(make, reason):
    """Refused in training; a module in evaluation mode is converted, and runs as it was if it is trained later."""
    module, x = make(), inputs().float()
    assert sparse24.convert(module, EXACT, quiet=True).skipped == {"": reason}
    module.eval()
    report = sparse24.convert(module, EXACT, quiet=True)
    assert report.converted == report.evaluation_only == [""]
    text = "sparse24: converted 1 of 1 (1 in evaluation only: in training they have dropout or the like)"
    assert str(report) == text
    with CountOps() as ops:
        module(x)
    assert ops.sparse == 1
    module.train()
    with CountOps() as ops, pytest.warns(UserWarning, match="in training it computes something else"):
        module(x)
    assert ops.sparse == 0
    module.eval()
    with CountOps() as ops:
        module(x)
    assert ops.sparse == 1


def test_arguments():
    """None passes, whatever else is given is computed as before, with one warning; what is missing is an error."""
    for module in (Optional(), WithMask()):
        sparse24.convert(module, EXACT, quiet=True)
        x, mask = inputs().float(), torch.full((D,), 2.0)
        with CountOps() as ops:
            assert_same_bits(module(x, None), module(x, mask=None))
        assert ops.sparse == 2
        with CountOps() as ops, pytest.warns(UserWarning, match="it is called with mask") as warned:
            module(x, mask)
            module(x, mask=mask)
        assert ops.sparse == 0 and len([w for w in warned if "sparse24" in str(w.message)]) == 1
    with pytest.raises(TypeError, match="mask"):
        module(x)


class Busy(TwoLayers):
    """It draws random numbers, counts its calls, and writes to what it holds."""

    def __init__(self):
        super().__init__()
        self.calls, self.log, self.seen, self.scratch = 0, [], {}, torch.zeros(1)

    def forward(self, x):
        self.calls += 1
        self.log.append(random.random())
        self.seen[len(self.seen)] = torch.rand(1)
        self.scratch += 1
        return super().forward(x)


def test_looking_leaves_no_trace():
    """Of what is refused either: hooks do not run, and random numbers are those that would have come."""
    called = []
    model = nn.Sequential(Busy(), Attention(), WithDropout(), Scaled())
    model[1].proj.register_forward_hook(lambda *_: called.append("hook"))
    model[2].w1.register_forward_pre_hook(lambda *_: called.append("hook"))
    model[3].eval()
    modes = [m.training for m in model.modules()]
    state, python = torch.get_rng_state(), random.getstate()
    report = sparse24.convert(model, quiet=True)
    assert report.converted == ["0"] and list(report.skipped) == ["2", "3"]
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert not called and [m.training for m in model.modules()] == modes
    busy = model[0]
    assert (busy.calls, busy.log, busy.seen) == (0, [], {}) and busy.scratch.item() == 0


def test_large_modules_are_not_tried_at_their_size():
    """Attention insists on its sizes, and says nothing of squared ReLU."""
    sizes = []

    class Watched(Attention):
        def forward(self, x):
            sizes.append(x.shape[-1])
            return super().forward(x.view(x.shape[0], -1, 4096))

    with torch.device("meta"):
        model = Watched(4096)
    report = sparse24.convert(model, quiet=True)
    assert not report.converted and not report.skipped and sizes and max(sizes) < 100


def test_what_fails_otherwise_than_by_sizes_is_tried_small_only():
    """It would fail at its own, too, which may take long. The reason is the first."""
    sizes = []

    class Needs(TwoLayers):
        def forward(self, x, residual):
            sizes.append(self.fc1.weight.shape[0])
            return super().forward(x) + residual

    report = sparse24.convert(Needs(("fc1", "fc2"), d=256, hidden=1024), quiet=True)
    assert report.skipped[""].startswith("its forward does not run: TypeError: unsupported operand")
    assert sizes and max(sizes) < 100


class Odd(nn.Module):
    """Weights without a size yet, a property that raises, an attribute that is itself, a list of itself."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.LazyLinear(HIDDEN), nn.LazyLinear(D)
        self.bank = nn.UninitializedParameter()
        self.loop = []
        self.loop.append(self.loop)
        self.squared_relu = "squared_relu"

    @property
    def trouble(self):
        raise RuntimeError("not now")

    def forward(self, x):
        return self.trouble or self.w2(torch.relu(self.w1(x)) ** 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_odd_modules_are_survived():
    model = nn.ModuleDict(
        {
            "lazy": nn.Sequential(nn.LazyLinear(HIDDEN), SquaredReLU(), nn.LazyLinear(D)),
            "odd": Odd(),
            "empty": nn.Module(),
            "none": nn.Sequential(nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)),
            "lists": nn.ModuleList([nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)]),
            "weights": nn.ParameterList([torch.zeros(HIDDEN, D), torch.zeros(D, HIDDEN)]),
            "scripted": torch.jit.script(feed_forward()),
            "network": TwoLayers(),
        }
    )
    model["none"].register_module("missing", None)
    report = sparse24.convert(model, quiet=True)
    assert report.converted == ["network"] and not report.skipped


@pytest.mark.parametrize("make", [feed_forward, InList, lambda: encoder(activation=relu2, dropout=0.0).layers[0]])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(make, how):
    """Converted, with the keys of the state_dict, and reverted to what they were."""
    module, x = make(), normal(2, 11, D, dtype=torch.float32, seed=5)
    keys, dense = list(module.state_dict()), module(x)
    sparse24.convert(module, EXACT, quiet=True)
    other = how(module)
    assert list(other.state_dict()) == keys
    with CountOps() as ops:
        assert_same_bits(other(x), module(x))
    assert ops.sparse == 2
    assert sparse24.revert(other) == [""] and type(other) is type(make())
    assert_same_bits(other(x), dense)
