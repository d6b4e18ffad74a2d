"""The command line: ``fusedres COMMAND``, also ``python -m fusedres COMMAND``.

A command is a module here with ``add_parser(subparsers)``, named after itself, and ``run(args) -> int``, which returns
0 only if everything asked for held. Wrong arguments are one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from .._version import __version__
from ..training.config import ConfigError, TrainingError

COMMANDS = ("info", "verify", "demo", "train", "traffic", "bench")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _load_commands() -> dict[str, ModuleType]:
    present = [name for name in COMMANDS if importlib.util.find_spec(f".{name}", __name__) is not None]
    return {name: importlib.import_module(f".{name}", __name__) for name in present}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = OneLineParser("fusedres", description="Fused batch norm, residual and ReLU for ResNets in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedres {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = _load_commands()
    for module in commands.values():
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error(f"a command is needed: {', '.join(commands)}")
    try:
        return commands[args.command].run(args)
    except ConfigError as error:
        return _fail(args.command, error, 2)
    except TrainingError as error:
        return _fail(args.command, error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `fusedres info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(command: str, error: Exception, code: int) -> int:
    message = str(error).splitlines()[-1]  # one that comes from a worker process carries its traceback in front
    print(f"fusedres {command}: error: {message}", file=sys.stderr)
    return code
