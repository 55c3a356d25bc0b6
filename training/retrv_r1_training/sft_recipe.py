"""The recipe of `retrv-r1-train sft` as frozen values. Defaults are ours unless a docstring says whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_training.checks import check_ranges
from retrv_r1_training.data_config import DataConfig
from retrv_r1_training.ranknet import FACTOR
from retrv_r1_training.sft import SftLoss


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """LamRA's sizes (its code, as the closest open system); the paper says LoRA and no number."""

    rank: int = 128
    alpha: int = 256

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": "rank alpha"})


@dataclass(frozen=True, slots=True)
class ExampleSettings:
    """direct_share: of the training examples, also teach the direct read (all validation examples do)

    spread: share of the training examples under labels drawn from all 127: where the same K stand in every list, copying one
        earns nothing, and the direct read of the miniature stayed at chance (docs/experiments.md)
    """

    direct_share: float = 1.0
    spread: float = 0.2

    def __post_init__(self) -> None:
        check_ranges(self, {"a share, 0 to 1": "direct_share spread"})


@dataclass(frozen=True, slots=True)
class Optimisation:
    """steps: optimiser steps; batch_size: examples per step over all GPUs; per_device: of them at once on one GPU (the rest is
    accumulated); warmup: share of the steps
    """

    steps: int
    batch_size: int
    per_device: int = 1
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "1 or more": "steps batch_size per_device",
                "0 or more": "lr weight_decay",
                "a share, 0 to 1": "warmup",
                "more than 0": "max_grad_norm",
            },
        )


@dataclass(frozen=True, slots=True)
class Running:
    """deepspeed: ZeRO stage, None = one process or DDP; every: steps between log lines; save, evaluate: between those,
        0 = only at the end; keep: last states

    report_to: passed on to transformers ("tensorboard", "wandb", ...); RUN/log.jsonl is always written
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    deepspeed: Literal["zero2", "zero3"] | None = None
    checkpointing: bool = True
    every: int = 10
    save: int = 200
    evaluate: int = 200
    keep: int = 2
    report_to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": "every keep", "0 or more": "save evaluate"})


@dataclass(frozen=True, slots=True)
class Hardware:
    """For `retrv-r1-train estimate` only. tflops, bandwidth: of one GPU by its data sheet (dense at `dtype`, TB/s of its memory;
    the defaults are an H100 SXM's); use: the share of both that is reached
    """

    gpus: int = 8
    gpu_gb: float = 80.0
    tflops: float = 989.0
    bandwidth: float = 3.35
    use: float = 0.3

    def __post_init__(self) -> None:
        check_ranges(
            self, {"1 or more": "gpus", "more than 0": "gpu_gb tflops bandwidth use", "a share, 0 to 1": "use"}
        )


@dataclass(frozen=True, slots=True)
class SftRecipe:
    """checkpoint: where to start, a Retrv-R1 checkpoint after `align`, or "miniature"

    backbone: sizes for the estimate while `checkpoint` does not exist yet; length, thought: tokens, for the estimate
    """

    checkpoint: str
    data: DataConfig
    optim: Optimisation
    stage: Literal["sft", "distill"] = "sft"
    seed: int = 0
    tune: Literal["lora", "full"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    loss: SftLoss = field(default_factory=SftLoss)
    run: Running = field(default_factory=Running)
    hardware: Hardware = field(default_factory=Hardware)
    backbone: str = ""
    length: int = 2048
    thought: int = 600

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": "length thought"})
        if self.stage == "distill":
            raise OptionsError(
                explain("stage", expected="'sft'", got="'distill'", fix="Call `retrv-r1-train distill`.")
            )


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the model thinks while it teaches itself, greedily; queries: at most, evenly over the training parts, 0 = all

    right_only: leave out thoughts that ended in a wrong answer
    """

    max_inspections: int = 4
    max_new_tokens: int = 512
    queries: int = 0
    right_only: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, {"0 or more": "max_inspections queries", "1 or more": "max_new_tokens"})


@dataclass(frozen=True, slots=True)
class DistillRecipe(SftRecipe):
    """checkpoint: one after `grpo` (or `sft`). The loss is that of `sft` on the model's own thoughts, with weighted RankNet on the
    direct read; FIRST's factor.
    """

    stage: Literal["sft", "distill"] = "distill"
    thinking: Thinking = field(default_factory=Thinking)
    loss: SftLoss = field(default_factory=lambda: SftLoss(answer=0.0, direct=1.0, relation=0.0, ranknet=FACTOR))

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": "length thought"})
        if self.loss.relation:
            fix = "Set loss.relation to 0."
            raise OptionsError(
                explain("loss.relation", expected="0 in distill: a thought need not name every candidate",
                        got=self.loss.relation, fix=fix)
            )  # fmt: skip


def accumulation(optim: Optimisation, world: int) -> int:
    """Micro-batches per optimiser step, so that the trajectory does not depend on the number of GPUs. Raises `OptionsError` if they do
    not come out even.
    """
    steps, rest = divmod(optim.batch_size, optim.per_device * world)
    if rest or not steps:
        raise OptionsError(
            explain("optim.batch_size", expected=f"a multiple of per_device x processes = {optim.per_device} x {world}",
                    got=optim.batch_size,
                    fix="Change batch_size, per_device or the number of processes (of `estimate`: hardware.gpus).")
        )  # fmt: skip
    return steps
