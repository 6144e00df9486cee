"""What is saved between the passes, and what is computed again instead."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from data import normal
from saved import saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from training_reference import D, exact_operands, operands, run

import sparse24
from sparse24 import SAC_SAVE_OPS

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


SIXTEEN_BIT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@SIXTEEN_BIT
def test_memory_between_the_passes(device, dtype):
    """Per feature and token: 1.125 bytes in 16 bits and 0.625 in fp8, where the unfused dense network has 4."""
    tokens, hidden = 256, 1024
    x = normal(tokens, D, dtype=dtype).to(device).requires_grad_()
    w1, w2 = (normal(*s, dtype=dtype, seed=1).to(device).requires_grad_() for s in ((hidden, D), (D, hidden)))
    inputs, cells = (x, w1, w2), tokens * hidden
    dense, _ = saved_bytes(lambda: F.linear(F.linear(x, w1).relu().square(), w2), inputs)
    assert dense == 4 * cells
    sixteen, _ = saved_bytes(lambda: sparse24.relu2_mlp(*inputs, min_tokens=0), inputs)
    assert sixteen == 1.125 * cells <= 0.30 * dense
    fused, _ = saved_bytes(lambda: sparse24.relu2_mlp(*inputs, sparse=False), inputs)
    assert fused == 2 * cells
    for fused in (True, False):
        eight, _ = saved_bytes(
            lambda f=fused: sparse24.relu2_mlp(*inputs, min_tokens=0, precision="fp8", fused=f), inputs
        )
        assert eight == 0.625 * cells + 4 * tokens <= 0.16 * dense
    for options in ({}, {"precision": "fp8"}, {"sparse": False}, {"precision": "fp8", "sparse": False}):
        nothing, out = saved_bytes(
            lambda o=options: sparse24.relu2_mlp(*inputs, min_tokens=0, recompute=True, **o), inputs
        )
        assert nothing == 0 and out.requires_grad


@pytest.mark.parametrize("known", [False, True], ids=["exact", "delayed"])
def test_memory_between_the_passes_of_six_products_in_float8(device, known):
    """At most 0.16 of an unfused dense network for the hidden layer, and a byte for each entry of x, w1 and w2."""
    tokens, hidden = 256, 1024
    x = normal(tokens, D, dtype=torch.bfloat16).to(device).requires_grad_()
    w1, w2 = (normal(*s, dtype=torch.bfloat16, seed=1).to(device).requires_grad_() for s in ((hidden, D), (D, hidden)))
    inputs = x, w1, w2
    options = {"precision": "fp8", "recipe": sparse24.Recipe(fp8_weight_gradients=True), "min_tokens": 0}
    options |= {"delayed_scales": torch.ones(4, device=device), "scales_known": known}
    saved, _ = saved_bytes(lambda: sparse24.relu2_mlp(*inputs, **options), inputs)
    dense, _ = saved_bytes(lambda: F.linear(F.linear(x, w1).relu().square(), w2), inputs)
    operands_of_products = sum(t.numel() for t in inputs)
    numbers = 128  # scales and largest magnitudes
    assert operands_of_products <= saved <= 0.16 * dense + operands_of_products + numbers


def test_x_is_saved_for_w1_only(device):
    """Frozen weights: x itself is not needed in the backward pass."""
    *leaves, _ = operands(65, torch.bfloat16, device)
    x = leaves[0].requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        sparse24.relu2_mlp(*leaves, min_tokens=0)
    assert x.data_ptr() not in seen and seen


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_recomputation_has_the_same_bits(device, precision, fused, sparse):
    """Of the dense network in 16 bits torch's own backward pass, without recomputation, adds and rounds elsewhere."""
    *leaves, grad = (exact_operands if not sparse else operands)(64, torch.bfloat16, device)
    options = {"precision": precision, "fused": fused, "sparse": sparse}
    if precision == "fp8":
        *leaves, grad = operands(64, torch.bfloat16, device)
    for actual, expected in zip(
        run(leaves, grad, recompute=True, **options), run(leaves, grad, **options), strict=True
    ):
        assert_same_bits(actual + 0.0, expected + 0.0)


