"""`grpo`, `passrate` and `calibrate` through the command line, on a shrunken catalogue and the shipped miniature."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("trl")

from retrv_r1_training import cli, grpo, grpo_commands
from retrv_r1_training.calibrate import Measured, NoneThreshold, calibrate
from retrv_r1_training.candidate_reader import CandidateReader
from retrv_r1_training.grpo_commands import GrpoRecipe
from retrv_r1_training.overrides import load
from retrv_r1_training.run_folder import locked
from retrv_r1_training.stage_checkpoint import write_manifest
from retrv_r1_training.unreadable import UnreadablePicture

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.model.checkpoint import load_checkpoint, read_manifest
from tests.training.parts import data_block, small_catalogue, with_lists

SHIPPED = cli.RECIPES / "miniature-grpo.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The shipped recipe, smaller, over lists of six, the positive missing from every fifth."""
    folder = tmp_path_factory.mktemp("grpo")
    values = yaml.safe_load(SHIPPED.read_text())
    root = small_catalogue(folder / "data", queries=4)
    values["data"] = data_block(root, 6, with_lists) | {"validation_queries": 12}
    values["grpo"] |= {"max_new_tokens": 90, "batch_size": 2, "micro_batch": 8}
    del values["grpo"]["save_every"]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def run(recipe):
    """Trained for two steps."""
    assert grpo_run(recipe) == 0
    return recipe.parent / "run"


def grpo_run(recipe, *sets):
    folder = recipe.parent / "run"
    return cli.main(["grpo", str(recipe), "--run", str(folder), "--threads", "1", "--set", "grpo.steps=2", *sets])


def test_grpo_leaves_a_checkpoint_with_the_same_memory(recipe, run, capsys):
    before, after = read_manifest(_miniature()), load_checkpoint(run / "checkpoint", device="cpu").manifest
    assert after.memory_digest == before.memory_digest
    assert after.checkpoint_digest != before.checkpoint_digest
    assert after.embedder_digest == before.embedder_digest
    assert (after.trained_min_k, after.trained_top_k) == (before.trained_min_k, 6)
    assert before.trained_min_k == 2
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["lambda"] for row in rows] == [0.0, 0.5]
    assert {"groups_equal", "inspections", "correct", "format"} <= set(rows[0])
    assert {"val_R@1_all", "val_R@1_coarse", "val_opened_fine"} <= set(rows[-1])
    assert load(GrpoRecipe, run / "recipe.yaml").grpo.steps == 2, "the resolved recipe is kept"
    assert grpo_run(recipe, "--set", "grpo.steps=3") == 1
    assert "the recipe this folder was started with" in capsys.readouterr().err


def test_grpo_called_again_goes_on_from_its_states_and_leaves_a_finished_run_alone(recipe, run, monkeypatch, caplog):
    """A kill between the last state and the checkpoint, then none."""
    monkeypatch.setattr(grpo._Source, "__call__", lambda *a: pytest.fail("trains again"))
    before = read_manifest(run / "checkpoint")
    shutil.rmtree(run / "checkpoint")
    assert grpo_run(recipe) == 0
    assert read_manifest(run / "checkpoint") == before
    log = (run / "log.jsonl").read_text()
    with caplog.at_level("INFO"):
        assert grpo_run(recipe) == 0
    assert "is finished" in caplog.text
    assert (run / "log.jsonl").read_text() == log


def test_passrate_names_the_solvable_hard_queries(recipe, capsys, caplog):
    out = recipe.parent / "rates.jsonl"
    argv = ["passrate", str(recipe), "--samples", "3", "--limit", "5", "--threads", "1", "--out", str(out)]
    assert cli.main(argv) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert row["pass_rate"] == row["solved"] / 3
        assert row["hard"] == (0 < row["solved"] < 3)
    lines = out.read_text().splitlines(keepends=True)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        inner = grpo_commands.pass_rates
        patch.setattr(
            grpo_commands, "pass_rates",
            lambda runner, tasks, *a: inner(runner, [asked.append(t.id) or t for t in tasks], *a),
        )  # fmt: skip
        out.write_text("".join(lines[:3]) + lines[3][:20])  # a kill
        assert cli.main(argv) == 0
        assert asked == [row["id"] for row in rows[3:]]
        assert out.read_text() == "".join(lines)
        out.write_text("".join(lines[1:]))
        assert cli.main(argv) == 0
    assert asked[2:] == [rows[0]["id"]], "by id, not by count"
    assert sorted(out.read_text().splitlines()) == sorted(line.strip() for line in lines)
    with locked(out.parent, ".rates.jsonl.lock"):
        assert cli.main(argv) == 1
    assert "rates.jsonl.lock: expected no other run at work here, got process" in capsys.readouterr().err
    assert cli.main([*argv, "--set", "seed=1"]) == 1
    assert "what this file was started with" in capsys.readouterr().err
    grpo = ["grpo", str(recipe), "--run", str(recipe.parent / "no"), "--threads", "1", "--set", f"hard={out}"]
    for hard, message in (
        (False, "expected queries solved sometimes, not always, got none among 5"),
        (True, f"hard {out}: expected ids of the training queries, got none of its 1 hard ids among them"),
        ("no", "expected rows of `retrv-r1-train passrate`, got a row without id, or without hard: true or false: {"),
    ):
        out.write_text("".join(json.dumps(r | {"hard": hard, "id": "90:gone"}) + "\n" for r in rows))
        assert cli.main(grpo) == 1
        assert message in capsys.readouterr().err
        assert "rates are those of checkpoint" not in caplog.text
        shutil.rmtree(recipe.parent / "no")
    out.write_text("no JSON\n")
    out.with_suffix(".yaml").write_text("checkpoint_digest: other\n")
    assert cli.main(grpo) == 1
    assert "the rates are those of checkpoint other, training starts at " in caplog.text
    assert "expected rows of `retrv-r1-train passrate`" in capsys.readouterr().err


