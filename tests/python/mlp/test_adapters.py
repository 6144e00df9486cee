"""Adapters beside 2:4 weights, and weights that are pruned once: as modules use, train, save and merge them."""

import copy
import pickle

import pytest
import torch
from compare import assert_same_bits
from small_network import HIDDEN as F
from small_network import OUT, D, tokens
from torch import nn

import sparse24
from sparse24 import Recipe, WeightPruning, prune24
from sparse24.nn import ReLU2MLP

CHOICES = ("none", "up", "both")


def module(device="cpu", dtype=torch.bfloat16, choice="both", *, rank=0, trained=True, **options):
    torch.manual_seed(0)
    options = {"min_tokens": 0, "recipe": Recipe(sparse_weights=choice), **options}
    mlp = ReLU2MLP(D, F, OUT, device=device, dtype=dtype, **options)
    if rank:
        mlp.add_adapters_(rank)
        if trained:
            nn.init.normal_(mlp.up_left, std=0.05)
    return mlp


def effective(mlp):
    """The two weights of the network that the module is."""
    choice = mlp.recipe.sparse_weights
    w1, w2 = mlp.up_proj.weight, mlp.down_proj.weight
    w1 = w1 if choice == "none" else prune24(w1)
    if hasattr(mlp, "up_left"):
        w1 = torch.addmm(w1, mlp.up_left, mlp.up_right)
    return w1, w2 if choice != "both" else prune24(w2, 0)


def expected(mlp, x, **options):
    w1, w2 = effective(mlp)
    options = {"min_tokens": mlp.min_tokens, "sparse": mlp.sparse, **options}
    return sparse24.relu2_mlp(x, w1, w2, mlp.up_proj.bias, mlp.down_proj.bias, **options)


@pytest.mark.parametrize("choice", CHOICES)
def test_new_adapters_change_nothing(device, dtype, choice):
    x = tokens(96, dtype, device)
    mlp = module(device, dtype, choice)
    before = mlp(x)
    assert mlp.add_adapters_(8) is mlp
    assert mlp.up_left.shape == (F, 8) and mlp.up_right.shape == (8, D)
    assert {p.dtype for p in (mlp.up_left, mlp.up_right)} == {dtype} and mlp.up_left.count_nonzero() == 0
    assert mlp.up_right.float().std().item() == pytest.approx(8**-0.5, rel=0.2)
    assert_same_bits(mlp(x), before)
    assert mlp.up_left.requires_grad and set(mlp.state_dict()) == {
        "up_left", "up_right", "up_proj.weight", "down_proj.weight"
    }  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}, {"bias": True, "threshold": 0.1}], ids=str)
def test_the_network_and_its_gradients(device, choice, options):
    mlp = module(device, torch.bfloat16, choice, rank=8, **options)
    x = tokens(96, torch.bfloat16, device).requires_grad_()
    plain = {name: options[name] for name in ("precision", "threshold") if name in options}
    recipe = Recipe(fp8_weight_gradients=False)
    wanted = expected(mlp, x, recipe=recipe, **plain)
    parameters = [x, *mlp.parameters()]
    grads = torch.autograd.grad(wanted.float().square().sum(), parameters)
    out = mlp(x)
    assert_same_bits(out, wanted)
    for a, e in zip(torch.autograd.grad(out.float().square().sum(), parameters), grads, strict=True):
        assert_same_bits(a, e)
    with torch.no_grad():
        assert_same_bits(mlp(x), wanted)


def test_against_float64(device, dtype):
    """At most twice torch's error, of the network whose first weight is the sum."""
    mlp, x = module(device, dtype, "up", rank=8), tokens(96, dtype, device)
    left, right = mlp.up_left.double(), mlp.up_right.double()
    h = x.double() @ (prune24(mlp.up_proj.weight).double() + left @ right).t()
    rival = x @ (prune24(mlp.up_proj.weight) + mlp.up_left @ mlp.up_right).t()
    w1 = effective(mlp)[0]
    error, of_torch = ((t.double() - h).norm() for t in (x @ w1.t(), rival))
    assert error <= 2 * of_torch + 1e-12 * h.norm()


def test_few_tokens_and_dense_phases(device):
    mlp = module(device, rank=4, min_tokens=33)
    x = tokens(32, torch.bfloat16, device)
    assert_same_bits(mlp(x), expected(mlp, x))
    mlp.sparse = False
    w1 = torch.addmm(mlp.up_proj.weight, mlp.up_left, mlp.up_right)
    assert_same_bits(mlp(x), sparse24.relu2_mlp(x, w1, mlp.down_proj.weight, sparse=False))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("decode", [False, True], ids=["", "decode"])
