"""Commands of the benchmarks, in this process."""

import contextlib
import importlib
import io

from bench.__main__ import COMMANDS


def run(name: str, *arguments, status: int = 0) -> str:
    """What `python -m bench name ...` prints, if it ends with `status`."""
    main = importlib.import_module(f"bench.{COMMANDS[name]}").main
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            ended = main([str(argument) for argument in arguments])
        except SystemExit as end:  # of argparse, or a sentence for status 1
            ended = end.code if isinstance(end.code, int) else 1
            print("" if isinstance(end.code, int) else end.code)
    assert ended == status, printed.getvalue()
    return printed.getvalue()
