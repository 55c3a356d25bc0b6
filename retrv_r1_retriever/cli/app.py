"""Commands, exit codes and error messages of `retrv-r1`.

Exit codes: 0 done, 1 something failed while working (a fallback to first-stage order included), 2 the input or the usage is
wrong or nothing is indexed yet, 130 interrupted.
Other packages add a command through the entry-point group `retrv_r1.commands`: its name is the command, its object a function
`add(parser)` that declares arguments and sets `run`, a function from the parsed arguments to an exit code.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, NoReturn

from retrv_r1_retriever import __version__
from retrv_r1_retriever.cli import (
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    evaluate_mbeir,
    index,
    memory,
    search,
    serve,
    view,
)
from retrv_r1_retriever.cli.findings import INDEX_FIRST
from retrv_r1_retriever.cli.terminal import printable
from retrv_r1_retriever.config import FILE_NAME
from retrv_r1_retriever.errors import InputError, NotIndexedError, OptionsError, RetrvR1Error, SchemaError
from retrv_r1_retriever.trace import strict_json

GROUP = "retrv_r1.commands"
AddArguments = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, AddArguments]] = {
    "index": ("put pictures and texts into a store", index.add),
    "search": ("find, rerank and explain", search.add_search),
    "rerank": ("order given files or a JSONL of documents", search.add_rerank),
    "memory": ("plan, build, switch and drop candidate memory beside a collection", memory.add),
    "eval": ("measure first stage and reranking on your own queries; or `eval mbeir`, `eval compare`", evaluate.add),
    "view": ("show stored traces as one page", view.add),
    "demo": ("the whole way on generated product cards", demo.add),
    "serve": ("answer over HTTP: rerank, search, metrics", serve.add),
    "bench": ("time two tokens per candidate against every candidate in full, on this machine", bench.add),
    "doctor": ("check installation, checkpoint and store, and say what to change", doctor.add),
}
#: Commands of two words: the second stands where the first alone would take a file.
TWO_WORDS: dict[tuple[str, str], tuple[str, AddArguments]] = {
    ("eval", "mbeir"): ("run and score the M-BEIR benchmark", evaluate_mbeir.add),
    ("eval", "compare"): ("compare two runs over the same queries, with intervals and p-values", compare.add),
}

#: Entry point -> what it is, of packages of this distribution: to ask them, they would have to be loaded.
BESIDE = {"retrv_r1_mcp.command:add": "tools for agents over MCP: search, rerank, inspect"}


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
    warnings.filterwarnings("ignore", "Image size .* decompression bomb")  # [images] max_pixels decides, and says so
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
    """Raises where argparse would print and exit: with --json the message has another form.

    second: parsers that take over when their word comes first
    """

    second: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args and args[0] in self.second:
            return self.second[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(self, message)


def _report_error(error: Exception, as_json: bool) -> int:
    """One message, no traceback. Wrong input is 2, everything else 1."""
    message = str(error)
    if not isinstance(error, RetrvR1Error):
        message = f"unexpected {type(error).__name__}: {message}. Run again with --debug and report the traceback."
    elif isinstance(error, NotIndexedError) and error.found:
        message = f"{error.found}. {INDEX_FIRST}"
    if as_json:
        print(strict_json({"error": {"type": type(error).__name__, "message": message}}))
    else:
        print(f"retrv-r1: {printable(message)}", file=sys.stderr)
    return 2 if isinstance(error, InputError | OptionsError | SchemaError | NotIndexedError) else 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="retrv-r1", description="A reranking retriever that reads, opens and decides.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (help_text, add) in COMMANDS.items():
        command = _command(commands, name, help_text)
        add(command)
        command.second = {word: _second(command, word) for first, word in TWO_WORDS if first == name}
    asked = next((a for a in arguments if not a.startswith("-")), None)
    for entry in entry_points(group=GROUP):
        if entry.name in COMMANDS:
            continue  # nobody replaces a command of ours
        added_by = f"added by {entry.dist.name if entry.dist else entry.value}"
        command = _command(commands, entry.name, BESIDE.get(entry.value, added_by))
        if entry.name == asked:  # loading is left until needed: a training package brings torch along
            entry.load()(command)
    return parser


def _second(first: _Parser, word: str) -> _Parser:
    help_text, add = TWO_WORDS[first.prog.split()[-1], word]
    parser = _with_shared(_Parser(prog=f"{first.prog} {word}", description=_sentence(help_text)))
    add(parser)
    return parser


def _command(commands: argparse._SubParsersAction[_Parser], name: str, help_text: str) -> _Parser:
    return _with_shared(commands.add_parser(name, help=help_text, description=_sentence(help_text)))


def _sentence(help_text: str) -> str:
    return help_text[0].upper() + help_text[1:] + "."


def _with_shared(command: _Parser) -> _Parser:
    command.add_argument("--config", default=FILE_NAME, metavar="FILE", help=f"settings (default: {FILE_NAME})")
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command
