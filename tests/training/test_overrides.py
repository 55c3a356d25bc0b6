"""Recipes: overrides, types, unknown keys, and the resolved recipe that reads back."""

from __future__ import annotations

import pytest
from retrv_r1_training.cli import RECIPES
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.overrides import dump, load, override, read_yaml, same_as_before
from retrv_r1_training.sft_recipe import SftRecipe

from retrv_r1_retriever.errors import OptionsError

SFT_RECIPES = ("sft-3b", "sft-7b", "sft-7b-full")
BASE = RECIPES / "sft-7b.yaml"


def test_recipes_of_one_pipeline_read_one_folder_and_grpo_keeps_inspecting():
    recipes = {file.stem: read_yaml(file) for file in RECIPES.glob("*.yaml")}
    roots = {name: made["data"]["root"] for name, made in recipes.items() if "data" in made and "miniature" not in name}
    assert len(roots) == 12
    assert set(roots.values()) == {"data"}
    floors = [
        made["grpo"]["std_floor"] for made in (*recipes.values(), recipes["miniature"]["stages"]) if "grpo" in made
    ]
    assert floors == [0.15] * 4


@pytest.mark.parametrize("name", SFT_RECIPES)
def test_shipped_recipes_read_back_what_they_resolve_to(name, tmp_path):
    recipe = load(SftRecipe, RECIPES / f"{name}.yaml")
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    assert load(SftRecipe, tmp_path / "resolved.yaml") == recipe


def test_overrides_are_typed_and_the_last_wins():
    sets = ["optim.lr=1e-5", "optim.lr=3e-6", "run.deepspeed=null", "run.report_to=[a, b]", "loss.ranknet=10"]
    sets += ["data.train=[{queries: q.jsonl, pool: p.jsonl}]"]
    recipe = load(SftRecipe, BASE, sets)
    assert recipe.optim.lr == 3e-6
    assert recipe.run.deepspeed is None
    assert recipe.run.report_to == ("a", "b")
    assert [(part.queries, part.pool) for part in recipe.data.train] == [("q.jsonl", "p.jsonl")]
    assert recipe.loss.ranknet == 10
    assert recipe.examples == load(SftRecipe, BASE).examples


def test_an_override_leaves_the_callers_data_alone():
    data = {"optim": {"lr": 1}}
    assert override(data, ["optim.lr=2", "new.key=3"]) == {"optim": {"lr": 2}, "new": {"key": 3}}
    assert data == {"optim": {"lr": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr=1", r"optim: expected keys \[.*'lr'.*, got lrr"),
        ("sed=1", "got sed"),
        ("optim.lr=fast", r"optim: lr: expected float, got 'fast'"),
        ("optim.steps=1.5", "steps: expected int, got 1.5"),
        ("run.deepspeed=zero9", "deepspeed: expected .*zero3.*, got 'zero9'"),
        ("run.checkpointing=1", "checkpointing: expected bool, got 1"),
        ("optim=3", "optim: expected keys and values, got 3"),
        ("optim.lr.x=3", "expected keys below lr, got"),
        ("optim.lr", "expected key=value, got 'optim.lr'"),
        ("optim.lr=[1", r"--set optim.lr: expected YAML, got '\[1'"),
    ],
)
def test_a_wrong_override_is_named(text, message):
    with pytest.raises(OptionsError, match=message):
        load(SftRecipe, BASE, [text])


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        (SftRecipe, "sft-7b", "optim.lr=-1", "optim: lr: expected 0 or more, got -1"),
        (SftRecipe, "sft-7b", "optim.lr=.nan", "optim: lr: expected 0 or more, got nan"),
        (SftRecipe, "sft-7b", "optim.warmup=7", "optim: warmup: expected a share, 0 to 1, got 7"),
        (SftRecipe, "sft-7b", "optim.steps=0", "optim: steps: expected 1 or more"),
        (SftRecipe, "sft-7b", "lora.rank=0", "lora: rank: expected 1 or more"),
        (SftRecipe, "sft-7b", "examples.spread=5", "examples: spread: expected a share"),
        (SftRecipe, "sft-7b", "loss.direct=-1", "loss: direct: expected 0 or more"),
        (SftRecipe, "sft-7b", "loss.tokens={mark: -1}", "loss: tokens: mark: expected 0 or more"),
        (SftRecipe, "sft-7b", "hardware.gpus=0", "hardware: gpus: expected 1 or more"),
        (SftRecipe, "sft-7b", "stage=distill", "stage: expected 'sft'"),
        (SftRecipe, "sft-7b", "data.train=[{queries: a}]", r"train\[0\]: expected a value for pool, got none"),
        (GrpoRecipe, "grpo-7b", "grpo.temperature=0", "grpo: temperature: expected more than 0"),
        (GrpoRecipe, "grpo-7b", "grpo.group_size=1", "grpo: group_size: expected 2 or more"),
        (GrpoRecipe, "grpo-7b", "grpo.micro_batch=0", "grpo: micro_batch: expected 1 or more"),
        (GrpoRecipe, "grpo-7b", "grpo.penalty=-3", "grpo: penalty: expected .progress. or a number, 0 to 1, got -3"),
        (GrpoRecipe, "grpo-7b", "grpo.loss_type=foo", "loss_type: expected Literal.*got 'foo'"),
        (GrpoRecipe, "grpo-7b", "grpo.missing=foo", "missing: expected Literal.*got 'foo'"),
    ],
)
def test_a_value_out_of_its_range_is_named(kind, name, text, message):
    with pytest.raises(OptionsError, match=message):
        load(kind, RECIPES / f"{name}.yaml", [text])


