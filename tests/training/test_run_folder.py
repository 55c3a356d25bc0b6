"""A run's folder: whole states, and a checkpoint that says that the run is finished."""

from __future__ import annotations

import pytest
from retrv_r1_training.cli import RECIPES
from retrv_r1_training.overrides import load
from retrv_r1_training.run_folder import finish, last_state, open_run
from retrv_r1_training.sft_recipe import SftRecipe

from retrv_r1_retriever.errors import OptionsError
from retrv_r1_retriever.model.checkpoint import Manifest


@pytest.fixture
def recipe():
    return load(SftRecipe, RECIPES / "sft-7b.yaml", ["checkpoint=miniature"])


def written(folder):
    (folder / "retrv").mkdir(parents=True)
    (folder / "retrv" / "manifest.json").write_text("{}")
    return Manifest("x")


def state(run, number, text='{"global_step": 1}'):
    folder = run / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "trainer_state.json").write_text(text)
    return str(folder)


def test_the_last_whole_state_is_gone_on_from(tmp_path, caplog):
    assert last_state(tmp_path / "nowhere") is None
    whole = state(tmp_path, 9)
    state(tmp_path, 10, None)
    state(tmp_path, 11, '{"global_st')
    state(tmp_path, "best")
    with caplog.at_level("INFO"):
        assert last_state(tmp_path) == whole
    said = [record.getMessage() for record in caplog.records]
    assert ["checkpoint-11 is not whole" in said[0], "checkpoint-10 is not whole" in said[1]] == [True, True]
    assert said[2] == f"going on from {whole}"


def test_no_whole_state_is_the_beginning_and_is_said(tmp_path, caplog):
    state(tmp_path, 10, None)
    assert last_state(tmp_path) is None
    assert "starting from the beginning" in caplog.text


def test_a_run_is_finished_when_its_checkpoint_is_in_place(recipe, tmp_path, caplog):
    run, out = tmp_path / "run", tmp_path / "run" / "checkpoint"
    with open_run(recipe, run) as unfinished:
        assert unfinished

    def killed(folder):
        written(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(out, killed)
    with open_run(recipe, run) as unfinished:
        assert unfinished, "a checkpoint that was being written is none"
    finish(out, written)
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint"]
    with caplog.at_level("INFO"), open_run(recipe, run) as unfinished:
        assert not unfinished
    assert f"{run} is finished, its checkpoint is {out}: nothing is done" in caplog.text


def test_a_checkpoint_that_is_not_this_runs_is_neither_finished_nor_overwritten(recipe, tmp_path):
    run, out = tmp_path / "run", tmp_path / "model"
    written(out)
    with (
        pytest.raises(OptionsError, match=r"model: expected nothing yet, or this run's checkpoint"),
        open_run(recipe, run, out),
    ):
        pass
    state(run / "states", 2)
    with open_run(recipe, run, out) as unfinished:
        assert not unfinished
    (run / "checkpoint").mkdir()
    with pytest.raises(OptionsError, match="got something else"), open_run(recipe, run):
        pass
