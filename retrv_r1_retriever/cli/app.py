"""Commands, exit codes and error messages of `retrv-r1`.

Exit codes: 0 done, 1 something failed while working (a fallback to first-stage order included), 2 the input or the usage is
wrong or nothing is indexed yet, 130 interrupted.
Other packages add a command through the entry-point group `retrv_r1.commands`: its name is the command, its object a function
`add(parser)` that declares arguments and sets `run`, a function from the parsed arguments to an exit code.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import NoReturn

from retrv_r1_retriever import __version__
from retrv_r1_retriever.cli import demo, doctor, evaluate, index, memory, search, serve, view
from retrv_r1_retriever.cli.terminal import printable
from retrv_r1_retriever.config import FILE_NAME
from retrv_r1_retriever.errors import InputError, NotIndexedError, OptionsError, RetrvR1Error, SchemaError

GROUP = "retrv_r1.commands"
AddArguments = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, AddArguments]] = {
    "index": ("put pictures and texts into a store", index.add),
    "search": ("find, rerank and explain", search.add_search),
    "rerank": ("order given files or a JSONL of documents", search.add_rerank),
    "memory": ("plan, build, switch and drop candidate memory beside a collection", memory.add),
    "eval": ("measure first stage and reranking on your own queries", evaluate.add),
    "view": ("show stored traces as one page", view.add),
    "demo": ("the whole way on generated product cards", demo.add),
    "serve": ("answer over HTTP: rerank, search, metrics", serve.add),
    "doctor": ("check installation, checkpoint and store, and say what to change", doctor.add),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
    except _UsageError as error:
        if "--json" in arguments:
            return _report_error(OptionsError(f"{error}. See: {error.parser.prog} --help"), True)
        error.parser.print_usage(sys.stderr)
        print(f"{error.parser.prog}: error: {error}", file=sys.stderr)
        return 2
    # What it warns about, a fallback, is the first line of what is printed.
    logging.getLogger("retrv_r1_retriever.reranker").setLevel(logging.ERROR)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `retrv-r1 search ... | head`: not an error, and nothing may be written any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        return _report_error(error, args.json)


class _UsageError(Exception):
    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit: with --json the message has another form."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(self, message)


def _report_error(error: Exception, as_json: bool) -> int:
    """One message, no traceback. Wrong input is 2, everything else 1."""
    message = str(error)
    if not isinstance(error, RetrvR1Error):
        message = f"unexpected {type(error).__name__}: {message}. Run again with --debug and report the traceback."
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message}}, ensure_ascii=False))
    else:
        print(f"retrv-r1: {printable(message)}", file=sys.stderr)
    return 2 if isinstance(error, InputError | OptionsError | SchemaError | NotIndexedError) else 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="retrv-r1", description="A reranking retriever that reads, opens and decides.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (help_text, add) in COMMANDS.items():
        add(_command(commands, name, help_text))
    asked = next((a for a in arguments if not a.startswith("-")), None)
    for entry in entry_points(group=GROUP):
        if entry.name in COMMANDS:
            continue  # nobody replaces a command of ours
        command = _command(commands, entry.name, f"added by {entry.dist.name if entry.dist else entry.value}")
        if entry.name == asked:  # loading is left until needed: a training package brings torch along
            entry.load()(command)
    return parser


def _command(commands: argparse._SubParsersAction[_Parser], name: str, help_text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    command.add_argument("--config", default=FILE_NAME, metavar="FILE", help=f"settings (default: {FILE_NAME})")
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command
