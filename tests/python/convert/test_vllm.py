"""The plugin of vLLM, on stand-ins of vLLM's classes; `tests/vllm_server.py` runs it in vLLM itself."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
import vllm_classes
from torch import nn
from vllm_classes import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, VllmConfig
from vllm_models import MLP, D, F, Gated, Gelu, Halved, PlainMLP, Residual, Twice, odd_sizes, quantized, spoil

import sparse24
from sparse24.vllm import register
from sparse24.vllm.settings import Settings

FEW, MANY = 8, 40
SETTINGS = Settings(min_tokens=32)


@pytest.fixture(scope="module", autouse=True)
def vllm():
    """vLLM is what the stand-ins are; the plugin's modules are imported once, as its op is defined once."""
    names = [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]
    before = {name: sys.modules.pop(name) for name in names}
    sys.modules |= vllm_classes.modules()
    yield
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    sys.modules |= before


@pytest.fixture
def engine():
    """The configuration of a running engine."""
    vllm_classes.running.append(VllmConfig())
    yield vllm_classes.running[-1]
    vllm_classes.running.pop()
    vllm_classes.reduced.clear()


def attached(engine, mlp, settings=SETTINGS):
    """A copy of a module that the plugin has changed."""
    from sparse24.vllm.loading import convert

    mlp = copy.deepcopy(mlp)
    assert convert(nn.ModuleDict({"mlp": mlp}), engine, settings) == ["mlp"]
    return mlp


def tokens(number, device="cpu", dtype=torch.bfloat16):
    return torch.randn(number, D, device=device, dtype=dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cls", [MLP, PlainMLP])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_run_as_before_and_many_sparse(engine, device, cls, bias):
    mlp = cls(bias=bias).to(device)
    ours = attached(engine, mlp)
    assert isinstance(ours, cls) and list(ours.state_dict()) == list(mlp.state_dict())
    x = tokens(FEW, device)
    assert torch.equal(ours(x), mlp(x))
    x = tokens(MANY, device)
    up, down = mlp.up_proj, mlp.down_proj
    expected = sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, min_tokens=0)
    assert torch.equal(ours(x), expected) and not torch.equal(expected, mlp(x))
    # transformers has a dimension for the batch
    assert torch.equal(ours(x[None]), expected[None])


def test_where_pruning_drops_nothing_the_result_is_as_before(engine, device):
    mlp = MLP().to(device)
    mlp.up_proj.weight.data.unflatten(0, (-1, 4))[:, 2:] = 0
    ours, x = attached(engine, mlp), tokens(MANY, device)
    torch.testing.assert_close(ours(x), mlp(x), rtol=2e-2, atol=2e-2)