def test_pass_rates_of_other_lists_are_refused_and_more_queries_may_be_asked(recipe, tmp_path, capsys):
    values, out = yaml.safe_load(recipe.read_text()), tmp_path / "rates.jsonl"
    lists = tmp_path / "train.trec"
    shutil.copy(values["data"]["train"][0]["lists"], lists)
    values["data"]["train"][0]["lists"] = str(lists)
    values["hard"] = str(out)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(values))

    def asked(limit, *sets):
        argv = ["passrate", str(own), "--samples", "1", "--limit", str(limit), "--threads", "1", "--out", str(out)]
        return cli.main([*argv, *sets]), [json.loads(line)["id"] for line in out.read_text().splitlines()]

    rc, first = asked(1)
    assert (rc, len(first)) == (0, 1)
    rc, more = asked(3, "--set", "hardware.gpus=4")
    assert (rc, more[:1], len(set(more))) == (0, first, 3)
    lists.write_text("".join(lists.read_text().splitlines(keepends=True)[1:]))
    assert asked(3) == (1, more)
    assert "train.trec was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-cost", "-5"), ("--max-cost", "nan"), ("--max-false-none", "7"), ("--max-cost", "x"), ("--threads", "0")],
)
def test_calibrate_takes_shares_only(recipe, capsys, option, value):
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(recipe), "--checkpoint", "nowhere", f"{option}={value}"])
    assert f"argument {option}: expected a" in capsys.readouterr().err


def test_pass_rates_of_other_weights_are_refused(recipe, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "rates.jsonl"
    shutil.copytree(_miniature(), folder)
    argv = ["passrate", str(recipe), "--samples", "1", "--limit", "1", "--threads", "1", "--out", str(out)]
    argv += ["--set", f"checkpoint={folder}"]
    assert cli.main(argv) == 0
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, checkpoint_digest="0123"))
    assert cli.main(argv) == 1
    assert "expected what this file was started with, got" in capsys.readouterr().err
    write_manifest(folder, manifest)
    assert cli.main(argv) == 0
    out.with_suffix(".yaml").unlink()
    assert cli.main(argv) == 1
    assert "expected what this file was started with, got no such file" in capsys.readouterr().err


def test_a_list_that_cannot_be_read_gets_no_pass_rate(recipe, tmp_path, monkeypatch):
    """And no other is measured twice in its place."""
    values = yaml.safe_load(recipe.read_text())
    queries = Path(values["data"]["root"], values["data"]["train"][1]["queries"])
    broken = [json.loads(line) for line in queries.read_text().splitlines()]
    read = CandidateReader.query

    def query(self, asked):
        if asked.content.image == broken[0]["query_img_path"]:
            raise UnreadablePicture("image of it: expected a picture, got none. Fix it.")
        return read(self, asked)

    monkeypatch.setattr(CandidateReader, "query", query)
    out = tmp_path / "rates.jsonl"
    assert cli.main(["passrate", str(recipe), "--samples", "1", "--threads", "1", "--out", str(out)]) == 0
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 15
    assert broken[0]["qid"] not in ids
    assert broken[1]["qid"] in ids
    argv = ["passrate", str(recipe), "--samples", "1", "--threads", "1", "--out", str(tmp_path / "strict.jsonl")]
    assert cli.main([*argv, "--set", "data.max_bad_share=0.05"]) == 1


def test_only_hard_queries_become_lists(recipe, tmp_path):
    opened = grpo_commands._Opened.of(load(GrpoRecipe, recipe), _miniature())
    every = opened.data.training(opened.reader, 0.0, "none")
    ids = frozenset(every[n].id for n in (1, 4))
    few = opened.data.training(opened.reader, 0.0, "none", ids)
    assert [few[n].id for n in range(len(few))] == [every[n].id for n in (1, 4)]
    assert [c.document.id for c in few[1].prompt.candidates] == [c.document.id for c in every[4].prompt.candidates]


