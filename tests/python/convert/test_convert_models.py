"""Conversion of models of the transformers library: small, with random weights, through their whole life."""

import copy
from contextlib import ExitStack

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, CountOps, assert_near, masked_class, masked_experts, randomize
from data import generator
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24

transformers = pytest.importorskip("transformers")

UP_DOWN = ("up_proj", "down_proj")
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
HYBRID = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
    "num_hidden_layers": 4,
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 96,
}

#: Further options, the names of the two layers, and the modules that are converted.
MODELS = {
    "nemotron": ({}, UP_DOWN, LAYERS),
    "nemotron_h": (HYBRID, UP_DOWN, ["model.layers.1.mixer", "model.layers.3.mixer.shared_experts"]),
    "arcee": ({}, UP_DOWN, LAYERS),
    "jais2": ({}, UP_DOWN, LAYERS),
    "persimmon": ({}, ("dense_h_to_4h", "dense_4h_to_h"), LAYERS),
    "nanochat": ({}, ("fc1", "fc2"), LAYERS),
}
#: Experts beside them: a module each, and the name of the network that follows.
EXPERTS = {"nemotron_h": ["model.layers.3.mixer.experts"]}
BIASED = {"jais2", "persimmon"}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def converted(name):
    """Networks and experts, in the order of the model."""
    return sorted([*MODELS[name][2], *EXPERTS.get(name, [])])


def build(name, device):
    """With weights that let the networks matter: those of a real initialisation hardly do."""
    config = transformers.AutoConfig.for_model(name, **COMMON | MODELS[name][0])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for path in converted(name):
        randomize(model.get_submodule(path))
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


def masked_model(model, name):
    """A context in which the networks of a model compute `masked`."""
    _, names, paths = MODELS[name]
    stack = ExitStack()
    for kind in {type(model.get_submodule(path)) for path in paths}:
        stack.enter_context(masked_class(kind, names))
    for kind in {type(model.get_submodule(path)) for path in EXPERTS.get(name, [])}:
        stack.enter_context(masked_experts(kind))
    return stack


def token_ids(device, shape=(2, 13)):
    return torch.randint(3, 97, shape, generator=generator(3)).to(device)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_forward_and_revert(device, name):
    model, ids = build(name, device), token_ids(device)
    dense = logits(model, ids)
    with masked_model(model, name):
        expected = logits(model, ids)
    keys = list(model.state_dict())
    report = sparse24.convert(model, EXACT, quiet=True)
    assert report.converted == converted(name) and not report.skipped
    assert list(model.state_dict()) == keys
    with CountOps() as ops:
        sparse = logits(model, ids)
    assert ops.sparse == len(MODELS[name][2]) and (device == "cuda" or ops.experts == len(EXPERTS.get(name, [])))
    pruned = (dense - expected).norm()
    if device == "cpu":
        assert_near([sparse], [expected], 1e-4)
        assert pruned > 1e-2 * expected.norm()
    else:  # in 16 bits the layers before decide near ties differently
        assert (sparse - expected).norm() < 0.5 * pruned
    with sparse24.disabled():
        assert_same_bits(logits(model, ids), dense)
    assert sparse24.revert(model) == report.converted
    assert_same_bits(logits(model, ids), dense)


def test_training(name):
    """Gradients of all parameters; the same with activation checkpointing."""
    model, ids = build(name, "cpu").train(), token_ids("cpu")
    biases = [n for path in converted(name) for n, _ in model.get_submodule(path).named_parameters() if "bias" in n]
    assert bool(biases) == (name in BIASED)

    def gradients():
        model.zero_grad()
        out = model(ids).logits
        out.float().log_softmax(-1)[..., 5].sum().backward()
        return [out.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]

    with masked_model(model, name):
        expected = gradients()
    sparse24.convert(model, EXACT, quiet=True)
    with CountOps() as ops:
        actual = gradients()
    assert ops.sparse == 2 * len(MODELS[name][2])  # the forward's, and the gradient of x
    assert_near(actual, expected, 2e-4)
    # Its name before transformers 5.23 is the second.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with CountOps() as ops:
        again = gradients()
    assert ops.sparse == 3 * len(MODELS[name][2])  # the forward runs twice
    assert_near(again, actual, 2e-4)


def test_generate(name):
    """Greedy, with prefill and single tokens."""
    model, ids = build(name, "cpu"), token_ids("cpu", (1, 7))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with masked_model(model, name):
        expected = model.generate(ids, **options)
    sparse24.convert(model, EXACT, quiet=True)
    with CountOps() as ops:
        actual = model.generate(ids, **options)
    assert actual.tolist() == expected.tolist()
    assert ops.sparse == 6 * len(MODELS[name][2])


def test_save_and_load(name, tmp_path):
    """What is saved is the model as it was; loaded, it converts again."""
    model, ids = build(name, "cpu"), token_ids("cpu")
    dense = logits(model, ids)
    sparse24.convert(model, EXACT, quiet=True)
    sparse = logits(model, ids)
    assert_same_bits(logits(copy.deepcopy(model), ids), sparse)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_bits(logits(loaded, ids), dense)
    sparse24.convert(loaded, EXACT, quiet=True)
    assert_same_bits(logits(loaded, ids), sparse)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["nemotron", "nanochat"])
def test_compile(name):
    """One graph of the whole model for prompts of every length."""
    torch._dynamo.reset()
    model = build(name, "cpu")
    sparse24.convert(model, EXACT, quiet=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (13, 7, 21):
            ids = token_ids("cpu", (2, tokens))
            assert_near([compiled(ids, use_cache=False).logits], [model(ids, use_cache=False).logits], 1e-5)
    assert len([graph for graph in counter.graphs if len(graph.graph.nodes) > 1]) == 1
    torch._dynamo.reset()


GATED = "gated: it has parameters or buffers beside its two layers"
SMOOTH = "its activation is not zero for negative inputs, as that of a leaky or smoothed variant"
OTHERS = {
    "SwiGLU": ("llama", {}, f"{GATED} (gate_proj.weight)"),
    "gated squared ReLU": ("bitnet", {}, f"{GATED} (gate_proj.weight, ffn_sub_norm.weight)"),
    "GELU": ("phi", {}, f"{SMOOTH} (activation_fn: NewGELUActivation)"),
    "ReLU": ("gpt_neox", {"hidden_act": "relu"}, "its activation is ReLU, not the square of it (act: ReLU)"),
    "another activation": ("nemotron", {"hidden_act": "silu"}, f"{SMOOTH} (act_fn: SiLUActivation)"),
    "dropout": ("gpt2", {"n_embd": 64, "activation_function": "relu2"}, "it has dropout (dropout, p=0.1)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_left_alone(kind):
    model, options, reason = OTHERS[kind]
    config = transformers.AutoConfig.for_model(model, **COMMON | {"num_hidden_layers": 1} | options)
    report = sparse24.convert(transformers.AutoModelForCausalLM.from_config(config), quiet=True)
    assert list(report.skipped.values()) == [reason] and not report.converted


def test_a_model_of_no_list_is_found():
    """By what its networks compute."""
    config = transformers.AutoConfig.for_model("gpt_neox", **COMMON, hidden_act="relu2")
    report = sparse24.convert(transformers.AutoModelForCausalLM.from_config(config), quiet=True)
    assert report.converted == ["gpt_neox.layers.0.mlp", "gpt_neox.layers.1.mlp"] and not report.skipped
