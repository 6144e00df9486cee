"""Modules that keep the scales of their float8 steps: known when they are, saved, loaded, copied, cast and compiled."""

import copy
import warnings
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from training_reference import HIDDEN, OUT, D

import sparse24
from sparse24.nn import delayed_scales

# Dynamo makes an instance of torch.autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

RECIPE = sparse24.Recipe(fp8_weight_gradients=True)


def make(device, **options):
    torch.manual_seed(0)
    options = {"precision": "fp8", "recipe": RECIPE, "min_tokens": 0} | options
    return sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, device=device, **options)


def step(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    device = module.up_proj.weight.device
    x, grad = (torch.randn(64, n, generator=g).to(device, torch.bfloat16) for n in (D, OUT))
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    return out.detach(), *(p.grad.clone() for p in module.parameters())


def assert_same_step(one, other, seed=0):
    for a, e in zip(step(one, seed), step(other, seed), strict=True):
        assert_same_bits(a, e)


def test_scales_become_known(device):
    module = make(device)
    assert not module.scales_known and module.delayed_scales.tolist() == [0, 0, 0, 0]
    with torch.no_grad():
        module(torch.ones(4, D, dtype=torch.bfloat16, device=device))
    assert module.delayed_scales.tolist() == [0, 0, 0, 0]
    step(module)
    assert (module.delayed_scales > 0).all() and not module.scales_known
    step(module)
    assert module.scales_known


def test_recomputation_does_not_look(device):
    """Of a checkpointed pass both times are one call, and the second has the scales of the first."""
    module = make(device)
    for known in (False, True, True):
        x = torch.randn(64, D, device=device).to(torch.bfloat16).requires_grad_()
        out = checkpoint(module, x, use_reentrant=False)
        assert module.scales_known is known
        out.sum().backward()
        assert module.scales_known is known
    assert module.calls_with_unknown_scales == 2


@pytest.mark.parametrize("stepped", [False, True], ids=["pass", "step"])
def test_nobody_looks_while_passes_are_open(device, stepped):
    """A pipeline has the backward pass of a micro-batch between the forward passes of others, here computed again."""
    module = make(device)

    def forward():
        x = torch.randn(64, D, device=device).to(torch.bfloat16).requires_grad_()
        return checkpoint(module, x, use_reentrant=False)

    passes = [forward(), forward()]
    for _ in range(6):
        passes.pop(0).sum().backward()
        passes.append(forward())
        assert not module.scales_known
    assert (module.delayed_scales > 0).all()
    if stepped:  # what is open then has no backward pass
        with torch.no_grad():
            module.up_proj.weight.mul_(2)
    else:
        for out in passes:
            out.sum().backward()
    for _ in range(2):  # the third and the fourth call that may look
        assert not module.scales_known
        forward().sum().backward()
    assert module.scales_known


def test_a_second_weight_of_zeros(device):
    """As many models begin: dh is zero, and its scale stays unknown."""
    module = make(device)
    torch.nn.init.zeros_(module.down_proj.weight)
    step(module)
    step(module)
    assert not module.scales_known and module.delayed_scales[3] == 0
    torch.nn.init.normal_(module.down_proj.weight, std=0.1)
    step(module)
    step(module)
    assert module.scales_known


def test_copied_saved_and_loaded(device, tmp_path):
    module = make(device)
    for seed in range(2):
        step(module, seed)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = make(device)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.scales_known
    assert_same_step(copy.deepcopy(module), other, seed=2)
    # States of other recipes.
    plain = sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, precision="fp8", device=device)
    assert "delayed_scales" not in plain.state_dict()
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    assert not module.scales_known


def test_casts_and_new_memory(device):
    module = make(device)
    for seed in range(2):
        step(module, seed)
    before = module.delayed_scales.clone()
    module.bfloat16()
    assert_same_bits(module.delayed_scales, before)
    with torch.device("meta"):
        empty = make("meta")
    assert empty.to_empty(device=device).delayed_scales.tolist() == [0, 0, 0, 0]
    # Not what memory holds that a module gets anew.
    torch.nn.Sequential(module).to_empty(device=device)
    assert_same_bits(module.delayed_scales, before)


def begin_anew(module, how):
    """Zeros again instead of scales that were known."""
    if how == "memory":
        weights = copy.deepcopy(list(module.parameters()))
        module.to("meta").to_empty(device=weights[0].device)
        with torch.no_grad():
            for p, w in zip(module.parameters(), weights, strict=True):
                p.copy_(w)
    else:
        state = module.state_dict()
        module.load_state_dict({name: t for name, t in state.items() if name != "delayed_scales"})


