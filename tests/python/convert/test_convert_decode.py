"""Conversion for decoding: few tokens are exact, float8 weights are made once, dense runs what it ran before."""

import copy
import pickle

import pytest
import torch
from compare import assert_same_bits
from convert_models import HIDDEN, BothParameters, CountOps, D, Inline, Stack, WithModule, randomize
from data import normal
from oracle import FP8
from torch import nn

import sparse24
from sparse24.convert.conversion import Weights
from sparse24.convert.run import dense_tokens
from sparse24.mlp import choice

CONFIGS = {
    "bf16": sparse24.ConvertConfig(decode=True, min_tokens=0),
    "fp8": sparse24.ConvertConfig(dtype="fp8", decode=True, min_tokens=0),
}
FP8_ONCE = sparse24.ConvertConfig(dtype="fp8", min_tokens=0)


@pytest.fixture(autouse=True)
def all_are_few(monkeypatch):
    """On CUDA too, whatever was measured."""
    monkeypatch.setattr(choice, "_few", {(16, D, HIDDEN): 64, (8, D, HIDDEN): 64})


def build(device, make=WithModule, config=CONFIGS["bf16"], training=False):
    module = randomize(make()).to(device, torch.bfloat16).train(training)
    before = copy.deepcopy(module)
    assert sparse24.convert(module, config, quiet=True).converted == [""]
    return module, before


def weights_of(module):
    if isinstance(module, BothParameters):
        return Weights(module.c_fc, None, None, None), Weights(module.c_proj.t(), None, None, None)
    names = module.names if isinstance(module, Inline) else ("up_proj", "down_proj")
    return tuple(Weights(layer.weight, layer.bias, None, None) for layer in (getattr(module, n) for n in names))


