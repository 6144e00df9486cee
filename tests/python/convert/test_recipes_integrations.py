"""docs/guide: programs for modules, training loops and code bases of others, which run as they stand there.

Nothing is fetched. TorchTitan and Lightning run where they are installed, checkouts of TorchTitan and nanochat where
SPARSE24_TORCHTITAN and SPARSE24_NANOCHAT name them.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from unittest import mock

import distributed_worker as worker
import megatron_like
import pytest
import torch
import torch.nn.functional as F
from convert_models import HIDDEN, CountOps, D, assert_near, relu2
from data import normal
from distributed_worker import WORLD
from recipes import GUIDE, execute, hide_gpu, run, sections, torchrun

import sparse24
from sparse24.analyze import top2_mask

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    hide_gpu(request, monkeypatch)


def masked(x, w1, w2, b1=None, b2=None):
    y = relu2(F.linear(x, w1, b1))
    return F.linear(y * top2_mask(y), w2, b2)


# ---- in your own forward ---------------------------------------------------------------------------------------------


def test_rwkv_channel_mix():
    n, ops = run("RWKV channel mix")
    assert ops.sparse == 16  # two steps of four are sparse: four products each, in two layers
    model, x = n["model"], n["x"]
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        dense, sparse = x, x
        for layer in model:
            mixed = [h + (F.pad(h, (0, 0, 1, -1)) - h) * layer.x_k for h in (dense, sparse)]
            dense = layer.value(torch.relu(layer.key(mixed[0])) ** 2)
            sparse = masked(mixed[1], layer.key.weight, layer.value.weight)
    for output, expected in zip(n["outputs"], (dense, dense, sparse, sparse), strict=True):
        assert_near([output], [expected], 2e-2)


def test_a_bank_of_weights():
    n, ops = run("A bank of weights")
    assert ops.sparse == 11  # the input of the first layer needs no gradient
    bank, x = n["bank"], n["x"]
    with torch.no_grad():
        expected = x
        for c_fc, c_proj in bank.mlp_bank.type_as(x):
            expected = expected + masked(F.rms_norm(expected, (64,)), c_fc, c_proj.t())
        assert_near([bank(x)], [expected], 2e-2)


def test_more_than_two_layers():
    n, ops = run("More than two layers")
    assert ops.sparse == 4 and all(p.grad is not None for p in n["block"].parameters())
    block, x = n["block"].eval(), n["x"]
    with torch.no_grad():
        y = masked(block.norm(x), block.w1, block.w2, block.b1, block.b2)
        assert_near([block(x)], [x + block.scale * y], 2e-2)


def test_tensor_and_sequence_parallelism_by_hand(tmp_path, backend):
    """The recipe compares its outputs with those of the whole network."""
    printed = torchrun("Tensor and sequence parallelism by hand", tmp_path, WORLD)
    for rank in range(WORLD):
        for tokens in (512, 256):
            assert f"rank {rank}: [{tokens}, 64] of the output, [128, 64] of the gradient of w1" in printed


# ---- coming from torchao or xformers ---------------------------------------------------------------------------------


def test_torchaos_activation24():
    """Both ways are near the network with a 2:4 mask, in the precision of float8."""
    n, ops = run("torchao's activation24")
    assert ops.sparse == 2
    expected = masked(*(n[name].float() for name in ("x", "w1", "w2")))
    for out in (n["by_hand"], n["whole"]):
        assert (out - expected).norm() < 0.09 * expected.norm()  # four operands are rounded


def test_xformers_sp24():
    """An assertion of its own compares the pattern of `compress_like` with that of the activation."""
    n, _ = run("xformers' sp24")
    h, w2 = n["h"].detach(), n["w2"]
    y = relu2(h)
    assert_near([n["out"]], [F.linear(y * top2_mask(y), w2)], 2e-2)
    assert torch.equal(n["h"].grad != 0, (h > 0) & top2_mask(y))


def test_names_in_tables_exist():
    """What the page says that there is here."""
    text = (GUIDE / "coming_from.md").read_text()
    names = set(re.findall(r"sparse24\.((?:nn\.)?[A-Za-z]\w+)", text)) - {"relu2"}
    assert len(names) > 9
    for name in names:
        assert functools.reduce(getattr, name.split("."), sparse24)


# ---- Megatron --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor parallel", "sequence parallel"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_megatron(ranks, sequence_parallel, bias):
    """The page's class among classes that behave as theirs, on two ranks: output and gradients of the whole network."""
    x, w1, w2, b1, b2 = megatron_like.network(bias, ranks.device)
    leaves = [t.requires_grad_() for t in (x, w1, w2, *((b1,) if bias else ()))]
    out = sparse24.relu2_mlp(x, w1, w2, b1, min_tokens=0, recipe=sparse24.Recipe(weight_gradients="dense"))
    out.square().sum().backward()
    expected = [out.detach(), *(t.grad for t in leaves)]
    share = [0, 0, 0, 1, 0] if sequence_parallel else [None, None, 0, 1, 0]  # dimensions along which a rank has a part
    results = ranks(worker.megatron, sequence_parallel, bias)
    for rank, (actual, output_bias, dense, theirs, sparse) in enumerate(results):
        assert sparse == 2
        parts = [e if dim is None else e.chunk(WORLD, dim)[rank] for e, dim in zip(expected, share, strict=False)]
        assert_near(actual, parts, 2 * ranks.tolerance(5e-5))  # sums of two summands, rounded once more
        assert_near([dense], [theirs], ranks.tolerance(1e-5))
        assert (output_bias is None) == (not bias)


