"""What a GRPO run is told; free of TRL, so that recipes can be read without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_training.checks import check_ranges
from retrv_r1_training.data_config import DataConfig
from retrv_r1_training.processes import world
from retrv_r1_training.sft_recipe import Hardware


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """batch_size: prompts per update over all GPUs, `group_size` thoughts each, scored `micro_batch` at a time on one GPU

    beta: weight of the KL term; iterations: updates per rollout; penalty: lambda, "progress" or a fixed number
    std_floor: added to a group's standard deviation, which the advantage is divided by; 0 = as `scale_rewards` says. Divided by the
        deviation alone, one opened candidate in a group of right answers weighs as much as being right, whatever lambda is
    lora_rank: 0 trains all weights of the language model
    dtype: None = bfloat16 on a GPU, float32 on the CPU; deepspeed: None = one process or DDP
    evaluate_every, save_every: updates; 0 = only at the end. The last two states are kept. missing: see `tasks_of`
    """

    steps: int
    lr: float
    batch_size: int
    group_size: int
    beta: float
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"]
    temperature: float
    penalty: str | float = "progress"
    format_weight: float = 0.2
    scale_rewards: Literal["group", "batch", "none"] = "group"
    std_floor: float = 0.0
    epsilon: float = 0.2
    iterations: int = 1
    micro_batch: int = 16
    max_inspections: int = 4
    max_new_tokens: int = 512
    lora_rank: int = 0
    warmup: int = 5
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    missing: Literal["none", "drop"] = "none"
    evaluate_every: int = 0
    save_every: int = 60  # a multiple of up to 6 iterations
    report_to: tuple[str, ...] = ("tensorboard",)
    dtype: Literal["bfloat16", "float32"] | None = None
    deepspeed: Literal["zero2"] | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "0 or more": "steps lr beta format_weight std_floor max_inspections lora_rank warmup evaluate_every save_every",
                "1 or more": "batch_size iterations micro_batch max_new_tokens",
                "2 or more": "group_size",
                "more than 0": "temperature epsilon max_grad_norm",
            },
        )
        self.check_world(world())
        if self.std_floor and self.scale_rewards != "group":
            got = f"scale_rewards {self.scale_rewards!r} beside std_floor {self.std_floor}"
            fix = "Set std_floor to 0, or leave scale_rewards out."
            raise OptionsError(explain("std_floor", expected="a group's own deviation", got=got, fix=fix))
        if self.save_every % self.iterations:
            fix = "Make it one, or a resumed run would differ from an uninterrupted one."
            raise OptionsError(explain("save_every", expected="a multiple of iterations", got=self.save_every, fix=fix))
        if self.penalty != "progress" and not (isinstance(self.penalty, int | float) and 0 <= self.penalty <= 1):
            expected = '"progress" or a number, 0 to 1'
            raise OptionsError(explain("penalty", expected=expected, got=repr(self.penalty), fix="Fix the recipe."))

    def check_world(self, world: int) -> None:
        """Raises `OptionsError` if so many processes cannot share the batch evenly."""
        if self.batch_size * self.group_size % (self.micro_batch * world):
            got = f"{self.batch_size} * {self.group_size} over {self.micro_batch} * {world} ranks"
            fix = "Change micro_batch."
            raise OptionsError(explain("batch_size * group_size", expected="whole micro-batches", got=got, fix=fix))
        if self.std_floor and self.batch_size % world:
            got = f"{self.batch_size} over {world} ranks"
            fix = "Change batch_size, or set std_floor to 0."
            raise OptionsError(explain("batch_size", expected="whole groups on each GPU", got=got, fix=fix))


@dataclass(frozen=True, slots=True)
class GrpoRecipe:
    """checkpoint: "miniature" or a folder, after SFT

    hard: a file of `passrate`; only its queries with a pass rate strictly between 0 and 1 are trained on
    shuffle: share of the training lists in random order; 0 = as served
    hardware, backbone, length, thought: for the estimate, as in `SftRecipe`
    """

    checkpoint: str
    data: DataConfig
    grpo: GrpoConfig
    stage: Literal["grpo"] = "grpo"
    seed: int = 0
    hard: str | None = None
    shuffle: float = 0.0
    hardware: Hardware = field(default_factory=Hardware)
    backbone: str = ""
    length: int = 2048
    thought: int = 600

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": "length thought", "a share, 0 to 1": "shuffle"})
        # in a recipe of the miniature 0 leaves the stage out; here it would leave nothing
        check_ranges(self.grpo, {"1 or more": "steps"})
