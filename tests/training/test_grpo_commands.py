"""`grpo`, `passrate` and `calibrate` through the command line, on a shrunken catalogue and the shipped miniature."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("trl")

from retrv_r1_training import cli
from retrv_r1_training.calibrate import Measured, calibrate
from retrv_r1_training.grpo_commands import load_grpo_recipe

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.model.checkpoint import load_checkpoint, read_manifest

SHIPPED = cli.RECIPES / "miniature-grpo.yaml"
FEW = catalogue.combos("val")[:24]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The shipped recipe over twelve queries a split."""
    patch = pytest.MonkeyPatch()
    small = {n: catalogue.Split(n, "val", s.seed, 2) for n, s in catalogue.SPLITS.items()}
    patch.setattr(catalogue, "SPLITS", small)
    patch.setattr(catalogue, "combos", lambda part: FEW)
    folder = tmp_path_factory.mktemp("grpo")
    root = catalogue.write_catalogue(folder / "data", ("train0", "val"))
    patch.undo()
    text = (
        SHIPPED.read_text()
        .replace("runs/miniature/catalogue", str(root))
        .replace("max_new_tokens: 160", "max_new_tokens: 90")
    )
    file = folder / "recipe.yaml"
    file.write_text(text.replace("batch_size: 8", "batch_size: 2").replace("micro_batch: 16", "micro_batch: 8"))
    return file


def test_grpo_leaves_a_checkpoint_with_the_same_memory(recipe, capsys):
    run = recipe.parent / "run"
    assert cli.main(["grpo", str(recipe), "--run", str(run), "--steps", "2", "--threads", "1"]) == 0
    before, after = read_manifest(_miniature()), load_checkpoint(run / "checkpoint", device="cpu").manifest
    assert after.memory_digest == before.memory_digest
    assert after.checkpoint_digest != before.checkpoint_digest
    assert after.embedder_digest == before.embedder_digest
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["lambda"] for row in rows] == [0.0, 0.5]
    assert {"groups_equal", "inspections", "correct", "format"} <= set(rows[0])
    assert {"val_R@1_all", "val_R@1_coarse", "val_opened_fine"} <= set(rows[-1])
    assert cli.main(["grpo", str(recipe), "--run", str(run), "--steps", "3", "--threads", "1"]) == 1
    assert "the recipe this folder was started with" in capsys.readouterr().err


def test_passrate_names_the_solvable_hard_queries(recipe, capsys):
    out = recipe.parent / "rates.jsonl"
    argv = ["passrate", str(recipe), "--samples", "3", "--limit", "5", "--threads", "1", "--out", str(out)]
    assert cli.main(argv) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert row["pass_rate"] == row["solved"] / 3
        assert row["hard"] == (0 < row["solved"] < 3)
    out.write_text("".join(json.dumps(r | {"hard": False}) + "\n" for r in rows))
    file = recipe.parent / "hard.yaml"
    file.write_text(recipe.read_text().replace("top_k: 20", f"top_k: 20, hard: {out}"))
    assert cli.main(["grpo", str(file), "--run", str(recipe.parent / "no"), "--threads", "1"]) == 1
    assert "none of 0 hard ids among 12 lists" in capsys.readouterr().err


def test_calibrate_writes_the_margin_and_no_digest_changes(recipe):
    folder = recipe.parent / "calibrated"
    shutil.copytree(_miniature(), folder)
    before = read_manifest(folder)
    assert cli.main(["calibrate", str(recipe), "--checkpoint", str(folder), "--threads", "1"]) == 0
    after = read_manifest(folder)
    assert after.think_margin is not None
    assert after.checkpoint_digest == before.checkpoint_digest
    assert load_checkpoint(folder, device="cpu").manifest.think_margin == after.think_margin


def _miniature():
    from pathlib import Path

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


def test_nothing_to_calibrate_on_is_an_error():
    with pytest.raises(InputError, match="expected validation queries"):
        calibrate([], 0.0)


def test_shipped_recipe_loads():
    assert load_grpo_recipe(SHIPPED).grpo.group_size == 8
