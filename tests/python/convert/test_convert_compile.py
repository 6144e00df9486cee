"""Converted modules under torch.compile and torch.export: one graph per switch, never a stale one."""

import copy
from itertools import combinations

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, CastLinear, CountOps, D, Inline, Stack, WithModule, gradients, randomize
from data import normal
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def stack(device):
    module = randomize(Stack(Inline(), WithModule(bias=True))).to(device, torch.bfloat16)
    before = copy.deepcopy(module)
    sparse24.convert(module, EXACT, quiet=True)
    return module, before


def inputs(device, tokens=21):
    return normal(tokens, D, dtype=torch.bfloat16, seed=tokens).to(device)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(device, counter, dynamic):
    """Without breaks, of both directions; the results of eager mode; one for all sizes where shapes are dynamic."""
    module, _ = stack(device)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    sizes = (21, 64, 127) if dynamic else (21, 21)
    for tokens in sizes:
        x = inputs(device, tokens)
        for actual, expected in zip(gradients(module, compiled, x), gradients(module, module, x), strict=True):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 1


def test_switches_are_guarded(device, counter):
    """Each state of a switch has its graph, and coming back to one needs none."""
    module, before = stack(device)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = inputs(device)

    def check(expected, frames):
        with torch.no_grad():
            assert_same_bits(compiled(x), expected)
        assert counter.frame_count == frames

    with torch.no_grad():
        sparse, dense = module(x), before(x)
        module.layers[0].sparse = False
        first_dense = module(x)
        module.layers[0].sparse = True
        module.layers[1].sparse24_enabled = False
        second_off = module(x)
        module.layers[1].sparse24_enabled = True

    outputs = (sparse, dense, first_dense, second_off)
    assert not any(torch.equal(a, b) for a, b in combinations(outputs, 2))

    check(sparse, 1)
    with sparse24.disabled():
        check(dense, 2)
    check(sparse, 2)
    module.layers[0].sparse = False
    check(first_dense, 3)
    module.layers[0].sparse = True
    check(sparse, 3)
    module.layers[1].sparse24_enabled = False
    check(second_off, 4)
    with sparse24.disabled():
        check(dense, 4)
    sparse24.revert(module)
    check(dense, 5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bf16", "fp8", "module"])
def test_guards_are_skipped(kind):
    """Those on a network that decodes: torch skips them while no dictionary in it has changed, as on plain modules."""
    if kind == "module":
        network = sparse24.nn.ReLU2MLP(D, 2 * D).prepare_decode_()
    else:
        network = randomize(WithModule()).eval()
        sparse24.convert(network, sparse24.ConvertConfig(dtype=kind, decode=True), quiet=True)
    outer, config = Around(network), torch._dynamo.config
    if not hasattr(config, "use_recursive_dict_tags_for_guards"):
        pytest.skip("guards are not skipped by this torch")
    torch._dynamo.reset()
    with config.patch(use_recursive_dict_tags_for_guards=True):
        torch.compile(outer, backend="eager", fullgraph=True)(inputs("cpu").float())
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(Around.forward.__code__)
    (line,) = [s for s in str(entry.guard_manager).splitlines() if f"type={type(network)}, tag_safe" in s]
    assert "tag_safe=(True, " in line
    torch._dynamo.reset()


@torch.no_grad()
def test_what_changes_behind_a_graph(counter, monkeypatch):
    """Skipped guards see it: an attribute, the class of a child, another conversion, and a class that is patched."""
    module = randomize(WithModule()).eval()
    before, x = copy.deepcopy(module), inputs("cpu").float()
    sparse24.convert(module, sparse24.ConvertConfig(decode=True), quiet=True)
    outer = Around(module)
    compiled = torch.compile(outer, backend=counter, fullgraph=True)
    exact = compiled(x)
    assert_same_bits(compiled(x), exact)
    assert counter.frame_count == 1
    with monkeypatch.context() as patch:
        forward = torch.nn.Linear.forward
        patch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
        assert_same_bits(compiled(x), before(x) + 1)
    assert_same_bits(compiled(x), exact)
    sparse24.revert(outer)
    sparse24.convert(outer, sparse24.ConvertConfig(decode=True, threshold=1e9), quiet=True)
    assert not (compiled(x) == exact).any()
    sparse24.revert(outer)
    assert_same_bits(compiled(x), before(x) + 1)


class Around(torch.nn.Module):
    """A network in a module, whose graph has guards on it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) + 1


def test_disabled_inside_a_compiled_function(device, counter):
    module, before = stack(device)

    @torch.compile(backend=counter, fullgraph=True)
    def both(x):
        with sparse24.disabled():
            dense = module(x)
        return dense, module(x)

    x = inputs(device)
    for _ in range(2):
        dense, sparse = both(x)
        assert_same_bits(dense, before(x))
        assert_same_bits(sparse, module(x))
    assert counter.frame_count == 1


def test_hooks_before_compilation(device, counter):
    """Hooks on a child are seen when the graph is traced; Dynamo does not guard on hooks of any module."""
    module, _ = stack(device)
    x = inputs(device)
    sparse = module(x)
    module.layers[0].c_fc.register_forward_hook(lambda _, args, out: out + 1)
    with pytest.warns(UserWarning, match="c_fc has hooks"):
        expected = module(x)
    assert_same_bits(torch.compile(module, backend=counter, fullgraph=True)(x), expected)
    assert not torch.equal(expected, sparse)


def test_a_training_run(device, counter):
    """As nanochat does it: float32 weights made on the meta device, static shapes, evaluation without compilation."""
    with torch.device("meta"):
        model = Stack(Inline(linear=CastLinear), Inline(linear=CastLinear))
    sparse24.convert(model, EXACT, quiet=True)
    randomize(model.to_empty(device=device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = sparse24.Schedule(4, dense_warmup_steps=2)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for step in range(4):
        assert schedule.apply(model, step) == (step >= 2)
        expected = gradients(model, model, inputs(device))
        for a, e in zip(gradients(model, compiled, inputs(device)), expected, strict=True):
            assert_same_bits(a, e)
        assert [a.dtype for a in expected] == [torch.bfloat16] * 2 + [torch.float32] * 4
        optimizer.step()
        plain = copy.deepcopy(model)
        sparse24.revert(plain)
        for tokens in (1, 21, 50):
            with sparse24.disabled(), torch.no_grad():
                assert_same_bits(model(inputs(device, tokens)), plain(inputs(device, tokens)))
    assert counter.frame_count == 2  # dense and sparse


@pytest.mark.parametrize("strict", [False, True])
def test_export(device, strict):
    """The exported program holds the sparse product, and runs without the module."""
    module, _ = stack(device)
    module.requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, (inputs(device),), dynamic_shapes=(({0: tokens}),), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sparse24.linear_compress.default") == targets.count("sparse24.mm.default") == 2
    for size in (21, 64):
        assert_same_bits(program.module()(inputs(device, size)), module(inputs(device, size)))


def test_functional_call_and_fake_tensors(device):
    """Other weights than the module's, and none at all."""
    module, _ = stack(device)
    x = inputs(device)
    weights = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert_same_bits(torch.func.functional_call(module, weights, (x,)), x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, CountOps() as ops:
        out = module(mode.from_tensor(x))
    assert out.shape == x.shape and out.dtype == x.dtype and ops.sparse == 2
