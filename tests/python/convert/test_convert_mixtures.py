"""A mixture of the transformers library, converted, on either device: output, generation, a step, and back."""

import copy

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, masked_class, masked_experts, randomize
from data import generator

import sparse24

transformers = pytest.importorskip("transformers")

# Dynamo makes an instance of each autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

UP_DOWN = ("up_proj", "down_proj")
EXPERTS, SHARED = "model.layers.1.mixer.experts", "model.layers.1.mixer.shared_experts"
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layers_block_type": ["full_attention", "moe"],
    "num_hidden_layers": 2,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def model(device):
    """Nemotron-H with experts and with one that all tokens share, whose weights let them matter."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("nemotron_h", **CONFIG))
    for path in (EXPERTS, SHARED):
        randomize(made.get_submodule(path))
    return made.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


@pytest.fixture
def ids(device):
    """128 tokens, and so 64 rows of an expert on average: on CUDA grouped kernels run."""
    return torch.randint(3, 97, (2, 64), generator=generator(3)).to(device)


class Masked:
    """Within it, the experts and the network beside them compute the pruned activation in plain torch."""

    def __init__(self, model):
        kinds = [type(model.get_submodule(path)) for path in (EXPERTS, SHARED)]
        self.contexts = masked_experts(kinds[0]), masked_class(kinds[1], UP_DOWN)

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def step(model, ids, rate=0.1):
    """Gradients by name of a step of gradient descent, which it takes, and the loss before it."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
    return loss.item(), found


def distance(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_output_and_generation(model, ids, device):
    dense, options = logits(model, ids), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with Masked(model):
        expected, words = logits(model, ids), model.generate(ids, **options)
    report = sparse24.convert(model, EXACT, quiet=True)
    assert report.converted == [EXPERTS, SHARED] and not report.skipped
    pruned = distance(dense, expected)
    # In 16 bits the attention before them is rounded otherwise where batches are, and decides near ties.
    assert distance(logits(model, ids), expected) < (1e-4 if device == "cpu" else 0.5 * pruned)
    generated = model.generate(ids, **options)
    assert generated.shape == words.shape and generated[:, :64].equal(ids)
    if device == "cpu":
        assert generated.equal(words)
    assert sparse24.revert(model) == report.converted
    assert_same_bits(logits(model, ids), dense)


def test_steps_of_training(model, ids, device):
    model.train()
    sparse24.convert(model, EXACT, quiet=True)
    start = copy.deepcopy(model.state_dict())
    loss, found = step(model, ids)
    trained = copy.deepcopy(model.state_dict())
    assert logits(model, ids).isfinite().all() and step(model, ids)[0] < loss

    sparse24.revert(model)
    model.load_state_dict(start)
    with Masked(model):
        expected_loss, expected = step(model, ids)
    assert abs(loss - expected_loss) < (1e-4 if device == "cpu" else 2e-2) * expected_loss
    assert found.keys() == expected.keys() and f"{EXPERTS}.up_proj" in found
    for name, gradient in expected.items():
        if gradient.any():
            assert distance(found[name], gradient) < (1e-3 if device == "cpu" else 0.15), name

    # What was trained is the model's, without this library too.
    model.load_state_dict(trained)
    fresh = copy.deepcopy(model)
    assert_same_bits(logits(model, ids), logits(fresh, ids))


def test_one_graph_of_a_decoder(model, ids, device):
    """torch.compile of the whole layer, in which sizes of experts are data."""
    torch._dynamo.reset()
    sparse24.convert(model, EXACT, quiet=True)
    layer = model.model.layers[1].mixer
    x = torch.randn(2, 64, 64, generator=generator(5)).to(device, next(model.parameters()).dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert distance(compiled(x), layer(x)) < (1e-5 if device == "cpu" else 1e-2)
    torch._dynamo.reset()
