"""A run's folder: one run at a time, one recipe, whole states, and a checkpoint that says that the run is finished."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from retrv_r1_training import inputs, run_folder
from retrv_r1_training.cli import RECIPES
from retrv_r1_training.estimate import only_estimated
from retrv_r1_training.overrides import load
from retrv_r1_training.run_folder import finish, last_state, locked, open_run
from retrv_r1_training.sft_recipe import SftRecipe
from retrv_r1_training.stage_recipe import BaseRecipe

from retrv_r1_retriever.errors import OptionsError, RetrvR1Error
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


@pytest.mark.parametrize("result", ["checkpoint-1/x", "states/checkpoint-1/x", "start/x", "thoughts-train.jsonl"])
def test_a_folder_with_results_keeps_its_recipe(recipe, tmp_path, result):
    other = replace(recipe, seed=1)
    for one in (recipe, other, recipe):
        with open_run(one, tmp_path):
            assert load(SftRecipe, tmp_path / "recipe.yaml") == one, "nothing was made of the one before"
    file = tmp_path / result
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    message = "expected the recipe this folder was started with, got another one: seed was 0, is 1"
    with pytest.raises(OptionsError, match=message), open_run(other, tmp_path):
        pass
    with open_run(recipe, tmp_path) as unfinished:
        assert unfinished


def test_a_recipe_of_ones_own_in_the_folder_is_not_written_over(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    own = (RECIPES / "sft-7b.yaml").read_text()
    for text in (own, "x: 1\n", "x: [\n"):
        file.write_text(text)
        message = r"recipe\.yaml: expected none, or the resolved recipe that this stage keeps there, got another file"
        with pytest.raises(OptionsError, match=message), open_run(recipe, tmp_path):
            pass
        assert file.read_text() == text
        assert not (tmp_path / "inputs.yaml").exists()
    file.unlink()
    for one in (recipe, load(SftRecipe, RECIPES / "sft-7b.yaml", ["checkpoint=miniature", "seed=2"])):
        with open_run(one, tmp_path):
            assert load(SftRecipe, file) == one, "the resolved one is written anew"


def test_what_only_the_estimate_reads_does_not_stop_a_resume(recipe, tmp_path):
    with open_run(recipe, tmp_path):
        state(tmp_path, 1)
    other = replace(recipe, hardware=replace(recipe.hardware, gpus=1), length=9, thought=3, backbone="Qwen2.5-VL-3B")
    with open_run(other, tmp_path) as unfinished:
        assert unfinished
    sized = load(BaseRecipe, RECIPES / "base.yaml")
    assert "backbone" not in only_estimated(sized), "it is what `base` makes"


def test_a_changed_table_of_instructions_is_noticed(recipe, tmp_path):
    table = tmp_path / "data" / "instructions" / "query_instructions.tsv"
    table.parent.mkdir(parents=True)
    table.write_text("head\ntext\timage\tshop\t90\tFind it.\n")
    recipe = replace(recipe, data=replace(recipe.data, root=str(tmp_path / "data")))
    with open_run(recipe, tmp_path / "run"):
        state(tmp_path / "run", 1)
    table.write_text("head\ntext\timage\tshop\t90\tLook for it.\n")
    with pytest.raises(OptionsError, match=r"query_instructions\.tsv was 33 bytes"), open_run(recipe, tmp_path / "run"):
        pass


def test_a_fingerprint_sees_what_is_cut_added_or_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_PIECES", 8)
    monkeypatch.setattr(inputs, "_PIECE", 16)
    lines = [b"line %d\n" % n for n in range(1000)]
    known = set()
    for made in (lines, lines[:-1], lines[1:] + lines[:1], [*lines, lines[0]], [], lines[:2], [b"Line 0\n", lines[1]]):
        (tmp_path / "file").write_bytes(b"".join(made))
        known.add(inputs.fingerprint(tmp_path / "file"))
    assert len(known) == 7
    assert inputs.fingerprint(tmp_path / "none") == "no file"


def test_a_second_run_is_refused_until_the_first_is_gone(recipe, tmp_path):
    with open_run(recipe, tmp_path):
        message = f"expected no other run at work here, got process {os.getpid()} on "
        with pytest.raises(RetrvR1Error, match=message), open_run(recipe, tmp_path):
            pass
    with pytest.raises(KeyboardInterrupt), open_run(recipe, tmp_path):
        raise KeyboardInterrupt
    with open_run(recipe, tmp_path):
        pass


def test_a_kill_leaves_no_lock_behind(tmp_path):
    code = f"from retrv_r1_training.run_folder import *\nwith locked(Path({str(tmp_path)!r})):\n print('in', flush=True)\n input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(RetrvR1Error, match=f"process {other.pid} on"), locked(tmp_path):
            pass
        with locked(tmp_path, ".another.lock"):
            pass
        other.kill()
    with locked(tmp_path):
        pass


def test_only_the_first_process_of_a_launch_holds_the_lock(recipe, tmp_path, monkeypatch):
    with open_run(recipe, tmp_path):
        monkeypatch.setenv("RANK", "1")
        with open_run(recipe, tmp_path) as unfinished:
            assert unfinished


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder, "FolderLock", unsupported)
    with locked(tmp_path):
        assert "cannot be locked ([Errno 38] Function not implemented): start no other run there" in caplog.text