@pytest.mark.parametrize("how", ["memory", "state"])
def test_scales_that_are_lost_are_found_again(device, how):
    """Those of a module whose memory was given up, or that loads a state without: as in a new one."""
    module, new = make(device), make(device)
    for seed in range(3):
        step(module, seed)
    assert module.scales_known
    begin_anew(module, how)
    assert not module.scales_known and module.calls_with_unknown_scales == 0
    assert module.delayed_scales.tolist() == [0, 0, 0, 0]
    for seed in range(3):
        assert_same_step(module, new, seed)
    assert module.scales_known and new.scales_known
    # A compiled module does not look: the steps of its optimizer do.
    begin_anew(module, how)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step(module)
    optimizer.step()
    assert module.scales_known


@pytest.mark.parametrize("later", [{"precision": "fp8"}, {"recipe": RECIPE}, {"precision": "fp8", "recipe": RECIPE}])
def test_options_that_are_set_later(device, later):
    """The module is as one that was made with them, and back."""
    options = {"precision": "fp8", "recipe": RECIPE}
    before = {"precision": "16bit", "recipe": sparse24.Recipe(fp8_weight_gradients=False)}
    module, made = make(device, **{**options, **{name: before[name] for name in later}}), make(device)
    assert module.delayed_scales is None and "delayed_scales" not in module.state_dict()
    step(module)
    for name, value in later.items():
        setattr(module, name, value)
    for seed in range(3):
        assert_same_step(module, made, seed)
    assert module.scales_known and set(module.state_dict()) == set(made.state_dict())
    for name in later:
        setattr(module, name, before[name])
    assert module.delayed_scales is None and not module.scales_known
    step(module)


def test_compiled_with_a_schedule(device):
    """The first step and both phases are graphs of their own; then nothing is traced again."""
    torch._dynamo.reset()
    module = make(device)
    eager, counter = copy.deepcopy(module), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    schedule = sparse24.Schedule(8, dense_warmup_steps=2, dense_final_steps=1)
    for step in range(8):
        for model in (module, eager):
            schedule.apply(model, step)
        g = torch.Generator().manual_seed(step)
        x, grad = (torch.randn(64, n, generator=g).to(device, torch.bfloat16) for n in (D, OUT))
        outs = [m(x) for m in (compiled, eager)]
        for out in outs:
            out.backward(grad)
        assert_same_bits(*outs)
        for p, q in zip(module.parameters(), eager.parameters(), strict=True):
            assert_same_bits(p.grad, q.grad)
    assert counter.frame_count == 3 and module.scales_known


def test_compiled_without_a_schedule(device):
    """The step of an optimizer finds that they are known: one graph with exact scales, one with these."""
    torch._dynamo.reset()
    module, counter = make(device), CompileCounterWithBackend("aot_eager")
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (module, eager)]
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x, grad = (torch.randn(64, n, generator=g).to(device, torch.bfloat16) for n in (D, OUT))
        outs = [m(x) for m in (compiled, eager)]
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.backward(grad)
            optimizer.step()
        assert_same_bits(*outs)
        assert module.scales_known
    assert counter.frame_count == 2


def test_optimizers_stop_looking(device, monkeypatch):
    """Ever more rarely where no step writes the scales; and not at all where all are known or nobody is left."""
    monkeypatch.setattr(delayed_scales, "_unknown", WeakKeyDictionary())
    module, reads = make(device), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0)
    with monkeypatch.context() as patch:
        patch.setattr(delayed_scales, "refresh", lambda *_: reads.append(1))
        for _ in range(40):
            optimizer.step()
    assert len(reads) == 6
    step(module)
    step(module)
    assert module.scales_known
    optimizer.step()
    assert not delayed_scales._unknown
    make(device)
    assert not delayed_scales._unknown


