"""relu2_mlp with w2_rows: few tokens are exact, in one op; which number is few, and what runs beyond."""

import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import normal
from small_network import HIDDEN, OUT, D, tokens, weights

import sparse24
from sparse24 import _C
from sparse24.mlp import choice, few_tokens, float8, inference


def network(dtype, device, *, bias=True, fp8=False):
    """w1, w2, b1, b2 with w2_rows, and the options of both weights' scales."""
    w1, w2, b1, b2 = weights(dtype, device, bias=bias)
    if not fp8:
        return (w1, w2, b1, b2), {"w2_rows": w2.t().contiguous()}
    (w1, s1), (w2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    return (w1, w2, b1, b2), {"w2_rows": w2.t().contiguous(), "w1_scale": s1, "w2_scale": s2}


def by_the_op(x, operands, options, threshold=0):
    w1, _, b1, b2 = operands
    scales = options.get("w1_scale"), options.get("w2_scale")
    return sparse24.relu2_mlp_few(x, w1, options["w2_rows"], b1, b2, *scales, threshold)


def exactly(x, operands, options, threshold=0):
    """In float64, with the sum of magnitudes; the pre-activation is rounded as that of the op."""
    w1, w2, b1, b2 = (t.cpu().double() for t in operands)
    w1, w2 = (
        w * options[s].cpu().double().reshape(-1, 1) if s in options else w
        for w, s in ((w1, "w1_scale"), (w2, "w2_scale"))
    )
    h = (x.cpu().double() @ w1.t() + b1).to(x.dtype).double()
    y = torch.where(h > threshold, h, 0).square()
    return y @ w2.t() + b2, y @ w2.t().abs() + b2.abs()


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 63, 64])
@pytest.mark.parametrize("how", [{}, {"min_tokens": 0}, {"sparse": False}, {"threshold": 0.25}], ids=str)
def test_few_tokens_are_exact(device, dtype, count, fp8, how):
    """On the CPU all that may be few are those of the op; on CUDA the others run dense, as exactly as torch."""
    operands, options = network(dtype, device, fp8=fp8)
    x = tokens(count, dtype, device)
    got = sparse24.relu2_mlp(x, *operands, **options, **how)
    assert got.shape == (count, OUT) and got.dtype == dtype and got.is_contiguous()
    if device == "cpu" or count <= few_tokens(HIDDEN, OUT, fp8=fp8):
        assert_same_bits(got, by_the_op(x, operands, options, how.get("threshold", 0)))
    elif not fp8:
        expected, scale = exactly(x, operands, options, how.get("threshold", 0))
        torch_options = {name: value for name, value in how.items() if name == "threshold"}
        dense = sparse24.relu2_mlp(x, *operands, sparse=False, **torch_options)
        assert_accurate(got, dense, expected, scale)


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
def test_more_tokens_run_as_without(device, dtype, fp8):
    operands, options = network(dtype, device, fp8=fp8)
    x = tokens(65, dtype, device)
    without = {name: value for name, value in options.items() if name != "w2_rows"}
    for how in ({}, {"min_tokens": 0}, {"min_tokens": 66}):
        got = sparse24.relu2_mlp(x, *operands, **options, **how)
        assert_same_bits(got, sparse24.relu2_mlp(x, *operands, **without, **how))
    pruned = sparse24.relu2_mlp(x, *operands, **without, min_tokens=0)
    assert not torch.equal(pruned, sparse24.relu2_mlp(x, *operands, **without, sparse=False))


@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D), (2, 3, D), (4, 0, D)], ids=str)
def test_leading_dimensions(device, shape):
    operands, options = network(torch.bfloat16, device)
    x = normal(*shape, dtype=torch.bfloat16).to(device)
    got = sparse24.relu2_mlp(x, *operands, **options)
    assert got.shape == (*shape[:-1], OUT)
    assert_same_bits(got.reshape(-1, OUT), sparse24.relu2_mlp(x.reshape(-1, D), *operands, **options))


def test_no_active_neuron_and_special_numbers(device):
    (w1, w2, b1, b2), options = network(torch.bfloat16, device)
    x = tokens(3, torch.bfloat16, device)
    rows = torch.full_like(options["w2_rows"], torch.nan)
    silent = torch.full_like(b1, -1000)
    got = sparse24.relu2_mlp(x, w1, w2, silent, b2, w2_rows=rows)
    assert_same_bits(got, b2.expand(3, OUT).contiguous())
    x[1, 0], x[2, 1] = torch.nan, torch.inf
    got = sparse24.relu2_mlp(x, w1, w2, b1, b2, **options)
    assert got[0].isfinite().all() and got[1].isnan().all() and not got[2].isfinite().all()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(9,), (3, 7), (64,)], ids=str)
