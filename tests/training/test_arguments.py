"""`--threads` is one option wherever there is one: checked, and set before the command begins."""

from __future__ import annotations

import pytest
import torch
from retrv_r1_training import cli


@pytest.mark.parametrize("command", ["base", "embedder", "align", "sft", "distill", "grpo", "passrate", "calibrate"])
def test_threads_are_set_in_every_stage(command, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    where = ["--out", str(tmp_path / "x")] if command in ("passrate", "calibrate") else ["--run", str(tmp_path)]
    argv = [command, str(tmp_path / "none.yaml"), *where]
    assert cli.main([*argv, "--threads", "3"]) == 1
    assert seen == [3]
    assert "expected a recipe, got no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*argv, "--threads", "0"])
    assert "argument --threads: expected a whole number of at least 1, got '0'" in capsys.readouterr().err


def test_commands_that_compute_nothing_have_no_threads(capsys):
    with pytest.raises(SystemExit):
        cli.main(["estimate", str(cli.RECIPES / "base.yaml"), "--threads", "1"])
    assert "unrecognized arguments: --threads" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--top-k"])
def test_a_first_stage_searches_one_query_at_least(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["first-stage", "data", "--queries", "q", "--pool", "p", "--out", "o", option, "0"])
    assert f"argument {option}: expected a whole number of at least 1" in capsys.readouterr().err
