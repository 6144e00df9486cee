"""The demo from beginning to end: train, compare, verify, time."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse24 import env
from sparse24.analyze import ModelReport, analyze_model
from sparse24.demo import speed
from sparse24.demo.data import even_windows, read_corpus
from sparse24.demo.model import BYTES, FFN, GPT, SMALL, DenseMLP
from sparse24.demo.training import TrainConfig, train
from sparse24.demo.verdict import gain, verdict
from sparse24.demo.verify import Check, verify_ffn
from sparse24.mlp import Precision, relu2_mlp
from sparse24.terminal import percent, progress, table

_HELD_OUT_WINDOWS = 32
_ANALYZED_WINDOWS = 8
_BATCH = 8  # windows of one evaluation
_DENSE = 1 << 62  # a token threshold that no batch reaches


@dataclass(frozen=True)
class Settings:
    """Options of `python -m sparse24 demo`."""

    steps: int = TrainConfig.steps
    seconds: float = 50.0
    seed: int = 0
    device: str = "auto"
    text: tuple[Path, ...] = ()
    out: Path | None = None


def run(settings: Settings) -> int:
    """Run the demo and print it. Returns 0 if everything was verified, 1 if something was wrong."""
    start = time.monotonic()
    device = _device(settings.device)
    # One thread: for a model this small more gain little on idle cores and lose a lot on busy ones, and the result is
    # the same on any number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(settings, device, start)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings, device: torch.device, start: float) -> int:
    print(f"sparse24 {env.build_info()['version']}, torch {torch.__version__}, {_describe(device)}")

    corpus = read_corpus(settings.text, settings.seed, SMALL.sequence + 1)
    print(
        f"Text: {corpus.train.numel() + corpus.held_out.numel():,} bytes of {corpus.files} files of {corpus.source}; "
        "the last tenth is held out."
    )
    model, trained = _train(settings, corpus.train, device)

    windows = even_windows(corpus.held_out, _HELD_OUT_WINDOWS, SMALL.sequence + 1).to(device)
    losses = _losses(model, windows)
    layers = list(_analyze(model, windows[:_ANALYZED_WINDOWS]).layers.values())
    checks = _verify(model, windows[:_ANALYZED_WINDOWS])
    timings = _speed(settings.seed, device)
    checks += [(f"{timing.shape.name}: ", check) for timing in timings for check in timing.checks]

    failed = [f"{prefix}{check}" for prefix, check in checks if not check.passed]
    if failed:
        print(f"\nFAILED: {len(failed)} of {len(checks)} comparisons with the reference:")
        print("\n".join(f"  {line}" for line in failed))
    else:
        print(f"\nVerified: {len(checks)} of {len(checks)} comparisons with plain torch hold (format bit for bit,")
        print("FFN outputs within twice the error of the dense product of the same dtype).")
    print(f"{time.monotonic() - start:.0f} s in all.\n")
    said = verdict(losses, layers, [timing.ms for timing in timings], len(failed))
    print(said)
    if settings.out is not None:
        record = {
            "environment": {**env.build_info(), "demo_device": device.type},
            "model": asdict(SMALL) | {"vocabulary": BYTES},
            "training": trained,
            "held_out_loss": losses,
            "layers": layers,
            "speed": [timing.as_dict() for timing in timings],
            "checks": [
                {"name": f"{prefix}{check.name}", **asdict(check), "passed": check.passed} for prefix, check in checks
            ],
            "verdict": said,
            "verified": not failed,
        }
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if failed else 0


def _device(wanted: str) -> torch.device:
    problem = env.cuda_problem()
    if wanted == "cuda" and problem is not None:
        raise RuntimeError(
            f"sparse24.demo: expected a device that runs the kernels for --device cuda, got none: {problem}"
        )
    return torch.device("cpu" if wanted == "cpu" or problem is not None else "cuda")


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return "CPU (one thread; the ops run as their reference)"


def _train(settings: Settings, data: Tensor, device: torch.device) -> tuple[GPT, dict[str, Any]]:
    model = GPT(SMALL, BYTES, DenseMLP, settings.seed, torch.float32).to(device)
    schedule = TrainConfig(steps=settings.steps)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Training {SMALL.layers} layers, D={SMALL.dim}, F={SMALL.hidden}, {parameters:,} parameters, dense, "
        f"float32, {schedule.steps} steps of {schedule.batch * SMALL.sequence:,} bytes:"
    )
    start = time.monotonic()
    losses = list(progress(train(model, data, schedule, settings.seed, settings.seconds), schedule.steps))
    model.eval()
    seconds = time.monotonic() - start
    print(f"{len(losses)} steps in {seconds:.1f} s, last training loss {losses[-1]:.3f}")
    if len(losses) < schedule.steps:
        print(f"Stopped early: more than {settings.seconds:g} s (--seconds). Figures depend on how far it came.")
    return model, {"steps": len(losses), "seconds": seconds, "seed": settings.seed, "last_loss": losses[-1]}


def _through_ops(precision: Precision, min_tokens: int) -> FFN:
    """Make an FFN in bf16 or fp8 inside the float32 model: nothing else changes between the variants."""

    def ffn(mlp: DenseMLP, x: Tensor) -> Tensor:
        w1, w2 = mlp.up_proj.weight.bfloat16(), mlp.down_proj.weight.bfloat16()
        return relu2_mlp(x.bfloat16(), w1, w2, precision=precision, min_tokens=min_tokens).to(x.dtype)

    return ffn


def _losses(model: GPT, windows: Tensor) -> dict[str, float]:
    variants: dict[str, FFN | None] = {
        "dense float32": None,
        "dense bf16": _through_ops("16bit", _DENSE),
        "2:4 bf16": _through_ops("16bit", 0),
        "dense fp8, row-wise": _through_ops("fp8", _DENSE),
        "2:4 fp8, row-wise": _through_ops("fp8", 0),
    }
    losses = {name: model.evaluate(windows, _BATCH, ffn) for name, ffn in variants.items()}
    dense = losses["dense float32"]
    print(f"\nHeld-out loss ({windows.shape[0] * (windows.shape[1] - 1):,} bytes), FFNs run as")
    # Adding zero turns -0.0 into 0.0.
    rows = [(name, f"{loss:.4f}", f"{round(loss - dense, 4) + 0.0:+.4f}") for name, loss in losses.items()]
    print(table(("", "nats/byte", "to dense"), rows))
    return losses


def _analyze(model: GPT, windows: Tensor) -> ModelReport:
    report = analyze_model(model, [windows])
    print("\nActivations on held-out text, in %: what 2:4 along features drops; tokens: what 2:4 along tokens drops of")
    print("the rest (only weight gradients would use it).")
    columns = {
        "zeros": "zeros",
        "groups > 2": "feature_groups_over_2",
        "non-zeros dropped": "feature_nonzeros_dropped",
        "energy dropped": "feature_energy_dropped",
        "output error": "output_error",
        "tokens: non-zeros": "token_nonzeros_dropped",
        "tokens: energy": "token_energy_dropped",
    }
    layers = report.layers.values()
    rows = [(str(i), *(percent(layer[key]) for key in columns.values())) for i, layer in enumerate(layers)]
    print(table(("layer", *columns), rows))
    print(f"sparse24.analyze_model says: {report.verdict}.")
    return report


def _verify(model: GPT, windows: Tensor) -> list[tuple[str, Check]]:
    checks = []
    for index, (block, x) in enumerate(zip(model.blocks, model.ffn_inputs(windows), strict=True)):
        w1, w2 = block.mlp.up_proj.weight.detach().bfloat16(), block.mlp.down_proj.weight.detach().bfloat16()
        checks += [(f"layer {index}: ", check) for check in verify_ffn(x.bfloat16(), w1, w2)]
    return checks


def _speed(seed: int, device: torch.device) -> list[speed.Timing]:
    if device.type != "cuda":
        reason = env.cuda_problem() or "the demo runs on the CPU as asked"
        print(f"\nNo speed table: {reason}.")
        return []
    print("\nFFN forward in ms (median, device time; verified before timing). 2:4: relu2_mlp, sparse at every")
    print("size to show where it loses. fp8: row-wise scales, weights quantised beforehand.")
    timings = [speed.measure(shape, seed) for shape in speed.SHAPES]
    rows = []
    for timing in timings:
        shape, ms = timing.shape, timing.ms
        rows.append(
            (
                f"{shape.name}, {shape.tokens} x {shape.dim} x {shape.hidden}",
                percent(timing.zeros, 0),
                *("-" if ms[name] is None else f"{ms[name]:.3f}" for name in speed.VARIANTS),
                *("-" if (times := gain(ms, precision)) is None else f"{times:.2f}x" for precision in ("bf16", "fp8")),
            )
        )
    header = ("tokens x D x F", "zeros %", *speed.VARIANTS, "gain bf16", "gain fp8")
    print(table(header, rows))
    print("gain: the best dense variant of the same precision divided by 2:4.")
    for note in dict.fromkeys(note for timing in timings for note in timing.notes):
        print(f"note: {note}")
    return timings