def test_dense_calls_by_few_tokens(device, dtype, shape, bias):
    """Those of a module without a copy, which on CUDA have the ReLU in the product: as exact as torch, NaN included."""
    (w1, w2, b1, b2), _ = network(dtype, device)
    b1, b2 = (b1, b2) if bias else (None, None)
    x = normal(*shape, D, dtype=dtype).to(device)
    first, second = torch.nn.functional.linear(x, w1, b1), w2.double()
    y = torch.relu(first).square().double()
    exact = y @ second.t() + (b2.double() if bias else 0)
    torchs = torch.nn.functional.linear(torch.relu(first).square(), w2, b2)
    got = inference.dense(x, w1, w2, b1, b2)
    assert got.shape == (*shape, OUT) and got.dtype == dtype
    assert_accurate(got, torchs, exact, y @ second.abs().t() + (b2.double().abs() if bias else 0))
    assert_same_bits(inference.dense(x, w1, w2, b1, b2), got)
    rows = x.reshape(-1, D)
    rows[1, 0], rows[2, 1] = torch.nan, torch.inf
    got = inference.dense(rows, w1, w2, b1, b2)
    assert got[[0, *range(3, len(rows))]].isfinite().all() and got[1].isnan().all() and not got[2].isfinite().any()


def test_calls_with_gradients_run_as_without(device):
    (w1, w2, b1, b2), options = network(torch.bfloat16, device)
    x = tokens(9, torch.bfloat16, device)
    w1, w2 = w1.requires_grad_(), w2.requires_grad_()
    outs = [sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0, **given) for given in (options, {})]
    assert_same_bits(*outs)
    assert_same_bits(*(torch.autograd.grad(out.float().sum(), w2)[0] for out in outs))
    with torch.no_grad():
        assert_same_bits(
            sparse24.relu2_mlp(x[:1], w1, w2, b1, b2, **options), by_the_op(x[:1], (w1, w2, b1, b2), options)
        )
    # Transforms of torch.func too.
    w1, w2 = w1.detach(), w2.detach()

    def loss(x, **given):
        return sparse24.relu2_mlp(x, w1, w2, **given).float().sum()

    assert_same_bits(torch.func.grad(loss)(x, w2_rows=options["w2_rows"]), torch.func.grad(loss)(x))