def test_missing_recipe_is_a_clear_error(tmp_path):
    with pytest.raises(OptionsError, match="expected a recipe, got no such file"):
        load(SftRecipe, tmp_path / "none.yaml")


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 1\nstages:\n  align: {steps: 1}\n  align: {steps: 2}\n")
    with pytest.raises(OptionsError, match="expected YAML, got 'align' a second time"):
        read_yaml(file)


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "seed: 1\n? {a: b}\n: 1\n"])
def test_a_key_that_is_no_text_is_an_error(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(OptionsError, match=r"expected YAML, got a (sequence|mapping) for a key"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("3: 1\nsed: 2\n")
    with pytest.raises(OptionsError, match=r"expected keys .*, got 3"):
        load(SftRecipe, tmp_path / "recipe.yaml")


def test_keys_set_aside_may_differ(tmp_path):
    file = tmp_path / "recipe.yaml"
    before = "hardware: {gpus: 1}\nlength: 3\nseed: 1\n"
    file.write_text(before)
    same_as_before(file, "hardware: {gpus: 8}\nseed: 1\n", "this", "Fix it.", ("hardware", "length"))
    assert file.read_text() == before
    with pytest.raises(OptionsError, match=r"another one: seed was 1, is 2\. Fix"):
        same_as_before(file, "hardware: {gpus: 8}\nseed: 2\n", "this", "Fix it.", ("hardware", "length"))


def test_what_differs_from_before_is_named(tmp_path):
    file = tmp_path / "new" / "recipe.yaml"
    same_as_before(file, "a: {b: [1, {c: 2}]}\nd: 1\n", "this", "Fix it.")
    same_as_before(file, "a: {b: [1, {c: 2}]}\nd: 1\n", "this", "Fix it.")
    with pytest.raises(
        OptionsError, match=r"expected this, got another one: a\.b\.1\.c was 2, is 3; d was 1, is absent\. Fix"
    ):
        same_as_before(file, "a: {b: [1, {c: 3}]}\n", "this", "Fix it.")
    with pytest.raises(OptionsError, match=r"3 was absent, is 3; and 3 more"):
        same_as_before(file, "a: {b: [1, {c: 2}]}\nd: {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}\n", "this", "Fix it.")
    file.write_text("a: {")
    with pytest.raises(OptionsError, match="another one: it cannot be read"):
        same_as_before(file, "a: 1\n", "this", "Fix it.")
