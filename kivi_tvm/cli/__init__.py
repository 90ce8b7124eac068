"""The command line: which commands there are, and how errors reach the user.

A command is a module of this package with `add_parser(subparsers)` and `run(args) -> int`. Only the
command that was asked for is imported, and it imports torch and tvm when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kivi_tvm.errors import UserError
from kivi_tvm.host import installed_version

COMMANDS = {
    "demo": "generate text with a real model and a 2-bit cache on this machine",
    "tune": "search for faster schedules on a device, and keep what is found",
    "bench": "measure kernels, call overhead and generation against other implementations",
    "eval": "compare predictions of cache settings with those at full precision",
    "inspect": "show what a compiled artifact holds, and its CUDA machine code",
    "info": "show paths, versions, compiler, devices, and what is cached and tuned",
}
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str or None
        Arguments without the program's name; default the process's.

    Returns
    -------
    int
        Exit status: 0, what the command returned, or 2 after one line on stderr for a mistake of
        the user's. Other errors keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    try:
        return int(import_module(f"{__name__}.{args.command}").run(args))
    except UserError as error:
        print(f"kivi-tvm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        # The reader has left (`| head`); the interpreter must not fail again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of `command` and one line of help for each of the others."""
    parser = argparse.ArgumentParser(
        prog="kivi-tvm",
        description="A 2-bit KV cache for language models, compiled with TVM TensorIR.",
    )
    version = installed_version("kivi-tvm") or "unknown (not installed)"
    parser.add_argument("--version", action="version", version=f"kivi-tvm {version}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == command:
            import_module(f"{__name__}.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser
