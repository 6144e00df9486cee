"""ReLU2Experts: relu2_experts with parameters of its own, and tokens that a router sends to several of them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from data import normal
from mixture import HIDDEN, OUT, D, rows
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import prune24
from sparse24.mlp import kept_weights

BF16 = torch.bfloat16
EXPERTS, TOP = 6, 2

# Dynamo makes an instance of each autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def module(device, dtype=BF16, dim_out=OUT, **options):
    torch.manual_seed(0)
    return sparse24.nn.ReLU2Experts(EXPERTS, D, HIDDEN, dim_out, device=device, dtype=dtype, **options)


def routing(tokens, device):
    """Tokens, the experts of each (never the fourth), and factors."""
    x = normal(tokens, D, dtype=BF16, seed=7).to(device)
    scores = normal(tokens, EXPERTS, dtype=torch.float32, seed=8)
    scores[:, 3] = -torch.inf
    weights, index = scores.sigmoid().topk(TOP)
    return x, index.to(device), weights.to(device)


def one_at_a_time(m, x, index, weights):
    """Every choice of every token on its own."""
    out = x.new_zeros(len(x), m.down_proj.shape[1], dtype=torch.float32)
    for t in range(len(x)):
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            if 0 <= e < m.num_experts:
                y = sparse24.relu2_mlp(x[t : t + 1], m.up_proj[e], m.down_proj[e], min_tokens=0)
                out[t] = out[t] + (y * w)[0]
    return out.to(x.dtype)


def test_module_is_the_function(device, dtype):
    m = module(device, dtype)
    x, offsets = rows(dtype, device, (7, 0, 1, 30, 12, 4))
    scale = normal(len(x), dtype=torch.float32, seed=4).to(device)
    expected = sparse24.relu2_experts(x, m.up_proj, m.down_proj, offsets, row_scale=scale)
    assert_same_bits(m(x, offsets, scale), expected)
    m.sparse = False
    expected = sparse24.relu2_experts(x, m.up_proj, m.down_proj, offsets, sparse=False)
    assert_same_bits(m(x, offsets), expected)


def test_names_and_shapes_of_the_state(device):
    shapes = {name: tuple(p.shape) for name, p in module(device).named_parameters()}
    assert shapes == {"up_proj": (EXPERTS, HIDDEN, D), "down_proj": (EXPERTS, OUT, HIDDEN)}
    assert list(module(device).state_dict()) == list(shapes)
    assert module(device, dim_out=None).down_proj.shape == (EXPERTS, D, HIDDEN)


def test_what_it_prints():
    text = repr(module("cpu", recipe=sparse24.Recipe("dense"), precision="fp8"))
    assert f"{EXPERTS} experts, {D} -> {HIDDEN} -> {OUT}, precision=fp8, recipe=Recipe(" in text
    assert "float8_e4m3fn" in repr(module("cpu").quantize_())


@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_tokens_of_a_router(device, tokens):
    m = module(device)
    x, index, weights = routing(tokens, device)
    with torch.no_grad():
        torch.testing.assert_close(
            m.routed(x, index, weights), one_at_a_time(m, x, index, weights), rtol=2e-2, atol=2e-2
        )


def test_an_index_beyond_the_experts_is_nobodys(device):
    """As experts are that other devices have; some libraries say -1."""
    m = module(device)
    x, index, weights = routing(23, device)
    index[::3, 0] = EXPERTS
    index[1] = EXPERTS
    index[5, 1] = index[6, 0] = -1
    with torch.no_grad():
        out = m.routed(x, index, weights)
        torch.testing.assert_close(out, one_at_a_time(m, x, index, weights), rtol=2e-2, atol=2e-2)
    assert not out[1].any()


def test_gradients_of_tokens_and_factors(device):
    m = module(device)
    x, index, weights = routing(23, device)
    grad = normal(23, OUT, dtype=BF16, seed=9).to(device)
    results = []
    for run in (m.routed, lambda *t: one_at_a_time(m, *t)):
        own = [t.detach().clone().requires_grad_() for t in (x, weights)]
        out = run(own[0], index, own[1])
        results.append(torch.autograd.grad(out, (*own, m.up_proj, m.down_proj), grad))
    for name, a, b in zip(("x", "weights"), *results, strict=False):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 * b.abs().max().item(), msg=name)
    assert not results[0][2][3].any()  # nobody chose it


def test_routing_is_compiled_whole(device):
    torch._dynamo.reset()
    m = module(device)
    compiled = torch.compile(m.routed, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (23, 40):
        x, index, weights = routing(tokens, device)
        x.requires_grad_()
        grads = []
        for run in (compiled, m.routed):
            out = run(x, index, weights)
            grads.append((out, *torch.autograd.grad(out.float().square().sum(), (x, m.up_proj, m.down_proj))))
        for a, b in zip(*grads, strict=True):
            assert_same_bits(a, b)
    torch._dynamo.reset()


def test_module_trains(device):
    """A step of gradient descent lowers the loss."""
    m = module(device, torch.float32)
    x, index, weights = routing(64, device)
    target = normal(64, OUT, dtype=BF16, seed=5).to(device)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        loss = F.mse_loss(m.routed(x, index, weights).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_quantised(device):
    m = module(device)
    x, offsets = rows(BF16, device, (7, 0, 1, 30, 12, 4))
    exact = m(x, offsets)
    q = copy.deepcopy(m).quantize_()
    assert not list(q.parameters())
    assert {n: t.dtype for n, t in q.state_dict().items()} == {
        "up_proj": torch.float8_e4m3fn,
        "up_proj_scale": torch.float32,
        "down_proj": torch.float8_e4m3fn,
        "down_proj_scale": torch.float32,
    }
    out = q(x, offsets)
    torch.testing.assert_close(out, exact, rtol=0.2, atol=0.1 * exact.abs().max().item())
    assert q.quantize_() is q and q.half().up_proj.dtype == torch.float8_e4m3fn
    assert q.up_proj_scale.dtype == torch.float32
    assert_same_bits(q(x, offsets), out)


def test_states_across_quantisation(device):
    m = module(device)
    q = copy.deepcopy(m).quantize_()
    loaded = module(device).quantize_()
    loaded.load_state_dict(m.state_dict())
    for name, t in q.state_dict().items():
        assert_same_bits(loaded.state_dict()[name], t)
    back = module(device)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    back.load_state_dict(torch.load(file))
    torch.testing.assert_close(back.up_proj, m.up_proj, rtol=0.07, atol=1e-2)
    state = q.state_dict()
    del state["up_proj_scale"]
    with pytest.raises(RuntimeError, match="expected the state to have up_proj_scale beside float8 weights, got none"):
        back.load_state_dict(state)


@pytest.mark.parametrize("choice", ["up", "both"])
def test_pruned_before_they_are_quantised(device, choice):
    """Float8 has equals of what was not: which of them are kept is for the weights to say."""
    recipe = sparse24.Recipe(sparse_weights=choice)
    m = module(device, recipe=recipe)
    pruned = {"up_proj": prune24(m.up_proj, -1), "down_proj": m.down_proj}
    if choice == "both":
        pruned["down_proj"] = prune24(m.down_proj, -2)
    q, loaded = copy.deepcopy(m).quantize_(), module(device, recipe=recipe).quantize_()
    loaded.load_state_dict(m.state_dict())
    for name, w in pruned.items():
        codes, scale = sparse24.quantize_fp8(w.detach().flatten(0, 1))
        for other in (q, loaded):
            assert_same_bits(getattr(other, name).flatten(0, 1), codes)
            assert_same_bits(getattr(other, f"{name}_scale").flatten(), scale.flatten())
    m.sparse = False
    assert m.quantize_().up_proj.float().count_nonzero() > 0.9 * m.up_proj.numel()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "int4"}, 'precision to be .*, got "int4"'),
        ({"num_experts": 0}, "num_experts to be at least 1, got 0"),
        ({"num_experts": 1.5}, "num_experts to be a whole number, got 1.5"),
        ({"dim": -32}, "dim to be at least 0, got -32"),
        ({"hidden": "64"}, "hidden to be a whole number, got 64"),
        ({"dim_out": 1.5}, "dim_out to be a whole number, got 1.5"),
        ({"dtype": torch.int8}, "dtype to be float32, bfloat16 or float16, got int8"),
    ],
    ids=["precision", "experts", "a fraction", "negative", "no number", "outputs", "dtype"],
)
def test_refusals(options, sentence):
    with pytest.raises(RuntimeError, match=rf"^sparse24\.nn\.ReLU2Experts: expected {sentence}"):
        sparse24.nn.ReLU2Experts(**{"num_experts": 2, "dim": 32, "hidden": 64, **options})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda x, index, weights: (None, index, weights), "x to be a Tensor, got None"),
        (lambda x, index, weights: (x[None], index, weights), "x to have 2 dimensions, got 3"),
        (lambda x, index, weights: (x, index[0], weights), "index to have 2 dimensions, got 1"),
        (lambda x, index, weights: (x, index.float(), weights), "index to be of integers, got float32"),
        (lambda x, index, weights: (x, index.bool(), weights), "index to be of integers, got bool"),
        (lambda x, index, weights: (x, index[:3], weights), r"index to have 6 rows \(those of x\), got 3"),
        (lambda x, index, weights: (x, index[:, :1], weights), r"weights to have shape \[6, 1\] .*, got \[6, 2\]"),
        (lambda x, index, weights: (x, index, weights[:4]), r"weights to have shape \[6, 2\] .*, got \[4, 2\]"),
        (lambda x, index, weights: (x, index, index), "weights to be of a floating dtype, got int64"),
        (lambda x, index, weights: (x, index, weights.to("meta")), "weights to be on cpu as x is, got meta"),
    ],
)
def test_refused_choices_of_a_router(wrong, sentence):
    module = sparse24.nn.ReLU2Experts(3, 32, 64)
    arguments = torch.randn(6, 32), torch.zeros(6, 2, dtype=torch.int64), torch.rand(6, 2)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.nn\.ReLU2Experts: expected {sentence}$"):
        module.routed(*wrong(*arguments))


def test_factors_of_any_floating_dtype():
    """They multiply in float32 where they are not of x's dtype."""
    module = sparse24.nn.ReLU2Experts(3, 32, 64)
    x, index, weights = torch.randn(6, 32), torch.randint(0, 3, (6, 2)), torch.rand(6, 2).half()
    expected = module.routed(x, index, weights.float())
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(module.routed(x, index, weights.to(dtype)), expected)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(RuntimeError, match='expected precision to be "auto" or "fp8" to quantise, got "16bit"'):
        module("cpu", precision="16bit").quantize_()
    with pytest.raises(RuntimeError, match="expected multiples of 16 features to quantise, got 40"):
        sparse24.nn.ReLU2Experts(2, 32, 40).quantize_()


