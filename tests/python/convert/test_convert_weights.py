"""Converted networks with 2:4 weights: in training, in inference by copies, with adapters, calibrated, and back."""

import copy
import pickle

import pytest
import torch
from compare import assert_same_bits
from convert_models import D, Inline, Stack
from data import normal
from torch import nn

import sparse24
from sparse24 import ConvertConfig, Recipe, prune24

CHOICES = ("up", "both")


def model(dtype=torch.bfloat16, device="cpu", layers=1):
    torch.manual_seed(0)
    networks = [Inline().to(device, dtype) for _ in range(layers)]
    return networks[0] if layers == 1 else Stack(*networks)


def converted(config, **options):
    net = model(**options)
    report = sparse24.convert(net, config, quiet=True)
    assert report.converted
    return net


def inputs(count=96, dtype=torch.bfloat16, device="cpu", seed=0):
    return normal(count, D, dtype=dtype, seed=seed).to(device)


def weights(net, choice, adapters=True):
    w1, w2 = net.c_fc.weight, net.c_proj.weight
    w1, w2 = prune24(w1), prune24(w2, 0) if choice == "both" else w2
    if adapters and hasattr(net, "sparse24_up_left"):
        w1 = torch.addmm(w1, net.sparse24_up_left, net.sparse24_up_right)
    return w1, w2


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("options", [{}, {"dtype": "fp8"}, {"decode": True}, {"dtype": "fp8", "decode": True}], ids=str)
def test_computes_the_pruned_network(device, choice, options):
    """In training, in evaluation, with few tokens; the parameters stay dense and revert is exact."""
    config = ConvertConfig(sparse_weights=choice, min_tokens=0, **options)
    net, before = converted(config, device=device), model(device=device)
    names = set(before.state_dict())
    assert set(net.state_dict()) == names
    x = inputs(device=device)
    precision = "fp8" if "dtype" in options else "auto"
    for _ in range(2):
        wanted = sparse24.relu2_mlp(x, *weights(net, choice), min_tokens=0, precision=precision).detach()
        assert_same_bits(net.train()(x).detach(), wanted)
        net.eval()
        with torch.no_grad():
            assert_same_bits(net(x), wanted)
            assert_same_bits(copy.deepcopy(net)(x), wanted)
            assert_same_bits(pickle.loads(pickle.dumps(net))(x), wanted)
            if "decode" in options:
                w1, w2 = weights(net, choice)
                if precision == "fp8":
                    (w1, s1), (w2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
                    few = sparse24.relu2_mlp_few(x[:3], w1, w2.t().contiguous(), None, None, s1, s2)
                else:
                    few = sparse24.relu2_mlp_few(x[:3], w1, w2.t().contiguous())
                assert_same_bits(net(x[:3]), few)
            for p in net.parameters():
                p.add_(0.1 * p.flip(0))
    with torch.no_grad(), sparse24.disabled():
        assert not torch.equal(net(x), wanted)
    sparse24.revert(net)
    assert type(net) is Inline and set(net.state_dict()) == names and not list(net.buffers())


@pytest.mark.parametrize("min_tokens", [None, 97])
def test_few_tokens_keep_pruned_weights(device, min_tokens):
    net = converted(ConvertConfig(sparse_weights="both", min_tokens=min_tokens), device=device).eval()
    x = inputs(16, device=device)
    with torch.no_grad():
        wanted = sparse24.relu2_mlp(x, *weights(net, "both"), min_tokens=min_tokens)
        assert_same_bits(net(x), wanted)


def test_gradients_are_dense():
    net = converted(ConvertConfig(sparse_weights="both", min_tokens=0))
    x = inputs()
    net(x).float().square().mean().backward()
    w1, w2 = (w.detach().requires_grad_() for w in weights(net, "both"))
    sparse24.relu2_mlp(x, w1, w2, min_tokens=0).float().square().mean().backward()
    assert_same_bits(net.c_fc.weight.grad, w1.grad)
    assert_same_bits(net.c_proj.weight.grad, w2.grad)
    net.sparse = False
    plain = sparse24.relu2_mlp(x, net.c_fc.weight, net.c_proj.weight, sparse=False)
    assert_same_bits(net(x), plain)
    with torch.no_grad():
        assert_same_bits(net.eval()(x), plain)


@pytest.mark.parametrize("choice", CHOICES)
def test_adapters_are_fitted(device, choice):
    """The nearest matrix of that rank to what pruning takes away; trained, saved, and gone after revert."""
    net = converted(ConvertConfig(sparse_weights=choice, adapters=8, min_tokens=0), dtype=torch.float32, device="cpu")
    w = net.c_fc.weight.detach()
    rest = w - prune24(w)
    u, s, v = torch.linalg.svd(rest)
    best = (rest - (u[:, :8] * s[:8]) @ v[:8]).norm()
    left, right = net.sparse24_up_left, net.sparse24_up_right
    assert left.shape == (160, 8) and right.shape == (8, D)
    assert (rest - left @ right).norm().item() == pytest.approx(best.item(), rel=1e-4)
    names = {"sparse24_up_left", "sparse24_up_right", "c_fc.weight", "c_proj.weight"}
    assert set(net.state_dict()) == names
    net = net.to(device, torch.bfloat16)
    x = inputs(device=device)
    wanted = sparse24.relu2_mlp(x, *weights(net, choice), min_tokens=0)
    assert_same_bits(net(x), wanted)
    with torch.no_grad():
        assert_same_bits(net.eval()(x), wanted)
    net.train()(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in net.parameters())
    other = converted(ConvertConfig(sparse_weights=choice, adapters=8, min_tokens=0), device=device)
    with torch.no_grad():
        net.sparse24_up_left.add_(0.1)
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert_same_bits(other.eval()(x), net.eval()(x))
    assert_same_bits(copy.deepcopy(net)(x).detach(), net(x).detach())
    sparse24.revert(net)
    assert set(net.state_dict()) == {"c_fc.weight", "c_proj.weight"}


def test_calibrated_masks_and_adapters(device):
    """By magnitude times the norm of the input feature; what is fitted counts by it, too."""
    norms = torch.linspace(0.1, 4, D, device=device)
    batches = [normal(50, D, dtype=torch.float32, seed=i).to(device) * norms for i in range(3)]
    found = sum(batch.square().sum(0) for batch in batches).sqrt()
    for rank in (0, 8):
        config = ConvertConfig(sparse_weights="up", min_tokens=0, calibration=batches, adapters=rank)
        net = converted(config, dtype=torch.float32, device=device)
        w = net.c_fc.weight.detach()
        keep = prune24(w * found) != 0
        assert not torch.equal(keep, prune24(w) != 0)
        assert_same_bits(net._buffers["_sparse24_keep_up"], keep)
        w1 = torch.where(keep, w, 0)
        if rank:
            left, right = net.sparse24_up_left, net.sparse24_up_right
            rest = (w - w1) * found
            u, s, v = torch.linalg.svd(rest)
            best = (rest - (u[:, :8] * s[:8]) @ v[:8]).norm().item()
            assert (rest - left @ right * found).norm().item() == pytest.approx(best, rel=1e-3)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        net.to(dtype)
        x = inputs(dtype=dtype, device=device)
        w1 = torch.where(keep, net.c_fc.weight, 0)
        if rank:
            w1 = torch.addmm(w1, net.sparse24_up_left, net.sparse24_up_right)
        wanted = sparse24.relu2_mlp(x, w1, net.c_proj.weight, min_tokens=0)
        assert_same_bits(net(x).detach(), wanted.detach())
        with torch.no_grad():
            assert_same_bits(net.eval()(x), wanted)
        sparse24.revert(net)
        assert not list(net.buffers())


@pytest.mark.parametrize("choice", CHOICES)
def test_adapters_of_master_weights(device, choice):
    """Training adds them in the dtype of the step; copies for inference have the sum of the masters, rounded once."""
    net = converted(ConvertConfig(sparse_weights=choice, adapters=8, min_tokens=0), dtype=torch.float32, device=device)
    x = inputs(device=device)
    left, right = net.sparse24_up_left, net.sparse24_up_right
    w1, w2 = prune24(net.c_fc.weight), weights(net, choice)[1]
    added = torch.addmm(w1.bfloat16(), left.bfloat16(), right.bfloat16())
    assert_same_bits(net(x).detach(), sparse24.relu2_mlp(x, added, w2, min_tokens=0).detach())
    with torch.no_grad():
        added = torch.addmm(w1, left, right)
        assert_same_bits(net.eval()(x), sparse24.relu2_mlp(x, added, w2, min_tokens=0))


@pytest.mark.parametrize("choice", CHOICES)
def test_merged_when_reverted(choice):
    """A plain model with what the adapters have learned."""
    batches = [inputs(seed=i) for i in range(2)]
    net = converted(ConvertConfig(sparse_weights=choice, adapters=8, calibration=batches, min_tokens=0))
    optimizer = torch.optim.SGD([net.sparse24_up_left, net.sparse24_up_right], lr=0.1)
    net(inputs()).float().square().mean().backward()
    optimizer.step()
    left, right, keep = net.sparse24_up_left, net.sparse24_up_right, net._buffers["_sparse24_keep_up"]
    w1 = torch.addmm(torch.where(keep, net.c_fc.weight, 0), left, right).detach()
    w2 = weights(net, choice)[1].detach()
    assert sparse24.revert(net, merge=True) == [""] and type(net) is Inline
    assert_same_bits(net.c_fc.weight.detach(), w1)
    assert_same_bits(net.c_proj.weight.detach(), w2)
    fresh = model()
    fresh.load_state_dict(net.state_dict())
    assert_same_bits(fresh(inputs()), net(inputs()))


def test_merged_into_transposed_parameters():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(normal(a, b, dtype=torch.float32)) for a, b in ((32, 64), (64, 16)))

        def forward(self, x):
            return torch.relu(x @ self.first).square() @ self.second

    net = Network()
    wanted = prune24(net.first, 0).detach(), prune24(net.second, -1).detach()
    assert sparse24.convert(net, ConvertConfig(sparse_weights="both"), quiet=True).converted
    sparse24.revert(net, merge=True)
    assert_same_bits(net.first.detach(), wanted[0])
    assert_same_bits(net.second.detach(), wanted[1])