def test_layers_own_the_collectives(engine):
    """Two ranks have halves of the features: the second layer adds the bias on the first, and sums once."""
    whole = MLP(bias=True)
    x = tokens(MANY)
    for rank in range(2):
        part = MLP(bias=True)
        half = slice(rank * F // 2, (rank + 1) * F // 2)
        for layer in (part.up_proj, part.down_proj):
            layer.output_size_per_partition, layer.input_size_per_partition = (
                (F // 2, D) if layer is part.up_proj else (D, F // 2)
            )
        part.up_proj.weight.data, part.up_proj.bias.data = whole.up_proj.weight[half], whole.up_proj.bias[half]
        part.down_proj.weight.data, part.down_proj.bias.data = (
            whole.down_proj.weight[:, half].contiguous(),
            whole.down_proj.bias,
        )
        part.down_proj.tp_rank, part.down_proj.tp_size = rank, 2
        attached(engine, part)(x)
    assert len(vllm_classes.reduced) == 2
    expected = attached(engine, whole)(x)
    torch.testing.assert_close(sum(p.float() for p in vllm_classes.reduced), expected.float(), rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("expose", [False, True], ids=["quantised in the layer", "quantised before it"])
@pytest.mark.parametrize("bias", [False, True])
def test_float8_with_static_scales(engine, device, expose, bias):
    mlp = quantized(expose, bias=bias).to(device)
    ours = attached(engine, mlp)
    x = tokens(FEW, device)
    assert torch.equal(ours(x), mlp(x))
    x, up, down = tokens(MANY, device), mlp.up_proj, mlp.down_proj
    rows = vllm_classes.to_fp8(x, up.input_scale)
    h = rows.float() @ up.weight.float() * up.input_scale * up.weight_scale
    h = (h if up.bias is None else h + up.bias.float()).bfloat16()
    values, meta, scale = sparse24.compress_fp8(h, down.input_scale.view(1), "relu2", scaling="tensor")
    expected = sparse24.decompress(values, meta, MANY, F).float() @ down.weight.float() * scale * down.weight_scale
    expected = expected if down.bias is None else expected + down.bias.float()
    torch.testing.assert_close(ours(x).float(), expected, rtol=2e-2, atol=3e-2)
    # The dense network in the same float8 is further away than rounding is: two of each four were kept.
    assert (ours(x).float() - expected).norm() < 0.1 * (ours(x) - mlp(x)).float().norm()


def test_float8_with_scales_by_row(engine, device):
    mlp = quantized(False, static=False).to(device)
    ours = attached(engine, mlp)
    x = tokens(FEW, device)
    assert torch.equal(ours(x), mlp(x))
    x, up, down = tokens(MANY, device), mlp.up_proj, mlp.down_proj
    scales = {"w1_scale": up.weight_scale.view(1), "w2_scale": down.weight_scale.view(1)}
    assert torch.equal(ours(x), sparse24.relu2_mlp(x, up.weight.t(), down.weight.t(), min_tokens=0, **scales))


@pytest.mark.parametrize("make", [MLP, PlainMLP, lambda: quantized(True)], ids=["tuples", "tensors", "float8"])
def test_one_compiled_graph_decides_at_each_call(engine, make):
    """What vLLM does: one trace for any number of tokens, whose guards it drops."""
    ours = attached(engine, make())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    for number in (MANY, FEW, 3 * MANY, 31, 32):
        x = tokens(number)
        assert torch.equal(compiled(x), ours(x))
    assert len(graphs) == 1 and "sparse24_network" in graphs[0].code


def test_captured_graphs(engine, cuda):
    mlp = MLP(bias=True).to(cuda)
    ours = attached(engine, mlp)
    for number in (FEW, MANY):
        x = tokens(number, cuda)
        ours(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ours(x)
        for _ in range(2):
            x.copy_(tokens(number, cuda))
            graph.replay()
            assert torch.equal(out, ours(x))


def test_new_weights_are_seen(engine):
    mlp = MLP()
    ours, x = attached(engine, mlp), tokens(MANY)
    before = ours(x)
    ours.up_proj.weight.data.mul_(2)
    assert torch.equal(ours(x), 4 * before)


def test_adapters_around_a_layer_run_as_before(engine):
    mlp = PlainMLP()
    ours, x = attached(engine, mlp), tokens(MANY)

    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer.quant_method.apply(self.base_layer, x, None) + 1

    ours.down_proj = Adapter(ours.down_proj)
    assert torch.equal(ours(x), mlp(x) + 1)


def test_weights_that_a_cpu_repacked(engine):
    mlp = MLP(bias=True)
    expected = attached(engine, mlp)(tokens(MANY))
    torch.manual_seed(0)
    repacked = MLP(bias=True)
    for layer in (repacked.up_proj, repacked.down_proj):
        layer.packed, layer.weight = layer.weight.data, nn.Parameter(torch.empty(0), requires_grad=False)
    assert torch.equal(attached(engine, repacked)(tokens(MANY)), expected)


def names_of(module):
    from sparse24.vllm.loading import layers_of

    return layers_of(module)


def test_what_is_found():
    assert names_of(MLP()) == names_of(PlainMLP()) == ("up_proj", "down_proj")
    assert names_of(PlainMLP(layers=(ReplicatedLinear, ReplicatedLinear))) == ("up_proj", "down_proj")
    assert names_of(PlainMLP(layers=(RowParallelLinear, ColumnParallelLinear))) is None
    for cls in (Residual, Twice, Halved, Gated, Gelu):
        assert names_of(cls()) is None, cls
    mlp = PlainMLP()
    mlp.scale = nn.Parameter(torch.ones(1))
    assert names_of(mlp) is None and names_of(nn.Linear(4, 4)) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: spoil(MLP(bias=True), "skip_bias_add", True), "leaves its bias"),
        (lambda: spoil(MLP(), "gather_output", True), "leaves its bias or its output"),
        (lambda: spoil(MLP(), "input_is_parallel", False), "splits its input"),
        (lambda: spoil(MLP(), "quant_method", vllm_classes.Int8LinearMethod()), "another way"),
        (lambda: MLP(dtype=torch.float32), "of torch.float32"),
        (lambda: spoil(quantized(True), "weight_scale", nn.Parameter(torch.ones(2, 2))), "scales of blocks"),
        (lambda: spoil(quantized(True), "params_dtype", torch.float16), "not in bfloat16"),
        (odd_sizes, "no multiples"),
    ],
)
def test_what_stays_dense_is_said(engine, caplog, make, reason):
    from sparse24.vllm.loading import convert

    mlp = make()
    with caplog.at_level("INFO", "vllm.sparse24"):
        assert convert(nn.ModuleDict({"mlp": mlp}), engine, SETTINGS) == []
    assert reason in caplog.text and "mlp stays dense" in caplog.text
    assert not engine.additional_config and not engine.compilation_config.static_forward_context


def test_silent_where_it_cannot_help(engine, caplog, monkeypatch):
    from sparse24.vllm.loading import convert

    with caplog.at_level("INFO", "vllm.sparse24"):
        assert convert(nn.ModuleDict({"mlp": MLP()}), engine, Settings()) == []  # a CPU
        assert convert(nn.ModuleDict({"mlp": Gated()}), engine, SETTINGS) == []
        monkeypatch.setattr(sys.modules["vllm.envs"], "VLLM_BATCH_INVARIANT", True)
        assert convert(nn.ModuleDict({"mlp": MLP()}), engine, SETTINGS) == []
    assert not caplog.records


def test_patterns_and_what_the_engine_is_told(engine, caplog):
    from sparse24.vllm.loading import convert

    model = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"mlp": MLP()}) for i in range(3)})
    for i, layer in enumerate(model.values()):
        layer["mlp"].down_proj.prefix = f"model.layer{i}.mlp.down_proj"
    with caplog.at_level("INFO", "vllm.sparse24"):
        assert convert(model, engine, Settings(32, ("layer0.*", "*2.mlp"))) == ["layer1.mlp"]
    assert "1 of 3 squared-ReLU networks" in caplog.text
    # Graphs that were compiled with other settings are not taken from vLLM's cache.
    assert engine.additional_config == {"sparse24": {"min_tokens": 32, "dense": ["layer0.*", "*2.mlp"]}}
    assert list(engine.compilation_config.static_forward_context) == ["model.layer1.mlp.down_proj.sparse24"]


