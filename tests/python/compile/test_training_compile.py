"""Training under torch.compile, and the dense phases of a schedule."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from convert_models import Inline
from data import normal
from training_reference import HIDDEN, D, operands, run

import sparse24
from sparse24 import Recipe, Schedule

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def counter():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("recipe", [None, Recipe(residual=True)], ids=["default", "residual"])
def test_compiled_training(device, dynamic, precision, recipe, counter):
    """One graph per size; with dynamic shapes one for all."""
    options = {"precision": precision, "recipe": recipe, "min_tokens": 0}
    compiled = torch.compile(
        lambda *t: sparse24.relu2_mlp(*t, **options), backend=counter, fullgraph=True, dynamic=dynamic
    )
    sizes = (80, 128, 80) if not dynamic else (80, 127, 196, 513)
    for tokens in sizes:
        *leaves, grad = operands(tokens, torch.bfloat16, device)
        inputs = [t.clone().requires_grad_() for t in leaves]
        compiled(*inputs).backward(grad)
        for t, g in zip(inputs, run(leaves, grad, precision=precision, recipe=recipe)[1:], strict=True):
            assert_same_bits(t.grad, g)
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.fixture
def captured():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


UNKNOWN = {
    "default": {},
    "dense": {"sparse": False},
    "min_tokens": {"min_tokens": 2},
    "unfused": {"fused": False},
    "recompute": {"recompute": True},
    "dense gradients": {"recipe": Recipe(weight_gradients="dense")},
    "residual": {"recipe": Recipe(residual=True)},
    "no reuse": {"recipe": Recipe(reuse_mask=False)},
    "natural": {"recipe": Recipe(permute_tokens=False)},
    "no split": {"recipe": Recipe(dense_features=0.0)},
    "fp8": {"precision": "fp8"},
    "fp8 dense": {"precision": "fp8", "sparse": False},
    "fp8 unfused": {"precision": "fp8", "fused": False},
    "fp8, a factor": {"precision": "fp8", "scale_y_factor": 1.0},
    "fp8, one scale": {"precision": "fp8", "scale_y": 0.1},
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_a_number_of_tokens_that_depends_on_data(device, way, counter, captured):
    """One graph for ``x[mask]``: training and inference, any number of tokens, also none and one."""
    if device == "cuda" and way in ("fp8 dense", "fp8 unfused"):
        pytest.skip("torch._scaled_mm cannot be traced with an unknown number of rows")
    options = dict(UNKNOWN[way])
    for name in ("scale_y", "scale_y_factor"):
        if name in options:
            options[name] = torch.full((1,), options[name], device=device)
    compiled = torch.compile(
        lambda mask, x, *t: sparse24.relu2_mlp(x[mask], *t, **options), backend=counter, fullgraph=True
    )
    *leaves, grad = operands(20, torch.bfloat16, device)
    graphs = []
    for learning in (True, False):
        for count in (20, 7, 1, 0):
            mask = torch.arange(20, device=device) >= 20 - count
            ours, theirs = ([t.clone().requires_grad_(learning) for t in leaves] for _ in range(2))
            out = compiled(mask, *ours)
            # On CUDA the compiler knows that there are at most 20 tokens: the default decides as for so many.
            decided = {} if device == "cuda" and "min_tokens" not in options else {"min_tokens": 0}
            expected = sparse24.relu2_mlp(theirs[0][mask], *theirs[1:], **{**options, **decided})
            assert_same_bits(out, expected)
            if learning:
                out.backward(grad[mask])
                expected.backward(grad[mask])
                for a, e in zip(ours, theirs, strict=True):
                    assert_same_bits(a.grad, e.grad)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2]


@pytest.mark.parametrize("kind", ["module", "quantised", "fp8", "converted"])
def test_unknown_tokens_of_modules(device, kind, counter, captured):
    def make(min_tokens=None):
        torch.manual_seed(0)
        if kind == "converted":
            model = Inline().to(device, torch.bfloat16)
            assert sparse24.convert(model, sparse24.ConvertConfig(min_tokens=min_tokens), quiet=True).converted
            return model
        options = {"device": device, "dtype": torch.bfloat16, "precision": "fp8" if kind == "fp8" else "auto"}
        model = sparse24.nn.ReLU2MLP(D, HIDDEN, min_tokens=min_tokens, **options)
        return model.quantize_() if kind == "quantised" else model

    model = make()
    compiled = torch.compile(lambda x, mask: model(x[mask]), backend=counter, fullgraph=True)
    x = normal(20, D, dtype=torch.bfloat16).to(device)
    for count in (20, 1, 0, 5):
        mask = torch.arange(20, device=device) < count
        out = compiled(x, mask)
        assert out.shape == (count, D)
    assert counter.frame_count == 1
    marked = x[:5].clone()
    torch._dynamo.decorators.mark_unbacked(marked, 0)
    torch._dynamo.reset()
    # Nothing bounds the number of tokens: it runs sparse.
    assert_same_bits(torch.compile(model, backend="aot_eager", fullgraph=True)(marked), make(min_tokens=0)(marked))


# ---- phases ----------------------------------------------------------------------------------------------------------


def network(device, layers=3, **options):
    torch.manual_seed(0)
    ffns = [
        sparse24.nn.ReLU2MLP(D, HIDDEN, device=device, dtype=torch.bfloat16, min_tokens=0, **options)
        for _ in range(layers)
    ]
    return torch.nn.Sequential(*ffns)


def test_phases_of_a_schedule():
    schedule = Schedule(10, dense_warmup_steps=3, dense_final_steps=2)
    assert [schedule.is_sparse(step) for step in range(10)] == [False] * 3 + [True] * 5 + [False] * 2
    assert [Schedule(1200).is_sparse(step) for step in (0, 999, 1000, 1199)] == [False, False, True, True]
    with pytest.warns(UserWarning):
        assert not any(Schedule(4, 3, 2).is_sparse(step) for step in range(4))


def test_steps_of_numpy_and_torch():
    """What is stored is a Python boolean, which a compiler takes for a constant."""
    model = network("cpu", layers=1)
    schedule = Schedule(np.int64(40), dense_warmup_steps=torch.tensor(10))
    for step in (20, np.int64(20), torch.tensor(20), 5, np.int64(5), torch.tensor(5)):
        sparse = schedule.apply(model, step)
        assert sparse is model[0].sparse and sparse is (int(step) == 20)
        assert schedule.is_sparse(step) is sparse


def test_a_schedule_that_is_never_sparse_warns():
    with pytest.warns(UserWarning, match=r"no step of Schedule\(total_steps=500, .*\) is sparse") as caught:
        schedule = Schedule(500)
        schedule.is_sparse(3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Schedule(1001).is_sparse(1000) and not Schedule(0).is_sparse(0)


def test_schedule_sets_modules(device):
    model = network(device)
    x = normal(65, D, dtype=torch.bfloat16).to(device)
    converted = model[1]._modules["down_proj"]
    converted._sparse24_converted = True
    results = {}
    for step in range(4):
        sparse = Schedule(4, dense_warmup_steps=1, dense_final_steps=1).apply(model, step)
        assert sparse == (step in (1, 2)) == converted.sparse == model[0].sparse == model[2].sparse
        results.setdefault(sparse, []).append(model(x))
    y = x
    for m in model:
        y = F.linear(sparse24.linear_relu2(y, m.up_proj.weight)[0], m.down_proj.weight)
    assert_same_bits(results[False][0], y)
    y = x
    for m in model:
        y = sparse24.mm(*sparse24.linear_compress(y, m.up_proj.weight)[:2], m.down_proj.weight.t())
    assert_same_bits(results[True][0], y)
    assert not torch.equal(*(results[sparse][1] for sparse in (False, True)))


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_one_graph_per_phase(device, counter, precision):
    """Also with a recipe object for each layer; going back to a phase costs nothing."""
    model = network(device, precision=precision)
    for m in model:
        m.recipe = Recipe(dense_features=0.1)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = normal(64, D, dtype=torch.bfloat16).to(device)
    frames = []
    for step in range(9):
        Schedule(9, dense_warmup_steps=3, dense_final_steps=3).apply(compiled, step)
        compiled(x).sum().backward()
        frames.append(counter.frame_count)
    assert frames == [1] * 3 + [2] * 6


def test_layers_share_a_graph(device, counter):
    """Compiled one by one, with equal recipes that are different objects."""
    x = normal(64, D, dtype=torch.bfloat16).to(device)
    for m in network(device):
        m.recipe = Recipe(residual=True)
        m.compile(backend=counter, fullgraph=True)
        m(x).sum().backward()
    assert counter.frame_count == 1


def test_training_lowers_the_loss(device):
    """Dense, then sparse, in both precisions."""
    for precision in ("16bit", "fp8"):
        model = network(device, precision=precision, layers=2)
        x, target = (normal(256, D, dtype=torch.bfloat16, seed=s).to(device) for s in (0, 5))
        optimizer, schedule = torch.optim.SGD(model.parameters(), lr=0.5), Schedule(12, dense_warmup_steps=4)
        losses = []
        for step in range(12):
            schedule.apply(model, step)
            loss = F.mse_loss(model(x).float(), target.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[3] < losses[0] and losses[11] < losses[4], losses
