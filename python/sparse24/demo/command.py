"""The command `sparse24 demo`."""

import argparse
from pathlib import Path

from sparse24.demo.run import Settings, run
from sparse24.demo.training import TrainConfig
from sparse24.terminal import output_file


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="train a small transformer, run its FFNs dense and 2:4, verify and compare",
        description="Trains a small byte-level transformer with squared-ReLU FFNs on text of this machine, runs its "
        "FFNs dense and 2:4, and compares. Exit status 0: all outputs were verified; 1: one was wrong; 2: it could not "
        "run.",
    )
    parser.add_argument(
        "--steps",
        type=_positive(int),
        default=TrainConfig.steps,
        metavar="N",
        help="training steps (default: %(default)s, less than a minute on one core)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        default=Settings.seconds,
        metavar="S",
        help="stop training after S seconds (default: %(default)g); inf: never",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and batches (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, or folders of .py, .txt, .md and .rst files (default: the Python standard library)",
    )
    parser.add_argument("--out", type=output_file, default=None, metavar="JSON", help="write all figures to this file")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    return run(
        Settings(
            steps=args.steps,
            seconds=args.seconds,
            seed=args.seed,
            device=args.device,
            text=tuple(args.text),
            out=args.out,
        )
    )


def _positive(kind):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    return parse