def test_loaded_models_are_searched_once(engine, monkeypatch):
    loader = vllm_classes.BaseModelLoader
    monkeypatch.setattr(loader, "load_model", loader.load_model)
    for name, value in {"SPARSE24_VLLM": "1", "SPARSE24_VLLM_MIN_TOKENS": "32"}.items():
        monkeypatch.setenv(name, value)
    register()
    register()
    model = nn.ModuleDict({"mlp": MLP()})
    x, expected = tokens(FEW), model["mlp"](tokens(FEW)).shape
    loaded = loader().load_model(vllm_config=engine, model_config=model)
    assert loaded is model and type(model["mlp"]) is not MLP and type(model["mlp"]).__mro__[1] is MLP
    assert model["mlp"](x).shape == expected


def test_off_unless_it_is_switched_on(monkeypatch):
    loader = vllm_classes.BaseModelLoader
    before = loader.load_model
    for value in (None, "", "0"):
        monkeypatch.delenv("SPARSE24_VLLM", raising=False)
        if value is not None:
            monkeypatch.setenv("SPARSE24_VLLM", value)
        register()
        assert loader.load_model is before


@pytest.mark.parametrize(
    ("name", "value"), [("SPARSE24_VLLM", "yes"), ("SPARSE24_VLLM_MIN_TOKENS", "-1"), ("SPARSE24_VLLM_MIN_TOKENS", "x")]
)
def test_values_that_mean_nothing_are_refused(name, value):
    with pytest.raises(RuntimeError, match=rf'^sparse24\.vllm: expected {name} to be .*, got "{value}"$'):
        Settings.of_environment({"SPARSE24_VLLM": "1", name: value})


def test_settings():
    on = {"SPARSE24_VLLM": "1"}
    assert Settings.of_environment(on) == Settings()
    assert Settings.of_environment({**on, "SPARSE24_VLLM_MIN_TOKENS": " 512 "}).min_tokens == 512
    assert Settings.of_environment({**on, "SPARSE24_VLLM_DENSE": "a.*, b,"}).dense == ("a.*", "b")


def test_the_first_number_of_tokens_that_runs_sparse(engine):
    mlp = MLP()
    ours = attached(engine, mlp)
    for number, sparse in ((31, False), (32, True)):
        x = tokens(number)
        assert torch.equal(ours(x), mlp(x)) != sparse


@pytest.mark.parametrize("make", [MLP, lambda: quantized(True), lambda: quantized(False, static=False)])
def test_default_number_of_tokens(engine, make):
    """On CUDA the rule is that of the library; decoding runs as before in every precision."""
    from sparse24.vllm.network import Network

    mlp = make()
    network = Network(mlp.up_proj, mlp.down_proj, mlp.act_fn, None)
    network.f, network.d_out = 16384, 4096
    assert [network.runs_sparse(t) for t in (1, 298, 299, 8192)] == [False, False, True, True]


def test_entry_point():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    (entry,) = re.findall(
        r'^\[project\.entry-points\."vllm\.general_plugins"\]\nsparse24 = "(.+)"$', text, re.MULTILINE
    )
    module, _, function = entry.partition(":")
    assert getattr(sys.modules[module], function) is register
