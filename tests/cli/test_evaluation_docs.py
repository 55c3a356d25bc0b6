"""Every command of docs/evaluation.md, run in order in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from tests.cli.conftest import Run
from tests.evaluation.mbeir_root import write_root

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_every_command_runs(workplace: Path, run: Run) -> None:
    run("index", "items")
    rows = [
        {"id": "a", "text": "two red circle", "positives": ["card1"]},
        {"id": "b", "image": "card0.png", "positives": ["card0"]},
    ]
    Path("queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("unlabelled.csv").write_text("id,text\n1,two red circle\n")
    Path("bm25.txt").write_text("a Q0 note 1 2 bm25\na Q0 card1 2 1 bm25\nb Q0 card0 1 1 bm25\n")
    Path("qrels.txt").write_text("a 0 card1 1\nb 0 card0 1\n")
    write_root(workplace / "M-BEIR", 8, 1)
    commands = [
        shlex.split(line)
        for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
        for line in block.splitlines()
    ]
    assert len(commands) == 6
    for command in commands:
        if command[1:3] == ["eval", "compare"]:  # of the two modes, each in a file of its own
            Path("reranked.retrv-r1.K20.always.hybrid.txt").rename("reranked.txt")
        ran = run(*command[1:])
        assert ran.code == 0, f"{' '.join(command)}\n{ran.err}"
    average = next(Path("mbeir-eval").glob("local.*/results.tsv")).read_text().splitlines()[-1].split("\t")[-1]
    assert 0 <= float(average) <= 100
    assert "Configuration" in Path("mbeir.html").read_text()
