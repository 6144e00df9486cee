"""Networks under what training and inference wrap around them: the results and gradients are those of plain calls."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from compare import assert_same_bits
from composition_models import INFERENCE_KINDS, KINDS, assert_close, build, checkpointed, inputs, masked_gradients
from convert_models import CountOps, assert_near, gradients
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import sparse24

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def counter():
    """The backend of tests that count graphs; one that is traced twice fails."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


#: The op whose calls tell how often the first half of a network ran.
FIRST_GEMM = "sparse24.linear_compress.default"


@pytest.mark.parametrize("kind", ["module", "converted"])
def test_eager_is_the_masked_network(device, kind):
    model, x = build(kind, device), inputs(device)
    assert_close(gradients(model, model, x), masked_gradients(kind, x))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", ["static", "dynamic", "marked"])
def test_compiled_training_is_traced_once(device, kind, counter, shapes):
    """Also for every number of tokens, where shapes are dynamic or only that dimension is."""
    model = build(kind, device)
    compiled = torch.compile(
        model, backend=counter, fullgraph=True, dynamic={"static": False, "dynamic": True}.get(shapes)
    )
    for tokens in (21, 64, 127, 40) if shapes != "static" else (21, 21):
        x = inputs(device, tokens=tokens)

        def call(x):
            if shapes == "marked":
                torch._dynamo.mark_dynamic(x, 1)
            return compiled(x)

        assert_same(gradients(model, call, x), gradients(model, model, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", INFERENCE_KINDS)
def test_compiled_inference_is_traced_once(device, kind, counter):
    model = build(kind, device)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (21, 64, 127):
            x = inputs(device, tokens=tokens)
            assert_same_bits(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_inductor(device):
    """The default backend, a training step: what is around the products is fused."""
    torch._dynamo.reset()
    model, x = build("module", device, torch.bfloat16), inputs(device, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    assert_near(gradients(model, compiled, x), gradients(model, model, x), 2e-2)
    torch._dynamo.reset()


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def save_gemms():
    def policy(ctx, op, *args, **kwargs):
        save = op in sparse24.SAC_SAVE_OPS
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def test_checkpointing(device, kind):
    model, x = build(kind, device), inputs(device)
    with CountOps() as once:
        expected = gradients(model, model, x)
    with CountOps() as twice:
        assert_same(gradients(model, checkpointed(model), x), expected)
    assert (once.calls[FIRST_GEMM], twice.calls[FIRST_GEMM]) == (2, 4)


@pytest.mark.parametrize("kind", ["module", "converted"])
def test_reentrant_checkpointing(device, kind):
    """Its first pass is one of inference: in 16 bits the same numbers, to rounding."""
    model, x = build(kind, device), inputs(device)
    assert_close(gradients(model, checkpointed(model, use_reentrant=True), x), gradients(model, model, x))


def test_selective_checkpointing(device, kind):
    """With SAC_SAVE_OPS no GEMM of the forward pass runs again."""
    model, x = build(kind, device), inputs(device)
    with CountOps() as once:
        expected = gradients(model, model, x)
    with CountOps() as selective:
        assert_same(gradients(model, checkpointed(model, context_fn=save_gemms), x), expected)
    for op in sparse24.SAC_SAVE_OPS:
        assert selective.calls[str(op)] == once.calls[str(op)]
    assert once.sparse == 4


class CountNodes:
    """A backend that counts the ops in the graphs of both passes."""

    def __init__(self):
        self.calls = Counter()
        self.backend = aot_autograd(
            fw_compiler=self.count, bw_compiler=self.count, partition_fn=min_cut_rematerialization_partition
        )

    def count(self, module, inputs):
        self.calls.update(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module.forward)


@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
def test_compiled_checkpointing(device, kind, counter, selective):
    model, x = build(kind, device), inputs(device)
    nodes = CountNodes()
    counter.backend = nodes.backend
    options = {"context_fn": save_gemms} if selective else {}
    compiled = torch.compile(checkpointed(model, **options), backend=counter, fullgraph=True)
    assert_same(gradients(model, compiled, x), gradients(model, model, x))
    assert counter.frame_count == 1
    # torch 2.11 saves what an autograd function saves, also inside of a checkpoint.
    expected = 4 if not selective and torch.__version__ >= "2.13" else 2
    assert nodes.calls[FIRST_GEMM] == expected


# ---- autocast, accumulation, inference -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["plain", "checkpointed", "compiled"])
def test_autocast(device, kind, wrapper, counter):
    """float32 weights and gradients, bfloat16 products: those of weights that are cast by hand."""
    model, x = build(kind, device, torch.float32, layers=1), inputs(device, torch.float32)
    layer = model.layers[0]
    call = {
        "plain": layer,
        "checkpointed": lambda x: checkpoint(layer, x, use_reentrant=False),
        "compiled": torch.compile(layer, backend=counter, fullgraph=True),
    }[wrapper]

    def under_autocast(x):
        with torch.autocast(device, torch.bfloat16):
            return call(x)

    by_hand = build(kind, device, torch.bfloat16, layers=1).layers[0]
    actual = gradients(layer, under_autocast, x)
    expected = gradients(by_hand, by_hand, x.bfloat16())
    assert_same_bits(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == torch.float32
        assert_same_bits(a.bfloat16(), e)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient_accumulation(device, kind, compiled, counter):
    """Two backward passes add up, without a new graph for the second."""
    model = build(kind, device)
    call = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    xs = [inputs(device), 2 * inputs(device)]
    alone = []
    for x in xs:
        model.zero_grad()
        model(x).square().sum().backward()
        alone.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for x in xs:
        call(x).square().sum().backward()
    for p, first, second in zip(model.parameters(), *alone, strict=True):
        assert_same_bits(p.grad, first + second)


@pytest.mark.parametrize("kind", INFERENCE_KINDS)
def test_inference_mode(device, kind):
    """Of the call, and of the weights."""
    expected = build(kind, device)(inputs(device)).detach()
    with torch.inference_mode():
        model, x = build(kind, device), inputs(device)
        assert_same_bits(model(x), expected)
    with torch.no_grad():
        assert_same_bits(model(x), expected)


# ---- copies ----------------------------------------------------------------------------------------------------------


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
def test_copies(device, kind, copied, sparse):
    """With the options, and in the phase, of the original; and independent of it."""
    model, x = build(kind, device), inputs(device)
    sparse24.Schedule(2, dense_warmup_steps=int(not sparse)).apply(model, 0)
    expected = gradients(model, model, x)
    other = copied(model)
    assert_same(gradients(other, other, x), expected)
    assert str(other) == str(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_same_bits(other(x).detach(), x)  # the residual connections alone
    assert_same(gradients(model, model, x), expected)
    phase = sparse24.Schedule(2, dense_warmup_steps=int(sparse)).apply(other, 0)
    assert phase != sparse and all(layer.sparse == sparse for layer in model.layers)
