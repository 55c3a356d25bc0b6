"""`plot`: our loop's rows and TRL's, several stages, a log that a kill cut off."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from retrv_r1_training import plot
from retrv_r1_training.cli import main

OURS = [
    {"stage": "align", "step": n, "loss": 2.0 / n, "relation": 0.1 * n, "val_relation": float("nan")} for n in (1, 2, 3)
]
TRL = [
    {"stage": "grpo", "step": n, "loss": 0.1, "reward": 1.0, "lambda": n / 4, "correct": 0.5, "inspections": 2.0,
     "tokens": 80.0, "val_R@1_all": 0.4}
    for n in range(1, 5)
]  # fmt: skip


def write(run, rows, tail=""):
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run


def test_stages_follow_one_another_and_a_stage_run_anew_begins_again():
    rows, stages = plot.follow([*OURS, *OURS, *TRL])
    assert [(s.name, s.start, s.end) for s in stages] == [("align", 0, 3), ("align", 3, 6), ("grpo", 6, 10)]
    assert plot.curves(rows, plot.PANELS["lambda"]) == {"lambda": [(7, 0.25), (8, 0.5), (9, 0.75), (10, 1.0)]}
    accuracy = plot.curves(rows, plot.PANELS["accuracy"])
    assert list(accuracy) == ["relation", "correct", "val_R@1_all"], "a NaN is no point"
    assert [at for at, _ in accuracy["relation"]] == [1, 2, 3, 4, 5, 6]


def test_one_panel_for_each_quantity_that_was_logged(tmp_path, monkeypatch):
    figures = []
    make = plot._figure
    monkeypatch.setattr(plot, "_figure", lambda *a: figures.append(make(*a)) or figures[-1])
    run = write(tmp_path / "run", [*OURS, *TRL], tail='{"stage": "grpo", "st')
    assert main(["plot", str(run)]) == 0
    names = [axis.get_ylabel().partition("\n")[0] for axis in figures[0].axes]
    assert names == list(plot.PANELS)
    with Image.open(run / "plot.png") as picture:
        assert picture.size[0] == 1300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert main(["plot", str(write(tmp_path / "short", OURS)), "--out", str(tmp_path / "x.png")]) == 0
    assert [axis.get_ylabel().partition("\n")[0] for axis in figures[1].axes] == ["loss", "accuracy"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[1].axes[0].get_lines()}
    assert pytest.approx([y for _, y in next(iter(lines.values()))]) == [2.0, 1.0, 2.0 / 3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "expected a run's log.jsonl, got no such file"),
        ("{}\n", "rows with a loss, got none"),
        ("x\n{}\n", "log.jsonl:1: expected JSON"),
        ('{"stage": "gr\xfcn"}\n{}\n', "log.jsonl:1: expected JSON"),
        ('{"step": 1, "loss": 1}\n{"step": "x"}\n', "log.jsonl:2: step: expected a whole number, got 'x'"),
        ('{"step": null}\n', "log.jsonl:1: step: expected a whole number, got None"),
    ],
)
def test_what_is_no_log_is_named(tmp_path, capsys, lines, message):
    run = write(tmp_path / "run", [])
    (run / "log.jsonl").unlink()
    if lines:
        (run / "log.jsonl").write_text(lines, encoding="latin-1")
    assert main(["plot", str(run)]) == 1
    assert message in capsys.readouterr().err