def test_pruned_once(device, dtype, rank, decode):
    """The parameters hold the pruned weights, and calls follow what happens to them."""
    mlp, x = module(device, dtype, rank=rank), tokens(96, dtype, device)
    few = x[:3]
    with torch.no_grad():
        w1, w2 = effective(mlp)
        wanted = expected(mlp, x), sparse24.relu2_mlp(few, w1, w2, w2_rows=w2.t().contiguous())
    state = {name: t.clone() for name, t in mlp.state_dict().items()}
    assert mlp.prune_weights_() is mlp
    if decode:
        mlp.prepare_decode_()
    assert_same_bits(mlp.up_proj.weight.detach(), prune24(state["up_proj.weight"]))
    assert_same_bits(mlp.down_proj.weight.detach(), prune24(state["down_proj.weight"], 0))
    assert set(mlp.state_dict()) == set(state)

    def check(module=mlp):
        with torch.no_grad():
            w = effective(module)
            assert_same_bits(module(x), sparse24.relu2_mlp(x, *w, min_tokens=0))
            if decode:
                assert_same_bits(module(few), sparse24.relu2_mlp(few, *w, w2_rows=w[1].t().contiguous()))
        assert_same_bits(module(x).detach(), sparse24.relu2_mlp(x, *w, min_tokens=0))

    check()
    assert_same_bits(mlp(x), wanted[0])
    if decode:
        with torch.no_grad():
            assert_same_bits(mlp(few), wanted[1])
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        check(other)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=1.0)
    mlp(x).float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(mlp.up_proj.weight, prune24(mlp.up_proj.weight))
    check()
    mlp.prune_weights_()
    check()
    mlp.load_state_dict(state)
    assert_same_bits(mlp.up_proj.weight.detach(), prune24(state["up_proj.weight"]))
    check()
    if dtype != torch.float32:
        x, few = x.float().cpu(), few.float().cpu()
        mlp.cpu().float()
        check()


def test_pruning_by_argument_and_refusals():
    mlp = module(choice="none")
    with pytest.raises(RuntimeError, match='expected sparse_weights to be "up" or "both" to prune the weights'):
        mlp.prune_weights_()
    with pytest.raises(RuntimeError, match='expected sparse_weights to be "none", "up" or "both", got "down"'):
        mlp.prune_weights_("down")
    assert mlp.prune_weights_("up").recipe.sparse_weights == "up"
    with pytest.raises(RuntimeError, match="w1 to have a multiple of 4 columns for 2:4 weights, got 6"):
        ReLU2MLP(6, 16).prune_weights_("up")
    with pytest.raises(RuntimeError, match="expected rank to be at least 1, got 0"):
        mlp.add_adapters_(0)
    with pytest.raises(RuntimeError, match="expected layers that can have adapters, got: up_proj is quantised"):
        module().quantize_().add_adapters_(4)
    with pytest.raises(RuntimeError, match="expected layers that can have adapters, got: a recipe with double_pruning"):
        module(recipe=Recipe(sparse_weights="both", double_pruning=True)).add_adapters_(4)
    with pytest.raises(RuntimeError, match="expected adapters that can be merged, got: none"):
        mlp.merge_adapters_()
    with pytest.raises(RuntimeError, match="expected adapters to be merged before weights are quantised"):
        module(rank=4).quantize_()
    with pytest.raises(RuntimeError, match="expected a recipe without double_pruning, .* to quantise, got one with it"):
        module(recipe=Recipe(sparse_weights="both", double_pruning=True)).quantize_()


@pytest.mark.parametrize("first", ["prune", "quantise"])
def test_float8_weights(device, first):
    mlp, x = module(device), tokens(64, torch.bfloat16, device)
    steps = {"prune": mlp.prune_weights_, "quantise": mlp.quantize_}
    steps.pop(first)()
    for step in steps.values():
        step()
    layers = mlp.up_proj, mlp.down_proj
    for layer, dim in zip(layers, (-1, 0), strict=True):
        codes = layer.weight.float().movedim(dim, -1).reshape(-1, 4)
        assert (codes != 0).sum(1).max() == 2
    scales = {f"w{i}_scale": layer.weight_scale for i, layer in enumerate(layers, 1)}
    options = {"scale_y_factor": layers[0].scale_y_factor, "min_tokens": 0, **scales}
    assert_same_bits(mlp(x), sparse24.relu2_mlp(x, *(layer.weight for layer in layers), **options))