def test_megatron_is_named():
    """Conversion says why it leaves theirs alone."""
    kind = type("MLP", (megatron_like.MLP,), {"__init__": lambda self: torch.nn.Module.__init__(self)})
    mlp = kind()
    mlp.linear_fc1 = megatron_like.ParallelLinear(HIDDEN, D, "copy_to_tensor_model_parallel_region", False, True)
    mlp.linear_fc2 = megatron_like.ParallelLinear(D, HIDDEN, "reduce_from_tensor_model_parallel_region", False, False)
    report = sparse24.convert(mlp, quiet=True)
    assert report.skipped == {"": "linear_fc1 is a megatron_like.ParallelLinear, not a torch.nn.Linear"}


# ---- training loops of others ----------------------------------------------------------------------------------------


def phases(module):
    """Record whether a network ran sparse, at each call in training."""
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(m.sparse) if m.training else None)
    return seen


def test_callbacks_are_imported_when_they_are_used():
    names = {name.partition(".")[0] for name in sys.modules if name.startswith(("sparse24.callbacks",))}
    assert not names or "transformers" in sys.modules


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_trainer_of_transformers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen = []
    fit = transformers.Trainer.train

    def train(self, *args, **kwargs):
        seen.append(phases(self.model.model.layers[0].mlp))
        return fit(self, *args, **kwargs)

    with mock.patch.object(transformers.Trainer, "train", train):
        n, ops = run("Trainer of transformers")
    assert seen == [[False, False, True, True, True, False]] and ops.sparse > 0
    from sparse24.callbacks.trainer import ScheduleCallback

    whole = ScheduleCallback()
    trainer = n["Trainer"](n["model"], n["args"], train_dataset=n["data"], callbacks=[whole])
    with pytest.warns(UserWarning, match="no step of Schedule"):
        trainer.train()
    assert whole.schedule == sparse24.Schedule(6, dense_warmup_steps=1000, dense_final_steps=0)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="sparse24.Schedule: expected model to have ReLU2MLP or converted modules"):
        whole.on_train_begin(n["args"], trainer.state, trainer.control, model=other)


@pytest.mark.filterwarnings("ignore")  # of Lightning
def test_lightning():
    lightning = pytest.importorskip("lightning.pytorch")
    seen = []
    fit = lightning.Trainer.fit

    def train(self, module, *args, **kwargs):
        seen.append(phases(module.mlp))
        return fit(self, module, *args, **kwargs)

    with mock.patch.object(lightning.Trainer, "fit", train):
        run("Lightning")
    assert seen == [[False, False, True, True, True, False]]


def test_the_callback_for_lightning_without_lightning(monkeypatch):
    """What it does with what Lightning gives it; its base class does nothing."""
    fake = types.ModuleType("lightning.pytorch")
    fake.Callback, fake.LightningModule, fake.Trainer = type("Callback", (), {}), object, object
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    monkeypatch.delitem(sys.modules, "sparse24.callbacks.lightning", raising=False)
    from sparse24.callbacks.lightning import ScheduleCallback

    module = torch.nn.Sequential(sparse24.nn.ReLU2MLP(D, HIDDEN))
    trainer = types.SimpleNamespace(global_step=0, estimated_stepping_batches=2000)
    callback = ScheduleCallback()
    callback.on_train_start(trainer, module)
    assert callback.schedule == sparse24.Schedule(2000) and module[0].sparse is False
    trainer.global_step = 1000
    callback.on_train_batch_start(trainer, module, None, 0)
    assert module[0].sparse is True
    monkeypatch.delitem(sys.modules, "sparse24.callbacks.lightning")


# ---- TorchTitan ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchtitan(monkeypatch):
    if checkout := os.environ.get("SPARSE24_TORCHTITAN"):
        monkeypatch.syspath_prepend(checkout)
    pytest.importorskip("torchtitan.protocols.model", exc_type=ImportError)
    return pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")  # of TorchTitan and what it imports
def test_torchtitan(torchtitan):
    """A model of theirs, with another feed-forward network, is converted when it is built, and keeps its keys."""
    from torchtitan.models.common.feed_forward import FeedForward

    n = execute(sections()["TorchTitan"], {"__name__": "__main__"})

    def spec(**options):
        found = torchtitan.model_registry("debugmodel", **options)
        for _, config, parent, attribute in list(found.model.traverse(FeedForward.Config)):
            setattr(parent, attribute, n["ReLU2FeedForward"].Config(w1=config.w1, w2=config.w2))
        return found

    converter = n["Sparse24Converter"]
    with pytest.raises(RuntimeError, match="converted 0 of 0: none of"):  # those of theirs are SwiGLU
        converter.Config().build().convert(torchtitan.model_registry("debugmodel").model).build()
    config = spec().model
    with torch.device("meta"):
        plain, model = config.build(), converter.Config(dtype="bf16").build().convert(config).build()
    assert list(plain.state_dict()) == list(model.state_dict())
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    model.init_states(buffer_device="cpu")
    networks = [m for m in model.modules() if getattr(m, "_sparse24_converted", False)]
    assert len(networks) == 6
    x = normal(300, 256, dtype=torch.bfloat16)
    network = networks[0].bfloat16()
    with CountOps() as ops:
        out = network(x)
    assert ops.sparse == 1
    assert_near([out], [masked(x, network.w1.weight, network.w2.weight)], 2e-2)