class Outputs(TorchDispatchMode):
    """Keeps dtype and shape of every tensor that an op returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(t, torch.Tensor):
                self.seen.append((t.dtype, tuple(t.shape)))
        return results


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@SIXTEEN_BIT
def test_the_backward_pass_makes_nothing_dense(device, dtype, precision, recompute):
    """No matrix of the activation's size, of any dtype, and in float32 not even one of the kept half."""
    tokens, hidden = 256, 1024
    shapes = (tokens, D), (hidden, D), (D, hidden)
    inputs = [normal(*s, dtype=dtype, seed=1).to(device).requires_grad_() for s in shapes]
    out = sparse24.relu2_mlp(*inputs, min_tokens=0, precision=precision, fused=True, recompute=recompute)
    with Outputs() as outputs:
        out.backward(torch.ones_like(out))
    assert (dtype, (tokens, hidden // 2)) in outputs.seen  # dh at least
    for kind, shape in outputs.seen:
        size = math.prod(shape) * (2 if kind == torch.float32 else 1)
        assert size < tokens * hidden, f"{kind} {shape}"


class Calls(TorchDispatchMode):
    """Counts the calls of each op."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function] = self.count.get(function, 0) + 1
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing(device):
    """The GEMM is not repeated where its op is in the policy's set, and the gradients are the same bits."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    *leaves, grad = operands(64, torch.bfloat16, device)
    expected = run(leaves, grad)

    def contexts(ops):
        def policy(ctx, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    for ops, repeated in ((SAC_SAVE_OPS, 1), (frozenset(), 2)):
        inputs = [t.clone().requires_grad_() for t in leaves]

        def ffn(*t):
            return sparse24.relu2_mlp(*t, min_tokens=0)

        with Calls() as calls:
            checkpoint(ffn, *inputs, use_reentrant=False, context_fn=lambda o=ops: contexts(o)).backward(grad)
        assert calls.count[torch.ops.sparse24.linear_compress.default] == repeated
        for t, g in zip(inputs, expected[1:], strict=True):
            assert_same_bits(t.grad, g)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    "dtype, precision", [(torch.bfloat16, "16bit"), (torch.bfloat16, "fp8"), (torch.float16, "16bit")], ids=str
)
def test_compiled_memory(device, dtype, precision, recompute):
    """What the compiler keeps between the passes: 2:4 values and metadata; with `recompute`, nothing of that size."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    kept = []

    def forward_graph(module, inputs):
        results = [n.meta["val"] for n in module.graph.find_nodes(op="output")[0].args[0] if hasattr(n, "meta")]
        kept.append([r for r in results if isinstance(r, torch.Tensor)])
        return make_boxed_func(module.forward)

    def backward_graph(module, inputs):
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    m = sparse24.nn.ReLU2MLP(
        D, 1024, precision=precision, recompute=recompute, min_tokens=0, device=device, dtype=dtype
    )
    backend = aot_autograd(
        fw_compiler=forward_graph, bw_compiler=backward_graph, partition_fn=min_cut_rematerialization_partition
    )
    x = normal(640, D, dtype=dtype).to(device).requires_grad_()
    compiled = torch.compile(m, backend=backend, fullgraph=True)
    compiled(x).sum().backward()
    # All that has one entry for each token and feature, or each group of four of them.
    large = sum(t.numel() * t.element_size() for t in kept[0] if t.numel() >= 640 * 1024 // 8)
    assert large == (0 if recompute else (0.625 if precision == "fp8" else 1.125) * 640 * 1024)
    grads = x.grad, m.up_proj.weight.grad, m.down_proj.weight.grad
    x.grad = m.up_proj.weight.grad = m.down_proj.weight.grad = None
    m(x).sum().backward()
    for actual, t in zip(grads, (x, m.up_proj.weight, m.down_proj.weight), strict=True):
        assert_same_bits(actual, t.grad)
    torch._dynamo.reset()


def test_an_odd_number_of_tokens_copies_only_the_last_rows(cuda):
    """Whole copies of x and of the gradient took a twentieth of a step of 8191 tokens."""
    d, hidden = 1024, 2048
    w1, w2 = (normal(*s, dtype=torch.bfloat16, seed=1).cuda().requires_grad_() for s in ((hidden, d), (d, hidden)))

    def peak(tokens):
        x = normal(tokens, d, dtype=torch.bfloat16).cuda().requires_grad_()
        for _ in range(2):  # what is allocated once for all calls is there in the second
            torch.cuda.synchronize()
            gc.collect()  # tensors of other tests would be freed meanwhile
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(sparse24.relu2_mlp(x, w1, w2, min_tokens=0), (x, w1, w2), torch.ones_like(x))
        return torch.cuda.max_memory_allocated() - before

    even = peak(8192)
    for tokens in (8191, 8190, 8188, 8184):
        assert peak(tokens) <= even + 8192 * d // 2, tokens  # a quarter of a copy