def test_a_schedule_sets_its_switch():
    model = torch.nn.Sequential(module("cpu"))
    schedule = sparse24.Schedule(10, dense_warmup_steps=4)
    assert not schedule.apply(model, 0) and not model[0].sparse
    assert schedule.apply(model, 4) and model[0].sparse


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference(device, mode):
    m = module(device)
    x, index, weights = routing(23, device)
    expected = m.routed(x, index, weights)
    with mode():
        out = m.routed(x, index, weights)
    assert not out.requires_grad
    assert_same_bits(out, expected)


def test_checkpointing(device):
    m = module(device)
    x, index, weights = routing(23, device)
    results = []
    for run in (m.routed, lambda *t: checkpoint(m.routed, *t, use_reentrant=False)):
        own = x.clone().requires_grad_()
        out = run(own, index, weights)
        results.append(torch.autograd.grad(out.float().square().sum(), (own, m.up_proj, m.down_proj)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_copies(device):
    m = module(device)
    x, offsets = rows(BF16, device, (7, 0, 1, 30, 12, 4))
    for original in (m, copy.deepcopy(m).quantize_()):
        file = io.BytesIO()
        torch.save(original, file)
        file.seek(0)
        pickled = pickle.loads(pickle.dumps(original))
        for again in (copy.deepcopy(original), torch.load(file, weights_only=False), pickled):
            assert_same_bits(again(x, offsets), original(x, offsets))


def test_parameters_that_are_swapped(device):
    """torch swaps no tensor to which there are weak references, as to those whose codes are kept."""
    m = module(device)
    for change in (lambda: m.load_state_dict({name: 2 * t for name, t in m.state_dict().items()}), m.float):
        for w in m.parameters():
            w.grad = torch.zeros_like(w)
            assert kept_weights.keeps(w) and kept_weights.codes_of(w, w.detach().to(BF16)) is not None
            w.grad = None
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            change()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert not any(w in kept_weights._kept for w in m.parameters())
    assert m.up_proj.dtype == torch.float32