@pytest.mark.filterwarnings("ignore")
def test_the_schedule_of_torchtitan(torchtitan):
    follow = execute(sections()["TorchTitan"], {"__name__": "__main__"})["follow"]
    model = torch.nn.Sequential(sparse24.nn.ReLU2MLP(D, HIDDEN))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizers = type("Container", (), {"__iter__": lambda self: iter([optimizer])})()
    optimizers.register_step_post_hook = optimizer.register_step_post_hook
    follow(sparse24.Schedule(5, dense_warmup_steps=2))(optimizers, [torch.nn.Linear(2, 2), model], None)
    seen = []
    for _ in range(4):
        seen.append(model[0].sparse)
        model(torch.randn(4, D)).sum().backward()
        optimizer.step()
    assert seen == [False, False, True, True]
    resumed = torch.optim.AdamW(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    optimizers = type("Container", (), {"__iter__": lambda self: iter([resumed])})()
    optimizers.register_step_post_hook = resumed.register_step_post_hook
    follow(sparse24.Schedule(9, dense_warmup_steps=2))(optimizers, [model], None)
    assert model[0].sparse is False
    resumed.step()
    assert model[0].sparse is True


# ---- nanochat --------------------------------------------------------------------------------------------------------

PATCH = GUIDE / "nanochat.patch"


def git_apply(folder, *options):
    done = subprocess.run(["git", "apply", *options, str(PATCH)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_patch_is_well_formed(tmp_path):
    """It applies to a file that has its context where it says, and to nothing else."""
    lines = ["#"] * 700
    at, added = 0, 0
    for line in PATCH.read_text().splitlines()[4:]:
        if line.startswith("@@"):
            at = int(re.match(r"@@ -(\d+)", line)[1]) - 1
        elif line.startswith("+"):
            added += 1
        else:
            lines[at] = line[1:]
            at += 1
    script = tmp_path / "scripts" / "base_train.py"
    script.parent.mkdir()
    script.write_text("\n".join(lines) + "\n")
    git_apply(tmp_path)
    text = script.read_text()
    assert added > 10 and text.count("dense_mlps():") == 3 and '"--sparse24-dense-steps"' in text
    git_apply(tmp_path, "--reverse")
    assert script.read_text().splitlines() == lines


def run_nanochat(checkout, options=""):
    """Run the training script of a checkout on random tokens; give what it printed."""
    script = Path(worker.__file__).with_name("nanochat_run.py")
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(checkout.parent / "base"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *options.split()], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_checkout_would_run_is_seen(tmp_path):
    """The test below rests on it, and runs where a checkout is."""
    script = tmp_path / "checkout" / "scripts" / "base_train.py"
    script.parent.mkdir(parents=True)
    program = """
        import torch
        from convert_models import D, Inline

        import sparse24

        model, x = Inline(), torch.ones(8, D)
        sparse24.convert(model)
        for model.sparse in (False, True):
            torch.compile(model)(x)
        with sparse24.disabled(), torch.no_grad():
            model(x)
        """
    script.write_text(textwrap.dedent(program))
    assert run_nanochat(script.parents[1]).splitlines() == [
        "sparse24: converted 1 of 1",
        f"calls {[(True, False), (True, True)]}",
    ]


@pytest.mark.skipif("SPARSE24_NANOCHAT" not in os.environ, reason="SPARSE24_NANOCHAT names no checkout")
@pytest.mark.parametrize("precision", ["bf16", "fp8", None])
def test_the_patch_on_a_checkout(tmp_path, precision):
    """Training follows the schedule; evaluation and samples, and all of it without the option, run as theirs."""
    checkout = tmp_path / "nanochat"
    shutil.copytree(os.environ["SPARSE24_NANOCHAT"], checkout, ignore=shutil.ignore_patterns(".git", "dev"))
    git_apply(checkout)
    options = "--depth 2 --max-seq-len 256 --device-batch-size 1 --total-batch-size 256 --num-iterations 4"
    options += " --eval-every 2 --eval-tokens 256 --core-metric-every 2 --sample-every 2 --window-pattern L"
    if precision:
        options += f" --sparse24 {precision} --sparse24-dense-steps 2"
    printed = run_nanochat(checkout, options)
    calls = [(True, False)] * 4 + [(True, True)] * 4 if precision else []  # of two layers
    assert printed.splitlines()[-1] == f"calls {calls}", printed
    assert ("sparse24: converted 2 of 2" in printed) == bool(precision)
