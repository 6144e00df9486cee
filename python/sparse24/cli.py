"""The command line: `sparse24 info`, `demo` and `bench`, or `python -m sparse24 ...`."""

import argparse
import sys

from sparse24 import env
from sparse24.bench import command as bench
from sparse24.demo import command as demo


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
    print(env.summary())
    print()
    env.print_env()
    print()
    env.print_mm_configs()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse24", description="2:4 activation sparsity")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what was built, what runs on this machine, and the GEMM configurations")
    info.set_defaults(run=_info)
    demo.add_to(commands)
    bench.add_to(commands)
    return parser
