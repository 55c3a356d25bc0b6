"""The arithmetic of `estimate` holds against known sizes and against itself."""

from __future__ import annotations

import pytest
from retrv_r1_training.cli import RECIPES, main
from retrv_r1_training.estimate import estimate, size_of
from retrv_r1_training.overrides import load
from retrv_r1_training.sft_recipe import SftRecipe

from retrv_r1_retriever.errors import OptionsError


def recipe(name, *sets):
    return load(SftRecipe, RECIPES / f"{name}.yaml", sets)


@pytest.mark.parametrize(("name", "parameters"), [("sft-3b", 3_754_622_976), ("sft-7b", 8_292_166_656)])
def test_backbones_have_their_released_size(name, parameters):
    size = size_of(recipe(name))
    assert size.total - size.module == parameters


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", ["sft-3b", "sft-7b"])
def test_lora_recipes_fit_one_gpu_and_eight(name, gpus):
    result = estimate(recipe(name, f"hardware.gpus={gpus}"))
    assert result.total_gb < 80
    assert result.gpu_hours > 1


def test_zero_shards_what_it_says():
    def parts(stage, gpus):
        return estimate(recipe("sft-7b-full", f"run.deepspeed={stage}", f"hardware.gpus={gpus}")).gb

    two, three = parts("zero2", 8), parts("zero3", 8)
    assert three["weights"] == pytest.approx(two["weights"] / 8)
    assert three["optimiser"] == two["optimiser"] == pytest.approx(parts("zero3", 1)["optimiser"] / 8)
    assert estimate(recipe("sft-7b-full", "hardware.gpus=1")).total_gb > 80, "the whole 7B does not fit one GPU"


def test_checkpointing_trades_memory_for_time():
    on, off = (estimate(recipe("sft-7b", f"run.checkpointing={value}")) for value in ("true", "false"))
    assert on.gb["activations"] < off.gb["activations"] / 5
    assert on.gpu_hours == pytest.approx(off.gpu_hours * 6 / 4)


def test_command_prints_parts_and_assumptions(capsys):
    assert main(["estimate", str(RECIPES / "sft-7b-full.yaml"), "--set", "hardware.gpus=1"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT 80 GB" in out
    assert "GPU-hours" in out
    assert "assumed, not measured" in out


def test_an_unknown_backbone_is_named():
    with pytest.raises(OptionsError, match=r"expected one of Qwen2\.5-VL-3B, Qwen2\.5-VL-7B .*got Qwen9"):
        size_of(recipe("sft-7b", "backbone=Qwen9"))
