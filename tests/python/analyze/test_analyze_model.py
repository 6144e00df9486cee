"""analyze_model: which networks it looks at, on which tokens, and that the model is what it was."""

import io
import itertools
import sys
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from convert_models import HIDDEN, BothParameters, D, Inline, SquaredReLU, Stack, randomize, relu2
from torch import nn

import sparse24
from sparse24 import terminal
from sparse24.demo.model import BYTES, GPT, SMALL, DenseMLP

TOKENS = 96


def batch(seed=0, tokens=TOKENS):
    return torch.randn(2, tokens // 2, D, generator=torch.Generator().manual_seed(seed))


def model():
    """Three networks whose weights are found in different places."""
    return Stack(randomize(Inline(bias=True)), randomize(BothParameters()), randomize(Inline(("up_proj", "down_proj"))))


def expected(network, x):
    """What activation_stats says of the same tokens."""
    if isinstance(network, BothParameters):
        return sparse24.activation_stats(x @ network.c_fc.t(), network.c_proj.t())
    up, down = (getattr(network, name) for name in network.names)
    return sparse24.activation_stats(up(x), down.weight)


@torch.no_grad()
def test_the_keys_and_numbers_are_those_of_activation_stats(device):
    net, x = model().to(device), batch().to(device)
    report = sparse24.analyze_model(net, [x])
    assert list(report.layers) == ["layers.0", "layers.1", "layers.2"] and not report.skipped
    stream = x
    for network, layer in zip(net.layers, report.layers.values(), strict=True):
        for name, value in expected(network, stream).as_dict().items():
            assert layer[name] == pytest.approx(value, rel=1e-5), name
        stream = stream + network(stream)
        assert layer["tokens"] == TOKENS
        assert (layer["d_model"], layer["d_ff"], layer["d_out"]) == (D, HIDDEN, D)
        density = layer["feature_density"]
        assert density == sorted(density) and 0 <= density[0] and density[-1] <= 1
        assert sum(density) / len(density) == pytest.approx(1 - layer["zeros"], abs=0.05)


def test_batches_are_added_up():
    net = Stack(randomize(Inline(bias=True)))
    one = sparse24.analyze_model(net, [torch.cat([batch(0), batch(1)])]).layers["layers.0"]
    two = sparse24.analyze_model(net, (batch(seed) for seed in range(2))).layers["layers.0"]
    for name in ("zeros", "feature_nonzeros_dropped", "output_error", "token_nonzeros_dropped", "amax", "tokens"):
        assert two[name] == pytest.approx(one[name]), name


class Call(nn.Module):
    """A model that wants its arguments in a certain way."""

    def __init__(self):
        super().__init__()
        self.mlp = randomize(Inline())

    def forward(self, x, shift=0.0, *, scale=1.0):
        return self.mlp(x * scale + shift)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, 0.5),
        lambda x: [x, 0.5],
        lambda x: {"x": x, "scale": 2.0},
        lambda x: UserDict(x=x, shift=0.5),
    ],
    ids=["tensor", "tuple", "list", "dict", "mapping"],
)
def test_batches_are_what_the_model_is_called_with(wrap):
    report = sparse24.analyze_model(Call(), [wrap(batch())])
    assert report.layers["mlp"]["tokens"] == TOKENS


def test_an_endless_iterable_ends():
    taken = []
    report = sparse24.analyze_model(model(), (taken.append(i) or batch(i) for i in itertools.count()), max_tokens=250)
    assert len(taken) == 3 and {layer["tokens"] for layer in report.layers.values()} == {250}


