"""torch.export and AOTInductor: programs that run in a process that has the op library, but not the Python package."""

import functools
import subprocess
import sys
import tempfile

import pytest
import torch
from compare import assert_same_bits
from composition_models import INFERENCE_KINDS, build, inputs
from convert_models import assert_near
from torch.utils.cpp_extension import CUDA_HOME

import sparse24

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

#: What a process does that serves programs: it gets the op library (or nothing) and a folder, and writes there what
#: each program makes of each of the inputs.
SERVE = """
import sys
from pathlib import Path
import torch

library, folder = sys.argv[1:]
if library:
    torch.ops.load_library(library)
inputs = torch.load(folder + "/inputs.pt")
outputs = {}
for path in sorted(Path(folder).glob("*.pt2")):
    compiled = path.name.endswith(".aoti.pt2")
    run = torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()
    outputs[path.name.partition(".")[0]] = [run(x) for x in inputs]
torch.save(outputs, folder + "/outputs.pt")
assert not any(name.startswith("sparse24") for name in sys.modules)
"""

#: A process of torch alone, with a package that holds nothing of this library.
PLAIN_PACKAGE = """
import sys
import torch

device, path = sys.argv[1:]
x = torch.ones(4, 8, device=device)
program = torch.export.export(torch.nn.Linear(8, 8, device=device).requires_grad_(False), (x,))
torch._inductor.aoti_compile_and_package(program, package_path=path)
torch._inductor.aoti_load_package(path)(x)
"""

SIZES = (2, 21, 64)


@pytest.fixture(params=INFERENCE_KINDS)
def kind(request):
    return request.param


def model_of(kind, device):
    return build(kind, device, torch.bfloat16).requires_grad_(False).eval()


def export(model, device, *, strict=False):
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    return torch.export.export(model, (example(device),), dynamic_shapes=(({1: tokens}),), strict=strict)


def example(device, tokens=21):
    return inputs(device, torch.bfloat16, tokens=tokens)


def serve(folder, device, *, library=sparse24._library.LIBRARY_PATH):
    """Run the programs of a folder in a fresh process: outputs for SIZES by program, or what it wrote to stderr."""
    torch.save([example(device, tokens) for tokens in SIZES], folder / "inputs.pt")
    command = [sys.executable, "-X", "faulthandler", "-c", SERVE, library, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return torch.load(folder / "outputs.pt") if done.returncode == 0 else f"exit {done.returncode}: {done.stderr}"


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_the_program_holds_the_sparse_product(device, kind, strict):
    model = model_of(kind, device)
    program = export(model, device, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sparse24.mm.default") == 2
    for tokens in SIZES:
        x = example(device, tokens)
        assert_same_bits(program.module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("kind", ["module", "converted"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_weights_that_learn_are_exported_for_any_number_of_tokens(device, kind, strict):
    """Also with gradients on, as they are where nobody thinks of them."""
    model = build(kind, device, torch.bfloat16).eval()
    program = export(model, device, strict=strict).module()
    for tokens in SIZES:
        x = example(device, tokens)
        assert_same_bits(program(x), model(x))


def test_a_dense_phase_is_exported_dense(device):
    model = model_of("module", device)
    sparse24.Schedule(2, dense_warmup_steps=1).apply(model, 0)
    program = export(model, device)
    assert "sparse24.mm.default" not in [str(node.target) for node in program.graph.nodes]
    assert_same_bits(program.module()(example(device)), model(example(device)))


def test_the_threshold_is_one_program_or_a_refusal(device):
    """Fewer tokens than `min_tokens` run dense: one program is for sizes on one side of it."""
    model = model_of("module", device)
    for layer in model.layers:
        layer.min_tokens = 30
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        export(model, device)
    for tokens, sparse in (((2, 9), 0), ((10, 4096), 2)):
        tokens = torch.export.Dim("tokens", min=tokens[0], max=tokens[1])
        x = example(device, tokens.min + 1)
        program = torch.export.export(model, (x,), dynamic_shapes=(({1: tokens}),))
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("sparse24.mm.default") == sparse
        assert_same_bits(program.module()(x), model(x))


def test_exported_programs_in_a_fresh_process(device, tmp_path):
    models = {kind: model_of(kind, device) for kind in INFERENCE_KINDS}
    for kind, model in models.items():
        torch.export.save(export(model, device), tmp_path / f"{kind}.pt2")
    outputs = serve(tmp_path, device)
    assert not isinstance(outputs, str), outputs
    for kind, model in models.items():
        for tokens, out in zip(SIZES, outputs[kind], strict=True):
            assert_same_bits(out, model(example(device, tokens)))


class Both(torch.nn.Module):
    """The models of two kinds side by side, so that the C++ compiler runs once."""

    def __init__(self, device):
        super().__init__()
        self.models = torch.nn.ModuleList(model_of(kind, device) for kind in ("module", "quantised"))

    def forward(self, x):
        return tuple(model(x) for model in self.models)


@functools.cache
def why_torch_cannot(device):
    """What a process says that uses torch alone to load the package of a linear layer; None if that works."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-X", "faulthandler", "-c", PLAIN_PACKAGE, device, folder + "/linear.pt2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or ["nothing"]
    first = next((line for line in said if line.startswith("Fatal") or "Error" in line), said[-1])
    return (
        f"torch {torch.__version__} cannot load the package of a torch.nn.Linear on {device}: "
        f"exit {done.returncode}, {first}"
    )


@pytest.mark.timeout(300)  # a C++ compiler runs, and torch is imported once more
@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_compiled_package_in_a_fresh_process(device, tmp_path):
    """AOTInductor: code in C++ that calls the ops by their names.

    Where it fails, torch has to try a package without these ops: if that fails too, the test is skipped.
    """
    if device == "cuda" and CUDA_HOME is None:
        pytest.skip("AOTInductor needs the headers of CUDA")
    model = Both(device)
    torch._inductor.aoti_compile_and_package(export(model, device), package_path=str(tmp_path / "both.aoti.pt2"))
    outputs = serve(tmp_path, device)
    if isinstance(outputs, str) and (reason := why_torch_cannot(device)):
        pytest.skip(reason)
    assert not isinstance(outputs, str), outputs
    for tokens, out in zip(SIZES, outputs["both"], strict=True):
        assert_near(out, model(example(device, tokens)), 2e-2)  # residual connections are rounded less often
    assert "Could not find schema for sparse24::" in serve(tmp_path, device, library="")


def test_a_process_without_the_op_library_says_so(tmp_path):
    torch.export.save(export(model_of("module", "cpu"), "cpu"), tmp_path / "module.pt2")
    message = serve(tmp_path, "cpu", library="")
    assert "torch.ops.sparse24.linear_compress.default" in message and "import the custom op" in message