def test_calibrate_writes_both_thresholds_and_no_digest_changes(recipe):
    folder = recipe.parent / "calibrated"
    shutil.copytree(_miniature(), folder)
    before = read_manifest(folder)
    out = recipe.parent / "calibration.json"
    assert cli.main(["calibrate", str(recipe), "--checkpoint", str(folder), "--threads", "1", "--out", str(out)]) == 0
    after, found = read_manifest(folder), json.loads(out.read_text())
    assert after.think_margin == found["margin"]
    assert after.none_margin == found["none"]["margin"]
    assert found["none"]["unanswerable"] > 0
    assert set(found["skipped"]) == {"all", "coarse", "fine"}
    assert after.checkpoint_digest == before.checkpoint_digest
    assert load_checkpoint(folder, device="cpu").manifest.think_margin == after.think_margin


def test_calibrate_writes_into_no_checkpoint_that_was_lent(recipe, tmp_path, monkeypatch, capsys):
    shipped = (_miniature() / "retrv" / "manifest.json").read_bytes()
    for argv in ([], ["--checkpoint", str(_miniature())]):
        assert cli.main(["calibrate", str(recipe), "--threads", "1", *argv]) == 1
        said = capsys.readouterr().err
        assert "expected a folder of your own, got " in said
        assert f"`cp -rL {_miniature()} calibrated`, and pass --checkpoint calibrated." in said
    assert (_miniature() / "retrv" / "manifest.json").read_bytes() == shipped
    cache = tmp_path / "cache"
    monkeypatch.setattr(grpo_commands, "checkpoint_folder", lambda name: cache)
    with pytest.raises(OptionsError, match="expected a folder of your own"):
        grpo_commands.own_folder(None, "someone/on-the-hub")
    cache.mkdir()
    assert grpo_commands.own_folder(None, str(cache)) == grpo_commands.own_folder(cache, "miniature") == cache


def _miniature():
    return Path(checkpoint_path(Config()))


def measured(margin, direct, thought=True):
    return Measured("coarse" if margin > 5 else "fine", margin, direct, thought)


def test_the_margin_skips_as_much_as_the_cost_allows():
    rows = [measured(m, direct=m > 3) for m in range(1, 11)]
    assert calibrate(rows, 0.0).margin == 4.0, "the smallest margin above every wrong direct read"
    found = calibrate(rows, 0.1)
    assert found.margin == 3.0, "one wrong answer in ten is allowed"
    assert found.skipped == {"all": 0.8, "coarse": 1.0, "fine": pytest.approx(3 / 5)}
    assert (found.recall_auto, found.recall_always, found.recall_never) == pytest.approx((0.9, 1.0, 0.7))


def test_a_direct_read_that_is_never_right_is_never_used():
    found = calibrate([measured(m, direct=False) for m in range(10)], 0.0)
    assert found.margin > 9
    assert np.isfinite(found.margin), "JSON knows no infinity"
    assert found.skipped["all"] == 0


def test_a_direct_read_as_good_as_the_thought_decides_alone():
    assert calibrate([measured(m, direct=True) for m in range(10)], 0.0).margin == 0.0


def test_none_is_called_as_often_as_the_answerable_lists_allow():
    """Skipped thoughts count by their direct read, the others by their own."""
    rows = [Measured("x", 9.0, True, True, n >= 4, direct_none=float(-n), thought_none=99.0) for n in range(10)]
    assert calibrate(rows, 0.0, max_false_none=0.0).none == NoneThreshold(-3.0, 0.0, 1.0, 0.0, 0.0, 4)
    mixed = [replace(row, direct_none=row.direct_none + 6 * (n == 9)) for n, row in enumerate(rows)]
    strict, loose = (calibrate(mixed, 0.0, max_false_none=share).none for share in (0.0, 0.2))
    assert (strict.margin, strict.false, strict.found) == (-2.0, 0.0, 0.75)
    assert (loose.margin, loose.false, loose.found) == (-3.0, pytest.approx(1 / 6), 1.0)
    assert calibrate([replace(row, answerable=True) for row in rows], 0.0).none is None


def test_nothing_to_calibrate_on_is_an_error():
    with pytest.raises(InputError, match="expected validation queries"):
        calibrate([], 0.0)


@pytest.mark.parametrize("name", ["miniature-grpo", "grpo-7b"])
def test_shipped_recipe_loads(name):
    recipe = load(GrpoRecipe, cli.RECIPES / f"{name}.yaml")
    assert recipe.grpo.group_size == 8
    assert recipe.data.top_k == 20
