"""ReLU2MLP.prepare_decode_: few tokens are exact, and the copy of the second weight follows it or is not used."""

import copy
import io
import pickle

import pytest
import torch
from compare import assert_same_bits
from small_network import HIDDEN, OUT, D, tokens
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import sparse24
from sparse24.mlp import choice, few_tokens
from sparse24.nn import weight_copies


@pytest.fixture(autouse=True)
def all_are_few(monkeypatch):
    """On CUDA too, whatever was measured."""
    monkeypatch.setattr(choice, "_few", {(16, OUT, HIDDEN): 64, (8, OUT, HIDDEN): 64})
    assert few_tokens(HIDDEN, OUT) == 64


def module(device, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, **options, device=device, dtype=dtype, min_tokens=0)


@torch.no_grad()
def exactly(m, x):
    up, down = m.up_proj, m.down_proj
    scales = (getattr(layer, "weight_scale", None) for layer in (up, down))
    biases = (None if b is None else b.to(x.dtype) for b in (up.bias, down.bias))
    rows = down.weight.t().contiguous()
    return sparse24.relu2_mlp_few(x, up.weight, rows, *biases, *scales, m.threshold)


def assert_exact(m, x):
    with torch.no_grad():
        assert_same_bits(m(x), exactly(m, x))


def assert_as_without(m, x):
    """It runs as a module that was not prepared: 2:4."""
    up, down = m.up_proj, m.down_proj
    with torch.no_grad():
        assert_same_bits(m(x), sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, min_tokens=0))


@torch.no_grad()
def assert_dense(m, x, weights=None):
    """It runs without the copy, and prunes nothing either."""
    w = dict(m.named_parameters()) if weights is None else weights
    biases = w.get("up_proj.bias"), w.get("down_proj.bias")
    expected = sparse24.relu2_mlp(x, w["up_proj.weight"], w["down_proj.weight"], *biases, min_tokens=65)
    assert_same_bits(m(x) if weights is None else torch.func.functional_call(m, weights, x), expected)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"threshold": 0.25}], ids=str)
@pytest.mark.parametrize("quantised", ["no", "before", "after"])
@pytest.mark.parametrize("count", [0, 1, 63, 64])
def test_few_tokens_are_exact(device, dtype, count, quantised, options):
    m = module(device, dtype, **options)
    state = list(m.state_dict())
    if quantised == "before":
        m.quantize_()
    assert m.prepare_decode_() is m
    if quantised == "after":
        m.quantize_()
    x = tokens(count, dtype, device)
    assert_exact(m, x)
    if count:
        with torch.no_grad():
            assert m(x.unsqueeze(0)).shape == (1, count, OUT)
    if quantised == "no":
        assert list(m.state_dict()) == state
    assert "decode" in repr(m)


def test_more_tokens_and_gradients_run_as_without(device):
    m = module(device).prepare_decode_()
    assert_as_without(m, tokens(65, torch.bfloat16, device))
    x = tokens(9, torch.bfloat16, device)
    expected = sparse24.relu2_mlp(x, m.up_proj.weight, m.down_proj.weight, min_tokens=0)
    assert_same_bits(m(x), expected)
    with torch.autocast(device, torch.float16), torch.no_grad():
        half = copy.deepcopy(m).half()
        assert_same_bits(m(x), exactly(half, x.half()))


def test_special_numbers(device):
    m = module(device, bias=True).prepare_decode_()
    x = tokens(4, torch.bfloat16, device)
    with torch.no_grad():
        m.up_proj.bias.fill_(-1000)
        m.down_proj.weight.fill_(torch.nan)
        assert_same_bits(m(x), m.down_proj.bias.expand(4, OUT).contiguous())  # no neuron is active
        m.up_proj.bias.fill_(1000)
        assert m(x).isnan().all()
        m.down_proj.weight.fill_(torch.inf)
        assert (m(x) == torch.inf).all()


def other_part_of_its_memory(m, _):
    weight = m.down_proj.weight
    weights = torch.cat((weight, weight * 3))
    weight.data = weights[:OUT]
    m.prepare_decode_()
    weight.data = weights[OUT:]


