"""The arithmetic of `estimate` holds against known sizes and against itself, for every stage; docs/training.md quotes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from retrv_r1_training.cli import RECIPES, main
from retrv_r1_training.estimate import estimate
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.overrides import load
from retrv_r1_training.sft_command import load_any
from retrv_r1_training.sizes import size_of

from retrv_r1_retriever.errors import OptionsError

STAGES = ("embedder", "align", "sft", "grpo", "distill")
SIZES = ("3b", "7b")
PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def recipe(name, *sets):
    return load_any(RECIPES / f"{name}.yaml", sets)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("backbone", "parameters"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_backbones_have_their_released_size(stage, backbone, parameters):
    size = size_of(recipe(f"{stage}-{backbone}"))
    assert size.total - size.module == parameters
    assert size.tower == pytest.approx(0.67e9, rel=0.02)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("backbone", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_recipes_fit_one_gpu_and_eight_and_the_page_says_what_they_cost(stage, backbone, gpus):
    result = estimate(recipe(f"{stage}-{backbone}", f"hardware.gpus={gpus}"))
    assert result.fits
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{stage}-{backbone}.yaml`"))
    _, one, eight, hours, hours_of_eight = (cell.strip() for cell in row.strip("|").split("|"))
    assert f"{max(result.total_gb, result.job.before):.0f}" == {1: one, 8: eight}[gpus]
    assert f"{result.gpu_hours:.0f}" == {1: hours, 8: hours_of_eight}[gpus]


@pytest.mark.parametrize(
    ("name", "sets", "message"),
    [
        (
            "sft-7b",
            ["optim.batch_size=4", "optim.per_device=3", "hardware.gpus=1"],
            "per_device x processes = 3 x 1, got 4",
        ),
        ("sft-7b", ["optim.batch_size=4", "hardware.gpus=7"], "per_device x processes = 1 x 7, got 4"),
        ("distill-7b", ["hardware.gpus=7"], "per_device x processes = 1 x 7, got 64"),
        ("align-7b", ["hardware.gpus=7"], "x 7, got 64"),
        ("embedder-7b", ["hardware.gpus=7"], "per_device x processes = 137 x 7, got 960"),
        ("embedder-7b", ["hardware.gpus=961"], "per_device: expected 1 or more, got 0"),
        ("grpo-7b", ["hardware.gpus=128"], "expected whole micro-batches, got 8 [*] 8 over 2 [*] 128 ranks"),
        ("grpo-7b", ["hardware.gpus=16"], "expected whole groups on each GPU, got 8 over 16 ranks"),
        *(
            (f"{stage}-7b", [f"{key}=-5000"], f"{key}: expected 1 or more, got -5000")
            for stage in STAGES
            for key in ("length", "thought")
            if key == "length" or stage in ("sft", "grpo", "distill")
        ),
        ("embedder-7b", ["hard_negatives=-1"], "hard_negatives: expected 0 or more"),
        ("align-7b", ["tokens=0"], "tokens: expected 1 or more"),
        ("base", ["max_text_tokens=-3"], "max_text_tokens: expected 1 or more"),
        ("base", ["backbone.heads=0"], "backbone: heads: expected 1 or more"),
        ("grpo-7b", ["grpo.steps=0"], "steps: expected 1 or more, got 0"),
    ],
)
def test_what_the_stage_would_refuse_is_not_estimated(name, sets, message):
    with pytest.raises(OptionsError, match=message):
        estimate(recipe(name, *sets))


def test_rollouts_of_more_gpus_cost_more_hours_never_none():
    """`std_floor` aside, which wants whole groups on each GPU."""
    hours = [
        estimate(recipe("grpo-7b", "grpo.std_floor=0", "grpo.micro_batch=1", f"hardware.gpus={n}")).hours["rollouts"]
        for n in (1, 8, 64)
    ]
    assert 0 < hours[0] < hours[1] < hours[2]


def test_zero_shards_what_it_says():
    def parts(stage, gpus):
        return estimate(recipe("sft-7b-full", f"run.deepspeed={stage}", f"hardware.gpus={gpus}")).gb

    two, three = parts("zero2", 8), parts("zero3", 8)
    assert three["weights"] == pytest.approx(two["weights"] / 8)
    assert three["optimiser"] == two["optimiser"] == pytest.approx(parts("zero3", 1)["optimiser"] / 8)
    assert not estimate(recipe("sft-7b-full", "hardware.gpus=1")).fits, "the whole 7B does not fit one GPU"


@pytest.mark.parametrize(("name", "key"), [("sft-7b", "run.checkpointing"), ("grpo-7b", "grpo.gradient_checkpointing")])
def test_checkpointing_trades_memory_for_time(name, key):
    on, off = (estimate(recipe(name, f"{key}={value}")) for value in ("true", "false"))
    assert on.gb["activations"] < off.gb["activations"] / 5
    passes = 4 / 3 if name == "grpo-7b" else 3 / 2  # of the former, the reference is one more
    assert on.hours["training"] == pytest.approx(off.hours["training"] * passes)


def test_what_a_stage_does_besides_training_is_counted():
    grpo = estimate(recipe("grpo-7b"))
    slower = estimate(recipe("grpo-7b", "hardware.bandwidth=0.335"))
    assert slower.hours["rollouts"] > 2 * grpo.hours["rollouts"], "a step of decoding reads all weights"
    assert slower.hours["training"] == grpo.hours["training"]
    full = estimate(recipe("grpo-7b", "grpo.lora_rank=0"))
    assert full.gb["reference"] == pytest.approx(16.6, rel=0.01)
    assert "reference" not in grpo.gb, "an adapter's base is its reference"
    more = estimate(recipe("grpo-7b", "grpo.group_size=16"))
    assert more.gb["KV cache"] == pytest.approx(2 * grpo.gb["KV cache"])
    wide, narrow = (estimate(recipe("align-7b", f"data.top_k={k}")).hours["tower"] for k in (20, 10))
    assert wide == pytest.approx(2 * narrow)
    embedder = [estimate(recipe("embedder-7b", f"hardware.gpus={n}")).gb["pictures"] for n in (1, 8)]
    assert embedder[0] == pytest.approx(8 * embedder[1])
    thinking = [estimate(recipe("distill-7b", f"thinking.queries={n}")).hours["thinking"] for n in (1000, 2000)]
    assert thinking[1] == pytest.approx(2 * thinking[0], rel=1e-6)


@pytest.mark.parametrize("name", ["base", "sft-7b-full", "miniature-grpo"])
def test_command_prints_parts_and_assumptions(name, capsys):
    sets = ["hardware.gpus=1"] if name == "sft-7b-full" else []
    assert main(["estimate", str(RECIPES / f"{name}.yaml"), *(part for text in sets for part in ("--set", text))]) == 0
    out = capsys.readouterr().out
    assert ("DOES NOT FIT 80 GB" in out) == (name == "sft-7b-full")
    assert re.search(r"^GPU-hours:\n  \w", out, re.M)
    assert "assumed, not measured" in out
    assert f"stage {'sft' if name.startswith('sft') else 'base' if name == 'base' else 'grpo'}, " in out


def test_a_checkpoint_that_is_there_is_counted_itself(material):
    size = size_of(load_any(material / "recipe.yaml", []))
    assert size.layers == 2
    assert size.hidden == 64


def test_what_cannot_be_estimated_is_named(tmp_path, capsys):
    with pytest.raises(OptionsError, match=r"expected one of Qwen2\.5-VL-3B, Qwen2\.5-VL-7B .*got Qwen9"):
        size_of(recipe("sft-7b", "backbone=Qwen9"))
    (tmp_path / "x.yaml").write_text("steps: 3\n")
    assert main(["estimate", str(tmp_path / "x.yaml")]) == 1
    assert "expected stage: one of base, embedder, align, sft, grpo, distill, got none" in capsys.readouterr().err


def test_the_stage_may_be_named_in_every_recipe():
    for name in STAGES:
        assert recipe(f"{name}-7b", f"stage={name}").stage == name
    with pytest.raises(OptionsError, match="stage: expected Literal"):
        load(GrpoRecipe, RECIPES / "grpo-7b.yaml", ["stage=sft"])
