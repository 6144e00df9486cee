"""The ops as torch sees them: opcheck, fakes, fresh outputs, autocast, streams, CUDA graphs, several devices."""

import pytest
import torch
from compare import assert_same_bits
from data import activations, k_major, normal
from oracle import FP8
from samples import CASES, make_or_skip
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse24

ALL_CASES = pytest.mark.parametrize("case", CASES, ids=str)


def assert_same_results(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def opcheck(sample, tests):
    # torch's schema test compares inputs with allclose, which float8 lacks; test_inputs_are_not_written covers it.
    if any(isinstance(a, torch.Tensor) and a.dtype == FP8 for a in sample.args):
        tests = [t for t in tests if t != "test_schema"]
    torch.library.opcheck(sample.overload, sample.args, sample.kwargs, test_utils=tests)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@ALL_CASES
def test_opcheck(device, case, requires_grad):
    if requires_grad and not case.differentiable:
        pytest.skip("no backward")
    sample = make_or_skip(case, device, requires_grad=requires_grad)
    opcheck(sample, ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"])


@pytest.mark.parametrize("layout", ["transposed", "offset", "expanded"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.dtype in (torch.bfloat16, torch.int32, FP8) and c.dim == -1], ids=str
)
def test_opcheck_of_views(device, case, layout):
    opcheck(make_or_skip(case, device, layout), ["test_schema", "test_autograd_registration", "test_faketensor"])


@ALL_CASES
def test_fakes_are_as_the_results(device, case):
    sample = make_or_skip(case, device)
    real = sample.run()
    with FakeTensorMode() as mode:
        convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        fake = sample.overload(*map(convert, sample.args), **sample.kwargs)
    for f, r in zip(fake if isinstance(fake, tuple) else (fake,), real, strict=True):
        assert (f.shape, f.stride(), f.dtype, f.device) == (r.shape, r.stride(), r.dtype, r.device)
        assert f.storage_offset() == r.storage_offset()


@ALL_CASES
def test_results_do_not_depend_on_fresh_memory(device, case, request):
    expected = make_or_skip(case, device).run()
    request.getfixturevalue("poisoned_memory")
    assert_same_results(case.make(device).run(), expected)


@ALL_CASES
def test_inputs_are_not_written(device, case):
    sample = make_or_skip(case, device)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
    out = sample.run()
    for a, b in zip(sample.args, before, strict=True):
        if isinstance(a, torch.Tensor):
            assert_same_bits(a, b)
            assert all(o.data_ptr() != a.data_ptr() for o in out if o.numel())


@ALL_CASES
def test_autocast_changes_nothing(device, case):
    sample = make_or_skip(case, device)
    expected = sample.run()
    with torch.autocast(device, torch.bfloat16):
        assert_same_results(sample.run(), expected)


@ALL_CASES
def test_inference_mode(device, case):
    expected = make_or_skip(case, device).run()
    with torch.inference_mode():
        assert_same_results(case.make(device).run(), expected)


def test_wrappers_pass_every_argument(device):
    """The functions of sparse24 against torch.ops with everything spelled out."""
    ops = torch.ops.sparse24
    x = activations(64, 64, torch.bfloat16, specials=False).to(device)
    scale = torch.full((64,), 0.5, device=device)
    b = k_major(normal(64, 8, dtype=torch.bfloat16).to(device))
    assert_same_results(sparse24.compress(x, "relu", -2), ops.compress(x, "relu", -2))
    assert_same_results(sparse24.compress(x), ops.compress(x, "none", -1))
    given = sparse24.compress_fp8(x, scale, "relu", -2, "row")
    assert_same_results(given, ops.compress_fp8(x, scale, "relu", -2, "row"))
    assert_same_results(sparse24.compress_fp8(x, scaling="tensor"), ops.compress_fp8(x, None, "none", -1, "tensor"))
    assert_same_results(sparse24.quantize_fp8(x, scale), ops.quantize_fp8(x, scale, "row"))
    assert_same_results(sparse24.quantize_fp8(x, scaling="tensor"), ops.quantize_fp8(x, None, "tensor"))
    values, meta = sparse24.compress(x, "relu", -2)
    assert_same_bits(sparse24.compress_like(x, meta, -2), ops.compress_like(x, meta, -2))
    assert_same_bits(sparse24.decompress(values, meta, 64, 64, -2), ops.decompress(values, meta, 64, 64, -2))
    options = {"dim": -2, "out_dtype": torch.float16, "transpose_out": True, "interleaved": True}
    bias = torch.ones(8, device=device)
    actual = sparse24.mm(values, meta, b, scale_a=scale, scale_b=scale[:1], bias=bias, **options)
    assert_same_bits(actual, ops.mm(values, meta, b, scale, scale[:1], bias, **options))
    w, bias = x[:32], torch.ones(32, device=device, dtype=torch.bfloat16)
    tensors = {"scale_x": scale, "scale_w": scale[:32], "bias": bias, "scale_out": 2 * scale}
    for op in (sparse24.linear_relu2, sparse24.linear_compress):
        expected = getattr(ops, op.__name__)(x, w, *tensors.values(), out_dtype=FP8)
        assert_same_results(op(x, w, **tensors, out_dtype=FP8), expected)
    kept, pattern = sparse24.compress(x, "relu2")
    actual = sparse24.linear_gradient(grad=x[:, :32], w=w, values=kept, meta=pattern)
    assert_same_results(actual, ops.linear_gradient(x[:, :32], w, kept, pattern))
    eight = sparse24.compress_fp8(x, activation="relu2")[1]
    actual = sparse24.linear_gradient(x[:, :32], w, kept, eight, True, False, True)
    assert_same_results(
        actual, ops.linear_gradient(x[:, :32], w, kept, eight, interleaved=True, tokens=False, fp8_meta=True)
    )
    hot = torch.tensor([3, 40], device=device)
    actual = sparse24.linear_gradient(x[:, :32], w, kept, pattern, hot=hot)
    assert_same_results(actual, ops.linear_gradient(x[:, :32], w, kept, pattern, False, True, False, hot))
    y = torch.relu(x).square()
    actual = sparse24.linear_relu2_gradient(grad=x[:, :32], w=w, y=y)
    assert_same_bits(actual, ops.linear_relu2_gradient(x[:, :32], w, y))
    features = torch.tensor([3, 40], device=device)
    actual = sparse24.gather_features(kept, eight, features, fp8_meta=True)
    assert_same_bits(actual, ops.gather_features(kept, eight, features, True))
    actual = sparse24.feature_counts(kept, eight, samples=20, fp8_meta=True)
    assert_same_bits(actual, ops.feature_counts(kept, eight, 20, True))
    counts = torch.arange(8, dtype=torch.int32, device=device)
    assert_same_bits(sparse24.densest_features(counts=counts, k=3), ops.densest_features(counts, 3))
    few, columns = x[:9], x[:64, :16]
    actual = sparse24.mm_active(y=few, w=columns, bias=bias[:16], out_dtype=torch.float32)
    assert_same_bits(actual, ops.mm_active(few, columns, None, bias[:16], out_dtype=torch.float32))
    actual = sparse24.relu2_mlp_few(few, w, columns[:32], b1=bias, threshold=1.0)
    assert_same_bits(actual, ops.relu2_mlp_few(few, w, columns[:32], bias, None, None, None, 1.0))
    expected = ops.linear_compress(x, w, None, None, None, None, activation="relu2", scaling="row", out_dtype=FP8)
    actual = sparse24.linear_compress(x, w, activation="relu2", scaling="row", out_dtype=FP8)
    assert_same_results(actual, expected)


def test_many_threads(device):
    """Ops release the GIL or at least do not share state."""
    from concurrent.futures import ThreadPoolExecutor

    xs = [activations(64, 256, torch.bfloat16, seed=i).to(device) for i in range(8)]
    expected = [sparse24.compress(x, "relu2") for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for actual, e in zip(pool.map(lambda x: sparse24.compress(x, "relu2"), xs * 8), expected * 8, strict=True):
            assert_same_results(actual, e)


@ALL_CASES
def test_first_call_of_a_thread(cuda, case):
    """A thread that has called nothing yet has no context, and with memory from the cache nothing has made it one."""
    from threading import Thread

    sample = make_or_skip(case, cuda)
    expected, results = sample.run(), []
    sample.run()  # so that the allocator has memory for one more

    def call():
        try:
            results.append(sample.run())
        except RuntimeError as error:
            results.append(error)

    thread = Thread(target=call)
    thread.start()
    thread.join()
    assert not isinstance(results[0], RuntimeError), results[0]
    assert_same_results(results[0], expected)


@ALL_CASES
def test_runs_on_the_current_stream(cuda, case):
    """Behind a delay and a write on a side stream, the op sees the written data."""
    sample, other = make_or_skip(case, cuda), case.make(cuda, seed=9)
    expected = other.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for a, b in zip(sample.args, other.args, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        out = sample.run()
    stream.synchronize()
    assert_same_results(out, expected)


@ALL_CASES
def test_cuda_graph(cuda, case):
    """Captured once, replayed with new data."""
    sample = make_or_skip(case, cuda)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample.run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample.run()
    for seed in (3, 4):
        other = case.make(cuda, seed=seed)
        for a, b in zip(sample.args, other.args, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_results(out, other.run())


def test_cuda_graph_of_a_network(cuda):
    """Compress and multiply in one graph, with more rows than fit one wave of tiles."""
    x = activations(4096, 1024, torch.bfloat16, specials=False).to(cuda).clone()
    w = normal(1000, 1024, dtype=torch.bfloat16, seed=1).to(cuda)

    def network(x):
        values, meta = sparse24.compress(x, "relu2")
        values8, meta8, scale = sparse24.compress_fp8(x, None, "relu2")
        w8, w_scale = sparse24.quantize_fp8(torch.nn.functional.pad(w, (0, 0, 0, 8)))
        return sparse24.mm(values, meta, w.t()), sparse24.mm(values8, meta8, w8.t(), scale, w_scale)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        network(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = network(x)
    for seed in (5, 6):
        x.copy_(activations(4096, 1024, torch.bfloat16, seed=seed, specials=False))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_results(out, network(x))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != torch.float32], ids=str)
def test_runs_on_the_device_of_its_tensors(case):
    """With device 0 current and tensors on device 1; device 0 gives the bits, as sums of products differ on the CPU."""
    expected = make_or_skip(case, "cuda:0").run()
    torch.cuda.set_device(0)
    out = make_or_skip(case, "cuda:1").run()
    assert all(o.device == torch.device("cuda:1") for o in out)
    assert torch.cuda.current_device() == 0
    assert_same_results(out, expected)
