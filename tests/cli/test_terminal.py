from __future__ import annotations

import argparse
import io
import json
import math
from importlib.metadata import EntryPoint

import pytest

from retrv_r1_retriever.cli import app, terminal
from retrv_r1_retriever.cli.terminal import Progress, one_line, print_table, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal_is_a_few_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(stream, every_s=60)
    for done in range(0, 101, 10):
        progress("indexing", done, 100)
    assert [" ".join(line.split()[:2]) for line in stream.getvalue().splitlines()] == [
        "indexing 0/100",
        "indexing 100/100",
    ]


def test_progress_on_a_terminal_redraws_one_line() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress("indexing", 50, 100)
    progress("indexing", 100, 100)
    assert stream.getvalue().count("\n") == 1
    assert "█" * 24 in stream.getvalue()


def test_progress_without_a_total() -> None:
    stream = io.StringIO()
    Progress(stream)("reading", 1234)
    assert "1,234" in stream.getvalue()


def test_table_aligns_numbers_right_and_cuts_the_last_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table(("rank", "score", "document"), [("1", "0.5", "a" * 60), ("10", "–", "b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "   1    0.5  " + "a" * 26 + "…"
    assert lines[2] == "  10      –  b"


def test_the_heads_of_a_wide_table_of_numbers_take_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ("", "first stage", "not judged", "inspection"), [("K=20 always/hybrid", "0.5", "10", "2")]
    monkeypatch.setenv("COLUMNS", "55")
    print_table(*table)
    monkeypatch.setenv("COLUMNS", "54")
    print_table(*table)
    assert capsys.readouterr().out.splitlines() == [
        "                    first stage  not judged  inspection",
        "K=20 always/hybrid          0.5          10           2",
        "                    first     not",
        "                    stage  judged  inspection",
        "K=20 always/hybrid    0.5      10           2",
    ]


def test_heads_that_differ_at_their_end_are_never_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modes of `eval mbeir`, beside a column of words and an average that is refused."""
    table = (
        ("", "metric", "K=50 never/logits", "K=50 never/hybrid"),
        [("CIRR", "R@5", "20.8", "27.1"), ("average", "", "refused", "refused")],
    )
    monkeypatch.setenv("COLUMNS", "45")
    print_table(*table)
    monkeypatch.setenv("COLUMNS", "40")
    print_table(*table)
    assert capsys.readouterr().out.splitlines() == [
        "                 K=50          K=50",
        "         metric  never/logits  never/hybrid",
        "CIRR     R@5     20.8          27.1",
        "average          refused       refused",
        "                 K=50     K=50",
        "                 never/   never/",
        "         metric  logits   hybrid",
        "CIRR     R@5     20.8     27.1",
        "average          refused  refused",
    ]
    print_table(("", *(f"K={k} never/hybrid" for k in range(10, 20))), [("a", *"0123456789")])
    assert [len(line.split()) for line in capsys.readouterr().out.splitlines()] == [10, 10, 10, 11]


def test_control_characters_are_removed() -> None:
    assert printable("a\x1b[2Jb\u202ec\nd") == "a [2Jb c\nd"
    assert one_line("a\n\n b\tc", 4) == "a b…"


def test_another_package_adds_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = []

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--port", type=int)
        parser.set_defaults(run=lambda args: args.port)

    class Entry(EntryPoint):
        def load(self) -> object:
            loaded.append(self.name)
            return add

    entries = [Entry("mcp", "x:add", app.GROUP), Entry("index", "x:add", app.GROUP)]
    monkeypatch.setattr(app, "entry_points", lambda group: entries)
    with pytest.raises(SystemExit, match="0"):
        app.main(["--help"])
    assert "mcp" in capsys.readouterr().out
    assert loaded == [], "listing commands must not load what they bring along"
    assert app.main(["mcp", "--port", "7"]) == 7
    assert loaded == ["mcp"]


def test_an_unexpected_error_is_one_message_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def boom(args: argparse.Namespace) -> int:
        raise ZeroDivisionError("three\x1b[2J")

    def add(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(run=boom)

    monkeypatch.setattr(app, "COMMANDS", {"boom": ("fail", add)})
    assert app.main(["boom"]) == 1
    assert capsys.readouterr().err.startswith("retrv-r1: unexpected ZeroDivisionError: three [2J.")
    with pytest.raises(ZeroDivisionError, match="three"):
        app.main(["boom", "--debug"])
    monkeypatch.setattr(app, "COMMANDS", {"boom": ("fail", lambda p: p.set_defaults(run=_interrupted))})
    assert app.main(["boom"]) == 130


def _interrupted(args: argparse.Namespace) -> int:
    raise KeyboardInterrupt


def test_json_holds_no_number_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": [-math.inf, math.nan, 1.5], "b": (True, None, "NaN")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, None, 1.5],
        "b": [True, None, "NaN"],
    }


def test_the_time_left_is_told_in_a_unit_a_person_waits_in() -> None:
    lines = [Progress(io.StringIO())._line("x", 10, total, 100.0) for total in (15, 100, 10_010)]
    assert [line.split("  ")[-1] for line in lines] == ["50 s left", "15 min left", "27.8 h left"]
    assert "0.1/s" in lines[0]