@pytest.mark.parametrize("batches", [[], (), iter(())], ids=["list", "tuple", "iterator"])
@pytest.mark.parametrize("net", [Stack(Inline()), nn.Linear(D, D)], ids=["with networks", "without"])
def test_no_batch_is_refused(net, batches):
    with pytest.raises(
        RuntimeError, match=r"^sparse24\.analyze_model: expected batches to have at least one, got none$"
    ):
        sparse24.analyze_model(net, batches)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((torch.ones(3), [batch()]), {}, "model to be a torch.nn.Module, got Tensor"),
        ((Stack(Inline()), batch()), {}, "batches to be an iterable of batches, such as a list of them, got Tensor"),
        (
            (Stack(Inline()), {"x": batch()}),
            {},
            "batches to be an iterable of batches, such as a list of them, got dict",
        ),
        ((Stack(Inline()), None), {}, "batches to be an iterable of batches, such as a list of them, got NoneType"),
        ((Stack(Inline()), [batch()]), {"max_tokens": 0}, "max_tokens to be at least 1, got 0"),
        ((Stack(Inline()), [batch()]), {"max_tokens": -1}, "max_tokens to be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, sentence):
    with pytest.raises(RuntimeError) as error:
        sparse24.analyze_model(*arguments, **options)
    assert str(error.value) == f"sparse24.analyze_model: expected {sentence}"


def test_the_model_is_what_it_was():
    """Also where it raises: modes, hooks, gradients."""
    net = Stack(Inline(), sparse24.nn.ReLU2MLP(D, HIDDEN))
    net.train()
    net.layers[0].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    seen = []

    def look(module, args):
        seen.append((module.training, torch.is_grad_enabled(), net.layers[1].sparse))

    net.layers[1].register_forward_pre_hook(look)
    sparse24.analyze_model(net, [batch()])
    with pytest.raises(RuntimeError):
        sparse24.analyze_model(net, [batch(), torch.ones(2, D + 1)])
    assert seen and set(seen) == {(False, False, False)}
    assert [module.training for module in net.modules()] == modes and net.layers[1].sparse
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    assert sum(hooks) == 1 and torch.is_grad_enabled()


def test_compiled_models_are_looked_at():
    """Whole and in parts; and they are compiled afterwards as they were."""
    net = Stack(randomize(Inline()), randomize(Inline()))
    whole = torch.compile(net, backend="eager")
    net.layers[1].compile(backend="eager")
    expected = whole(batch())
    report = sparse24.analyze_model(whole, [batch()])
    assert [layer["tokens"] for layer in report.layers.values()] == [TOKENS, TOKENS]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(whole(batch()), expected)


def test_converted_networks_and_modules_of_the_library_are_looked_at():
    net = model()
    before = sparse24.analyze_model(net, [batch()])
    sparse24.convert(net, quiet=True)
    net.layers.append(sparse24.nn.ReLU2MLP(D, HIDDEN, threshold=100))
    report = sparse24.analyze_model(net, [batch()])
    assert [layer["state"] for layer in report.layers.values()] == [*["converted"] * 3, "ReLU2MLP"]
    for name, layer in before.layers.items():  # the model runs dense, as before conversion
        assert report.layers[name]["feature_nonzeros_dropped"] == layer["feature_nonzeros_dropped"]
    assert set(report.decisions) == set(before.decisions)  # ReLU2MLP needs none
    assert report.layers["layers.3"]["zeros"] > 0.9  # of the threshold
    assert type(net.layers[0])._sparse24_converted


def test_a_threshold_of_a_conversion_counts():
    net = Stack(randomize(Inline()))
    zeros = sparse24.analyze_model(net, [batch()]).layers["layers.0"]["zeros"]
    sparse24.convert(net, sparse24.ConvertConfig(threshold=0.7), quiet=True)
    assert sparse24.analyze_model(net, [batch()]).layers["layers.0"]["zeros"] > zeros + 0.1


def test_float8_is_judged_with_its_own_scales(device):
    """A bounded scale is far above the largest value: more becomes zero than under a scale per row."""
    torch.manual_seed(0)
    mlp = sparse24.nn.ReLU2MLP(D, HIDDEN, device=device, dtype=torch.bfloat16)
    x = batch().to(device, torch.bfloat16)
    usual = sparse24.analyze_model(mlp, [x])
    quantized = sparse24.analyze_model(mlp.quantize_(), [x])
    assert (usual.precision, quantized.precision) == ("bf16", "fp8")
    assert quantized.layers[""]["fp8_underflow"] > 2 * usual.layers[""]["fp8_underflow"]
    assert quantized.layers[""]["fp8_saturated"] == 0
    assert quantized.layers[""]["zeros"] == pytest.approx(usual.layers[""]["zeros"], abs=0.02)


def test_what_cannot_be_looked_at_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = randomize(Inline()), Inline()
            self.gelu = Inline(activation=nn.functional.gelu)
            self.offloaded = Inline().to("meta")

        def forward(self, x):
            return self.gelu(self.used(x))

    report = sparse24.analyze_model(Two(), [batch()])
    assert list(report.layers) == ["used"] and report.skipped["unused"] == "no batch reached it"
    assert set(report.skipped) == {"unused", "gelu", "offloaded"}
    assert report.skipped["offloaded"] == "its weights are on the meta device"
    with pytest.raises(RuntimeError, match="expected batches to reach the feed-forward networks of model"):
        sparse24.analyze_model(Unreached(), [batch()])


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Inline()

    def forward(self, x):
        return x


def test_a_model_without_networks_gives_an_empty_report():
    report = sparse24.analyze_model(nn.Linear(D, D), [batch()])
    assert report.layers == report.decisions == {} and "no squared-ReLU" in report.verdict
    assert report.verdict in report.table()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_how_far_it_is_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    sparse24.analyze_model(model(), [batch(), batch(1)], max_tokens=2 * TOKENS)
    assert f"{2 * TOKENS}/{2 * TOKENS}" in shown.getvalue() and "tokens" in shown.getvalue()
    silent = io.StringIO()
    monkeypatch.setattr(sys, "stderr", silent)
    sparse24.analyze_model(model(), [batch()])
    assert not silent.getvalue() and not capsys.readouterr().out


def test_without_rich_numbers_show_how_far_it_is(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(terminal, "_bar", lambda stream: None)
    sparse24.analyze_model(model(), [batch(), batch(1)], max_tokens=2 * TOKENS)
    assert shown.getvalue() == f"\r{TOKENS} of {2 * TOKENS} tokens\r{2 * TOKENS} of {2 * TOKENS} tokens\n"


class Parts(nn.Module):
    """Networks under names of their own, in a list, and inside of a layer of torch; and one that is missed."""

    def __init__(self):
        super().__init__()
        self.plain = randomize(Inline(("wi", "wo")))
        self.sequence = randomize(nn.Sequential(nn.Linear(D, HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, D)))
        self.encoder = nn.TransformerEncoderLayer(D, 4, HIDDEN, dropout=0.0, activation=relu2, batch_first=True)
        self.three = Three()

    def forward(self, x):
        return self.three(self.encoder(self.sequence(self.plain(x))))


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x):
        return self.c(self.b(F.relu(self.a(x)).square()))


def test_it_looks_at_what_convert_finds():
    net = Parts()
    report = sparse24.analyze_model(net, [batch()])
    assert list(report.layers) == ["plain", "sequence", "encoder"] and set(report.near_misses) == {"three"}
    assert all(layer["tokens"] == TOKENS for layer in report.layers.values())
    decisions = dict.fromkeys(report.decisions, True)
    done = sparse24.convert(net.eval(), sparse24.ConvertConfig(decisions=decisions), quiet=True)
    assert done.converted == list(report.layers)
    again = sparse24.analyze_model(net, [batch()])
    for name, layer in report.layers.items():
        assert again.layers[name]["zeros"] == layer["zeros"] and again.layers[name]["state"] == "converted"


def test_decisions_are_what_convert_takes():
    """A network whose pre-activations are all positive drops half of everything: it stays dense."""
    net = Stack(*(randomize(Inline(bias=True)) for _ in range(3)))
    with torch.no_grad():
        for i, network in enumerate(net.layers):
            network.c_fc.bias.fill_(99.0 if i == 2 else -3.0)
    report = sparse24.analyze_model(net, [batch()])
    assert report.decisions == {"layers.0": True, "layers.1": True, "layers.2": False}
    assert (
        report.verdict.startswith("convert 2 of 3; ")
        and "layers.2 drops 50 % of non-zeros: keep it dense" in report.verdict
    )
    done = sparse24.convert(net, sparse24.ConvertConfig(decisions=report.decisions), quiet=True)
    assert done.converted == ["layers.0", "layers.1"] and done.skipped == {"layers.2": "decided against"}


def test_the_model_of_the_demo():
    gpt = GPT(SMALL, BYTES, DenseMLP, 0, torch.float32)
    windows = torch.randint(BYTES, (2, SMALL.sequence + 1), generator=torch.Generator().manual_seed(0))
    report = sparse24.analyze_model(gpt, [windows])
    assert list(report.decisions) == [f"blocks.{i}.mlp" for i in range(SMALL.layers)]
    inputs = gpt.ffn_inputs(windows)
    for block, x, layer in zip(gpt.blocks, inputs, report.layers.values(), strict=True):
        stats = sparse24.activation_stats(block.mlp.up_proj(x), block.mlp.down_proj.weight)
        assert layer["zeros"] == pytest.approx(stats.zeros) and layer["tokens"] == 2 * SMALL.sequence
    sparse24.convert(gpt, sparse24.ConvertConfig(decisions=report.decisions), quiet=True)


@pytest.mark.parametrize("kind", ["nemotron", "arcee", "persimmon", "nanochat"])
def test_models_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, num_key_value_heads=4, vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    net = transformers.AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
    report = sparse24.analyze_model(net, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert list(report.layers) == [f"model.layers.{i}.mlp" for i in range(2)] and net.training
    assert all(layer["tokens"] == 80 and 0.3 < layer["zeros"] < 0.8 for layer in report.layers.values())
    done = sparse24.convert(net, sparse24.ConvertConfig(decisions=dict.fromkeys(report.decisions, True)), quiet=True)
    assert done.converted == list(report.layers)
