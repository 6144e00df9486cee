"""What is installed: the facts of the build, the command line, the files."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sparse24
from sparse24 import _C

COMPILED = [Path(_C.__file__), Path(_C.__file__).with_name("libsparse24_torch.so")]


def run(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300)


def test_build_info():
    info = sparse24.build_info()
    assert set(info) >= {
        "version",
        "cuda",
        "cuda_archs",
        "cuda_version",
        "cutlass",
        "compiler",
        "torch_target",
        "torch",
        "device",
    }
    assert info["version"] == sparse24.__version__ == metadata.version("sparse24")
    assert info["torch"] == torch.__version__
    assert re.search(r"\d+\.\d+", info["compiler"])
    if info["cuda"]:
        assert "90a" in info["cuda_archs"]
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", info["cuda_version"])
        assert info["cutlass"].startswith("4.2")
    else:
        assert info["cuda_archs"] == info["cuda_version"] == ""
    assert (info["device"] == "cpu") == (not torch.cuda.is_available())


def test_info_command():
    done = run("-m", "sparse24", "info")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(sparse24.env.summary())
    info = sparse24.build_info()
    for value in (info["version"], info["compiler"], info["torch"], info["torch_target"]):
        assert value in done.stdout
    assert run("-m", "sparse24", "--version").stdout == f"sparse24 {sparse24.__version__}\n"
    # The table of configurations: every compiled tile.
    for dtype in ("bfloat16", "float16", "float8_e4m3fn"):
        for config in _C.mm_configs(dtype):
            tile = rf"{dtype}.*\b{config['tile_m']} ?x ?{config['tile_n']} ?x ?{config['tile_k']}\b"
            assert re.search(tile, done.stdout), tile


def test_info_says_in_words_what_runs():
    text = run("-m", "sparse24", "info").stdout
    for subject in sparse24.env.abilities():
        assert re.search(rf"^{subject} +(do not run|does not run|run)", text, re.MULTILINE), subject
    if not torch.cuda.is_available():
        assert re.search(r"on the GPU +do not run: torch finds no CUDA device", text)
        assert re.search(r"bench +does not run: it measures a GPU", text)
    if torch.version.cuda is None:
        assert f"torch {torch.__version__} is built without CUDA" in text


@pytest.mark.parametrize(
    ("available", "built", "capability", "said"),
    [
        (False, True, None, "torch finds no CUDA device"),
        (True, False, (9, 0), "this build has no CUDA kernels"),
        (True, True, (10, 0), "built for sm_90a, this device is sm_100"),
        (True, True, (9, 0), None),
    ],
)
def test_why_the_kernels_cannot_run(monkeypatch, available, built, capability, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    info = {**_C.build_info(), "cuda": built, "cuda_archs": "90a", "cuda_version": "13.0"}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    problem = sparse24.env.cuda_problem()
    assert problem is None if said is None else problem.startswith(said)
    assert sparse24.env.summary().endswith("and slow." if said is None else f"{problem}.")
    bench = sparse24.env.abilities()["sparse24 bench"]
    assert bench == ("runs" if said is None else "does not run: it measures a GPU")


def test_whoever_reads_one_line_breaks_nothing():
    """As ``sparse24 info | head -1`` does, with every line written at once."""
    program = [sys.executable, "-u", "-m", "sparse24", "info"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("sparse24 ")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=300) == 0


def test_a_closed_pipe_is_no_error():
    """The reader has gone before anything is written."""
    program = [sys.executable, "-u", "-m", "sparse24", "info"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=300) == 141


def test_wrong_command_fails():
    assert run("-m", "sparse24", "nonsense").returncode == 2


def test_the_floor_of_torch_is_the_abi_it_is_built_for():
    floors = [r for r in metadata.requires("sparse24") if re.match(r"torch\b", r) and "extra" not in r]
    assert len(floors) == 1
    (version,) = re.findall(r">=\s*([\d.]+)", floors[0])
    assert version == sparse24.build_info()["torch_target"]


def test_is_typed():
    package = Path(sparse24.__file__).parent
    assert (package / "py.typed").is_file()
    stub = (package / "_C.pyi").read_text()
    for name in dir(_C):
        if not name.startswith("_"):
            assert re.search(rf"^(def )?{name}\b", stub, re.MULTILINE), f"_C.pyi lacks {name}"


@pytest.mark.parametrize("path", COMPILED, ids=lambda p: p.name)
def test_compiled_files_are_portable(path):
    """No libpython, no path of the build machine, no CUDA library but the driver's."""
    content = path.read_bytes()
    assert b"libpython" not in content
    for library in (b"libcudart.so", b"libcublas", b"libcusparse", b"libnvrtc"):
        assert library not in content, library