CHANGES = {
    "in place": lambda m, _: m.down_proj.weight.mul_(2),
    "first layer": lambda m, _: m.up_proj.weight.mul_(2),
    "other data": lambda m, _: setattr(m.down_proj.weight, "data", m.down_proj.weight * 3),
    "other part of its memory": other_part_of_its_memory,
    "loaded": lambda m, _: m.load_state_dict({name: t * 2 for name, t in m.state_dict().items()}),
    "assigned": lambda m, _: m.load_state_dict({name: t * 2 for name, t in m.state_dict().items()}, assign=True),
    "cast": lambda m, _: m.half().bfloat16(),
    "moved": lambda m, device: m.to("cpu").to(device),
    "layer loaded": lambda m, _: m.down_proj.load_state_dict({"weight": m.down_proj.weight * 2}),
    "quantised": lambda m, _: m.quantize_(),
    "quantised, then changed": lambda m, _: m.quantize_().down_proj.weight.copy_(m.down_proj.weight.flip(0)),
    "quantised, then cast": lambda m, _: m.quantize_().float().bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_follows_the_weight(device, change):
    m = module(device).prepare_decode_()
    x = tokens(5, torch.bfloat16, device)
    assert_exact(m, x)
    with torch.no_grad():
        before = m(x)
        CHANGES[change](m, device)
        assert change in ("cast", "moved") or not torch.equal(m(x), before)
    assert_exact(m, x)


def test_the_copy_stays_where_it_is(device):
    """A captured graph holds its address."""
    m = module(device).prepare_decode_()
    pointer = m.w2_rows.data_ptr()
    with torch.no_grad():
        m.down_proj.weight.mul_(2)
    assert_exact(m, tokens(1, torch.bfloat16, device))
    m.load_state_dict(m.state_dict())
    m.prepare_decode_()
    assert m.w2_rows.data_ptr() == pointer and not m.w2_rows.requires_grad


@pytest.mark.parametrize("quantised", [False, True])
def test_copies_of_the_module(device, quantised):
    m = module(device).prepare_decode_()
    m = m.quantize_() if quantised else m
    x = tokens(3, torch.bfloat16, device)
    saved = io.BytesIO()
    torch.save(m, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        assert other.w2_rows is not m.w2_rows
        assert_exact(other, x)
        with torch.no_grad():
            other.down_proj.weight.copy_(other.down_proj.weight.flip(0))
        assert_exact(other, x)
    assert_exact(m, x)


def test_other_weights_are_not_those_of_the_copy(device):
    m = module(device).prepare_decode_()
    x = tokens(3, torch.bfloat16, device)
    m.down_proj.weight = nn.Parameter(m.down_proj.weight.detach() * 2)
    assert_dense(m, x)
    assert_exact(m.prepare_decode_(), x)
    weights = {name: t.detach() * 2 for name, t in m.named_parameters()}
    assert_dense(m, x, weights)
    with torch.no_grad():
        expected = torch.func.functional_call(m, weights, x).float()
        mapped = torch.vmap(lambda w: torch.func.functional_call(m, w, x))({n: t[None] for n, t in weights.items()})
        assert (mapped[0].float() - expected).norm() <= 0.01 * expected.norm()  # pruned it would be a twentieth
    assert_exact(m, x)
    assert m._copies.fresh  # for what is compiled, too


def test_weights_of_inference_mode(device):
    """They count no changes, so there is no copy of them; few tokens are exact, and it is said once."""
    m = module(device).prepare_decode_().requires_grad_(False)
    with torch.inference_mode():
        state = {name: t * 2 for name, t in m.state_dict().items()}
    with pytest.warns(UserWarning, match="made in inference mode: they count no changes"):
        m.load_state_dict(state, assign=True)
    assert not m._buffers.get("w2_rows", torch.empty(0)).numel()
    assert_dense(m, tokens(3, torch.bfloat16, device))


def test_memory_that_comes_again(monkeypatch):
    """A weight may have the identity and the address of one that is no more."""
    monkeypatch.setattr(weight_copies, "id", lambda _: 0, raising=False)
    m, memory = module("cpu"), bytearray(2 * HIDDEN * OUT)

    def put(value):
        weight = torch.frombuffer(memory, dtype=torch.bfloat16).reshape(OUT, HIDDEN)
        weight.copy_(value)
        m.down_proj.weight = nn.Parameter(torch.frombuffer(memory, dtype=torch.bfloat16).reshape(OUT, HIDDEN))

    weight = m.down_proj.weight.detach()
    put(weight)
    m.prepare_decode_()
    put(weight * 2)
    assert_exact(m, tokens(3, torch.bfloat16, "cpu"))


@pytest.fixture
def swaps():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_that_are_swapped(device, swaps):
    """torch swaps no tensor to which there are weak references."""
    m = module(device).prepare_decode_()
    x = tokens(3, torch.bfloat16, device)
    network = nn.Sequential(m)
    network.load_state_dict({name: t * 2 for name, t in network.state_dict().items()})
    assert_exact(m, x)
    network.half().bfloat16()
    assert_exact(m, x)
    for layer in m.children():  # which the module does not see
        layer.load_state_dict({name: t * 2 for name, t in layer.state_dict().items()})
        layer.half().bfloat16()
    assert_exact(m, x)


def test_no_copy_where_the_weight_is_by_neuron_already(device):
    m = module(device)
    m.down_proj.weight = nn.Parameter(m.down_proj.weight.detach().t().contiguous().t())
    m.prepare_decode_()
    assert not dict(m.named_buffers())
    x = tokens(3, torch.bfloat16, device)
    assert_exact(m, x)
    with torch.no_grad():
        m.down_proj.weight.mul_(2)
    assert_exact(m, x)


def test_memory(device):
    m = module(device).prepare_decode_()
    assert weight_copies.bytes_of_copies(m) == 2 * HIDDEN * OUT
    assert weight_copies.bytes_of_copies(m.quantize_()) == HIDDEN * OUT


def test_meta_weights(device):
    m = module("meta").prepare_decode_().to_empty(device=device)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_()
    assert_exact(m, tokens(3, torch.bfloat16, device))


def test_refusals():
    m = module("cpu")
    m.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="expected layers whose weights can be copied.*down_proj has hooks"):
        m.prepare_decode_()
    m = module("cpu")
    m.down_proj.weight = nn.Parameter(TwoTensor(m.down_proj.weight.detach(), m.down_proj.weight.detach()))
    with pytest.raises(RuntimeError, match="the weight of down_proj is distributed or quantised"):
        m.prepare_decode_()
    assert m._buffers.get("w2_rows") is None and "decode" not in repr(m)
    with torch.inference_mode():
        m = module("cpu")
        with pytest.raises(RuntimeError, match="the weight of up_proj was made in inference mode"):
            m.prepare_decode_()
        assert not dict(m.named_buffers())
        assert m(tokens(3, torch.bfloat16, "cpu")).shape == (3, OUT)


def count_graphs(m):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(m, backend=backend, fullgraph=True), graphs


@torch.no_grad()
def test_compiled(device):
    """It looks while it is traced; a step of an optimizer is noticed, once."""
    m = module("meta").prepare_decode_().to_empty(device=device)
    for p in m.parameters():
        p.normal_()
    compiled, graphs = count_graphs(m)
    x = tokens(3, torch.bfloat16, device)
    assert_same_bits(compiled(x), exactly(m, x))
    optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
    for _ in range(3):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected = sparse24.relu2_mlp(x, m.up_proj.weight, m.down_proj.weight, min_tokens=65)
        assert_same_bits(compiled(x), expected)
    assert_exact(m, x)
    assert_same_bits(compiled(x), exactly(m, x))
    assert len(graphs) == 2
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_exported(device, strict):
    m = module(device).prepare_decode_()
    x = tokens(3, torch.bfloat16, device)
    exported = torch.export.export(m, (x,), strict=strict).module()
    assert_same_bits(exported(x), exactly(m, x))
    assert_exact(m, x)


def test_inference_mode(device):
    m = module(device).prepare_decode_()
    x = tokens(3, torch.bfloat16, device)
    with torch.inference_mode():
        assert_same_bits(m(x), exactly(m, x))
        m.down_proj.weight.mul_(2)
        assert_same_bits(m(x), exactly(m, x))
    assert_exact(m, x)


@torch.no_grad()
def test_cuda_graph(cuda):
    """Replayed with other data, and after the weights have changed and the copy was made again."""
    m = module(cuda).prepare_decode_()
    x = torch.zeros(2, D, dtype=torch.bfloat16, device=cuda)
    m(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = m(x)
    for seed in range(3):
        x.copy_(tokens(2, torch.bfloat16, cuda, seed=seed))
        m.down_proj.weight.mul_(1.5)
        m.prepare_decode_()
        graph.replay()
        assert_same_bits(out, exactly(m, x))
