"""Command line: `python -m sparse24 info` and `python -m sparse24 demo`."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done and verified, 1 verification failed, 2 could not run."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _info(args: argparse.Namespace) -> int:
    from sparse24 import env

    env.print_env()
    print()
    env.print_mm_configs()
    return 0


def _demo(args: argparse.Namespace) -> int:
    from sparse24.demo.run import Settings, run

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparse24", description="2:4 activation sparsity")
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="what was built, and the sparse GEMM configurations")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="train a small transformer, run its FFNs dense and 2:4, verify and compare",
        description="Trains a small byte-level transformer with squared-ReLU FFNs on text of this machine, runs its "
        "FFNs dense and 2:4, and compares. Exit status 0: all outputs were verified; 1: one was wrong; 2: it could not "
        "run.",
    )
    demo.add_argument(
        "--steps",
        type=_positive(int),
        default=600,
        metavar="N",
        help="training steps (default: 600, about a minute on one core)",
    )
    demo.add_argument(
        "--seconds",
        type=_positive(float),
        default=90.0,
        metavar="S",
        help="stop training after S seconds (default: 90); inf: never",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the weights and batches (default: 0)")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    demo.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, or folders of .py, .txt, .md and .rst files (default: the Python standard library)",
    )
    demo.add_argument("--out", type=Path, default=None, metavar="JSON", help="write all figures to this file")
    demo.set_defaults(run=_demo)
    return parser


def _positive(kind):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