def test_masters_and_autocast(device):
    """Weights and biases are cast to x's dtype, or to that of autocast."""
    operands, options = network(torch.float32, device)
    x = tokens(1, torch.float32, device)
    cast = tuple(t.bfloat16() for t in operands)
    expected = by_the_op(x.bfloat16(), cast, {"w2_rows": options["w2_rows"].bfloat16()})
    assert_same_bits(sparse24.relu2_mlp(x.bfloat16(), *operands, **options), expected)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(sparse24.relu2_mlp(x, *operands, **options), expected)


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
def test_vmap_runs_the_few_tokens_of_a_sample(device, dtype, fp8):
    """Exactly, as each of them alone; transforms that differentiate run as without w2_rows."""
    operands, options = network(dtype, device, fp8=fp8)
    x = tokens(10, dtype, device).reshape(5, 2, D)

    def run(x):
        return sparse24.relu2_mlp(x, *operands, **options)

    expected = torch.stack([run(sample) for sample in x])
    assert_same_bits(torch.vmap(run)(x), expected)
    assert_same_bits(torch.vmap(run, in_dims=1, out_dims=1)(x.transpose(0, 1).contiguous()).transpose(0, 1), expected)
    twice = torch.vmap(torch.vmap(run))(x.unsqueeze(2))
    assert_same_bits(twice, torch.stack([torch.stack([run(t.unsqueeze(0)) for t in sample]) for sample in x]))
    rows = torch.stack((options["w2_rows"],) * 5)
    each = torch.vmap(lambda x, w2_rows: sparse24.relu2_mlp(x, *operands, **(options | {"w2_rows": w2_rows})))
    assert_same_bits(each(x, rows), expected)
    leaf = x.clone().requires_grad_()
    assert torch.vmap(run)(leaf).requires_grad
    with torch.no_grad():
        assert_same_bits(torch.vmap(run)(leaf), expected)


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (lambda t: t.t(), r"w2_rows to have shape \[160, 48\] \(that of w2\.t\(\)\), got \[48, 160\]"),
        (lambda t: t[0], r"w2_rows to have shape \[160, 48\] \(that of w2\.t\(\)\), got \[48\]"),
        (lambda t: t.double(), "w2_rows to be float32, bfloat16, float16 or float8_e4m3fn, got float64"),
        (lambda t: t.to(torch.float8_e4m3fn), "w2_rows to be of 16 or 32 bits as w2 is, got float8_e4m3fn"),
        (lambda t: t.to("meta"), "w2_rows to be on cpu as w2 is, got meta"),
        (lambda t: 3, "w2_rows to be a Tensor, got int"),
    ],
)
def test_refusals(rows, sentence):
    (w1, w2, *_), options = network(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {sentence}$"):
        sparse24.relu2_mlp(tokens(1, torch.bfloat16, "cpu"), w1, w2, w2_rows=rows(options["w2_rows"]))


def test_the_table():
    rows = _C.few_tokens_rows()
    assert {row["bits"] for row in rows} == {8, 16}
    assert len({(row["bits"], row["d_model"], row["d_ff"]) for row in rows}) == len(rows)
    for row in rows:
        assert 0 <= row["tokens"] <= 64 and row["record"]
        assert few_tokens(row["d_ff"], row["d_model"], fp8=row["bits"] == 8) == row["tokens"]
        assert choice.dense_few_tokens(row["d_ff"], row["d_model"], fp8=row["bits"] == 8) == row["dense"]
        assert row["dense"] == 0 or row["tokens"] < row["dense"] <= 128


@pytest.fixture(autouse=True)
def no_numbers_from_before(monkeypatch):
    monkeypatch.setattr(choice, "_found", {})


def test_the_number_of_the_nearest_network(monkeypatch):
    monkeypatch.setattr(choice, "_few", {(16, 1024, 4096): 2, (16, 4096, 16384): 8, (8, 4096, 4096): 32})
    sizes = [(4096, 1024), (4096, 2000), (8192, 2049), (100000, 9000), (64, 16), (0, 16), (16, 0)]
    assert [few_tokens(*size) for size in sizes] == [2, 2, 8, 8, 2, 0, 0]
    assert few_tokens(64, 64, fp8=True) == 32
    monkeypatch.setattr(choice, "_few", {})
    monkeypatch.setattr(choice, "_found", {})
    assert few_tokens(4096, 1024) == 0


def test_what_is_few_on_cuda(monkeypatch):
    monkeypatch.setattr(choice, "_few", {(16, 1024, 4096): 8})
    on_cuda = [t for t in range(70) if choice.runs_few(t, 4096, 1024, fp8=False, is_cuda=True)]
    on_the_cpu = [t for t in range(70) if choice.runs_few(t, 4096, 1024, fp8=False, is_cuda=False)]
    assert on_cuda == list(range(9)) and on_the_cpu == list(range(65))


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
def test_what_runs_dense_in_one_op(monkeypatch, fp8):
    """As on CUDA: inference that nobody asks to be 2:4, by the function and by a module."""
    calls = []

    def counted(*args):
        calls.append(1)
        return sparse24.relu2_mlp_dense(*args)

    def would(*sizes, fp8, is_cuda):
        return choice.runs_dense_few(*sizes, fp8=fp8, is_cuda=True)

    for module in ("sparse24.mlp", "sparse24.mlp.inference"):
        monkeypatch.setattr(f"{module}.relu2_mlp_dense", counted)
        monkeypatch.setattr(f"{module}.runs_dense_few", would)
    monkeypatch.setattr(choice, "_dense", {(8 if fp8 else 16, OUT, HIDDEN): 64})
    operands, options = network(torch.bfloat16, "cpu", fp8=fp8)
    del options["w2_rows"]
    x = tokens(20, torch.bfloat16, "cpu")
    scales = options.get("w1_scale"), options.get("w2_scale")
    expected = sparse24.relu2_mlp_dense(x, *operands, *scales)
    for how in ({}, {"min_tokens": 21}, {"sparse": False}, {"min_tokens": 0, "sparse": False}):
        assert_same_bits(sparse24.relu2_mlp(x, *operands, **options, **how), expected)
    assert len(calls) == 4
    for how in ({"min_tokens": 0}, {"fused": False}):
        sparse24.relu2_mlp(x, *operands, **options, **how)
    sparse24.relu2_mlp(tokens(65, torch.bfloat16, "cpu"), *operands, **options)
    sparse24.relu2_mlp(x.clone().requires_grad_(), *operands, **options)
    assert len(calls) == 4
    w1, w2, b1, b2 = weights(torch.bfloat16, "cpu", bias=True)
    module = sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, bias=True, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer, weight, bias in ((module.up_proj, w1, b1), (module.down_proj, w2, b2)):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        module = module.quantize_() if fp8 else module
        module(x)
        assert len(calls) == 5
        module.sparse = False
        module(x)
        assert len(calls) == 6


def test_which_numbers_of_tokens_run_dense_in_one_op(monkeypatch):
    monkeypatch.setattr(choice, "_dense", {(16, 1024, 4096): 64, (8, 1024, 4096): 128})

    def found(*sizes, **how):
        return [t for t in range(140) if choice.runs_dense_few(t, *sizes, **{"is_cuda": True, **how})]

    assert found(512, 4096, 1024, fp8=False) == list(range(65))
    assert found(512, 4096, 1024, fp8=True) == list(range(129))
    assert found(512, 4096, 1024, fp8=True, is_cuda=False) == []
    # Rows of 16 bytes, and nothing else, are read so.
    assert found(520, 4104, 1023, fp8=False) and not found(520, 4096, 1024, fp8=True)
    assert not found(516, 4096, 1024, fp8=False) and not found(512, 4100, 1024, fp8=False)
    assert not found(512, 4104, 1024, fp8=True) and not found(0, 4096, 1024, fp8=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_graphs(device, dynamic, monkeypatch):
    """One graph for few tokens and one for others, whatever their number; a single token is its own."""
    monkeypatch.setattr(choice, "_few", {(16, 48, 160): 8})
    torch._dynamo.reset()
    (w1, w2, *_), options = network(torch.bfloat16, device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(x, w1, w2, rows):
        return sparse24.relu2_mlp(x, w1, w2, w2_rows=rows)

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=dynamic)
    for count in (1, 2, 5, 8, 3, 7, 100, 70, 99, 4, 1):
        x = tokens(count, torch.bfloat16, device)
        assert_same_bits(compiled(x, w1, w2, options["w2_rows"]), run(x, w1, w2, options["w2_rows"]))
    most = 3 if dynamic else 4  # without, the first number is taken for the only one
    assert len(graphs) <= most, len(graphs)
    torch._dynamo.reset()


def test_exported_for_any_number_of_tokens(device):
    """One graph cannot hold both: it runs as without w2_rows."""
    (w1, w2, *_), options = network(torch.bfloat16, device)

    class Network(torch.nn.Module):
        def forward(self, x, w1, w2, rows):
            return sparse24.relu2_mlp(x, w1, w2, w2_rows=rows, min_tokens=0)

    operands = (w1, w2, options["w2_rows"])
    x = tokens(20, torch.bfloat16, device)
    shapes = ({0: torch.export.Dim("tokens", min=2, max=4096)}, None, None, None)
    exported = torch.export.export(Network(), (x, *operands), dynamic_shapes=shapes, strict=True).module()
    for count in (3, 100):
        x = tokens(count, torch.bfloat16, device)
        assert_same_bits(exported(x, *operands), sparse24.relu2_mlp(x, w1, w2, min_tokens=0))


def test_cuda_graph_with_new_data(cuda):
    (w1, w2, b1, b2), options = network(torch.bfloat16, cuda)
    x = torch.zeros(2, D, dtype=torch.bfloat16, device=cuda)
    run = lambda: sparse24.relu2_mlp(x, w1, w2, b1, b2, **options)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        x.copy_(tokens(2, torch.bfloat16, cuda, seed=seed))
        graph.replay()
        assert_same_bits(out, run())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("count", [0, 1, 9, 64, 65])
@pytest.mark.parametrize("rows", [False, True], ids=["one scale of x", "by row"])
def test_dense_products_of_float8(device, count, bias, rows):
    """As accurate as torch's with a scale per row, which few tokens do not take."""
    x, scale = sparse24.quantize_fp8(normal(count, 96, dtype=torch.bfloat16).to(device))
    w, w_scale = sparse24.quantize_fp8(normal(48, 96, dtype=torch.bfloat16, seed=1).to(device))
    scale = scale if rows else torch.full((1,), 0.25, device=device)
    b = normal(48, dtype=torch.bfloat16, seed=2).to(device) if bias else None
    got = float8.down_projection_fp8(x, scale, w, w_scale.reshape(-1), b)
    exact = (x.double() * scale.double().reshape(-1, 1)) @ (w.double() * w_scale.double().reshape(-1, 1)).t()
    exact = exact if b is None else exact + b.double()
    assert got.dtype == torch.bfloat16
    assert_accurate(got, float8.linear_fp8(x, scale, w, w_scale.reshape(-1), b), exact, exact.abs())