@torch.no_grad()
def exactly(module, x, fp8=False):
    """By the op, of the module's weights as they are."""
    first, second = weights_of(module)
    w1, w2, scales = first.weight, second.weight, ()
    if fp8:
        (w1, s1), (w2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
        scales = s1, s2
    return sparse24.relu2_mlp_few(x, w1, w2.t().contiguous(), first.bias, second.bias, *scales)


def copies_of(module):
    return {name: t for name, t in module.named_buffers() if name.startswith("sparse24")}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("make", [WithModule, lambda: WithModule(bias=True), Inline, BothParameters])
def test_few_tokens_are_exact(device, make, kind):
    module, before = build(device, make, CONFIGS[kind])
    assert list(module.state_dict()) == list(before.state_dict())
    for count in (0, 1, 63, 64):
        x = normal(1, count, D, dtype=torch.bfloat16).to(device)
        assert_same_bits(module(x), exactly(module, x, kind == "fp8"))
    x = normal(65, D, dtype=torch.bfloat16).to(device)
    first, second = weights_of(module)
    operands = x, first.weight, second.weight, first.bias, second.bias
    precision = "fp8" if kind == "fp8" else "16bit"
    assert_same_bits(module(x), sparse24.relu2_mlp(*operands, precision=precision, min_tokens=0))
    assert "decode=True" in repr(module)
    assert sparse24.revert(module) == [""] and type(module) is type(before)
    assert not copies_of(module) and not module._load_state_dict_post_hooks
    assert_same_bits(module(x), before(x))


def test_memory(device):
    """A second weight; none where it is stored by neuron; in fp8 both weights once more, and the second twice."""
    size = D * HIDDEN
    held = {
        kind: {name: t.numel() * t.element_size() for name, t in copies_of(build(device, config=c)[0]).items()}
        for kind, c in CONFIGS.items()
    }
    assert held["bf16"] == {"sparse24_w2_rows": 2 * size}
    weights = {name: size for name in ("sparse24_w1", "sparse24_w2", "sparse24_w2_rows")}
    scales = {"sparse24_w1_scale": 4 * HIDDEN, "sparse24_w2_scale": 4 * D, "sparse24_scale_y_factor": 4}
    assert held["fp8"] == weights | scales
    assert not copies_of(build(device, BothParameters)[0])
    assert set(copies_of(build(device, config=FP8_ONCE)[0])) == set(held["fp8"]) - {"sparse24_w2_rows"}


CHANGES = {
    "in place": lambda m: m.down_proj.weight.mul_(2),
    "first layer": lambda m: m.up_proj.weight.mul_(2),
    "loaded": lambda m: m.load_state_dict({name: t * 2 for name, t in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({name: t * 2 for name, t in m.state_dict().items()}, assign=True),
    "cast": lambda m: m.half().bfloat16(),
    "cast to what it is": lambda m: m.bfloat16(),
    "to the meta device and back": lambda m: m.to("meta")
    .to_empty(device="cpu")
    .load_state_dict({name: t.bfloat16() * 3 for name, t in randomize(WithModule()).state_dict().items()}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("change", CHANGES)
def test_copies_follow_the_weights(device, kind, change):
    module, _ = build(device, config=CONFIGS[kind])
    x = normal(5, D, dtype=torch.bfloat16).to(device)
    before = module(x)
    CHANGES[change](module)
    module.to(device)
    assert change.startswith("cast") or not torch.equal(module(x), before)
    assert_same_bits(module(x), exactly(module, x, kind == "fp8"))
    many = normal(70, D, dtype=torch.bfloat16).to(device)
    first, second = weights_of(module)
    precision = "fp8" if kind == "fp8" else "16bit"
    expected = sparse24.relu2_mlp(many, first.weight, second.weight, precision=precision, min_tokens=0)
    assert_same_bits(module(many), expected)


OTHER_CALLS = {
    "a new weight": lambda m: setattr(m.up_proj, "weight", nn.Parameter(m.up_proj.weight * 2)),
    "a new second weight": lambda m: setattr(m.down_proj, "weight", nn.Parameter(m.down_proj.weight * 2)),
    "a new bias": lambda m: setattr(m.up_proj, "bias", nn.Parameter(m.up_proj.bias + 1)),
    "no bias": lambda m: setattr(m.down_proj, "bias", None),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("change", OTHER_CALLS)
def test_calls_unlike_the_one_before(device, kind, change):
    module, _ = build(device, lambda: WithModule(bias=True), CONFIGS[kind])
    x = normal(3, D, dtype=torch.bfloat16).to(device)
    first = module(x)
    assert_same_bits(module(x), first)
    OTHER_CALLS[change](module)
    expected = exactly(module, x, kind == "fp8")
    got = module(x)
    if "weight" in change:  # whose copies are of the one before: pruned, or float8 in each call
        torch.testing.assert_close(got, expected, rtol=0.3, atol=0.3 * float(expected.float().abs().max()))
        assert float((got - first).float().norm()) > 0.5 * float((expected - first).float().norm()) > 0
    else:
        assert_same_bits(got, expected)
    assert_same_bits(module(x), got)


def test_calls_with_gradients_behind_one_without(device):
    module, _ = build(device)
    x = normal(3, D, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        module(x)
    out = module(x.clone().requires_grad_())
    out.sum().backward()
    assert module.up_proj.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_copies_of_the_module(device, kind):
    module, _ = build(device, config=CONFIGS[kind])
    x = normal(2, D, dtype=torch.bfloat16).to(device)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert set(copies_of(other)) == set(copies_of(module))
        assert_same_bits(other(x), module(x))
        other.down_proj.weight.mul_(2)
        assert_same_bits(other(x), exactly(other, x, kind == "fp8"))


@torch.no_grad()
def test_float8_weights_are_made_once(device):
    module, _ = build(device, config=FP8_ONCE)
    x = normal(20, D, dtype=torch.bfloat16).to(device)
    with CountOps() as count:
        out = module(x)
    assert count.calls["sparse24.quantize_fp8.default"] == 0
    assert count.calls["sparse24.relu2_mlp_sparse.default"] == 1  # which quantises x
    first, second = weights_of(module)
    assert_same_bits(out, sparse24.relu2_mlp(x, first.weight, second.weight, precision="fp8", min_tokens=0))


def test_training_quantises_in_each_call(device):
    module, _ = build(device, config=FP8_ONCE, training=True)
    x = normal(20, D, dtype=torch.bfloat16).to(device)
    expected = sparse24.relu2_mlp(x, *(w.weight for w in weights_of(module)), precision="fp8", min_tokens=0)
    module(x).float().sum().backward()
    with torch.no_grad():
        assert_same_bits(module(x), expected)
        assert not copies_of(module)
        assert_same_bits(module.eval()(x), expected)
        assert copies_of(module)
        for p in module.parameters():
            p.sub_(p.grad)
        expected = sparse24.relu2_mlp(x, *(w.weight for w in weights_of(module)), precision="fp8", min_tokens=0)
        assert_same_bits(module(x), expected)
    assert_same_bits(module(x), expected)  # with gradients, in evaluation


@torch.no_grad()
def test_other_weights_are_not_those_of_the_copies(device):
    for config in CONFIGS.values():
        module, before = build(device, config=config)
        x = normal(3, D, dtype=torch.bfloat16).to(device)
        weights = {name: t * 2 for name, t in module.named_parameters()}
        got = torch.func.functional_call(module, weights, x)
        before.load_state_dict(weights)
        operands = x, *(w.weight for w in weights_of(before))
        precision = "fp8" if config.dtype == "fp8" else "16bit"
        assert_same_bits(got, sparse24.relu2_mlp(*operands, precision=precision, min_tokens=65))


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(device, kind, dynamic):
    module, _ = build(device, config=CONFIGS[kind])
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    module.down_proj.weight.mul_(2)
    for count in (1, 2, 5, 8, 3, 64, 1):
        x = normal(count, D, dtype=torch.bfloat16).to(device)
        assert_same_bits(compiled(x), exactly(module, x, kind == "fp8"))
    assert len(graphs) <= (2 if dynamic else 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    precision = "fp8" if kind == "fp8" else "16bit"
    operands = (w.weight for w in weights_of(module))
    assert_same_bits(compiled(x), sparse24.relu2_mlp(x, *operands, precision=precision, min_tokens=0))
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"threshold": 0.1}], ids=str)
@pytest.mark.usefixtures("not_by_few_tokens")
def test_dense_by_few_tokens_runs_what_it_ran_before(device, how):
    """The same functions of torch; where there is more to it, it computes the network."""
    module, _ = build(device, lambda: WithModule(bias=True), sparse24.ConvertConfig(min_tokens=65, **how))
    calls = []
    module.act_fn.register_forward_hook(lambda *_: calls.append(1))  # which another forward would not call
    x = normal(64, D, dtype=torch.bfloat16).to(device)
    if how:
        with pytest.warns(UserWarning, match="act_fn has hooks"):
            module(x)
    else:
        module(x)
    assert calls == [1]


def test_where_a_module_runs_as_before():
    """By devices: below what pays in 16 bits; with decode from what is few up to 64 at least, in fp8 too."""
    bf16, fp8 = "16bit", "fp8"
    sizes = D, HIDDEN, D
    choice._few[16, D, HIDDEN], choice._few[8, D, HIDDEN] = 8, 16
    first = choice.tokens_that_pay(HIDDEN, D)
    assert choice.pays(first, HIDDEN, D) and not choice.pays(first - 1, HIDDEN, D)
    assert dense_tokens(sizes, False, bf16, {}, False) == ((-1, 0), (-1, first))
    assert dense_tokens(sizes, False, bf16, {"min_tokens": 20}, False) == ((-1, 20), (-1, 20))
    assert dense_tokens(sizes, False, bf16, {}, True) == ((64, 0), (8, first))
    assert dense_tokens(sizes, False, bf16, {"min_tokens": 20}, True) == ((64, 20), (8, 65))
    assert dense_tokens(sizes, False, fp8, {}, True) == ((64, 0), (16, 65))
    never = (0, 0), (0, 0)
    assert dense_tokens(sizes, False, fp8, {}, False) == dense_tokens(sizes, True, "auto", {}, True) == never
    assert dense_tokens(sizes, False, bf16, {"threshold": "0.5"}, True) == never


@torch.no_grad()
def test_masters_are_cast_by_few_tokens_too(device):
    """A plain layer would refuse another dtype."""
    module = randomize(WithModule()).to(device)
    assert sparse24.convert(module, sparse24.ConvertConfig(min_tokens=65), quiet=True).converted == [""]
    x = normal(3, D, dtype=torch.bfloat16).to(device)
    assert module(x).dtype == torch.bfloat16
    with torch.autocast(device, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@torch.no_grad()
def test_a_stack_of_networks(device):
    model = Stack(*(randomize(WithModule()) for _ in range(3))).to(device, torch.bfloat16).eval()
    reference = copy.deepcopy(model)
    assert len(sparse24.convert(model, CONFIGS["bf16"], quiet=True).converted) == 3
    x = normal(1, 1, D, dtype=torch.bfloat16).to(device)
    expected = x
    for layer in reference.layers:
        expected = expected + exactly(layer, expected)
    assert_same_bits(model(x), expected)


@torch.no_grad()
def test_checkpoints_in_float8(device):
    """Static scales are those of the checkpoint; the copy by neuron is float8 too."""
    module = randomize(WithModule()).to(device, torch.bfloat16)
    for name in ("up_proj", "down_proj"):
        setattr(module, name, sparse24.nn.QuantizedLinear(getattr(module, name)))
    module.down_proj.register_buffer("input_scale", torch.tensor(0.02, device=device))
    assert sparse24.convert(module, CONFIGS["bf16"], quiet=True).converted == [""]
    up, down = module.up_proj, module.down_proj
    assert copies_of(module)["sparse24_w2_rows"].dtype == FP8
    x = normal(4, D, dtype=torch.bfloat16).to(device)
    rows = down.weight.t().contiguous()
    expected = sparse24.relu2_mlp_few(x, up.weight, rows, None, None, up.weight_scale, down.weight_scale)
    assert_same_bits(module(x), expected)
    x = normal(70, D, dtype=torch.bfloat16).to(device)
    scales = {"w1_scale": up.weight_scale, "w2_scale": down.weight_scale, "scale_y": down.input_scale}
    assert_same_bits(module(x), sparse24.relu2_mlp(x, up.weight, down.weight, **scales, min_tokens=0))


def test_refused_options():
    with pytest.raises(RuntimeError, match=r"^sparse24\.ConvertConfig: expected decode to be True or False, got 2$"):
        sparse24.ConvertConfig(decode=2)


@torch.no_grad()
def test_cuda_graph(cuda):
    """Replayed with new data, and with weights that have changed since: one call makes the copies again in place."""
    module, _ = build(cuda, config=CONFIGS["fp8"])
    x = torch.zeros(2, D, dtype=torch.bfloat16, device=cuda)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    for seed in range(3):
        x.copy_(normal(2, D, dtype=torch.bfloat16, seed=seed))
        module.down_proj.weight.mul_(1.5)
        expected = module(x)
        graph.replay()
        assert_same_bits(out, expected)
        assert_same_bits(out, exactly(module, x, fp8=True))


@pytest.mark.parametrize("kind", [*CONFIGS, "once"])
def test_fused_optimizers_are_followed(device, kind):
    """They write to the weights without a new version."""
    module, _ = build(device, config=CONFIGS.get(kind, FP8_ONCE))
    x = normal(3, D, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        before = module(x)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    versions = [p._version for p in module.parameters()]
    optimizer.step()
    assert versions == [p._version for p in module.parameters()]
    with torch.no_grad():
        after = module(x)
        again = copy.deepcopy(module)(x)
    assert not torch.equal(after, before)
    assert_same_bits(after, again)


@torch.no_grad()
def test_weights_that_change_before_a_call_in_training(device):
    module, before = build(device, config=FP8_ONCE)
    x = normal(70, D, dtype=torch.bfloat16).to(device)
    module(x)
    module.train()
    module.up_proj.weight.mul_(2)
    before.up_proj.weight.mul_(2)
    sparse24.convert(before.train(), FP8_ONCE, quiet=True)
    assert_same_bits(module(x), before(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [*CONFIGS, "once"])
@pytest.mark.filterwarnings("ignore:sparse24")
def test_float64_runs_as_before_conversion(kind):
    module, before = build("cpu", config=CONFIGS.get(kind, FP8_ONCE))
    x = normal(3, D, dtype=torch.float32).double()
    module(x.bfloat16())
    assert_same_bits(module.double()(x), before.double()(x))
