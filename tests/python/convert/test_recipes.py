"""docs/guide: each program runs as it stands there, and does what its text says; and so does the README."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from convert_models import CountOps, D, Inline, Stack, assert_near, masked, randomize, relu2
from data import normal
from recipes import README, execute, hide_gpu, run, sections, torchrun

import sparse24

pytestmark = pytest.mark.filterwarnings(
    # torch's own, and Dynamo's, which makes an instance of every autograd function that it traces
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    hide_gpu(request, monkeypatch)


def test_every_recipe_is_tested():
    code = "".join(page.read_text() for page in Path(__file__).parent.glob("test_recipes*.py"))
    tested = set(re.findall(r"^def test_(\w+)", code, re.MULTILINE))
    names = {section: section.lower().replace(" ", "_").replace("'", "") for section in sections()}
    assert set(names.values()) <= tested, f"docs/guide: {set(names.values()) - tested} without a test"


def test_experts():
    names, _ = run("Experts")
    assert names["model"].experts.sparse is True and names["loss"].item() < 1.2
    assert not names["w1"].grad[0].equal(names["w1"].grad[1])
    assert names["frozen"].up_proj.dtype == torch.float8_e4m3fn


def test_experts_of_transformers():
    pytest.importorskip("transformers")
    names, ops = run("Experts of transformers")
    assert names["report"].converted == ["model.layers.1.mixer.experts", "model.layers.1.mixer.shared_experts"]
    assert ops.experts > 1 and not names["sparse"].equal(names["before"])
    assert names["generated"].shape == (2, 36)


def test_the_readme_at_sizes_for_a_cpu():
    blocks = [
        block._replace(
            code=re.sub(r"\b(8192|4096|16384)\b", lambda n: str(int(n[0]) // 32), block.code).replace('"cuda"', '"cpu"')
        )
        for block in sections(README)["Write a model"]
    ]
    with CountOps() as ops:
        n = execute(blocks, {})
    assert ops.sparse == 0  # the first step of the schedule
    mlp, x = n["mlp"], n["x"]
    assert mlp.sparse is False and n["schedule"].apply(mlp, 1000) is True
    assert 0.4 < n["stats"].zeros < 0.6 and 0.15 < n["stats"].feature_nonzeros_dropped < 0.25
    w1, w2 = mlp.up_proj.weight, mlp.down_proj.weight
    expected = F.linear(relu2(F.linear(x, w1)), w2)
    assert_near([n["y"]], [expected], 1e-2)
    assert mlp.sparse is True
    y = mlp(x)
    assert 0.05 < (y - expected).norm() / expected.norm() < 0.5  # a fifth of a random activation is dropped
    assert n["frozen"].up_proj.weight.dtype == torch.float8_e4m3fn and n["frozen"](x).shape == x.shape


def test_conversion_in_the_readme(capsys):
    model, x = randomize(Stack(Inline(), Inline())), normal(21, D, dtype=torch.float32)
    dense, evaluated = model(x), []

    def evaluate(model):
        evaluated.append(model(x))

    execute(sections(README)["Convert a model"], {"sparse24": sparse24, "model": model, "evaluate": evaluate})
    assert capsys.readouterr().out == "sparse24: converted 2 of 2\n"
    assert_same_bits(evaluated[0], dense)
    assert_same_bits(model(x), dense)


def test_quick_start(capsys):
    n, ops = run("Quick start")
    x = n["x"]
    expected = masked(n["mlp"], ("up_proj", "down_proj"), x)
    assert (n["y"] - expected).norm() <= 1e-2 * expected.norm()
    assert ops.sparse == 4 and x.grad is not None
    assert capsys.readouterr().out == "50% zeros; pruning drops 19% of the other entries\n"


def test_analyze_in_a_program(capsys):
    torch.manual_seed(0)  # the share is at the edge of two roundings
    n, _ = run("Analyze in a program")
    report, names = n["report"], [f"layers.{i}" for i in range(4)]
    assert list(report.layers) == names and all(layer["tokens"] == 2048 for layer in report.layers.values())
    assert report.decisions == {name: name != "layers.0" for name in names}
    assert n["done"].converted == names[1:] and n["done"].skipped == {"layers.0": "decided against"}
    printed = capsys.readouterr().out
    assert report.verdict in printed and "layers.0 drops 19 % of non-zeros: keep it dense" in report.verdict


def test_own_module(capsys):
    n, ops = run("Own module")
    assert ops.sparse == 4 and n["x"].grad is not None
    assert all(p.grad is not None for p in n["mlp"].parameters())
    x, w1, w2 = n["x"].detach().float(), n["mlp"].w1.detach().float(), n["mlp"].w2.detach().float()
    assert_near([n["dense"].float()], [F.linear(relu2(F.linear(x, w1)), w2)], 2e-2)
    share = int(
        re.fullmatch(r"2:4 differs from dense by (\d+)% at random initialisation\n", capsys.readouterr().out)[1]
    )
    assert 5 < share < 50  # a fifth of a random activation is dropped


def test_the_parts_of_the_network():
    """An assertion of its own compares the network with its parts."""
    n, ops = run("The parts of the network")
    assert ops.sparse == 2
    assert_same_bits(n["y"], n["mlp"](n["x"]))
    two_steps = sparse24.mm(n["values"], n["meta"], n["w2"].t())  # the pre-activation is torch's, rounded otherwise
    assert_near([two_steps], [n["y"]], 1e-2)


def test_training_schedule(capsys):
    n, _ = run("Training schedule")
    losses = n["losses"]
    assert losses[0] > 2 * losses[19] and losses[19] > 1.2 * losses[49], losses
    assert capsys.readouterr().out.startswith(f"dense to {losses[19]:.4f}, sparse to {losses[49]:.4f}, ")


def test_float8(capsys):
    n, ops = run("Float8")
    # The first step looks for its scales, op by op; of the others each pass is one op, dense or sparse.
    assert ops.calls["sparse24.relu2_mlp_fp8.default"] == ops.calls["sparse24.relu2_mlp_fp8_gradients.default"] == 29
    assert n["mlp"].scales_known and n["loss"].item() < 1
    assert capsys.readouterr().out.startswith("loss ")


def test_activation_checkpointing():
    n, ops = run("Activation checkpointing")
    assert ops.calls["sparse24.linear_compress.default"] == 1
    gradients = [p.grad.clone() for p in n["block"].parameters()]
    n["block"].zero_grad()
    n["block"](n["x"]).square().mean().backward()
    for actual, p in zip(gradients, n["block"].parameters(), strict=True):
        assert_same_bits(actual, p.grad)


def test_transformers(capsys):
    pytest.importorskip("transformers")
    n, ops = run("transformers")
    assert ops.sparse == 2 and n["report"].converted == ["model.layers.1.mlp", "model.layers.2.mlp"]
    out = capsys.readouterr().out
    assert out.startswith("sparse24: converted 2 of 3, skipped 1 (decided against)\n")
    assert 0 < n["divergence"] < 0.01
    with torch.no_grad():
        assert_same_bits(n["model"](n["ids"]).logits.log_softmax(-1), n["dense"])
    assert n["state"].keys() == n["model"].state_dict().keys()


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_decoding(capsys):
    pytest.importorskip("transformers")
    n, ops = run("Decoding")
    assert ops.sparse == 0 and ops.calls["sparse24.relu2_mlp_few.default"] == 2 * 8 + 2  # two networks, eight words
    assert n["after"].shape == (1, 24) and capsys.readouterr().out == "sparse24: converted 2 of 2\n"


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_nanochat():
    torch._dynamo.reset()
    n = execute(sections()["nanochat"], {})
    losses = n["losses"]
    assert losses[0] > 1.5 * losses[9] > 1.5 * losses[-1], losses
    assert abs(n["evaluation"] - losses[-1]) < 0.2 * losses[0]
    assert all(p.dtype == torch.float32 for p in n["orig_model"].parameters())
    with CountOps() as ops:
        n["orig_model"](n["x"])
    assert ops.sparse == 2
    torch._dynamo.reset()


def test_fsdp2(tmp_path, backend):
    """Two processes with half of the tokens each learn what one with all of them learns."""
    losses = [float(torchrun("FSDP2", tmp_path, n).removeprefix("loss ")) for n in (1, 2)]
    assert losses[0] < 1.0 and abs(losses[1] - losses[0]) < 0.02 * losses[0], losses


def test_tensor_parallelism(tmp_path, backend):
    """The recipe compares its output with that of the whole network; the gradients are in test_distributed.py."""
    printed = torchrun("Tensor parallelism", tmp_path, 2)  # the ranks' lines may be mixed
    assert all(f"rank {rank}: [128, 64] of the gradient of W1" in printed for rank in range(2)), printed


def test_expert_parallelism(tmp_path, backend):
    """The recipe compares its output and a gradient with those of one process."""
    printed = torchrun("Expert parallelism", tmp_path, 2)
    assert all(f"rank {rank}: [4, 128, 64] of W1" in printed for rank in range(2)), printed


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_export():
    n = execute(sections()["Export"], {})
    assert "sparse24.mm.default" in [str(node.target) for node in n["program"].graph.nodes]
    expected, loaded, compiled = n["outputs"]
    assert_same_bits(loaded, expected)
    assert_near([compiled], [expected], 1e-2)
