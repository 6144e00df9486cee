"""Conversion beside the libraries that change the layers of a model: adapters of PEFT, weights of torchao."""

import warnings

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, CountOps, D, Inline, Stack, WithModule, assert_near, masked, randomize
from data import normal

import sparse24

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, when they are imported


def build():
    return randomize(Stack(Inline(), WithModule(bias=True)))


def inputs():
    return normal(21, D, dtype=torch.float32, seed=5)


def runs_as_before(model, x, reasons):
    """The output, with a warning of each network."""
    with warnings.catch_warnings(record=True) as caught, CountOps() as ops:
        warnings.simplefilter("always")
        out = model(x)
    assert ops.sparse == 0
    messages = [str(w.message) for w in caught if "sparse24" in str(w.message)]
    names = ("Inline", "WithModule")
    expected = [f"sparse24: {n} runs as before conversion: {r}" for n, r in zip(names, reasons, strict=True)]
    assert messages == expected
    return out


@pytest.fixture
def adapted():
    """A function that puts LoRA on the first layers of a model, with weights that are not zero."""
    peft = pytest.importorskip("peft")

    def adapt(model):
        config = peft.LoraConfig(r=4, target_modules=["c_fc", "up_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)

    return adapt


def test_adapters_before_conversion(adapted):
    model = adapted(build())
    what = "is a peft.tuners.lora.layer.Linear, not a torch.nn.Linear"
    report = sparse24.convert(model, EXACT, quiet=True)
    assert list(report.skipped.values()) == [f"c_fc {what}", f"up_proj {what}"] and not report.converted


def test_adapters_after_conversion(adapted):
    """They count while they are there; merged, the network runs sparse with them."""
    model, x = build(), inputs()
    expected = adapted(build())(x)
    sparse24.convert(model, EXACT, quiet=True)
    wrapped = adapted(model)
    reasons = [f"{layer} is not a Linear any more" for layer in ("c_fc", "up_proj")]
    assert_same_bits(runs_as_before(wrapped, x, reasons), expected)
    merged = wrapped.merge_and_unload()
    with CountOps() as ops, torch.no_grad():
        actual = merged(x)
    assert ops.sparse == 2
    with torch.no_grad():
        first = x + masked(merged.layers[0], ("c_fc", "c_proj"), x)
        assert_near([actual], [first + masked(merged.layers[1], ("up_proj", "down_proj"), first)], 1e-5)


def test_adapters_of_the_module():
    """`ReLU2MLP` with LoRA on both layers: dense with it, sparse when it is merged or unloaded."""
    peft = pytest.importorskip("peft")
    network, x = randomize(Stack(sparse24.nn.ReLU2MLP(D, 160, min_tokens=0))), inputs()
    with torch.no_grad():
        plain = network(x)
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(network, config)
    mlp = wrapped.base_model.model.layers[0]
    with pytest.warns(UserWarning, match="ReLU2MLP calls its layers and runs dense: up_proj is a peft"):
        out = wrapped(x)
    assert_same_bits(out, x + mlp.down_proj(torch.relu(mlp.up_proj(x)).square()))
    out.sum().backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in mlp.named_parameters())
    with pytest.raises(RuntimeError, match="to quantise, got: up_proj is a peft"):
        mlp.quantize_()
    with CountOps() as ops, torch.no_grad():
        assert_same_bits(wrapped.unload()(x), plain)
        merged = peft.get_peft_model(network, config).merge_and_unload()(x)
    assert ops.sparse == 2 and not torch.equal(merged, plain)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_quantised_children(config):
    """Of torchao, before conversion and after."""
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, config)()
    model, x = build(), inputs()
    quantization.quantize_(model, config)
    kind = type(model.layers[0].c_fc.weight).__name__
    expected = model(x)
    report = sparse24.convert(model, EXACT, quiet=True)
    assert report.skipped == {
        "layers.0": f"the weight of c_fc is a {kind}",
        "layers.1": f"the weight of up_proj is a {kind}",
    }
    model = build()
    sparse24.convert(model, EXACT, quiet=True)
    quantization.quantize_(model, config)
    reasons = [f"the weight of {layer} is distributed or quantised" for layer in ("c_fc", "up_proj")]
    assert_same_bits(runs_as_before(model, x, reasons), expected)
