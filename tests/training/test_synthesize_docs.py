"""Commands in docs/synthesize.md parse, and its first one runs, on files of the names it uses."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from retrv_r1_training import admit, chat_teacher, freetext, words_teacher
from retrv_r1_training.synthesize_cli import add_parser

PAGE = (Path(__file__).parents[2] / "docs" / "synthesize.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^retrv-r1-train .*$", PAGE, re.M)]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[2])
def test_the_commands_run(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Path("first-stage.trec").write_text("q Q0 1 1 -1 t\nq Q0 2 2 -2 t\n")
    Path("pool.jsonl").write_text('{"did": "1", "txt": "red ring"}\n{"did": "2", "txt": "blue ring"}\n')
    Path("queries.jsonl").write_text(json.dumps({"qid": "q", "query_txt": "red", "pos_cand_list": ["1"]}) + "\n")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(argv)
    assert args.main(args) == 0


def test_every_rejection_is_explained():
    sources = "".join(Path(module.__file__).read_text() for module in (admit, chat_teacher, freetext, words_teacher))
    names = set(re.findall(r'(?:Unreadable\(|return |rejected=|Written\(None, )"([a-z_]+)"', sources))
    assert len(names) > 12
    assert names <= set(re.findall(r"`([a-z_]+)`", PAGE))
