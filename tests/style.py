"""Size limits and house rules that no linter knows; run by `make check`.

Functions: p90 at most 40 lines, none over 80. Classes at most 250, files at most 400. No `print` outside the command line.
`**kwargs` only in `with_options` and where a framework forces it, with the reason as a comment on that line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

ROOTS = ("retrv_r1_retriever", "training", "integrations")
FUNCTION_P90, FUNCTION_MAX, CLASS_MAX, FILE_MAX = 40, 80, 250, 400
KWARGS_ALLOWED = {"with_options"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def length(node: FunctionNode | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def may_print(path: Path) -> bool:
    return "cli" in path.parts or path.stem == "cli"


def is_print(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def takes_kwargs_unexplained(node: FunctionNode, lines: list[str]) -> bool:
    if node.args.kwarg is None or node.name in KWARGS_ALLOWED:
        return False
    return "#" not in lines[node.args.kwarg.lineno - 1]


def check_file(path: Path, source: str) -> tuple[list[str], list[int]]:
    """Problems of one file, and the lengths of its functions."""
    lines = source.splitlines()
    problems, lengths = [], []
    if len(lines) > FILE_MAX:
        problems.append(f"{path}: {len(lines)} lines, at most {FILE_MAX}: split the file")
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, FunctionNode):
            lengths.append(length(node))
            if length(node) > FUNCTION_MAX:
                problems.append(
                    f"{path}:{node.lineno}: {node.name} has {length(node)} lines, at most {FUNCTION_MAX}: split it"
                )
            if takes_kwargs_unexplained(node, lines):
                problems.append(f"{path}:{node.lineno}: {node.name} takes **kwargs: name the parameters")
        elif isinstance(node, ast.ClassDef) and length(node) > CLASS_MAX:
            problems.append(
                f"{path}:{node.lineno}: class {node.name} has {length(node)} lines, at most {CLASS_MAX}: split it"
            )
        elif is_print(node) and not may_print(path):
            problems.append(f"{path}:{node.lineno}: print in library code: return, log or report progress instead")
    return problems, lengths


def p90(lengths: list[int]) -> int:
    return sorted(lengths)[int(0.9 * (len(lengths) - 1))] if lengths else 0


def python_files(root: Path) -> Iterator[Path]:
    for name in ROOTS:
        yield from sorted((root / name).rglob("*.py"))


def main(root: Path) -> int:
    problems: list[str] = []
    lengths: list[int] = []
    for path in python_files(root):
        found, sizes = check_file(path.relative_to(root), path.read_text(encoding="utf-8"))
        problems += found
        lengths += sizes
    if p90(lengths) > FUNCTION_P90:
        problems.append(f"90th percentile of function length is {p90(lengths)} lines, at most {FUNCTION_P90}")
    print("\n".join(problems) or f"style: {len(lengths)} functions, p90 {p90(lengths)} lines, all within limits")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
