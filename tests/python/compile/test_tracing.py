"""torch.fx.symbolic_trace and torch.jit.trace: what they record, and what is refused in a sentence."""

import io

import pytest
import torch
from compare import assert_same_bits

import sparse24
from sparse24 import Recipe

# torch.jit is deprecated, and warns of each size that is compared.
pytestmark = pytest.mark.filterwarnings("ignore")

NETWORKS = {
    "plain": ({}, ()),
    "threshold": ({"threshold": 0.1}, ()),
    "fp8": ({"precision": "fp8"}, ()),
    "up": ({"recipe": Recipe(sparse_weights="up")}, ()),
    "both in fp8": ({"precision": "fp8", "recipe": Recipe(sparse_weights="both")}, ()),
    "decode": ({}, ("prepare_decode_",)),
    "quantised": ({}, ("quantize_", "prepare_decode_")),
    "pruned": ({"recipe": Recipe(sparse_weights="up")}, ("prune_weights_",)),
}


class Block(torch.nn.Module):
    def __init__(self, device, preparations=(), **options):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = sparse24.nn.ReLU2MLP(32, 64, device=device, dtype=torch.bfloat16, **options)
        for name in preparations:
            getattr(self.mlp, name)()

    def forward(self, x):
        return x + self.mlp(x)


class Experts(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.experts = sparse24.nn.ReLU2Experts(3, 32, 64, device=device, dtype=torch.bfloat16)

    def forward(self, x, offsets):
        return self.experts(x, offsets)


class Routed(Experts):
    def forward(self, x, offsets):
        index = offsets.long()[:, None] % 3
        return self.experts.routed(x[:3], index, x[:3, :1])


def inputs(device):
    x = torch.randn(8, 32, device=device, dtype=torch.bfloat16)
    return x, torch.tensor([2, 2, 6], device=device, dtype=torch.int32)


@pytest.mark.parametrize("name", NETWORKS)
def test_fx_calls_networks(name, device):
    """The graph has the module itself, whose switches hold in it."""
    options, preparations = NETWORKS[name]
    model, (x, _) = Block(device, preparations, **options), inputs(device)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1 and traced.mlp is model.mlp
    for model.mlp.sparse in (True, False):
        assert_same_bits(traced(x), model(x))


def test_fx_calls_experts(device):
    model, (x, offsets) = Experts(device), inputs(device)
    assert_same_bits(torch.fx.symbolic_trace(model)(x, offsets), model(x, offsets))


def test_what_fx_cannot_record(device):
    network = Block(device).mlp
    with pytest.raises(RuntimeError, match=r"sparse24.nn.ReLU2MLP: expected to be a part of what torch.fx traces"):
        torch.fx.symbolic_trace(network)
    w1, w2 = network.up_proj.weight, network.down_proj.weight
    with pytest.raises(RuntimeError, match=r"sparse24.relu2_mlp: expected x to be a Tensor, got Proxy"):
        torch.fx.symbolic_trace(lambda x: sparse24.relu2_mlp(x, w1, w2))
    with pytest.raises(RuntimeError, match=r"sparse24.nn.ReLU2Experts: expected x to be a Tensor, got Proxy"):
        torch.fx.symbolic_trace(Routed(device))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_jit_traces_inference(name, device):
    """What is traced is saved and loaded, and computes the same bits."""
    options, preparations = NETWORKS[name]
    model, (x, _) = Block(device, preparations, **options), inputs(device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    assert_same_bits(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("options", [{}, {"decode": True}, {"dtype": "fp8"}, {"sparse_weights": "up"}], ids=str)
@torch.no_grad()
def test_jit_traces_converted_networks(options, device):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)) ** 2)

    model, (x, _) = Network().to(device, torch.bfloat16).eval(), inputs(device)
    config = sparse24.ConvertConfig(min_tokens=0, **options)
    assert sparse24.convert(model, config, quiet=True).converted
    assert_same_bits(torch.jit.trace(model, x)(x), model(x))


def test_jit_traces_no_gradients(device):
    model, (x, offsets) = Block(device), inputs(device)
    with pytest.raises(RuntimeError, match=r"sparse24.relu2_mlp: expected no gradients where torch.jit.trace runs"):
        torch.jit.trace(model, x)
    with pytest.raises(RuntimeError, match=r"sparse24.relu2_experts: expected no torch.jit.trace"):
        torch.jit.trace(Experts(device), (x, offsets))