@pytest.mark.parametrize("choice", CHOICES)
def test_merged(device, choice):
    mlp, x = module(device, torch.bfloat16, choice, rank=4), tokens(96, torch.bfloat16, device)
    wanted = expected(mlp, x)
    assert mlp.merge_adapters_() is mlp and set(mlp.state_dict()) == {"up_proj.weight", "down_proj.weight"}
    assert_same_bits(mlp(x), wanted)
    assert mlp.recipe.sparse_weights == "none"


def test_after_soft_training():
    """What is pruned is what entered."""
    mlp, x = module(), tokens(96, torch.bfloat16, "cpu")
    pruning = WeightPruning(mlp, soft=True)
    pruning.step()
    wanted = mlp(x)
    mlp.add_adapters_(4)
    assert_same_bits(mlp(x), wanted)
    with torch.no_grad():
        assert_same_bits(mlp(x), wanted)
    mlp.prune_weights_()
    assert_same_bits(mlp(x), wanted)
    assert not {"_sparse24_soft_up", "_sparse24_soft_down"} & mlp._buffers.keys()


@pytest.mark.filterwarnings("ignore:.*calls its layers")
@pytest.mark.parametrize("rank", [0, 4])
def test_layers_that_have_to_be_called(rank):
    """They run with the weights as they enter; what has none of its own is refused."""
    mlp, x = module(rank=rank), tokens(96, torch.bfloat16, "cpu")
    wanted, seen = expected(mlp, x, sparse=False), []
    mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert_same_bits(mlp(x), wanted)
    assert seen

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight = layer, layer.weight

        def forward(self, x):
            return self.layer(x)

    mlp.down_proj = nn.Sequential(mlp.down_proj)
    with pytest.raises(RuntimeError, match="expected down_proj to have a plain weight, .* got none"):
        mlp(x)


@pytest.mark.filterwarnings("ignore:.*calls its layers")
@pytest.mark.parametrize("choice", ["up", "both"])
@pytest.mark.parametrize("pruned", [False, True], ids=["in each call", "once"])
def test_quantised_layers_that_have_to_be_called(choice, pruned):
    """Their weights are buffers, and enter as those of others do."""
    mlp, x = module(rank=0).quantize_(), tokens(96, torch.bfloat16, "cpu")
    mlp.recipe = Recipe(sparse_weights=choice)
    if pruned:
        mlp.prune_weights_()
    scales = mlp.up_proj.weight_scale, mlp.down_proj.weight_scale
    w1, w2 = ((w.float() * scale[:, None]).bfloat16() for w, scale in zip(mlp.entering_weights(), scales, strict=True))
    wanted = torch.relu(x @ w1.t()).square() @ w2.t()
    assert_same_bits(prune24(w1), w1)
    mlp.up_proj.register_forward_hook(lambda *_: None)
    assert_same_bits(mlp(x), wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_and_exported():
    torch._dynamo.reset()
    mlp, x = module(rank=4), tokens(96, torch.bfloat16, "cpu")
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), mlp(x))
    compiled(x).float().square().sum().backward()
    grads = [p.grad.clone() for p in mlp.parameters()]
    mlp.zero_grad()
    mlp(x).float().square().sum().backward()
    for p, grad in zip(mlp.parameters(), grads, strict=True):
        assert_same_bits(grad, p.grad)
    mlp.prune_weights_()
    with torch.no_grad():
        assert_same_bits(compiled(x), mlp(x))
        program = torch.export.export(mlp, (x,))
        assert_same_bits(program.module()(x), mlp(x))
    torch._dynamo.reset()


def test_tied_weights_are_not_written_to():
    """What is pruned of one would be gone from the other; products of a step prune each for itself."""
    mlp = ReLU2MLP(32, 32, recipe=Recipe(sparse_weights="both"))
    mlp.down_proj.weight = mlp.up_proj.weight
    before, x = mlp.up_proj.weight.detach().clone(), torch.randn(4, 32)
    out = mlp(x).detach()
    sentence = "ReLU2MLP: expected two weights with memory of their own, to be written to, got tied ones"
    for choice in ("up", "both"):
        with pytest.raises(RuntimeError, match=sentence):
            mlp.prune_weights_(choice)
    with pytest.raises(RuntimeError, match=sentence):
        mlp.add_adapters_(4).merge_adapters_()
    assert_same_bits(mlp.up_proj.weight.detach(), before)
    assert_same_bits(mlp(x).detach(), out)
    meta = ReLU2MLP(32, 64, device="meta").prune_weights_("up")
    assert meta(x.to("meta")).shape == (4, 32)
