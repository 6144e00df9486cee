"""What a float8 step holds at most while it runs: an op frees what lies between its products as it goes."""

import gc

import pytest
import torch
from data import normal
from torch.profiler import ProfilerActivity, profile

import sparse24

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def most_held(run, device):
    """The most bytes that a call has allocated at one time, of which some are freed when it returns."""
    run()  # what is allocated once for all calls
    gc.collect()  # tensors of other tests would be freed meanwhile
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # What was asked for: a block that is used again may be larger, by up to a megabyte.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most > 0
    return most


def operands(tokens, d, features, device):
    shapes = (tokens, d), (features, d), (d, features), (tokens, d)
    made = (normal(*s, dtype=torch.bfloat16, seed=i).to(device) for i, s in enumerate(shapes))
    return *made, torch.full((4,), 0.05, device=device)


# Of no size here is K split, which takes memory of its own; on a GPU codes are too large to share an allocation.
SIZES = {"cpu": [(1024, 256, 2048), (2048, 256, 1024)], "cuda": [(8192, 2048, 9216), (16384, 2048, 8192)]}
CASES = [(device, size) for device, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize("where, size", CASES, ids=[f"{d}-{'x'.join(map(str, s))}" for d, s in CASES])
def test_each_matrix_is_freed_behind_its_last_product(device, where, size):
    if where != device:
        pytest.skip(f"a size for {where}")
    tokens, d, features = size
    x, w1, w2, grad, scales = operands(*size, device)
    cells, slack = tokens * features, 64 * features + 2**20  # counts, scales, and what each allocation is rounded by

    # Beside codes of x and of a weight, in both orders: the activation, 0.625 bytes an entry; then the result.
    codes, codes_of_weight = tokens * d, features * d
    kept = codes + 2 * codes_of_weight + cells * 5 // 8
    run = lambda: sparse24.relu2_mlp_fp8(x, w1, w2, scales)  # noqa: E731
    first = 2 * codes + 2 * codes_of_weight + cells * 5 // 8
    second = kept + codes_of_weight + 2 * codes
    assert kept < most_held(run, device) <= max(first, second) + slack

    # dh, and y and dh along tokens; codes of grad. Then results of two bytes an entry, the smallest one first.
    _, *saved = run()
    options = {"need_dh": False}
    along_tokens = cells * 5 // 8
    smallest, other = sorted((2 * codes, 2 * codes_of_weight))
    between = 2 * along_tokens + cells // 2
    first = between + codes + max(codes, smallest)
    freed = cells // 2 if tokens < features else along_tokens
    second = between + codes + smallest - freed + 2 * codes_of_weight
    last = 2 * codes + 4 * codes_of_weight + codes + along_tokens
    held = most_held(lambda: sparse24.relu2_mlp_fp8_gradients(grad, *saved, scales, **options), device)
    assert between < held <= max(first, second, last) + slack


def test_what_a_step_holds(cuda):
    """Eager and compiled: 321 MB with the output and what is saved, 415 where all of a pass lives until it ends."""
    x, w1, w2, grad, scales = operands(8192, 2048, 9216, "cuda")
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    recipe = sparse24.Recipe(fp8_weight_gradients=True)

    def ffn(x, w1, w2):
        options = {"precision": "fp8", "recipe": recipe, "min_tokens": 0, "delayed_scales": scales}
        return sparse24.relu2_mlp(x, w1, w2, **options)

    torch._dynamo.reset()
    for call in (ffn, torch.compile(ffn, fullgraph=True)):
        assert most_held(lambda c=call: torch.autograd.grad(c(*leaves), leaves, grad), "cuda") <= 322e6
    torch._dynamo.reset()
