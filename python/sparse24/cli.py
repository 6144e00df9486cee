"""The command line: `sparse24 info`, `demo`, `analyze` and `bench`, or `python -m sparse24 ...`."""

import argparse
import io
import os
import sys

from sparse24 import env
from sparse24.analyze import command as analyze
from sparse24.bench import command as bench
from sparse24.demo import command as demo


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done and verified, 1 verification failed, 2 could not run."""
    args = _parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141  # that of a program which the signal ends
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _info(args: argparse.Namespace) -> int:
    text = io.StringIO()
    print(env.summary(), end="\n\n", file=text)
    for subject, sentence in env.abilities().items():
        print(f"{subject:<21}  {sentence}", file=text)
    print(file=text)
    env.print_env(text)
    print(file=text)
    env.print_mm_configs(text)
    sys.stdout.write(text.getvalue())  # at once: whoever reads the first line alone closes no pipe that is written to
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse24", description="2:4 activation sparsity")
    parser.add_argument("--version", action="version", version=f"sparse24 {env.build_info()['version']}")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what was built, what runs on this machine, and the GEMM configurations")
    info.set_defaults(run=_info)
    demo.add_to(commands)
    analyze.add_to(commands)
    bench.add_to(commands)
    return parser