def test_tied_weights_are_not_merged():
    """Nothing has changed then: both are reverted without it."""
    stack = nn.Sequential(model(), Square())
    assert len(sparse24.convert(stack, ConvertConfig(sparse_weights="both"), quiet=True).converted) == 2
    before = {name: t.clone() for name, t in stack.state_dict().items()}
    with pytest.raises(RuntimeError, match="sparse24.revert: expected two weights with memory of their own"):
        sparse24.revert(stack, merge=True)
    assert all(torch.equal(t, before[name]) for name, t in stack.state_dict().items())
    assert len(sparse24.revert(stack)) == 2


class Square(nn.Module):
    """Its two weights are one."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.c_proj.weight = self.c_fc.weight

    def forward(self, x):
        return self.c_proj(torch.relu(self.c_fc(x)).square())


def test_calibration_reaches_every_network():
    stack = model(layers=3)
    batches = [inputs(seed=i) for i in range(2)]
    config = ConvertConfig(sparse_weights="both", calibration=batches)
    assert len(sparse24.convert(stack, config, quiet=True).converted) == 3 and stack.training
    kept = [layer._buffers["_sparse24_keep_up"] for layer in stack.layers]
    assert not torch.equal(kept[0], kept[1])
    fresh = model(layers=2)
    with pytest.raises(RuntimeError, match="expected calibration to reach every network, got no batch"):
        sparse24.convert(fresh, ConvertConfig(sparse_weights="up", calibration=[]), quiet=True)
    assert all(type(layer) is Inline for layer in fresh.layers)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (torch.full((4, D), float("nan")), "to give 0 finite inputs, got NaN or infinity"),
        (torch.full((4, D), float("inf")), "to give 0 finite inputs, got NaN or infinity"),
        (torch.zeros(4, D), "to give 0 inputs that are not all zeros, got none"),
        (torch.zeros(0, D), "to give 0 inputs that are not all zeros, got none"),
    ],
    ids=["NaN", "infinity", "zeros", "no tokens"],
)
def test_calibration_that_says_nothing(batch, sentence):
    """One such batch would choose entries by their places, or make all adapters NaN."""
    stack = nn.Sequential(model(dtype=torch.float32))
    before = {name: t.clone() for name, t in stack.state_dict().items()}
    config = ConvertConfig(sparse_weights="up", adapters=2, calibration=[batch])
    with pytest.raises(RuntimeError, match=f"^sparse24.convert: expected calibration {sentence}$"):
        sparse24.convert(stack, config, quiet=True)
    assert type(stack[0]) is Inline and stack.training
    for name, t in stack.state_dict().items():
        assert_same_bits(t, before[name])


def test_features_that_are_always_zero_are_compared_by_magnitude():
    net, x = model(dtype=torch.float32), inputs(dtype=torch.float32)
    x[:, :8] = 0
    sparse24.convert(net, ConvertConfig(sparse_weights="up", calibration=[x]), quiet=True)
    kept = net._buffers["_sparse24_keep_up"][:, :8]
    assert_same_bits(kept, prune24(net.c_fc.weight.detach()[:, :8]) != 0)


def test_refusals_and_reasons():
    for recipe, choice in (("both", "up"), ("up", "both")):
        words = f'expected sparse_weights to be "{recipe}" as recipe says, got "{choice}"'
        with pytest.raises(RuntimeError, match=words):
            ConvertConfig(sparse_weights=choice, recipe=Recipe(sparse_weights=recipe))
    with pytest.raises(RuntimeError, match='expected sparse_weights to be "none", "up" or "both", got "all"'):
        ConvertConfig(sparse_weights="all")
    for options, what in (({"adapters": 4}, "adapters"), ({"calibration": []}, "calibration")):
        with pytest.raises(RuntimeError, match=f'expected sparse_weights to be "up" or "both" for {what}, got "none"'):
            ConvertConfig(**options)
    recipe = Recipe(weight_gradients="dense")
    net = converted(ConvertConfig(sparse_weights="up", recipe=recipe, min_tokens=0))
    assert net._recipe_in_use() == Recipe(weight_gradients="dense", sparse_weights="up")
    same = ConvertConfig(sparse_weights="up", recipe=Recipe(sparse_weights="up"))
    assert same.recipe.sparse_weights == "up"
    odd = Inline(d=62, hidden=160)
    report = sparse24.convert(odd, ConvertConfig(sparse_weights="up"), quiet=True)
    assert list(report.skipped.values()) == ["2:4 weights need multiples of 4 features, it has 62 and 62"]
    with torch.device("meta"):
        net = Inline()
    report = sparse24.convert(net, ConvertConfig(sparse_weights="up", adapters=4), quiet=True)
    wanted = "adapters are fitted to weights, and its first one is on the meta device"
    assert list(report.skipped.values()) == [wanted]


def test_prints():
    assert "sparse_weights='up'" in repr(converted(ConvertConfig(sparse_weights="up")))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    torch._dynamo.reset()
    net, x = converted(ConvertConfig(sparse_weights="both", adapters=4, min_tokens=0)), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), net(x))
    compiled(x).float().sum().backward()
    net.eval()
    with torch.no_grad():
        assert_same_bits(compiled(x), net(x))
    optimizer = torch.optim.SGD([p for p in net.parameters() if isinstance(p, nn.Parameter)], lr=0.1)
    optimizer.step()
    with torch.no_grad():
        assert_same_bits(compiled(x), net(x))
    torch._dynamo.reset()
