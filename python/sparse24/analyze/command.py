"""The command `sparse24 analyze`: what 2:4 does to a checkpoint of transformers, on text of yours."""

import argparse
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse24._options import positive_number, whole_number
from sparse24.analyze.model import analyze_model
from sparse24.analyze.speed import PHASES, Calls
from sparse24.analyze.weights import RANKS, analyze_weights
from sparse24.errors import dtype_name, fail
from sparse24.terminal import drawing_file, output_file

#: Tokens of one sequence, where the model takes so many, and of one call.
WINDOW, CALL = 1024, 4096
#: A token is hardly ever more characters: what is read of a text.
_CHARACTERS_PER_TOKEN = 16


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "analyze",
        help="tell of each feed-forward network of a checkpoint what 2:4 drops, on your text, and whether it pays",
        description="Runs a checkpoint of transformers on text and tells of each squared-ReLU feed-forward network "
        "what 2:4 would drop, whether to convert it, and which speed to expect. Exit status 0: done; 2: it could not "
        "run.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a folder, as save_pretrained writes it")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="what it reads")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write everything")
    parser.add_argument("--csv", type=output_file, metavar="FILE", help="write a line for each network")
    parser.add_argument("--plot", type=drawing_file, metavar="FILE", help="draw the networks (needs matplotlib)")
    parser.add_argument(
        "--sparse-weights", choices=("up", "both"), help="also tell the loss on the text with 2:4 weights, and without"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="R",
        help=f"of adapters beside them (default: {' '.join(map(str, RANKS))})",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="choose what they keep by their inputs on this text too",
    )
    parser.add_argument("--max-tokens", type=int, default=65536, metavar="N", help="default: 65536")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    for phase in PHASES:
        usual = getattr(Calls(), phase)
        text = f"tokens in a call of {phase}, for the speed to expect (default: {usual})"
        parser.add_argument(f"--{phase}", type=int, default=usual, metavar="T", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    _check(args)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        fail("analyze", "--device cuda where there is a CUDA device", "none")
    model, tokenize = load(args.model)
    model.to(device)
    batches = batches_of(model, tokenize, args.text, args.max_tokens)
    first = next(batches, None)
    if first is None:
        fail("analyze", "--text to have at least one token", "none")
    try:
        report = analyze_model(model, chain((first,), batches), max_tokens=args.max_tokens)
    except (RuntimeError, OSError):
        raise
    except Exception as error:  # of the model, and it may be anything
        raise RuntimeError(f"sparse24.analyze: expected the model to run on the text, got {error!r}") from error
    report = report.at(**{phase: getattr(args, phase) for phase in PHASES})
    tokens = max((layer["tokens"] for layer in report.layers.values()), default=0)
    seen = f" on {tokens:,} tokens" if report.layers else ""
    print(f"{type(model).__name__} of {args.model}{seen}, in {dtype_name(model.dtype)}\n")
    content = report.as_dict()
    if args.sparse_weights:
        content["weights_loss"] = losses = _losses(model, tokenize, args)
        by = "magnitude" if not args.calibrate else "magnitude and calibration"
        print(f"loss on the text, sparse_weights={args.sparse_weights!r}, pruned by {by}, nothing trained:")
        for name, loss in losses.items():
            print(f"  {name:10}{loss:9.4f}{100 * (loss / losses['dense'] - 1):+9.2f} %")
        print()
    print(report.table())
    for path, write in ((args.json, partial(_write_json, content)), (args.csv, _write_csv), (args.plot, _plot)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(report, path)
    return 0


def _losses(model: nn.Module, tokenize: Any, args: argparse.Namespace) -> dict[str, float]:
    """Find the loss of the model on the text, dense and with 2:4 weights: see `analyze_weights`."""
    if "labels" not in inspect.signature(model.forward).parameters:
        fail("analyze", "a model with a loss for --sparse-weights", type(model).__name__)
    texts = {option: files for option, files in (("--text", args.text), ("--calibrate", args.calibrate)) if files}
    calls = {option: _calls_that_learn(model, tokenize, option, texts[option], args.max_tokens) for option in texts}
    batches, calibration = calls["--text"], calls.get("--calibrate")
    options = {"sparse_weights": args.sparse_weights, "ranks": _ranks(args), "calibration": calibration}
    return analyze_weights(model, batches, **options)


def _calls_that_learn(
    model: nn.Module, tokenize: Any, option: str, files: Sequence[Path], tokens: int
) -> list[Mapping[str, Any]]:
    """Give calls with labels, of about so many tokens, of the files of an option."""
    batches: list[Mapping[str, Any]] = []
    left = tokens
    for batch in batches_of(model, tokenize, files, tokens, learn=True):
        if left <= 0:
            break
        if batch["input_ids"].shape[1] > 1:  # after one alone nothing is predicted
            batches.append(batch)
        left -= batch["input_ids"].numel()
    if not batches:
        got = "none" if left == tokens else "one"
        fail("analyze", f"{option} to have at least two tokens for --sparse-weights", got)
    return batches


def _ranks(args: argparse.Namespace) -> tuple[int, ...]:
    return RANKS if args.ranks is None else tuple(args.ranks)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot run before a model is loaded, which may take long."""
    if args.plot:
        _drawing()
    positive_number("analyze", "--max-tokens", args.max_tokens)
    Calls(**{phase: getattr(args, phase) for phase in PHASES})
    if args.ranks is not None and not args.sparse_weights:
        fail("analyze", "--sparse-weights, which --ranks are of", "none")
    if args.calibrate and not args.sparse_weights:
        fail("analyze", "--sparse-weights, which --calibrate is for", "none")
    for rank in _ranks(args):
        whole_number("analyze", "--ranks", rank)
    for file in (*args.text, *(args.calibrate or ())):
        file.open("rb").close()


def load(folder: Path) -> tuple[nn.Module, Any]:
    """Load a model, and what makes token ids of a text."""
    try:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RuntimeError(f"sparse24.analyze: expected transformers to be installed, got none: {error}") from error
    if not (folder / "config.json").is_file():
        fail("analyze", "MODEL_DIR to be a folder with a config.json", folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    except ValueError:  # it generates no text
        model = _loaded(AutoModel, folder, dtype="auto")
    except Exception as error:  # of the model, and it may be anything
        raise _refusal(folder, error) from error
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        vocabulary = model.get_input_embeddings().num_embeddings
        print(
            "note: MODEL_DIR has no tokenizer: each byte of the text is taken for a token. That is right for models of"
        )
        print("bytes, and meaningless for others.\n")
        return model, lambda text: [byte % vocabulary for byte in text.encode()]
    tokenizer = _loaded(AutoTokenizer, folder)
    return model, lambda text: tokenizer(text, verbose=False)["input_ids"]


def batches_of(
    model: nn.Module, tokenize: Any, files: Sequence[Path], tokens: int, *, learn: bool = False
) -> Iterator[Mapping[str, Any]]:
    """Cut texts into windows: calls of the model, of which only as much is read as is needed; `learn`: with labels."""
    config = getattr(model, "config", None)
    window = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    taken = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False} | ({} if learn else {"logits_to_keep": 1})
    options = {name: value for name, value in wanted.items() if name in taken}
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as stream:
            ids = torch.tensor(tokenize(stream.read(_CHARACTERS_PER_TOKEN * tokens)), dtype=torch.int64)
        whole = ids[: len(ids) // window * window].view(-1, window)
        calls: list[Tensor] = list(whole.split(max(1, CALL // window))) if len(whole) else []
        if len(whole) == 0 and len(ids):
            calls = [ids[None]]
        for call in calls:
            ids = call.to(next(model.parameters()).device)
            yield {"input_ids": ids, **options, **({"labels": ids} if learn else {})}


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # of the model, and it may be anything
        raise _refusal(folder, error) from error


def _refusal(folder: Path, error: Exception) -> RuntimeError:
    first = str(error).strip().partition("\n")[0]
    return RuntimeError(f"sparse24.analyze: expected MODEL_DIR to be loaded by transformers, got {folder}: {first}")


def _write_json(content: dict[str, Any], _report: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_csv(report: Any, path: Path) -> None:
    path.write_text(report.csv())


def _plot(report: Any, path: Path) -> None:
    report.plot(path)


def _drawing() -> None:
    try:
        from sparse24.analyze import drawing  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"sparse24.analyze: expected matplotlib for --plot, got none: {error}") from error