def test_converted(device):
    class FFN(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc = torch.nn.Linear(D, HIDDEN, bias=False)
            self.c_proj = torch.nn.Linear(HIDDEN, OUT, bias=False)

        def forward(self, x):
            return self.c_proj(F.relu(self.c_fc(x)).square())

    torch.manual_seed(0)
    ffn = torch.nn.Sequential(FFN().to(device, torch.bfloat16))
    keys, attributes = list(ffn.state_dict()), set(vars(ffn[0]))
    config = sparse24.ConvertConfig(dtype="fp8", recipe=RECIPE, min_tokens=0)
    sparse24.convert(ffn, config, quiet=True)
    module = make(device, dtype=torch.bfloat16)
    module.up_proj.weight.data.copy_(ffn[0].c_fc.weight)
    module.down_proj.weight.data.copy_(ffn[0].c_proj.weight)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x, grad = (torch.randn(64, n, generator=g).to(device, torch.bfloat16) for n in (D, OUT))
        for model in (ffn, module):
            model.zero_grad()
            model(x).backward(grad)
        assert_same_bits(ffn[0].c_fc.weight.grad, module.up_proj.weight.grad)
        assert_same_bits(ffn[0].c_proj.weight.grad, module.down_proj.weight.grad)
    assert ffn[0].scales_known and list(ffn.state_dict()) == keys
    assert copy.deepcopy(ffn)[0].scales_known
    sparse24.revert(ffn)
    assert not ffn[0]._buffers and vars(ffn[0]).keys() == attributes
    sparse24.convert(ffn, config, quiet=True)  # again: what it counts is no attribute that has changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            ffn(x).backward(grad)
    assert ffn[0].scales_known


def test_what_is_default(device):
    """All six products from 768 input features on, in modules, converted networks and the function."""
    assert not sparse24.Recipe().has_fp8_weight_gradients(767) and sparse24.Recipe().has_fp8_weight_gradients(768)
    for asked in (True, False):
        assert sparse24.Recipe(fp8_weight_gradients=asked).has_fp8_weight_gradients(4096) is asked
        assert sparse24.Recipe(fp8_weight_gradients=asked).has_fp8_weight_gradients(64) is asked
    narrow, wide = (sparse24.nn.ReLU2MLP(dim, 32, precision="fp8", device="meta") for dim in (752, 768))
    assert narrow.delayed_scales is None and wide.delayed_scales is not None
    assert sparse24.nn.ReLU2MLP(768, 32, device="meta").delayed_scales is None

    g = torch.Generator().manual_seed(0)
    x, w1, w2, grad = (
        torch.randn(*s, generator=g).to(device, torch.bfloat16) for s in ((8, 768), (32, 768), (32, 32), (8, 32))
    )
    leaves = [t.requires_grad_() for t in (x, w1 / 36, w2 / 6)]
    found = []
    for recipe in (None, RECIPE, sparse24.Recipe(fp8_weight_gradients=False)):
        out = sparse24.relu2_mlp(*leaves, precision="fp8", recipe=recipe, min_tokens=0)
        found.append(torch.autograd.grad(out, leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][1], found[2][1])


def test_the_larger_of_two_calls_before_a_backward_pass_has_its_scale(device):
    module = make(device)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for _ in range(6):
        small, large = module(x), module(8 * x)
        (small.float().sum() + large.float().sum()).backward()
    largest = module.delayed_scales[0].item() * 448 / (8 * x.abs().max().item())
    assert 0.999 < largest < 2.001


def test_scales_that_stay_unknown_are_seldom_read(device, monkeypatch):
    """With one frozen weight no step writes them, and each read waits for the device."""
    module = make(device)
    module.up_proj.weight.requires_grad_(False)
    reads = []
    monkeypatch.setattr(delayed_scales, "refresh", lambda *_: reads.append(1) or False)
    for _ in range(40):
        module(torch.ones(4, D, dtype=torch.bfloat16, device=device))
    assert len(reads) == 6


def of_inference_mode():
    with torch.inference_mode():
        return torch.ones(4)


@pytest.mark.parametrize(
    "scales, sentence",
    [
        (4.0, r"to be a Tensor, got float"),
        (torch.ones(3), r"to have shape \[4\] \(of x, y and two gradients\), got \[3\]"),
        (torch.ones(4, 1), r"to have shape \[4\] \(of x, y and two gradients\), got \[4, 1\]"),
        (torch.ones(4, dtype=torch.bfloat16), r"to be float32, got bfloat16"),
        (torch.ones(4, device="meta"), r"to be on cpu as x is, got meta"),
        (torch.ones(4, requires_grad=True), r"to require no gradient, got one that does"),
        (torch.ones(1).expand(4), r"to have four elements in memory, which are written, got an expanded one"),
        (of_inference_mode(), r"to be made outside of inference mode, .*, got one made in it"),
    ],
    ids=str,
)
def test_refusals(scales, sentence):
    x, w1, w2 = (torch.ones(*s, dtype=torch.bfloat16) for s in ((4, D), (HIDDEN, D), (OUT, HIDDEN)))
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected delayed_scales {sentence}$"):
        sparse24.relu2_mlp(x, w1, w2, precision="fp8", delayed_scales=scales)