def test_the_op_library_does_not_know_python():
    content = COMPILED[1].read_bytes()
    assert b"PyObject_" not in content and b"Py_Initialize" not in content
    assert b"_ZN2at" not in content and b"_ZN3c10" not in content, "only the stable ABI"


def test_schemas():
    """The contract, word by word."""
    expected = {
        "compress": '(Tensor x, str activation="none", int dim=-1, *, float threshold=0.0) '
        "-> (Tensor values, Tensor meta)",
        "compress_fp8": '(Tensor x, Tensor? scale=None, str activation="none", int dim=-1, str scaling="row", *, '
        "float threshold=0.0) -> (Tensor values, Tensor meta, Tensor scale)",
        "compress_like": "(Tensor x, Tensor meta, int dim=-1) -> Tensor",
        # rows and cols are ints to callers; SymInt lets torch.compile keep them symbolic.
        "decompress": "(Tensor values, Tensor meta, SymInt rows, SymInt cols, int dim=-1) -> Tensor",
        "mm": "(Tensor values, Tensor meta, Tensor b, Tensor? scale_a=None, Tensor? scale_b=None, Tensor? bias=None, "
        "*, int dim=-1, ScalarType? out_dtype=None, bool transpose_out=False, bool interleaved=False) -> Tensor",
        "put_features": "(Tensor(a!) out, Tensor parts, Tensor features, int dim) -> ()",
        "quantize_fp8_both": "(Tensor x, Tensor? scale=None, bool interleaved=False) -> (Tensor values, "
        "Tensor transposed, Tensor scale, Tensor amax)",
        "quantize_fp8": '(Tensor x, Tensor? scale=None, str scaling="row") -> (Tensor values, Tensor scale)',
        "linear_relu2": "(Tensor x, Tensor w, Tensor? scale_x=None, Tensor? scale_w=None, Tensor? bias=None, "
        "Tensor? scale_out=None, *, "
        'ScalarType? out_dtype=None, bool statistics=True, str activation="relu2", float threshold=0.0) '
        "-> (Tensor y, Tensor amax, Tensor saturated)",
        "linear_compress": "(Tensor x, Tensor w, Tensor? scale_x=None, Tensor? scale_w=None, Tensor? bias=None, "
        "Tensor? scale_out=None, *, "
        'str activation="relu2", str scaling="given", ScalarType? out_dtype=None, bool statistics=True, '
        "float threshold=0.0) "
        "-> (Tensor values, Tensor meta, Tensor scale, Tensor amax, Tensor saturated)",
        "linear_compress_packed": "(Tensor x, Tensor w, Tensor meta, Tensor? scale_x=None, Tensor? scale_w=None, "
        "Tensor? bias=None, Tensor? scale_out=None, *, "
        'str activation="relu2", str scaling="given", ScalarType? out_dtype=None, bool statistics=True, '
        "float threshold=0.0) "
        "-> (Tensor values, Tensor meta, Tensor scale, Tensor amax, Tensor saturated)",
        "transpose_fp8": "(Tensor values) -> Tensor",
        "prune_quantize_fp8_both": "(Tensor w, Tensor? scale=None, int dim=-1) "
        "-> (Tensor values, Tensor transposed, Tensor scale, Tensor amax)",
        "prune_pack_fp8_both": "(Tensor w, Tensor? scale=None, int dim=-1) "
        "-> (Tensor values, Tensor meta, Tensor transposed, Tensor scale, Tensor amax)",
        "prune_pack24": "(Tensor w, int dim=-1, *, ScalarType? dtype=None) "
        "-> (Tensor pruned, Tensor values, Tensor meta)",
        "gather_features": "(Tensor values, Tensor meta, Tensor features, bool fp8_meta=False) -> Tensor",
        "densest_features": "(Tensor counts, SymInt k) -> Tensor",
        "feature_counts": "(Tensor values, Tensor meta, SymInt samples=1024, bool fp8_meta=False) -> Tensor",
        "linear_gradient": "(Tensor grad, Tensor w, Tensor values, Tensor meta, bool interleaved=False, "
        "bool tokens=True, bool fp8_meta=False, Tensor? hot=None, bool roots=False) -> (Tensor dh_values, "
        "Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor counts, "
        "Tensor y_hot, Tensor dh_hot)",
        "linear_gradient_packed": "(Tensor grad, Tensor w, Tensor w_meta, Tensor values, Tensor meta, "
        "bool interleaved=False, bool tokens=True, bool fp8_meta=False, Tensor? hot=None, bool roots=False) -> "
        "(Tensor dh_values, Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, "
        "Tensor counts, Tensor y_hot, Tensor dh_hot)",
        "linear_gradient_fp8": "(Tensor grad, Tensor w, Tensor values, Tensor meta, Tensor scale_grad, Tensor scale_w, "
        "Tensor scale_y, Tensor scale_dh, bool interleaved=False, Tensor? hot=None) -> (Tensor dh_values, "
        "Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor y_hot, "
        "Tensor dh_hot, Tensor amax, Tensor saturated)",
        "linear_gradient_fp8_packed": "(Tensor grad, Tensor w, Tensor w_meta, Tensor values, Tensor meta, "
        "Tensor scale_grad, Tensor scale_w, Tensor scale_y, Tensor scale_dh, bool interleaved=False, "
        "Tensor? hot=None) -> (Tensor dh_values, Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, "
        "Tensor y_tokens_meta, Tensor y_hot, Tensor dh_hot, Tensor amax, Tensor saturated)",
        "linear_relu2_gradient": "(Tensor grad, Tensor w, Tensor y, bool roots=False) -> Tensor",
        "linear_relu2_gradient_fp8": "(Tensor grad, Tensor w, Tensor y, Tensor scale_grad, Tensor scale_w, "
        "Tensor scale_y, Tensor scale_dh) -> (Tensor dh, Tensor dh_transposed, Tensor y_transposed, Tensor amax, "
        "Tensor saturated)",
        "mm_active": "(Tensor y, Tensor w, Tensor? scale_w=None, Tensor? bias=None, *, ScalarType? out_dtype=None) "
        "-> Tensor",
        "relu2_mlp_few": "(Tensor x, Tensor w1, Tensor w2_rows, Tensor? b1=None, Tensor? b2=None, "
        "Tensor? w1_scale=None, Tensor? w2_scale=None, float threshold=0.0) -> Tensor",
        "relu2_mlp_dense": "(Tensor x, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None, "
        "Tensor? w1_scale=None, Tensor? w2_scale=None, Tensor? scale_y=None, Tensor? scale_y_factor=None, "
        "float threshold=0.0) -> Tensor",
        "relu2_mlp_sparse": "(Tensor x, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None, "
        "Tensor? w1_scale=None, Tensor? w2_scale=None, Tensor? scale_y=None, Tensor? scale_y_factor=None, "
        "float threshold=0.0) -> Tensor",
        "relu2_mlp_fp8": "(Tensor x, Tensor w1, Tensor w2, Tensor scales, Tensor? b1=None, Tensor? b2=None, "
        "Tensor? w1_scale=None, Tensor? w2_scale=None, bool sparse=True, bool interleaved=False, "
        "float threshold=0.0) -> (Tensor out, Tensor x_transposed, Tensor w1_transposed, Tensor w2_transposed, "
        "Tensor values, Tensor meta, Tensor places)",
        "relu2_mlp_fp8_gradients": "(Tensor grad, Tensor x_transposed, Tensor w1_transposed, Tensor w2_transposed, "
        "Tensor values, Tensor meta, Tensor places, Tensor scales, Tensor? hot=None, SymInt dense_features=0, "
        "bool sparse=True, bool interleaved=False, bool need_x=True, bool need_dh=True) -> (Tensor dx, Tensor dw1, "
        "Tensor dw2, Tensor dh, Tensor next_scales)",
        "experts_linear_compress": "(Tensor x, Tensor w, Tensor offsets, Tensor? scale_x=None, Tensor? scale_w=None, "
        '*, str activation="relu2", float threshold=0.0) -> (Tensor values, Tensor meta, Tensor scale)',
        "experts_linear_relu2": "(Tensor x, Tensor w, Tensor offsets, Tensor? scale_x=None, Tensor? scale_w=None, *, "
        'str activation="relu2", float threshold=0.0) -> Tensor',
        "experts_linear": "(Tensor x, Tensor w, Tensor offsets, Tensor? scale_x=None, Tensor? scale_w=None, "
        "Tensor? row_scale=None, *, ScalarType? out_dtype=None) -> Tensor",
        "experts_mm": "(Tensor values, Tensor meta, Tensor b, Tensor offsets, Tensor? scale_a=None, "
        "Tensor? scale_b=None, Tensor? row_scale=None, *, SymInt rows, ScalarType? out_dtype=None) -> Tensor",
        "experts_linear_gradient": "(Tensor grad, Tensor w, Tensor values, Tensor meta, Tensor offsets, "
        "Tensor? row_scale=None, Tensor? scale_grad=None, Tensor? scale_w=None, Tensor? scale_y=None, *, "
        "bool dense=True) -> (Tensor dh_values, Tensor dh, Tensor y, Tensor products)",
        "experts_weight_gradient": "(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    }
    for op, schema in expected.items():
        wanted = torch._C.parse_schema(f"sparse24::{op}{schema}")
        assert str(getattr(torch.ops.sparse24, op).default._schema) == str(wanted)


def test_every_op_is_documented():
    from sparse24.ops import functions

    for name in (*functions.__all__, "relu2_mlp"):
        text = getattr(sparse24, name).__doc__
        for section in ("Parameters", "Returns", "Raises"):
            assert f"{section}\n" in text, f"{name} lacks {section}"
        assert "Source: " in text and "arXiv" in text, name


def test_examples_of_the_documentation():
    import doctest

    from sparse24.ops import compression, features, gradients, linear, packed, packed_gradients, products

    for module in (compression, features, gradients, linear, packed, packed_gradients, products):
        results = doctest.testmod(module, extraglobs={"sparse24": sparse24})
        assert results.attempted > 0 and results.failed == 0


def test_a_library_that_does_not_load_says_why(tmp_path):
    """A missing op library is an ImportError with its path and both versions, not a missing op later."""
    package = tmp_path / "sparse24"
    package.mkdir()
    for source in [*Path(sparse24.__file__).parent.glob("*.py"), COMPILED[0]]:
        (package / source.name).write_bytes(source.read_bytes())
    # An editable install finds the package before the path is looked at.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if not hasattr(f, 'known_source_files')]; "
        f"sys.path.insert(0, {str(tmp_path)!r}); import sparse24"
    )
    done = run("-c", code)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for part in ("ImportError", str(package / "libsparse24_torch.so"), torch.__version__, "torch >= "):
        assert part in last, last
