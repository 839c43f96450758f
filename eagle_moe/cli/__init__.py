"""`eagle-moe`: the commands for people who use models. Everything heavy is imported when needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import eagle_moe
from eagle_moe.cli.asking import add_chat, add_serve, add_web
from eagle_moe.cli.experts import add_experts
from eagle_moe.cli.sharing import add_import, add_pull, add_release


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Mistakes of the person end in one line, code 2."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eagle-moe", description="Vision-language models with a mixture of vision experts."
    )
    parser.add_argument("--version", action="version", version=f"eagle-moe {eagle_moe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_experts(commands)
    add_chat(commands)
    add_serve(commands)
    add_web(commands)
    add_import(commands)
    add_pull(commands)
    add_release(commands)
    doctor = commands.add_parser("doctor", help="show versions and what is missing, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from eagle_moe.doctor import run_doctor

    return run_doctor()
